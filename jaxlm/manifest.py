"""The manifest of a folder: size and SHA-256 of every file in it, written when all are there.

Its presence says that the folder is complete, its checksums that the folder is still as written.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Force every file to the disk, then declare the folder complete."""
    entries = sorted(folder.rglob("*"))
    files = [path for path in entries if path.is_file()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync, [*entries, folder, folder.parent]))
        digests = list(pool.map(sha256, files))
    manifest = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    _sync(draft)
    draft.rename(folder / MANIFEST)
    _sync(folder)


def verify(folder: str | Path) -> str | None:
    """What is wrong with a folder that has a manifest, as a short phrase; None if it is sound.

    Reads every byte.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    with ThreadPoolExecutor() as pool:
        problems = pool.map(partial(_file_problem, folder), expected.items())
        return next(filter(None, problems), None)


def _file_problem(folder: Path, expected: tuple[str, tuple[int, str]]) -> str | None:
    name, (size, digest) = expected
    try:
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        return None if sha256(folder / name) == digest else f"bytes changed in {name}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """fsync a file, or a folder's list of entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
