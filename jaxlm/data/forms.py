"""Forms: what a task makes of its sources, from items of text to rows of tokens.

Preparing is the same for all tasks: a tokenizer learns from the training text, a share of the items
is held out by a hash, threads encode, files are written. A form says what the items are.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.data.examples import EXAMPLE_FORMAT, Example, ExampleFile, ExampleWriter, PackedRows
from jaxlm.data.loader import Rows
from jaxlm.data.records import Column, Counts, Record, read_records, usable
from jaxlm.data.sources import max_document_bytes, read_documents
from jaxlm.data.tokens import FORMAT, Row, TokenFile, TokenWriter, token_dtype
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

MOST_NAMES = 12  # that a line shows


@dataclasses.dataclass(frozen=True)
class Origin:
    """One entry of `data.train` or `data.valid`."""

    spec: str
    language: str | None = None
    """The target language of all its records, where the config names one."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An item as a writer takes it."""

    content: np.ndarray | Example | None
    """A document's token ids [n], an example, or None for what is too long for one."""
    num_bytes: int
    """UTF-8 bytes of its text."""


@dataclasses.dataclass(frozen=True)
class Form(ABC):
    """What a task makes of its sources. An item is one of what it reads: a document, a pair."""

    data: DataConfig

    format: ClassVar[int]
    """The version of the files it writes."""
    kind: ClassVar[str]
    """What those files are called."""
    item: ClassVar[str]
    """What an item is called."""
    bad: ClassVar[str]
    """What was wrong with those that were left out."""
    names: ClassVar[tuple[str, ...] | None]
    """Labels, or languages; None: still to be found, by `name_of` all training items."""

    def origins(self, side: str) -> list[Origin]:
        """The entries of `data.train` or `data.valid`."""
        return [Origin(spec) for spec in getattr(self.data, side)]

    @abstractmethod
    def items(self, origin: Origin, counts: Counts) -> Iterator[Any]:
        """The items of a source, in a fixed order. Raises UserError as `read_records` does."""

    @abstractmethod
    def key(self, item: Any) -> str:
        """The text whose hash decides whether an item is held out."""

    @abstractmethod
    def texts(self, item: Any) -> Sequence[str]:
        """What a tokenizer learns from."""

    @property
    def controls(self) -> tuple[str, ...]:
        """Special pieces that a tokenizer learns for this task."""
        return ()

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer as the task uses it. Raises UserError for one without what that takes."""
        if tokenizer.loses_spaces:
            raise UserError(
                "the tokenizer has word pieces, which lose a text's spaces: a model that writes "
                "texts needs one that gives them back"
            )
        return tokenizer

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the items depend on, sources aside."""

    def origin_facts(self, origin: Origin) -> dict[str, Any]:
        """What the items of one source depend on besides."""
        return {}

    def encoding_facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the files depend on, beyond the items and the tokenizer's model."""
        return {}

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, items: Sequence[Any]) -> list[Encoded]:
        """The items in tokens; called by several threads at once."""

    @abstractmethod
    def writer(self, path: Path, tokenizer: Tokenizer) -> TokenWriter | ExampleWriter:
        """Where the encoded items go."""

    @abstractmethod
    def open(self, path: Path) -> TokenFile | ExampleFile:
        """What a writer left. Raises UserError where that is damaged."""

    @abstractmethod
    def rows(self, file: Any, seq_len: int) -> Sequence[Row]:
        """The rows of a file, by their index."""

    @abstractmethod
    def summary(self, kept: Any, held_out: Any, how: str) -> str:
        """A line that says what a source came to."""

    def skipped(self, file: Any) -> str:
        """How many items of a file were left out as bad, and where the first of them is."""
        first = f" (the first: {file.first_skipped})" if file.first_skipped else ""
        return f"{counted(file.num_skipped, self.item)} skipped as {self.bad}{first}"


@dataclasses.dataclass(frozen=True)
class Documents(Form):
    """Documents, for language modelling."""

    format = FORMAT
    kind = "tokens"
    item = "document"
    bad = "invalid UTF-8 or null"
    names = ()

    def items(self, origin: Origin, counts: Counts) -> Iterator[str]:
        return read_documents(origin.spec, self.data, counts)

    def key(self, item: str) -> str:
        return item

    def texts(self, item: str) -> Sequence[str]:
        return [item]

    def facts(self) -> dict[str, Any]:
        return {"text_field": self.data.text_field}

    def origin_facts(self, origin: Origin) -> dict[str, Any]:
        return {"max_document_bytes": max_document_bytes(origin.spec, self.data)}

    def encode(self, tokenizer: Tokenizer, items: Sequence[str]) -> list[Encoded]:
        begin, end = self.ends(tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        return [
            Encoded(np.array([*begin, *ids, *end], dtype), len(text.encode()))
            for text, ids in zip(items, tokenizer.encode_batch(items), strict=True)
        ]

    def ends(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """What stands before and behind each document."""
        return [tokenizer.bos_id], [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def writer(self, path: Path, tokenizer: Tokenizer) -> TokenWriter:
        return TokenWriter(path, token_dtype(tokenizer.vocab_size))

    def open(self, path: Path) -> TokenFile:
        return TokenFile(path)

    def rows(self, file: TokenFile, seq_len: int) -> Rows:
        return Rows(file, seq_len)

    def summary(self, kept: TokenFile, held_out: TokenFile, how: str) -> str:
        summary = f"{kept.num_tokens + held_out.num_tokens:,} tokens {how}"
        if len(held_out):
            tokens = f"{held_out.num_tokens:,} tokens"
            summary += f", {counted(len(held_out), 'document')} ({tokens}) held out"
        if kept.num_skipped:
            summary += f", {self.skipped(kept)}"
        return summary


@dataclasses.dataclass(frozen=True)
class Examples(Form):
    """Records that become packed examples: what all tasks but language modelling have in common.

    A task says which columns it reads, how a record becomes an item, and an item its arrays:
    `tokens`, `targets` and `weights` [n], `source` [m] for an encoder, and what else it keeps.
    """

    seq_len: int
    """Tokens in a row."""
    names: tuple[str, ...] | None

    format = EXAMPLE_FORMAT
    kind = "examples"
    item = "record"
    bad = "empty, null or invalid UTF-8"

    columns: ClassVar[tuple[Column, ...]]

    @abstractmethod
    def read(self, record: Record, origin: Origin) -> Any:
        """The item of a record. Raises BadRecord as `data.on_bad` has it, UserError for others."""

    @abstractmethod
    def dtypes(self, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """The types in which an example's arrays are stored."""

    @property
    def lengths(self) -> dict[str, int]:
        """The size of a row on each side, by the array that fills it."""
        return {"tokens": self.seq_len}

    def items(self, origin: Origin, counts: Counts) -> Iterator[Any]:
        records = read_records(origin.spec, self.data, self.columns)
        return usable(records, partial(self.read, origin=origin), self.data, counts)

    def facts(self) -> dict[str, Any]:
        columns = {column.name: column.given for column in self.columns}
        return {"task": type(self).__name__, "columns": columns, "header": self.data.tsv_header}

    def origin_facts(self, origin: Origin) -> dict[str, Any]:
        return {"language": origin.language}

    def encoding_facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return {"lengths": self.lengths, "names": self.names}

    def writer(self, path: Path, tokenizer: Tokenizer) -> ExampleWriter:
        return ExampleWriter(path, self.dtypes(tokenizer), self.lengths)

    def open(self, path: Path) -> ExampleFile:
        return ExampleFile(path)

    def rows(self, file: ExampleFile, seq_len: int) -> PackedRows:
        return PackedRows(file)

    def summary(self, kept: ExampleFile, held_out: ExampleFile, how: str) -> str:
        files = kept, held_out
        tokens = sum(file.num_tokens for file in files)
        parts = [f"{counted(sum(map(len, files)), 'example')} of {tokens:,} tokens {how}"]
        if len(held_out):
            parts.append(f"{len(held_out):,} held out")
        if dropped := sum(file.num_dropped for file in files):
            lengths = " or ".join(f"{n} tokens ({side})" for side, n in self._by_side(self.lengths))
            parts.append(f"{dropped:,} left out as longer than {lengths}")
        if cut := sum(file.num_cut for file in files):
            parts.append(f"{cut:,} cut to {self.seq_len} tokens")
        if kept.num_skipped:
            parts.append(self.skipped(kept))
        padding = (f"{share:.1%} ({side})" for side, share in self._by_side(kept.padding))
        parts.append(f"{counted(len(kept.rows) - 1, 'row')}, padding {', '.join(padding)}")
        return ", ".join(parts)

    def _by_side(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Values with the names of their sides."""
        names = {"tokens": "target" if "source" in values else "text"}
        return [(names.get(side, side), value) for side, value in values.items()]


class NamedExamples(Examples):
    """Examples with labels or languages, which a config may leave to be found."""

    name: ClassVar[str]
    """What one of them is called."""

    @abstractmethod
    def name_of(self, item: Any) -> str:
        """An item's label or language."""

    @abstractmethod
    def with_names(self, found: Mapping[str, int]) -> "NamedExamples":
        """This form, with the names that the training items have; `found` counts the items.

        Raises UserError for names that cannot be meant.
        """

    def names_line(self, found: Mapping[str, int]) -> str:
        """How many items have each name, of very many the first."""
        names = [f"{name} {found[name]:,}" for name in self.names[:MOST_NAMES]]
        more = ", ..." if len(self.names) > MOST_NAMES else ""
        return f"{counted(len(self.names), self.name)}: {', '.join(names)}{more}"


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
