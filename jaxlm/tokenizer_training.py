"""Learning a tokenizer from text: SentencePiece, exact for every text."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import sentencepiece

from jaxlm.data_config import LEAST_VOCABULARY, TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer

# SentencePiece drops training sentences above this many bytes; ours are cut to a quarter as many
# characters, which never have more than four bytes each.
SENTENCE_BYTES = 16384
BYTE_PIECES = 256
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")


def train_tokenizer(
    texts: Iterator[str], config: TokenizerConfig, controls: Sequence[str] = ()
) -> Tokenizer:
    """Train SentencePiece (`config.kind`, `config.vocab_size`) on all of `texts`.

    `controls` are special pieces, which no text is encoded to, with ids behind those of `<s>` and
    `</s>`. The same texts give the same model, byte for byte. Raises UserError
    where they are too few for `config.vocab_size`.
    """
    sentences = list(_sentences(texts))
    boundaries = _rare_characters(sentences, config.vocab_size - len(controls))
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.translate(boundaries) for sentence in sentences),
            model_writer=out,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # The trainer uses the tab as a boundary and so would never make it a piece.
            user_defined_symbols=["\t"],
            control_symbols=list(controls),
            max_sentence_length=SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # the model depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _no_such_size(config.vocab_size, str(error)) from error
    return SentencePieceTokenizer(out.getvalue())


def _no_such_size(vocab_size: int, message: str) -> UserError:
    """What SentencePiece's message means: the size is too small for special tokens, or too large
    for the text."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: {BYTE_PIECES} bytes, the text's most "
            f"frequent characters and the task's special tokens are {needed[1]} already; set it to "
            f"{int(needed[1]) + 1} or more"
        )
    largest = re.search(r"value <= (\d+)", message)
    remedy = "give it more text"
    # 256 bytes, and the text's characters: what is just above them fails again.
    if largest and int(largest[1]) <= 320:
        remedy += f" ({LEAST_VOCABULARY} tokens, of them {BYTE_PIECES} bytes, are the least)"
    elif largest:
        remedy += f", set tokenizer.vocab_size to {largest[1]} or less"
    remedy += (
        ", or take a tokenizer that is there: by tokenizer.kind=file, or by init_from and no "
        "settings of the tokenizer"
    )
    return UserError(f"too little text to learn tokenizer.vocab_size={vocab_size} tokens: {remedy}")


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Cut `texts` at line ends (kept) into what the trainer takes as a sentence."""
    limit = SENTENCE_BYTES // 4
    pattern = re.compile(rf"(?s).{{1,{limit}}}(?<=\n)|.{{1,{limit}}}")
    for text in texts:
        yield from pattern.findall(text)


def _rare_characters(sentences: list[str], vocab_size: int) -> dict[int, str]:
    """A `str.translate` table that turns characters not worth a piece into boundaries.

    Pieces go to the characters that make up 99.95 % of the text, and to so few that half of the
    vocabulary is left for longer pieces; the others are spelt in bytes.
    """
    counts = Counter()
    for sentence in sentences:
        counts.update(sentence)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    room = (vocab_size - BYTE_PIECES - len(SPECIAL_PIECES)) // 2
    spare = counts.total() * 0.0005
    while ranked and (len(ranked) > room or counts[ranked[-1]] <= spare):
        spare -= counts[ranked.pop()]
    kept = set(ranked) - {SPACE_MARK, "\0", "\t"}
    return dict.fromkeys((ord(c) for c in counts if c not in kept), "\t")
