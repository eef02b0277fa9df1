"""SentencePiece models that transformers numbers in a way of its own: Marian's pair, and T5's."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.errors import UserError
from jaxlm.tokenizer_base import SPACE_MARK, Tokenizer, piece_bytes

FILES = SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"
UNKNOWN, END, PAD = "<unk>", "</s>", "<pad>"
SPIECE = "spiece.model"
T5_EXTRA_IDS = 100


class MarianTokenizer(Tokenizer):
    """A SentencePiece model for each side, and a table that numbers the pieces of both.

    It encodes targets, and `source` what they are translations of. Targets start with the padding,
    whose embedding is zero, so that its logit means nothing: no text has it.
    """

    file_name = SOURCE
    chat_template = None

    def __init__(self, files: Mapping[str, bytes], side: str = TARGET):
        """`files` are FILES by name. Raises UserError without a special piece."""
        super().__init__(b"".join(files[name] for name in FILES))
        self.files = dict(files)
        self._ids: dict[str, int] = json.loads(files[VOCABULARY])
        if missing := [name for name in (UNKNOWN, END, PAD) if name not in self._ids]:
            raise UserError(f"has no piece {missing[0]} in its {VOCABULARY}: it is not Marian's")
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(files[side])
        self.vocab_size = max(self._ids.values()) + 1
        self.eos_id = self._ids[END]
        self.bos_id = self.pad_id = self.never_id = self._ids[PAD]
        self.prefix, self.suffix = [], [self.eos_id]
        languages = (name for name in self._ids if name.startswith(">>") and name.endswith("<<"))
        self.special_ids = {name: self._ids[name] for name in (UNKNOWN, END, PAD, *languages)}
        self._bytes = [b""] * self.vocab_size
        for piece, i in self._ids.items():
            self._bytes[i] = b"" if piece in self.special_ids else piece_bytes(piece)
        self.adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)

    def __reduce__(self):
        return MarianTokenizer, (self.files, TARGET)

    @functools.cached_property
    def source(self) -> Tokenizer:
        """The same, encoding sources."""
        return MarianTokenizer(self.files, SOURCE)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        unknown = self._ids[UNKNOWN]
        encoded = self._processor.encode(list(texts), out_type=str, num_threads=1)
        return [[self._ids.get(piece, unknown) for piece in pieces] for pieces in encoded]

    def save(self, folder: str | Path) -> None:
        """Write the three files."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @classmethod
    def read(cls, file: Path) -> "MarianTokenizer":
        """That of a SOURCE file and those beside it."""
        return cls({name: file.with_name(name).read_bytes() for name in FILES})


def is_t5(model: bytes) -> bool:
    """Whether a SentencePiece model has T5's special pieces: <pad>, </s>, <unk>, and no <s>."""
    ids = sentencepiece.SentencePieceProcessor()
    ids.load_from_serialized_proto(model)
    return (ids.pad_id(), ids.eos_id(), ids.unk_id(), ids.bos_id()) == (0, 1, 2, -1)


def t5_json(model: bytes, extra_ids: int) -> bytes:
    """The tokenizer.json of T5's SentencePiece model, with `extra_ids` sentinels at its end.

    They are numbered downwards, so that <extra_id_0> has the last id (Raffel et al., 2020).
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    pieces += [(name, 0.0) for name in sentinels]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    words = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.decoder = decoders.Metaspace(SPACE_MARK, prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    backend.add_special_tokens([PAD, END, UNKNOWN, *sentinels])
    return backend.to_str().encode()
