"""Records: the rows of TSV, JSON lines, Parquet and datasets, as named fields.

A `.tsv` file has one record a line and tabs between its columns, without quoting or escapes. A
column is named by its number from 1, or by the name that the first line gives it where
`data.tsv_header` says that there is one. A name with dots reaches into nested fields of the other
formats: `translation.de` is `record["translation"]["de"]`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.data.files import list_files, load_hf, open_file, readable
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError, nearest

T = TypeVar("T")
# A longer line is not one record, but something else in one line.
MAX_LINE_BYTES = 256 << 20
ROWS_AT_ONCE = 64
TSV = (".tsv", ".tsv.gz", ".tsv.zst")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)


class BadRecord(UserError):
    """A record with an empty, null or invalid text: `data.on_bad` says what becomes of it."""

    def __init__(self, problem: str):
        """`problem` says where it is, what is wrong, and what would be right."""
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}, or set data.on_bad=skip to leave it out"


@dataclass
class Counts:
    """What a pass over a source left out."""

    skipped: int = 0
    """Documents with invalid UTF-8, or null; records with an empty field besides."""
    first: str | None = None
    """The `problem` of the first of them."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {"num_skipped": self.skipped, "first_skipped": self.first}


@dataclass(frozen=True)
class Column:
    """A field that a task reads of its records."""

    name: str
    """What it holds; also what it is called, unless the user says otherwise."""
    setting: str
    """Where the user says otherwise: a field of the config."""
    given: str | None = None
    """What the user called it."""
    number: int | None = None
    """Its place in a TSV without a header, from 1."""
    optional: bool = False
    """Whether a record may lack it."""

    @property
    def field(self) -> str:
        """What it is called."""
        return self.given or self.name

    def find(self, row: dict[str, Any], default: Any = None) -> Any:
        """Its value in a row of named fields."""
        if self.field in row:
            return row[self.field]
        for part in self.field.split("."):
            if not isinstance(row, dict) or part not in row:
                return default
            row = row[part]
        return row


@dataclass(frozen=True)
class Record:
    """One row of a source."""

    where: str
    """Its file with its line or row, for messages."""
    values: dict[str, Any]
    """What it has of the columns, by their `name`; bytes where these may be invalid UTF-8."""
    fields: Sequence[str] = ()
    """The names of all its fields, for messages."""
    start: int | None = None
    """The number, in the file, of the byte its bytes begin with; None: they are a field's."""

    def text(self, column: Column, empty: bool = False) -> str:
        """The text of a column.

        Raises BadRecord where it is null, not valid Unicode or, unless `empty`, nothing but white
        space; UserError where the record lacks it or it is no string.
        """
        value = self.value(column)
        if isinstance(value, str) and not value.isascii():
            # An escape such as \ud800 can spell half of a surrogate pair: no Unicode text.
            value = value.encode("utf-8", errors="surrogatepass")
        if isinstance(value, bytes):
            value = self._decode(value, column)
        if not isinstance(value, str):
            raise UserError(
                f"{self.where}: field {column.field!r} holds {str(value)[:40]!r}, which is not a "
                "string"
            )
        if not empty and not value.strip():
            raise self.bad(f"field {column.field!r} is empty", "fill it")
        return value

    def value(self, column: Column) -> Any:
        """What a column holds. Raises BadRecord for null, UserError where the record lacks it."""
        if column.name not in self.values:
            raise missing(self.where, column, self.fields)
        if (value := self.values[column.name]) is None:
            raise self.bad(f"field {column.field!r} is null, not a string", "give it text")
        return value

    def bad(self, problem: str, remedy: str) -> BadRecord:
        """The error for a record that can be left out."""
        return BadRecord(f"{self.where}: {problem}: {remedy}")

    def _decode(self, value: bytes, column: Column) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            within = f"byte {error.start} of field {column.field!r}"
            place = within if self.start is None else f"byte {self.start + error.start}"
            raise self.bad(f"{place} is not valid UTF-8", "convert the text to it") from error


def usable(
    records: Iterator[Record], read: Callable[[Record], T], data: DataConfig, counts: Counts
) -> Iterator[T]:
    """`read` of each record, without those it raises BadRecord for, which `counts` counts.

    Raises BadRecord with `data.on_bad=error`.
    """
    for record in records:
        try:
            item = read(record)
        except BadRecord as error:
            if data.on_bad == "error":
                raise
            counts.skipped += 1
            counts.first = counts.first or error.problem
        else:
            yield item


def read_records(spec: str, data: DataConfig, columns: Sequence[Column]) -> Iterator[Record]:
    """The records of one source, in a fixed order.

    Raises UserError for a source that does not exist, a damaged file, one whose format has no
    records, and a record without one of the columns.
    """
    if spec.startswith("hf:"):
        yield from dataset_records(spec, columns)
        return
    if spec == "stdlib":
        names = " and ".join(column.name for column in columns if column.number)
        raise UserError(
            f"data source 'stdlib', which data.train is if it is not set, has no {names}: give "
            f"{', '.join((*TSV[:1], *JSON_LINES[:1], *PARQUET))} or hf:NAME with those"
        )
    for path in list_files(spec):
        with readable(path):
            yield from file_records(path, data, columns)


def file_records(path: Path, data: DataConfig, columns: Sequence[Column]) -> Iterator[Record]:
    """The records of one file."""
    name = path.name.lower()
    if name.endswith(TSV):
        return _tsv_records(path, data, columns)
    if name.endswith(JSON_LINES):
        return _json_records(path, columns)
    if name.endswith(PARQUET):
        return _parquet_records(path, columns)
    raise UserError(
        f"{path} has no records with fields: give {', '.join((*TSV, *JSON_LINES, *PARQUET))} or "
        "hf:NAME"
    )


def _lines(path: Path) -> Iterator[tuple[bytes, str, int]]:
    """The lines of a file that are not blank, where each stands, and its first byte's number."""
    start = 0
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            where = f"{path}, line {number}"
            if len(line) == MAX_LINE_BYTES:
                raise UserError(
                    f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB: a file of this kind has "
                    "one record a line"
                )
            if start == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{path} begins as UTF-16 does: convert it to UTF-8")
            if line.strip():
                yield line, where, start
            start += len(line)


def _tsv_records(path: Path, data: DataConfig, columns: Sequence[Column]) -> Iterator[Record]:
    lines = _lines(path)
    header = None
    if data.tsv_header:
        first = next(lines, None)
        if first is None:
            return
        header = [name.decode("utf-8-sig", errors="replace") for name in _cells(first[0])]
    places = {c: _tsv_place(c, header, path) for c in columns}
    places = {c: place for c, place in places.items() if place is not None}
    for line, where, start in lines:
        cells = _cells(line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line)
        values = {c.name: cells[n] for c, n in places.items() if n < len(cells)}
        if len(values) < len(places):
            _check_width(where, places, len(cells))
        yield Record(where, values)


def _cells(line: bytes) -> list[bytes]:
    return line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")


def _tsv_place(column: Column, header: list[str] | None, path: Path) -> int | None:
    """The index of a column in a line; None for one that is not there and need not be."""
    if header is not None and column.field in header:
        return header.index(column.field)
    if column.given is not None and column.given.isdecimal() and int(column.given) > 0:
        return int(column.given) - 1
    if header is not None:
        if column.optional:
            return None
        raise missing(f"{path}, line 1", column, header)
    if column.given is not None:
        raise UserError(
            f"{column.setting}={column.given} names a column, but {path} is taken to have no "
            "header: give the column's number, or set data.tsv_header=true"
        )
    return None if column.number is None else column.number - 1


def _check_width(where: str, places: dict[Column, int], width: int) -> None:
    for column, place in places.items():
        if place >= width and not column.optional:
            raise UserError(
                f"{where} has {width} column{'' if width == 1 else 's'}, but its {column.name} "
                f"should be in column {place + 1}: put tabs between columns, or set "
                f"{column.setting}"
            )


def _json_records(path: Path, columns: Sequence[Column]) -> Iterator[Record]:
    for line, where, start in _lines(path):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            # Whichever field is asked for, the line is invalid UTF-8.
            yield Record(where, dict.fromkeys((c.name for c in columns), line), start=start)
            continue
        except (ValueError, RecursionError) as error:
            # Without the place, which counts from the start of the line.
            reason = getattr(error, "msg", error)
            raise UserError(f"{where} is not JSON ({reason}): write one object a line") from error
        if not isinstance(row, dict):
            fields = " and ".join(repr(c.field) for c in columns if not c.optional)
            raise UserError(f"{where} is not a JSON object: write one with a field {fields}")
        yield Record(where, _values(row, columns), list(row), start)


_ABSENT = object()


def _values(row: dict[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    found = ((c.name, c.find(row, _ABSENT)) for c in columns)
    return {name: value for name, value in found if value is not _ABSENT}


def _parquet_records(path: Path, columns: Sequence[Column]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = _wanted(str(path), columns, names)
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
            arrays = []
            for array in batch.columns:
                if pyarrow.types.is_dictionary(array.type):
                    array = array.dictionary_decode()
                if array.type in (pyarrow.string(), pyarrow.large_string()):
                    # The strings of a Parquet file need not be valid UTF-8.
                    array = array.cast(pyarrow.large_binary())
                arrays.append(array.to_pylist())
            for values in zip(*arrays, strict=True):
                number += 1
                row = dict(zip(batch.schema.names, values, strict=True))
                yield Record(f"{path}, row {number}", _values(row, columns), names)


def dataset_records(spec: str, columns: Sequence[Column]) -> Iterator[Record]:
    """The records of `hf:NAME`; classes have their names."""
    dataset = load_hf(spec)
    names = dataset.column_names
    dataset = dataset.select_columns(_wanted(spec, columns, names))
    classes = {
        name: feature.names
        for name, feature in dataset.features.items()
        if hasattr(feature, "int2str")
    }
    number = 0
    for batch in dataset.iter(batch_size=ROWS_AT_ONCE):
        for name, classes_of in classes.items():
            # Unlabelled rows have no class, or -1.
            known = range(len(classes_of))
            batch[name] = [classes_of[n] if n in known else None for n in batch[name]]
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            yield Record(f"{spec}, row {number}", _values(row, columns), names)


def _wanted(where: str, columns: Sequence[Column], names: list[str]) -> list[str]:
    """The names, of those a table has, that columns are or lie in."""
    wanted = []
    for column in columns:
        options = (column.field, column.field.partition(".")[0])
        name = next((name for name in options if name in names), None)
        if name is None and not column.optional:
            raise missing(where, column, names)
        wanted.append(name)
    return list(dict.fromkeys(filter(None, wanted)))


def missing(where: str, column: Column, names: Sequence[str]) -> UserError:
    """The error for a column that is not there."""
    there = ", ".join(map(repr, names[:8])) or "no field"
    return UserError(
        f"{where} has no field {column.field!r} but {there}{nearest(column.field, names)}: set "
        f"{column.setting} to the one with the {column.name}"
    )
