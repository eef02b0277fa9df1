"""Translation: a target text from a source text, in any of the languages the model is told."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.data.examples import Example
from jaxlm.data.forms import Encoded, NamedExamples, Origin
from jaxlm.data.records import Column, Record
from jaxlm.data.tokens import token_dtype
from jaxlm.errors import UserError, nearest
from jaxlm.tokenizer import Tokenizer

LANGUAGE = re.compile(r"[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str
    language: str | None


@dataclasses.dataclass(frozen=True)
class Translation(NamedExamples):
    """Pairs: the source side of a row holds `tag, text, EOS`, the target side `BOS, text, EOS`.

    `names` are the target languages, if the model is told; their tags are special pieces. Pairs of
    which a side is too long for a row are left out.
    """

    name = "language"

    source_len: int
    """Tokens on the source side of a row."""

    @property
    def columns(self) -> tuple[Column, ...]:
        data = self.data
        pair = (
            Column("source", "data.source_column", data.source_column, 1),
            Column("target", "data.target_column", data.target_column, 2),
        )
        if data.language_column is None:
            return pair
        return *pair, Column("language", "data.language_column", data.language_column)

    @property
    def lengths(self) -> dict[str, int]:
        return {"source": self.source_len, "tokens": self.seq_len}

    @property
    def controls(self) -> tuple[str, ...]:
        return tuple(map(tag, self.names))

    def origins(self, side: str) -> list[Origin]:
        specs, languages = getattr(self.data, side), _languages(self.data, side)
        return [Origin(*entry) for entry in zip(specs, languages, strict=True)]

    def read(self, record: Record, origin: Origin) -> Pair:
        source, target, *column = self.columns
        language = record.text(column[0]).strip() if column else origin.language
        if language is not None:
            self._check(language, record.where)
        return Pair(record.text(source), record.text(target), language)

    def _check(self, language: str, where: str) -> None:
        if not LANGUAGE.fullmatch(language):
            raise UserError(
                f"{where}: {language[:40]!r} cannot be a language: name one by letters, digits, "
                "dots and dashes, such as de"
            )
        if self.names is not None and language not in self.names:
            raise unknown_language(language, self.names, f"{where}: ")

    def key(self, item: Pair) -> str:
        return item.source

    def texts(self, item: Pair) -> Sequence[str]:
        return [item.source, item.target]

    def name_of(self, item: Pair) -> str:
        return item.language

    def with_names(self, found: Mapping[str, int]) -> "Translation":
        return dataclasses.replace(self, names=tuple(sorted(found)))

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        if tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer has no end token, so that no translation could end: use another"
            )
        for language in self.names:
            tag_ids(tokenizer, language)
        return super().tokenizer(tokenizer)

    def dtypes(self, tokenizer: Tokenizer) -> dict[str, Any]:
        ids = token_dtype(tokenizer.vocab_size)
        return {
            "source": ids,
            "tokens": ids,
            "targets": ids,
            "weights": np.uint8,
            "reference": np.uint8,
        }

    def encode(self, tokenizer: Tokenizer, items: Sequence[Pair]) -> list[Encoded]:
        targets = tokenizer.encode_batch([item.target for item in items])
        sources = encode_sources(
            tokenizer, [item.source for item in items], [item.language for item in items]
        )
        return [
            self._encoded(tokenizer, item, source, target)
            for item, source, target in zip(items, sources, targets, strict=True)
        ]

    def _encoded(
        self, tokenizer: Tokenizer, item: Pair, source: list[int], ids: list[int]
    ) -> Encoded:
        reference = item.target.encode()
        num_bytes = len(item.source.encode()) + len(reference)
        if len(source) > self.source_len or len(ids) + 1 > self.seq_len:
            return Encoded(None, num_bytes)
        arrays = {
            "source": np.array(source),
            "tokens": np.array([tokenizer.bos_id, *ids]),
            "targets": np.array([*ids, tokenizer.eos_id]),
            "weights": np.ones(len(ids) + 1, np.uint8),
            # Decoding may not give it back: a foreign tokenizer normalises.
            "reference": np.frombuffer(reference, np.uint8),
        }
        return Encoded(Example(arrays), num_bytes)


def make_form(config: Config) -> Translation:
    """The form of a config's data. Raises UserError for languages that do not fit its sources."""
    data = config.data
    languages = None
    if data.language_column is None:
        languages = tuple(dict.fromkeys(data.languages))
        unknown = set(data.valid_languages) - set(languages)
        if unknown:
            raise unknown_language(min(unknown), languages, "data.valid_languages: ")
    elif data.languages or data.valid_languages:
        raise UserError(
            f"data.language_column={data.language_column} names each record's language, and "
            "data.languages each source's: leave one of them out"
        )
    source_len = data.source_len or config.seq_len
    return Translation(data, seq_len=config.seq_len, names=languages, source_len=source_len)


def _languages(data, side: str) -> Sequence[str | None]:
    """The language of each source in `data.train` or `data.valid`."""
    setting, languages = "data.languages", data.languages
    if side == "valid" and data.valid_languages:
        setting, languages = "data.valid_languages", data.valid_languages
    sources = getattr(data, side)
    if len(languages) < 2 or not sources:
        return [*(languages or [None])] * len(sources)
    if len(languages) != len(sources):
        raise UserError(
            f"{setting} has {len(languages)} languages for {len(sources)} sources in data.{side}: "
            f"give one for each{', in data.valid_languages' if side == 'valid' else ''}"
        )
    return languages


def unknown_language(language: str, known: Sequence[str], where: str = "") -> UserError:
    """The error for a language that the model was not told of."""
    there = ", ".join(map(repr, known)) or "none"
    return UserError(
        f"{where}{language!r} is not a target language of this model, which has {there}"
        f"{nearest(language, known)}"
    )


def tag(language: str) -> str:
    """The special piece that stands in front of a source whose target is in this language."""
    return f">>{language}<<"


def languages_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The target languages whose tags a tokenizer has."""
    found = (re.fullmatch(tag(f"({LANGUAGE.pattern})"), name) for name in tokenizer.special_ids)
    return tuple(match[1] for match in found if match)


def tag_ids(tokenizer: Tokenizer, language: str | None) -> list[int]:
    """The tag's id; none without a language. Raises UserError where it is no special piece."""
    if language is None:
        return []
    if (piece := tag(language)) not in tokenizer.special_ids:
        raise UserError(
            f"the tokenizer has no special piece {piece!r} for the language {language!r}: let one "
            "be learnt (tokenizer.kind=bpe), or add it to the tokenizer as a special token"
        )
    return [tokenizer.special_ids[piece]]


def encode_sources(
    tokenizer: Tokenizer, texts: Sequence[str], languages: Sequence[str | None]
) -> list[list[int]]:
    """What the encoder reads to translate each text into its language: tag, text, EOS."""
    return [
        [*tag_ids(tokenizer, language), *ids, tokenizer.eos_id]
        for ids, language in zip(tokenizer.source.encode_batch(texts), languages, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class ReferencePair:
    """A pair that translations are measured on."""

    source: list[int]
    """What the encoder reads."""
    reference: str
    language: str | None


def reference_pairs(prepared: Prepared, limit: int = 0) -> list[ReferencePair]:
    """Validation pairs, at most `limit` (0: all) of each source, always the same ones."""
    languages = {tag_ids(prepared.tokenizer, name)[0]: name for name in prepared.form.names}
    pairs = []
    for file in prepared.valid:
        for index in range(min(len(file), limit or len(file))):
            arrays = file.example(index)
            source = arrays["source"].tolist()
            reference = arrays["reference"].tobytes().decode()
            pairs.append(ReferencePair(source, reference, languages.get(source[0])))
    return pairs
