"""Memory in huge pages, for commands on Linux."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
FIRST_GLIBC = 2, 35
"""The first that knows the tunable."""


def ask_for_huge_pages() -> None:
    """Start this process again, the same command, with a malloc that asks for huge pages.

    A training step on CPUs gets its memory from Linux anew, and page by page: with pages of 2 MiB
    instead of 4 KiB a step takes nine tenths of the time. glibc asks for them only if its
    environment said so when the process began. Returns where it need not or cannot ask, where
    `GLIBC_TUNABLES` says already what to do (0: do not ask), and where a debugger or a profiler
    runs the command, which Python would have called `-m` until it has found it.
    """
    told = os.environ.get(TUNABLES, "")
    if TUNABLE in told or sys.argv[0] != "-m" or not _has_to_ask():
        return
    os.environ[TUNABLES] = f"{told}:{TUNABLE}=1".removeprefix(":")
    with contextlib.suppress(OSError):  # where a process may start no other
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def without_huge_pages(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a command of jaxlm has set for itself."""
    others = (t for t in environ.get(TUNABLES, "").split(":") if not t.startswith(f"{TUNABLE}="))
    return {**environ, TUNABLES: ":".join(others)}


def _has_to_ask() -> bool:
    try:
        library, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        given = HUGE_PAGES.read_text()
    except (AttributeError, ValueError, OSError):  # no Linux, another libc, a kernel without them
        return False
    known = tuple(int(part) for part in version.split(".")[:2]) >= FIRST_GLIBC
    return library == "glibc" and known and "[madvise]" in given and bool(sys.executable)
