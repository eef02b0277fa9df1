"""The tokenizer inside a GGUF file.

llama.cpp tokenizes text itself, by one of a few built-in models. Each tokenizer of ours goes to
the one that gives the same ids:

- SentencePiece BPE to "llama", which merges neighbours by the score of the result. Only the
  character U+2581 in a text, which we spell in bytes, is a space there.
- SentencePiece unigram to "plamo2", the one model that finds the best segmentation and spells
  unknown characters in bytes ("t5" gives <unk> for them). Of segmentations that are exactly as
  good, such as those of a run of spaces, it may take another.
- byte-level BPE of a tokenizer.json to "gpt2", with the pre-tokenizer of the same pattern.
"""

import json

from jaxlm.errors import UserError
from jaxlm.tokenizer import SPACE_MARK, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

# Members of `gguf.TokenType`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# The "plamo2" model keeps scores times 10,000 as integers. It takes no piece below -2,000, and an
# unknown character has -1,000: all pieces have to be better than that.
WORST_SCORE, NO_SCORE = -900.0, -2000.0

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a text is cut by, one after the other, and whether a whole word is taken without merging,
# by llama.cpp's name for it.
PRE_TOKENIZERS = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": ((_WORDS + "{1,3}" + _REST,), True),
    "dbrx": ((_WORDS + "{1,3}" + _REST,), False),
    "qwen2": ((_WORDS + _REST,), False),
}


def write_vocabulary(writer, tokenizer: Tokenizer, size: int) -> None:
    """Write `tokenizer` into a `gguf.GGUFWriter`, filled up to `size` ids.

    Raises UserError for a tokenizer that llama.cpp does not have, or one with more ids than
    `size`.
    """
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has only {size}"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        texts, types, scores = _write_sentencepiece(writer, tokenizer)
        writer.add_token_scores(scores + [NO_SCORE] * (size - len(texts)))
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        texts, types = _write_byte_level(writer, tokenizer)
    else:
        raise UserError(f"llama.cpp has no tokenizer like {type(tokenizer).__name__}")
    fill = [f"[PAD{i}]" for i in range(len(texts), size)]
    writer.add_token_list(texts + fill)
    writer.add_token_types(types + [UNUSED] * len(fill))
    writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _write_sentencepiece(writer, tokenizer: SentencePieceTokenizer):
    """Texts, types and scores of the pieces; writes what depends on the kind of model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    unigram = trainer.model_type == trainer.UNIGRAM
    if not unigram and trainer.model_type != trainer.BPE:
        raise UserError("llama.cpp has SentencePiece's bpe and unigram only")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(
            "the tokenizer normalises text, which llama.cpp does not: train one with "
            "normalization_rule_name=identity and remove_extra_whitespaces=false"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UserError("llama.cpp wants a SentencePiece model with spaces before words")
    if unigram and (normalizer.add_dummy_prefix or not trainer.byte_fallback):
        raise UserError(
            "llama.cpp has unigram tokenizers with byte_fallback and without add_dummy_prefix only"
        )
    texts = [piece.piece for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    plain = {text for text, kind in zip(texts, types, strict=True) if kind == NORMAL}
    texts = [
        _out_of_reach(text, plain) if kind in (CONTROL, UNKNOWN) else text
        for text, kind in zip(texts, types, strict=True)
    ]
    writer.add_tokenizer_model("plamo2" if unigram else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(normalizer.add_dummy_prefix)
    if UNKNOWN in types:
        writer.add_unk_token_id(types.index(UNKNOWN))
    if not unigram:
        return texts, types, scores
    # As good as it gets with integers; a common factor changes nothing else.
    scale = WORST_SCORE / min(scores)
    scores = [s * scale if t == NORMAL else NO_SCORE for s, t in zip(scores, types, strict=True)]
    return [text.replace(SPACE_MARK, " ") for text in texts], types, scores


def _out_of_reach(text: str, pieces: set[str]) -> str:
    """A special token's text, changed until no two pieces merge into it.

    llama.cpp merges to any token there is, so that with a piece "s>" the text "<s>" would begin a
    document.
    """
    while any(text[:i] in pieces and text[i:] in pieces for i in range(1, len(text))):
        text = f"<|{text}|>"
    return text


def _write_byte_level(writer, tokenizer: HuggingFaceTokenizer):
    """Texts and types of the tokens; writes the rest of a byte-level BPE."""
    whole = json.loads(tokenizer.model)
    model = whole["model"]
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in ("byte_fallback", *affixes)):
        raise UserError(
            "of a tokenizer.json, GGUF export takes byte-level BPE only: use the tokenizer.model "
            "(SentencePiece) that models without it come with"
        )
    normalizer = (whole.get("normalizer") or {}).get("type", "NFC")
    # NFC leaves nearly all text as it is, and llama.cpp's own converter passes over it.
    if normalizer != "NFC":
        raise UserError(f"the tokenizer normalises text by {normalizer}, which llama.cpp does not")
    pre = _pre_tokenizer(whole.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    texts = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for text, i in model["vocab"].items():
        texts[i], types[i] = text, NORMAL
    for token in whole.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    for i in (tokenizer.bos_id, tokenizer.eos_id):
        if i is not None:
            types[i] = CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges(merges)
    return texts, types


def _pre_tokenizer(pre_tokenizer: dict | None, ignore_merges: bool) -> str:
    """llama.cpp's name for a tokenizer.json's pre-tokenizer."""
    if pre_tokenizer is None:
        parts = []
    elif pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    else:
        parts = [pre_tokenizer]
    patterns = tuple(pattern for part in parts if (pattern := _pattern(part)))
    for name, known in PRE_TOKENIZERS.items():
        if known == (patterns, ignore_merges):
            return name
    raise UserError(
        f"llama.cpp has no pre-tokenizer that cuts text by {' then '.join(patterns) or 'nothing'}"
        f"{' and takes whole words without merging' if ignore_merges else ''}: it has those of "
        f"{', '.join(PRE_TOKENIZERS)}"
    )


def _pattern(part: dict) -> str | None:
    """What one pre-tokenizer cuts text by; a name that llama.cpp lacks where it is no pattern."""
    kind = part["type"]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            return "ByteLevel with add_prefix_space"
        return _GPT2 if part.get("use_regex", True) else None
    if kind == "Digits":
        return r"\p{N}" if part["individual_digits"] else r"\p{N}+"
    # All of the text matches, so that dropping what does not loses nothing.
    if kind == "Split" and (part["behavior"] == "Isolated" or part["invert"]):
        return part["pattern"].get("Regex", "a string")
    return kind
