"""What jaxlm needs of a tokenizer, whatever kind it is."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError

# SentencePiece writes a space as this character, so in text it cannot stand for itself.
SPACE_MARK = "\u2581"


class Tokenizer(ABC):
    """What jaxlm needs of a tokenizer. Made by `load_tokenizer`, or by training.

    Attributes:
        vocab_size: number of ids, special ones included.
        bos_id: what a document starts with.
        eos_id: what a document ends with, or None.
        prefix: the ids that the tokenizer's own post-processing puts in front of a text, which
            `encode` leaves out: [bos_id] for SentencePiece, [] for GPT-2's tokenizer.json.
        suffix: the ids that it puts behind a text; `encode` leaves them out, too.
        pad_id: an id for padding rows of texts: one that no text ends with, or None.
        loses_spaces: decoding is a guess, as with BERT's word pieces: fine for models that only
            read.
        special_ids: ids of special (control) pieces by name: no text is encoded to one, not even
            one that spells it.
        chat_template: how messages become a text, in Jinja; or None.
        never_id: an id that no text has, however likely a model finds it, or None.
        adds_space: whether encoding puts a space before the text, for decoding to take away.
        model: the model file, byte for byte.
        file_name: what that file is called in a folder.
        fingerprint: SHA-256 of `model`.
    """

    file_name: str
    vocab_size: int
    bos_id: int
    eos_id: int | None
    prefix: list[int]
    suffix: list[int]
    pad_id: int | None
    never_id: int | None = None
    loses_spaces: bool = False
    special_ids: dict[str, int]
    chat_template: str | None
    adds_space: bool
    # The bytes each id stands for (none for special ids).
    _bytes: list[bytes]

    def __init__(self, model: bytes):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """What stands before and behind a text that a model reads as a whole, to classify it."""
        return [self.bos_id], [] if self.eos_id is None else [self.eos_id]

    @property
    def source(self) -> "Tokenizer":
        """What encodes texts to be translated: itself, unless these have pieces of their own."""
        return self

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ids, even where the text spells one."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text. Other threads run meanwhile.

        Raises UserError for a text with half of a surrogate pair, which no bytes stand for.
        """
        try:
            return self._encode_batch(texts)
        except (RuntimeError, TypeError, UnicodeError):
            for text in texts:
                _check_unicode(text)
            raise

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` of texts that can be encoded."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special and unknown ids are nothing, broken UTF-8 becomes U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of `ids`, which may begin or end inside a character: what streaming needs."""
        return b"".join(self._bytes[i] for i in ids if 0 <= i < self.vocab_size)

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, int64 [vocab_size]."""
        return np.array([len(content) for content in self._bytes])

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another chat template. Raises UserError where none can go."""
        raise UserError(
            f"a tokenizer of {self.file_name} has no place for a chat template: use a "
            "SentencePiece model or a tokenizer.json"
        )

    def with_dropout(self, rate: float, seed: int) -> "Tokenizer":
        """The same tokenizer, leaving out merges. Raises UserError where none can be left out."""
        raise UserError(
            f"tokenizer.dropout={rate} leaves out merges of BPE as tokenizer.kind=bpe learns it, "
            f"and this tokenizer, a {self.file_name}, is another kind: leave it out"
        )

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` reads back; the model byte for byte."""
        (Path(folder) / self.file_name).write_bytes(self.model)


def piece_bytes(piece: str, is_byte: bool = False) -> bytes:
    """The UTF-8 that a piece of SentencePiece stands for, be it text or a byte's name."""
    return bytes.fromhex(piece[3:5]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
            "pair: text must be valid Unicode"
        ) from error
