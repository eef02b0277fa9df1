"""From what a config names (`data.train`, `data.valid`) to documents, one string at a time.

However large a source, a constant amount of it is in memory; its documents always come in the same
order.
"""

import glob
import hashlib
import importlib
import io
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.config import DataConfig
from jaxlm.errors import UserError, nearest

# A longer plain text becomes several documents, and so does, above the smaller bound, one that is
# more than this share of its source, of which validation text has to be held out.
MAX_DOCUMENT_BYTES = 4 << 20
MIN_CUT_BYTES = 2 << 10
LARGEST_SHARE = 1 / 64
# A longer line is not JSON lines, but something else in one line.
MAX_JSON_BYTES = 256 << 20
ROWS_AT_ONCE = 64
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass
class Counts:
    """What a pass over a source left out."""

    skipped: int = 0
    """Documents with invalid UTF-8, or null."""


def read_documents(spec: str, data: DataConfig, counts: Counts) -> Iterator[str]:
    """The documents of one source, in a fixed order; empty ones are left out.

    A plain text file is a document (above `max_document_bytes` several, cut at line ends), and so
    is every row of JSON lines, Parquet and datasets. With `data.on_bad=skip`, documents that are
    null or have invalid UTF-8 are left out and counted in `counts`.

    Raises UserError for a source that does not exist, a damaged file, a row without the text, and,
    with `data.on_bad=error`, invalid UTF-8 or null.
    """
    rows = _hf_rows(spec, data) if spec.startswith("hf:") else _file_rows(spec, data)
    for text, where in rows:
        if not isinstance(text, str):
            text = _decode(text, where, data, counts)
        if text:
            yield text


def max_document_bytes(spec: str, data: DataConfig) -> int:
    """The size above which a plain text is cut; smaller in a small source without `data.valid`.

    Raises UserError for a source that does not exist.
    """
    if data.valid or spec.startswith("hf:"):
        return MAX_DOCUMENT_BYTES
    size = 0
    for path in list_files(spec):
        with _readable(path):
            size += path.stat().st_size
    return min(MAX_DOCUMENT_BYTES, max(MIN_CUT_BYTES, int(size * LARGEST_SHARE)))


def source_fingerprint(spec: str) -> str:
    """A digest that changes when the source does; it reads names, sizes and times, not texts.

    Raises UserError for a source that does not exist.
    """
    if spec.startswith("hf:"):
        return _load_hf(spec)._fingerprint
    identity: list[Any] = []
    for path in list_files(spec):
        with _readable(path):
            stat = path.stat()
        if spec == "stdlib":
            identity.append((str(path.relative_to(_stdlib())), stat.st_size, sys.version))
        else:
            identity.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def list_files(spec: str) -> list[Path]:
    """The files of a source, sorted. Raises UserError where there are none."""
    if spec == "stdlib":
        files = [f for f in _walk(_stdlib(), NOT_STDLIB) if f.suffix == ".py"]
        return files or _no_files(spec, f"{_stdlib()} has no .py file: name other text")
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return list(_walk(path)) or _no_files(spec, "the folder has no file (hidden ones aside)")
    if glob.has_magic(spec):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        return [f for f in matches if f.is_file()] or _no_files(spec, _only_matches(matches))
    return _no_files(spec, _why_missing(spec, path))


def _only_matches(matches: list[Path]) -> str:
    folder = next(filter(Path.is_dir, matches), None)
    if folder is None:
        return "no file matches"
    return f"it matches the folder {folder} and no file: name the folder, to read all that is in it"


def _why_missing(spec: str, path: Path) -> str:
    if path.exists():
        return "it is neither a file nor a folder"
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which does not exist"
    if "," in spec:
        return f"there is no such file or folder; a list is written [{spec}]"
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    return f"there is no such file or folder{nearest(path.name, [*beside, 'stdlib'])}"


def _no_files(spec: str, reason: str) -> list[Path]:
    raise UserError(f"data source {spec!r}: {reason}")


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _walk(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """The files below `folder`, sorted, without hidden ones and the folders named `without`."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in without and not f.startswith("."))
        paths = (Path(parent, f) for f in sorted(files) if not f.startswith("."))
        yield from filter(Path.is_file, paths)


# A row is its text (bytes where it may not be UTF-8) and where it stands, for messages: the file,
# perhaps with a line or row, and the number of its first byte there.
Where = tuple[str, int]
Rows = Iterator[tuple[str | bytes | None, Where]]


def _file_rows(spec: str, data: DataConfig) -> Rows:
    max_bytes = max_document_bytes(spec, data)
    for path in list_files(spec):
        name = path.name.lower()
        with _readable(path):
            if name.endswith(".parquet"):
                yield from _parquet_rows(path, data.text_field)
            elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
                yield from _json_rows(path, data.text_field)
            else:
                yield from _plain_rows(path, max_bytes)


def _plain_rows(path: Path, max_bytes: int) -> Rows:
    start, rest = 0, b""
    with _open(path) as file:
        while block := rest + file.read(MAX_DOCUMENT_BYTES - len(rest)):
            size = _last_cut(block) if len(block) == MAX_DOCUMENT_BYTES else len(block)
            for piece in _pieces(block[:size], max_bytes):
                yield piece, (str(path), start)
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


def _json_rows(path: Path, field: str) -> Rows:
    start = 0
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES), b""), 1):
            where = f"{path}, line {number}"
            if len(line) == MAX_JSON_BYTES:
                raise UserError(
                    f"{where} is longer than {MAX_JSON_BYTES >> 20} MiB: .jsonl files have one "
                    "JSON object a line"
                )
            if line.strip():
                yield _json_text(line, where, field), (where, start)
            start += len(line)


def _json_text(line: bytes, where: str, field: str) -> str | bytes:
    """The text in a line; as bytes where these are not valid UTF-8."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError) as error:
        # Without the place, which counts from the start of the line.
        reason = getattr(error, "msg", error)
        raise UserError(f"{where} is not JSON ({reason}): write one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object: write one with a field {field!r}")
    if field not in record:
        raise _no_field(where, field, list(record))
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds {str(text)[:40]!r}, which is not a string")
    # An escape such as \ud800 can spell half of a surrogate pair, which is no Unicode text.
    return text if text.isascii() else text.encode("utf-8", errors="surrogatepass")


def _parquet_rows(path: Path, field: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise _no_field(str(path), field, schema.names)
        kind = schema.field(field).type
        by_index = pyarrow.types.is_dictionary(kind)
        if (kind.value_type if by_index else kind) not in (
            pyarrow.string(),
            pyarrow.large_string(),
        ):
            raise UserError(f"{path}: column {field!r} holds {kind}, not strings")
        row = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[field]):
            texts = batch.column(0).dictionary_decode() if by_index else batch.column(0)
            # As binary, because the strings of a Parquet file need not be valid UTF-8.
            for text in texts.cast(pyarrow.large_binary()).to_pylist():
                row += 1
                yield text, (f"{path}, row {row}", 0)


def _hf_rows(spec: str, data: DataConfig) -> Rows:
    dataset, field = _load_hf(spec), data.text_field
    if field not in dataset.column_names:
        raise _no_field(spec, field, dataset.column_names)
    row = 0
    for batch in dataset.select_columns([field]).iter(batch_size=ROWS_AT_ONCE):
        for text in batch[field]:
            row += 1
            where = f"{spec}, row {row}"
            if not isinstance(text, str):
                raise UserError(f"{where}: {field!r} holds {str(text)[:40]!r}, not a string")
            yield text, (where, 0)


def _load_hf(spec: str) -> Any:
    """The memory-mapped `datasets.Dataset` of `hf:NAME_OR_PATH[@CONFIG][:SPLIT]`."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"data source {spec!r} needs the package datasets: pip install datasets, or 'jaxlm[hf]'"
        ) from error
    # It would report every attempt to reach the hub.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    place, _, split = spec.removeprefix("hf:").partition(":")
    name, _, config = place.partition("@")
    name = os.path.expanduser(name)
    # A name on the hub has one slash at most.
    if (name.startswith(("/", ".")) or name.count("/") > 1) and not Path(name).exists():
        raise UserError(f"data source {spec!r} cannot be loaded: there is no such file or folder")
    saved = ("state.json", "dataset_dict.json")
    try:
        if any(Path(name, file).is_file() for file in saved):
            loaded = datasets.load_from_disk(name)
            return loaded[split or "train"] if isinstance(loaded, dict) else loaded
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # a hub's, a file's and a network's errors share no other class
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"data source {spec!r} cannot be loaded: {reason}") from error


def _no_field(where: str, field: str, fields: list[str]) -> UserError:
    there = ", ".join(map(repr, fields[:8])) or "no field"
    return UserError(
        f"{where} has no field {field!r} but {there}: set data.text_field to the one with the text"
    )


def _decode(raw: bytes | None, where: Where, data: DataConfig, counts: Counts) -> str | None:
    place, start = where
    try:
        if raw is not None:
            return raw.decode("utf-8")
        if data.on_bad == "error":
            raise UserError(
                f"{place}: field {data.text_field!r} is null, not a string: give it text, or set "
                "data.on_bad=skip to leave it out"
            )
    except UnicodeDecodeError as error:
        if data.on_bad == "error":
            raise UserError(
                f"{place}: byte {start + error.start} is not valid UTF-8: convert the text, or set "
                "data.on_bad=skip to leave it out"
            ) from error
    counts.skipped += 1
    return None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as file:
            yield file
    else:
        # pyarrow, unlike the codecs' own packages, raises for a file that was cut off in every one.
        import pyarrow

        with pyarrow.input_stream(str(path), compression=compression) as file:
            yield io.BufferedReader(file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the operating system or pyarrow raises for `path` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's exceptions derive from one of these
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(
            f"cannot read {path}: {reason}: mend it, or take it out of the data"
        ) from error
