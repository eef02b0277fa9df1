"""Folders that are made once: complete or not there, whoever makes them and however it ends.

A folder is made under the name `KEY.partial` and renamed when it is finished. Its maker holds a
lock on `KEY.lock` that the operating system takes away when the process ends, even when it is
killed. So a partial folder whose lock is free has lost its maker and can be removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.errors import UserError

T = TypeVar("T")
Report = Callable[[str], None]


def cache_folder(configured: str | None) -> Path:
    """Where token files are kept: as configured, or the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def cache_key(kind: str, facts: dict[str, Any]) -> str:
    """A folder's name: its kind and a digest of everything its content depends on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:24]}"


def cached(
    folder: Path, opened: Callable[[Path], T], make: Callable[[Path], None], report: Report
) -> T:
    """`opened(folder)`, after `make(partial folder)` where there is none yet.

    Where `opened` raises UserError, the folder is damaged and made again. Of several processes one
    makes the folder and the others wait. Raises UserError where nothing can be written.
    """
    if (result := _open(folder, opened)) is not None:
        return result
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, report):
            if (result := _open(folder, opened, report)) is not None:
                return result
            _remove_orphans(folder.parent)
            partial = _beside(folder, ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}): set data.cache to a folder with "
            "room that can be written"
        ) from error
    return opened(folder)


def _open(
    folder: Path, opened: Callable[[Path], T], report: Report = lambda line: None
) -> T | None:
    if not folder.exists():
        return None
    try:
        return opened(folder)
    except UserError as error:
        report(f"damaged, so made again: {error}")
        return None


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


@contextmanager
def _lock(folder: Path, report: Report) -> Iterator[None]:
    with _beside(folder, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that makes {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_orphans(cache: Path) -> None:
    """Remove the partial folders of processes that died."""
    for partial in cache.glob("*.partial"):
        with _beside(partial.with_suffix(""), ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(partial, ignore_errors=True)
