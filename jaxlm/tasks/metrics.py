"""How good translations are: BLEU (Papineni et al., 2002), chrF (Popović, 2015), by sacreBLEU."""

import dataclasses
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

from jaxlm.tasks.translation import ReferencePair

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


def translation_metrics(
    translations: Sequence[str], pairs: Sequence[ReferencePair]
) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics by name, signatures by language) of the translations of `pairs`.

    Each language is a corpus; where there are several, `valid_bleu` and `valid_chrf` are means.
    """
    scores = {}
    for language in sorted({pair.language for pair in pairs}, key=str):
        chosen = [i for i, pair in enumerate(pairs) if pair.language == language]
        scores[language] = translation_scores(
            [translations[i] for i in chosen], [pairs[i].reference for i in chosen], language
        )
    metrics = {}
    for name in ("bleu", "chrf"):
        values = {language: getattr(score, name) for language, score in scores.items()}
        metrics[f"valid_{name}"] = sum(values.values()) / len(values)
        if len(values) > 1:
            metrics |= {f"valid_{name}_{key}": value for key, value in values.items()}
    return metrics, {language or "": score.signature for language, score in scores.items()}
