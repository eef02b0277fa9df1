"""The files and datasets that a source names: found, fingerprinted, opened, decompressed."""

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
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.errors import UserError, nearest, nearest_path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_fingerprint(spec: str) -> str:
    """A digest that changes when the source does; it reads names, sizes and times, not texts.

    Raises UserError for a source that does not exist or is empty.
    """
    if spec.startswith("hf:"):
        return load_hf(spec)._fingerprint
    identity: list[Any] = []
    size = 0
    for path in list_files(spec):
        with readable(path):
            stat = path.stat()
        size += stat.st_size
        if spec == "stdlib":
            identity.append((str(path.relative_to(_stdlib())), stat.st_size, sys.version))
        else:
            identity.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    if not size:
        what = "the file is empty" if len(identity) == 1 else f"all {len(identity)} files are empty"
        raise UserError(f"data source {spec!r}: {what} (0 bytes): give it text")
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
    near = nearest(spec, ["stdlib"]) or nearest_path(path)
    return f"there is no such file or folder{near}"


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


def load_hf(spec: str) -> Any:
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


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
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
def readable(path: Path) -> Iterator[None]:
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
