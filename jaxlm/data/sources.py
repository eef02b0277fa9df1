"""From what a config names (`data.train`, `data.valid`) to documents, one string at a time.

However large a source, a constant amount of it is in memory; its documents always come in the same
order.
"""

from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.files import list_files, open_file, readable
from jaxlm.data.records import (
    JSON_LINES,
    PARQUET,
    TSV,
    Column,
    Counts,
    Record,
    dataset_records,
    file_records,
    usable,
)
from jaxlm.data_config import DataConfig

# A longer plain text becomes several documents, and so does, above the smaller bound, one that is
# more than this share of its source, of which validation text has to be held out.
MAX_DOCUMENT_BYTES = 4 << 20
MIN_CUT_BYTES = 2 << 10
LARGEST_SHARE = 1 / 64


def text_column(data: DataConfig) -> Column:
    """The column of the texts, in a TSV without a header the second."""
    # Its usual name names no column of such a TSV.
    return Column(
        "text", "data.text_field", None if data.text_field == "text" else data.text_field, 2
    )


def read_documents(
    spec: str, data: DataConfig, counts: Counts, tables: bool = False
) -> Iterator[str]:
    """The documents of one source, in a fixed order; empty ones are left out, and so are all where
    none has more than white space.

    A plain text file is a document (above `max_document_bytes` several, cut at line ends), and so
    is every row of JSON lines, Parquet and datasets and, with `tables`, of TSV. With
    `data.on_bad=skip`, documents that are null or have invalid UTF-8 are left out and counted in
    `counts`.

    Raises UserError for a source that does not exist, a damaged file, a row without the text, and,
    with `data.on_bad=error`, invalid UTF-8 or null.
    """
    column = text_column(data)
    if spec.startswith("hf:"):
        records = dataset_records(spec, [column])
    else:
        records = _file_records(
            spec, data, column, (*JSON_LINES, *PARQUET, *(TSV if tables else ()))
        )
    texts = usable(records, lambda record: record.text(column, empty=True), data, counts)
    texts = filter(None, texts)
    held = []
    for text in texts:
        held.append(text)
        if text.strip():
            yield from held
            yield from texts


def max_document_bytes(spec: str, data: DataConfig) -> int:
    """The size above which a plain text is cut; smaller in a small source without `data.valid`.

    Raises UserError for a source that does not exist.
    """
    if data.valid or spec.startswith("hf:"):
        return MAX_DOCUMENT_BYTES
    size = 0
    for path in list_files(spec):
        with readable(path):
            size += path.stat().st_size
    return min(MAX_DOCUMENT_BYTES, max(MIN_CUT_BYTES, int(size * LARGEST_SHARE)))


def _file_records(
    spec: str, data: DataConfig, column: Column, endings: tuple[str, ...]
) -> Iterator[Record]:
    max_bytes = max_document_bytes(spec, data)
    for path in list_files(spec):
        with readable(path):
            if path.name.lower().endswith(endings):
                yield from file_records(path, data, [column])
            else:
                yield from _plain_records(path, max_bytes, column)


def _plain_records(path: Path, max_bytes: int, column: Column) -> Iterator[Record]:
    start, rest = 0, b""
    with open_file(path) as file:
        while block := rest + file.read(MAX_DOCUMENT_BYTES - len(rest)):
            size = _last_cut(block) if len(block) == MAX_DOCUMENT_BYTES else len(block)
            for piece in _pieces(block[:size], max_bytes):
                yield Record(str(path), {column.name: piece}, start=start)
            start += size
            rest = block[size:]


def _pieces(block: bytes, max_bytes: int) -> Iterator[bytes]:
    """Cut `block` at line ends; one with invalid UTF-8 stays whole, to be skipped as a whole."""
    start = 0
    while len(block) - start > max_bytes and (start or _is_utf8(block)):
        size = _last_cut(block[start : start + max_bytes])
        yield block[start : start + size]
        start += size
    yield block[start:]


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _last_cut(block: bytes) -> int:
    """Where `block` can be cut: after its last line, or else before its last UTF-8 character."""
    after_line = block.rfind(b"\n") + 1
    if after_line:
        return after_line
    continuations = (n for n in range(1, 4) if block[-n] & 0xC0 != 0x80)
    return len(block) - next(continuations, 4)
