"""How good translations are: BLEU (Papineni et al., 2002), chrF (Popović, 2015), by sacreBLEU."""

import dataclasses
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

# Languages that are written without spaces are cut into characters, Chinese ones by a rule.
_TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "lo": "char", "my": "char"}


@dataclasses.dataclass(frozen=True)
class TranslationScores:
    """Scores of a corpus, from 0 to 100, and what sacreBLEU calls the way they were computed."""

    bleu: float
    chrf: float
    signature: str


def translation_scores(
    translations: Sequence[str], references: Sequence[str], language: str | None = None
) -> TranslationScores:
    """Corpus BLEU and chrF of detokenised texts, one reference each.

    `language` is that of the references, such as "zh" or "pt-br": it chooses BLEU's tokenizer.
    """
    family = (language or "").lower().replace("_", "-").partition("-")[0]
    bleu, chrf = BLEU(tokenize=_TOKENIZERS.get(family, "13a")), CHRF()
    scores = [metric.corpus_score(translations, [references]).score for metric in (bleu, chrf)]
    signature = f"BLEU {bleu.get_signature()}, chrF {chrf.get_signature()}"
    return TranslationScores(*scores, signature)
