"""Text to token ids and back: one small interface over SentencePiece and `tokenizers`.

A tokenizer that jaxlm trains is exact: `decode(encode(text)) == text` for every string. One loaded
from a file is as exact as its own normalisation lets it be.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from jaxlm.errors import UserError
from jaxlm.tokenizer_base import SPACE_MARK, Tokenizer, piece_bytes
from jaxlm.tokenizer_dropout import DropoutBPE
from jaxlm.tokenizer_foreign import SPIECE, T5_EXTRA_IDS, MarianTokenizer, is_t5, t5_json

# Long texts are encoded in stretches that end before the first space of a gap. No piece reaches
# over such a place, unless a model has pieces with a space inside.
STRETCH = 4096
STRETCHES = re.compile(rf"(?s).{{{STRETCH},}}?(?:(?<=[^ ])(?= )|\Z)|.+")
INNER_SPACE = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}")
# How word pieces that continue a word begin.
INSIDE_WORD = "##"
# Such as a tokenizer that normalises, or puts a space in front, cuts differently.
SAMPLE = "The \ufb01rst  caf\u00e9s of 1998,\n\tand the \u2116\uff11 \u2026"
CHAT_TEMPLATE = "chat_template.jinja"
START = "decoder_start_token_id"
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]")
END_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (`tokenizer.model`)."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, chat_template: str | None = None):
        """Raises UserError without a begin-of-sequence or end-of-sequence piece."""
        super().__init__(model)
        self._dropout = None
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(model)
        self.vocab_size = len(self._processor)
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        if max(bos, eos) < 0:
            raise UserError("has no <s> or </s> piece: documents need one of them to start with")
        self.bos_id = bos if bos >= 0 else eos
        self.eos_id = eos if eos >= 0 else None
        self.prefix, self.suffix = [self.bos_id], []
        pad = self._processor.pad_id()
        self.pad_id = pad if pad >= 0 else self._processor.unk_id()
        self.chat_template = chat_template
        controls = filter(self._processor.is_control, range(self.vocab_size))
        self.special_ids = {self._processor.id_to_piece(i): i for i in controls}
        self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark if all(map(self._processor.is_byte, mark)) else []
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        spaces = self.decode_bytes(self._processor.encode("  a ", out_type=int))
        self._can_cut = spaces == b"  a " and not any(map(INNER_SPACE.search, pieces))

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model, self.chat_template)

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return SentencePieceTokenizer(self.model, template)

    def with_dropout(self, rate: float, seed: int) -> "SentencePieceTokenizer":
        """The same tokenizer of BPE, which leaves out merges at random (`tokenizer_dropout`).

        Raises UserError where its pieces do not come of the text's own characters by merges.
        """
        plain = DropoutBPE(self._processor, 0.0, seed)
        if not self._can_cut or plain.encode(SAMPLE) != self._processor.encode(SAMPLE):
            return super().with_dropout(rate, seed)
        tokenizer = SentencePieceTokenizer(self.model, self.chat_template)
        tokenizer._dropout = DropoutBPE(self._processor, rate, seed)
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Also writes the chat template, which the model has no place for."""
        super().save(folder)
        if self.chat_template is not None:
            (Path(folder) / CHAT_TEMPLATE).write_text(self.chat_template, "utf-8")

    @property
    def spells_marks(self) -> bool:
        """Whether U+2581 in a text is spelt in its bytes, not taken for a space."""
        return self._can_cut and bool(self._mark_ids)

    def _bytes_of(self, i: int) -> bytes:
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        return piece_bytes(self._processor.id_to_piece(i), is_byte=self._processor.is_byte(i))

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if not self._can_cut:
            return self._processor.encode(text, out_type=int)
        if SPACE_MARK not in text or not self._mark_ids:
            return self._encode_long(text)
        first, *others = map(self._encode_long, text.split(SPACE_MARK))
        return first + [i for ids in others for i in (*self._mark_ids, *ids)]

    def _encode_long(self, text: str) -> list[int]:
        if self._dropout is not None:
            return self._dropout.encode(text)
        # The time that SentencePiece takes grows faster than the text.
        if len(text) <= STRETCH:
            return self._processor.encode(text, out_type=int)
        stretches = STRETCHES.findall(text)
        encoded = self._processor.encode(stretches, out_type=int, num_threads=1)
        return [i for ids in encoded for i in ids]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, with the names of its special tokens.

    Attributes:
        config: the tokenizer_config.json beside it, with the chat template of chat_template.jinja.
    """

    file_name = "tokenizer.json"

    def __init__(
        self,
        model: bytes,
        bos: str | None = None,
        eos: str | None = None,
        config: dict | None = None,
    ):
        """Raises UserError where neither `bos`, `eos` nor any well-known special token exists."""
        super().__init__(model)
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self._eos = next((name for name in (eos, *END_NAMES) if name in vocabulary), None)
        self._bos = next((n for n in (bos, *BEGIN_NAMES, self._eos) if n in vocabulary), None)
        if self._bos is None:
            raise UserError(
                "names no begin-of-sequence token and has no well-known one, such as <s> or "
                "<|endoftext|>: put a tokenizer_config.json with bos_token beside it"
            )
        # As special tokens they are never found in a text, whatever the file says of them.
        self._tokenizer.add_special_tokens(list(filter(None, (self._bos, self._eos))))
        self.bos_id = vocabulary[self._bos]
        self.eos_id = vocabulary.get(self._eos)
        self.config = (config or {}) | {"bos_token": self._bos, "eos_token": self._eos}
        self.chat_template = _default_template(self.config.get("chat_template"))
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_ids = {token.content: i for i, token in added if token.special}
        self._bytes = self._make_bytes(vocabulary)
        first = self._encode_batch(["a"])[0][:1]
        self.adds_space = bool(first) and self._bytes[first[0]].startswith(b" ")
        whole = self._tokenizer.encode("a")
        special = whole.special_tokens_mask
        self.prefix = whole.ids[: [*special, 0].index(0)]
        self.suffix = whole.ids[len(special) - [*special[::-1], 0].index(0) :]
        pad = self.special_ids.get(_content(self.config.get("pad_token")))
        spare = None if self.bos_id == self.eos_id else self.bos_id
        self.pad_id = spare if pad is None else pad

    def __reduce__(self):
        return HuggingFaceTokenizer, (self.model, self._bos, self._eos, self.config)

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        config = self.config | {"chat_template": template}
        return HuggingFaceTokenizer(self.model, self._bos, self._eos, config)

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """What its own post-processing adds, unless that is nothing."""
        own = self.prefix, self.suffix
        return own if any(own) else super().ends

    def beginning_with(self, bos_id: int | None) -> "HuggingFaceTokenizer":
        """The same tokenizer with another `bos_id`; with None, itself."""
        if bos_id in (None, self.bos_id):
            return self
        begin = self._tokenizer.id_to_token(bos_id)
        return HuggingFaceTokenizer(self.model, begin, self._eos, self.config)

    def _make_bytes(self, vocabulary: dict[str, int]) -> list[bytes]:
        decoders = _decoder_types(json.loads(self.model)["decoder"])
        byte_level = "ByteLevel" in decoders
        self.loses_spaces = "WordPiece" in decoders
        if not byte_level and not decoders & {"ByteFallback", "Metaspace", "WordPiece"}:
            raise UserError(
                f"decodes by {' and '.join(sorted(decoders)) or 'joining words'}, which loses "
                "spaces: use one with a ByteLevel, ByteFallback, Metaspace or WordPiece decoder"
            )
        alphabet = _byte_level_alphabet()
        table = [b""] * self.vocab_size
        for piece, i in vocabulary.items():
            if byte_level and all(c in alphabet for c in piece):
                table[i] = bytes(alphabet[c] for c in piece)
            elif self.loses_spaces:
                inside = piece.startswith(INSIDE_WORD)
                table[i] = (piece.removeprefix(INSIDE_WORD) if inside else f" {piece}").encode()
            else:
                is_byte = not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None
                table[i] = piece_bytes(piece, is_byte)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            table[i] = b"" if token.special else token.content.encode()
        table[self.bos_id] = b""
        if self.eos_id is not None:
            table[self.eos_id] = b""
        return table

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def save(self, folder: str | Path) -> None:
        """Also writes `config`: tokenizer.json does not name the special tokens."""
        super().save(folder)
        text = json.dumps(self.config, indent=2) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `.model` file, a `tokenizer.json`, Marian's `source.spm` and the files
    beside it, or a folder with one of them.

    Raises UserError for a missing, corrupt or unsupported file.
    """
    file = Path(path)
    if file.is_dir():
        kinds = HuggingFaceTokenizer, SentencePieceTokenizer, MarianTokenizer
        names = *(kind.file_name for kind in kinds), SPIECE
        file = next((file / name for name in names if (file / name).is_file()), file)
        if file.is_dir():
            raise UserError(f"the folder {path} has no tokenizer: none of {', '.join(names)}")
    try:
        model = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    try:
        if file.suffix == ".spm":
            return MarianTokenizer.read(file)
        if file.name == SPIECE and is_t5(model):
            config = {"pad_token": "<pad>", "eos_token": "</s>"} | _read_config(file)
            model = t5_json(model, config.get("extra_ids", T5_EXTRA_IDS))
            return _from_json(file, model, config)
        if file.suffix == ".model":
            template = file.with_name(CHAT_TEMPLATE)
            found = template.read_text("utf-8") if template.is_file() else None
            return SentencePieceTokenizer(model, found)
        if file.suffix == ".json":
            return _from_json(file, model, _read_config(file))
    except UserError as error:
        raise UserError(f"the tokenizer {file} {error}") from error
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"{file} is not a tokenizer that can be read: it should be a SentencePiece model "
            "(.model, or Marian's source.spm, target.spm and vocab.json) or a Hugging Face "
            "tokenizer.json"
        ) from error
    raise UserError(f"the tokenizer {file} should end in .model, .json or .spm")


def _from_json(file: Path, model: bytes, config: dict) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json that lies, or could lie, where `file` does."""
    tokenizer = HuggingFaceTokenizer(model, *_special_names(config), config)
    return tokenizer.beginning_with(_target_start(file))


def _read_config(file: Path) -> dict:
    """The tokenizer_config.json beside `file`, with the text of chat_template.jinja."""
    config_file = file.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
    template = file.with_name(CHAT_TEMPLATE)
    if template.is_file():
        return config | {"chat_template": template.read_text("utf-8")}
    return config


def _default_template(template: str | list[dict] | None) -> str | None:
    """The chat template, which may be one of several named ones."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _special_names(config: dict) -> list[str | None]:
    return [_content(config.get(key)) for key in ("bos_token", "eos_token")]


def _content(name: str | dict | None) -> str | None:
    return name["content"] if isinstance(name, dict) else name


def _target_start(file: Path) -> int | None:
    """The id that a decoder beside the tokenizer starts with, where its settings tell it."""
    paths = (file.with_name(name) for name in ("config.json", "generation_config.json"))
    found = (json.loads(path.read_bytes()).get(START) for path in paths if path.is_file())
    return next((start for start in found if start is not None), None)


def _decoder_types(decoder: dict | None) -> set[str]:
    """Type names of a tokenizer.json's decoder and of those in its sequence."""
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoder_types(part)}
    return {decoder["type"]}


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's byte-level BPE.

    Bytes that are visible Latin-1 characters stand for themselves, the others, in order, for the
    characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    shifted = {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | shifted
