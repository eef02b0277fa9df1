"""Tokenizer files that `transformers.AutoTokenizer` reads with the ids that jaxlm gives.

What stands in front of a text is the begin token, always; a text that spells a special token
stays text. Pieces of SentencePiece are written with spaces in the place of U+2581, so that this
character, which SentencePiece cannot tell from a space, is spelt in its bytes as in `encode`.

Not exact are: unigram texts with two segmentations of the same score, which SentencePiece's float32
sums tell apart by their rounding; characters with several combining marks under a normalisation
other than identity; and, in BPE models that add or remove spaces, texts that spell a symbol which
the user has defined. Beside a config.json of model_type qwen2, transformers 5 takes Qwen's own
pre-tokenizer whatever tokenizer_config.json says, so that any other tokenizer's ids are lost there.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.errors import UserError
from jaxlm.tokenizer import (
    INNER_SPACE,
    SPACE_MARK,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from jaxlm.tokenizer_foreign import MarianTokenizer

# Before the first space of a gap, as the tokenizer's own stretches end.
WORDS = " *[^ ]+| +"
# At both ends and inside, as SentencePiece removes extra whitespace.
EXTRA_SPACES = rf"\A +| +(?= )|[ {SPACE_MARK}]+\z"
# SentencePiece's score in a unigram model for a symbol that the user has defined.
DEFINED_SCORE = -0.1
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
TEXT_TYPES = (Piece.NORMAL, Piece.USER_DEFINED)
# Which of a foreign tokenizer_config.json's names transformers turns into special tokens.
SPECIAL_NAMES = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What would replace the tokens, or the class, that tokenizer.json stands for.
DROPPED = (
    "added_tokens_decoder",
    "add_prefix_space",
    "auto_map",
    "backend",
    "tokenizer_file",
    "vocab_file",
)
Ends = tuple[list[int], list[int]]
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


def write_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    max_length: int,
    ends: Ends | None = None,
    pad_id: int | None = None,
) -> None:
    """Write what AutoTokenizer needs into `folder`, which exists.

    `AutoTokenizer(text).input_ids` is `[*begin, *tokenizer.encode(text), *end]` for every text,
    where `ends` are (begin, end), by default the begin token alone. With a chat template, a text
    that spells a special token needs `split_special_tokens=True` for that. `max_length` is the most
    tokens the model takes, `pad_id` what rows of texts are padded with. Raises UserError for a
    tokenizer that a tokenizer.json cannot express.
    """
    ends = ends or ([tokenizer.bos_id], [])
    if isinstance(tokenizer, MarianTokenizer):
        tokenizer.save(folder)
        config = {"tokenizer_class": "MarianTokenizer", "model_max_length": max_length}
        config["split_special_tokens"] = True
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        return
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spec, config = _between(tokenizer, ends), _kept_config(tokenizer)
    else:
        (folder / tokenizer.file_name).write_bytes(tokenizer.model)
        spec, config = _from_sentencepiece(tokenizer, ends)
    if pad_id is not None:
        config["pad_token"] = tokenizers.Tokenizer.from_str(spec).id_to_token(pad_id)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # A chat template's text holds special tokens; other text only spells them.
        "split_special_tokens": tokenizer.chat_template is None,
        "add_bos_token": bool(ends[0]),
        "add_eos_token": bool(ends[1]),
    }
    names = {
        key: config[key] for key in ("bos_token", "eos_token", *SPECIAL_NAMES) if key in config
    }
    contents = {
        "tokenizer.json": spec,
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(names, indent=2),
    }
    for name, text in contents.items():
        (folder / name).write_text(text + "\n", "utf-8")


def _between(tokenizer: HuggingFaceTokenizer, ends: Ends) -> str:
    """Its tokenizer.json, whose post-processing adds these ends and nothing else.

    A space that encoding puts in front is taken away by decoding, as jaxlm does.
    """
    spec = json.loads(tokenizer.model) | {"truncation": None, "padding": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    text = backend.encode("a", add_special_tokens=False).ids
    if backend.encode("a").ids != [*ends[0], *text, *ends[1]]:
        old = spec["post_processor"] or {}
        parts = old.get("processors", [old])
        kept = [part for part in parts if part.get("type") == "ByteLevel"]
        backend.post_processor = _template(backend, ends)
        new = json.loads(backend.to_str())["post_processor"]
        if kept:
            new = {"type": "Sequence", "processors": [*kept, new]}
        spec["post_processor"] = new
    if backend.decode(text).removeprefix(" ") == tokenizer.decode(text) != backend.decode(text):
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        spec["decoder"] = {"type": "Sequence", "decoders": [spec["decoder"], strip]}
    return json.dumps(spec, ensure_ascii=False)


def _template(backend: tokenizers.Tokenizer, ends: Ends) -> processors.TemplateProcessing:
    begin, end = (list(map(backend.id_to_token, ids)) for ids in ends)
    second = [f"{piece}:1" for piece in (*begin, "$B", *end)]
    ids = sorted({*ends[0], *ends[1]})
    return processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *second],
        special_tokens=[(backend.id_to_token(i), i) for i in ids],
    )


def _kept_config(tokenizer: HuggingFaceTokenizer) -> dict:
    """Its tokenizer_config.json, less what would change ids.

    transformers makes every name it finds a special token, and adds it where it is new.
    """
    spec = json.loads(tokenizer.model)
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    config = {key: value for key, value in tokenizer.config.items() if key not in DROPPED}
    for key in SPECIAL_NAMES:
        name = _content(config.pop(key, None))
        if name in special:
            config[key] = name
    for key in SPECIAL_LISTS:
        names = config.pop(key, None) or ()
        names = map(_content, names.values() if isinstance(names, dict) else names)
        if kept := [name for name in names if name in special]:
            config[key] = kept
    if config["eos_token"] is None:
        del config["eos_token"]
    # Some releases put their own default in the place of what tokenizer.json says.
    pre_tokenizer = spec["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return config


def _content(name: str | dict | None) -> str | None:
    return name.get("content") if isinstance(name, dict) else name


def _from_sentencepiece(tokenizer: SentencePieceTokenizer, ends: Ends) -> tuple[str, dict]:
    """An equal tokenizer.json, and the names of the special tokens."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    _check_expressible(proto)
    pieces = [(p.piece.replace(SPACE_MARK, " "), p.score, p.type) for p in proto.pieces]
    bytewise = any(kind == Piece.BYTE for _, _, kind in pieces)
    is_unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
    unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == Piece.UNKNOWN)
    if is_unigram:
        model = models.Unigram(_unigram_scores(pieces), unknown, byte_fallback=bytewise)
    else:
        model = models.BPE(
            vocab={piece: i for i, (piece, _, _) in enumerate(pieces)},
            merges=list(_merges(pieces)),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=bytewise,
        )
    backend = tokenizers.Tokenizer(model)
    steps = _normalizers(proto.normalizer_spec, tokenizer.spells_marks)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    splits = _splits(pieces, is_unigram, bytewise)
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_tokens(backend, pieces, is_unigram)
    backend.post_processor = _template(backend, ends)
    names = {"bos_token": pieces[tokenizer.bos_id][0], "unk_token": pieces[unknown][0]}
    if tokenizer.eos_id is not None:
        names["eos_token"] = pieces[tokenizer.eos_id][0]
    return backend.to_str(), names


def _check_expressible(proto) -> None:
    kinds = proto.trainer_spec
    if kinds.model_type not in (kinds.UNIGRAM, kinds.BPE, kinds.CHAR):
        raise UserError(
            "a SentencePiece model of words cannot be exported: use one of kind unigram or bpe"
        )
    if kinds.treat_whitespace_as_suffix:
        raise UserError(
            "a SentencePiece model with treat_whitespace_as_suffix cannot be exported: use one "
            "whose pieces have their space in front"
        )
    if len({p.piece.replace(SPACE_MARK, " ") for p in proto.pieces}) < len(proto.pieces):
        raise UserError(
            "a SentencePiece model with the same piece once with a space and once with U+2581 "
            "cannot be exported: remove one of them"
        )


def _normalizers(spec, spells_marks: bool) -> list[normalizers.Normalizer]:
    """What SentencePiece does to a text, in its order, with spaces for U+2581."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(EXTRA_SPACES), ""))
    if not spells_marks:
        steps.append(normalizers.Replace(SPACE_MARK, " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _unigram_scores(pieces: list[tuple]) -> list[tuple[str, float]]:
    """Pieces with scores; what is not text costs more than spelling it in any pieces."""
    worst = min(score for _, score, kind in pieces if kind == Piece.NORMAL)
    longest = max(len(piece) for piece, _, kind in pieces if kind not in TEXT_TYPES)
    never = (min(worst, DEFINED_SCORE) - 1) * (longest + 1)

    def score_of(score: float, kind: int) -> float:
        return {Piece.NORMAL: score, Piece.USER_DEFINED: DEFINED_SCORE}.get(kind, never)

    return [(piece, score_of(score, kind)) for piece, score, kind in pieces]


def _merges(pieces: list[tuple]) -> Iterator[tuple[str, str]]:
    """Every pair that makes a piece, in SentencePiece's order: best score, then leftmost."""
    scores = {piece: score for piece, score, kind in pieces if kind == Piece.NORMAL}
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in _cuts(piece):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                yield left, right


def _cuts(piece: str) -> Iterator[int]:
    """Where to cut `piece` in two, ordered so that of two overlapping pairs the left one is first.

    Pairs (x, y) and (y, z) that both make `piece` can share y; then the first cut is at |x| and
    the second at |y|, which sum to its length.
    """
    size = len(piece)
    for short in range(1, size // 2 + 1):
        long = size - short
        short_is_left = piece[:long] == piece[short:] and piece[:short] != piece[long:]
        first, second = (short, long) if short_is_left else (long, short)
        yield first
        if first != second:
            yield second


def _splits(pieces: list[tuple], is_unigram: bool, bytewise: bool) -> list:
    """Cuts that no piece reaches over: at words for speed, and inside spelt-out special tokens."""
    texts = {piece for piece, _, kind in pieces if kind in TEXT_TYPES}
    patterns = []
    inner = INNER_SPACE.pattern.replace(SPACE_MARK, " ")
    if " " in texts and not any(re.search(inner, piece) for piece in texts):
        patterns.append(WORDS)
    spelt = {c for piece, _, kind in pieces if kind not in TEXT_TYPES for c in piece}
    missing = spelt - texts
    if is_unigram and missing:
        # A character without a piece costs more than a special token that has it inside.
        known = {piece for piece in texts if len(piece) == 1}
        patterns.append(f"[{_class(missing)}]" if bytewise else f"[^{_class(known)}]+")
    return [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in patterns]


def _class(characters: Iterable[str]) -> str:
    return "".join(f"\\x{{{ord(c):X}}}" for c in sorted(characters))


def _add_tokens(backend: tokenizers.Tokenizer, pieces: list[tuple], is_unigram: bool) -> None:
    special = [piece for piece, _, kind in pieces if kind in (Piece.CONTROL, Piece.UNKNOWN)]
    backend.add_special_tokens(special)
    defined = [piece for piece, _, kind in pieces if kind == Piece.USER_DEFINED]
    if not is_unigram:
        plain = [tokenizers.AddedToken(piece, normalized=False, special=False) for piece in defined]
        backend.add_tokens(plain)
