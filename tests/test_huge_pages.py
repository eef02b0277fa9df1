"""Commands ask for huge pages, once, where Linux waits to be asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm
from jaxlm import huge_pages
from jaxlm.bench.turns import peer_on
from jaxlm.huge_pages import TUNABLE, TUNABLES, ask_for_huge_pages

WAITS = "always [madvise] never"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Calls of exec on a glibc that knows the tunable and a Linux that waits to be asked."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv)))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.35", raising=False)
    monkeypatch.setattr(huge_pages, "HUGE_PAGES", tmp_path / "enabled")
    huge_pages.HUGE_PAGES.write_text(WAITS)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "jaxlm.train", "--a=b c"])
    monkeypatch.setattr(sys, "argv", ["-m", "--a=b c"])
    monkeypatch.setenv(TUNABLES, "")
    return calls


def test_the_same_command_starts_again_and_only_once(asked):
    ask_for_huge_pages()
    assert asked == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ[TUNABLES] == "glibc.malloc.hugetlb=1"
    ask_for_huge_pages()
    assert len(asked) == 1


def test_other_tunables_stay(asked, monkeypatch):
    monkeypatch.setenv(TUNABLES, "glibc.malloc.arena_max=2")
    ask_for_huge_pages()
    assert os.environ[TUNABLES] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


def test_a_benchmark_starts_others_without_what_it_has_itself(asked, monkeypatch):
    monkeypatch.setenv(TUNABLES, "glibc.malloc.arena_max=2")
    ask_for_huge_pages()
    assert peer_on("cpu") == os.environ | {
        TUNABLES: "glibc.malloc.arena_max=2",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.parametrize(
    ("libc", "kernel", "told"),
    [
        ("glibc 2.34", WAITS, ""),
        ("musl 1.2", WAITS, ""),
        (None, WAITS, ""),
        ("glibc 2.36", "[always] madvise never", ""),
        ("glibc 2.36", "always madvise [never]", ""),
        ("glibc 2.36", None, ""),
        ("glibc 2.36", WAITS, "glibc.malloc.hugetlb=0"),
    ],
)
def test_elsewhere_nothing_starts_again(libc, kernel, told, asked, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    monkeypatch.setenv(TUNABLES, told)
    if kernel is None:
        huge_pages.HUGE_PAGES.unlink()
    else:
        huge_pages.HUGE_PAGES.write_text(kernel)
    ask_for_huge_pages()
    assert not asked
    assert os.environ[TUNABLES] == told


def test_a_debugger_is_not_started_again(asked, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["debugger/__main__.py", "-m", "jaxlm.train", "--a=b c"])
    ask_for_huge_pages()
    assert not asked


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="shows no environments")
def test_a_command_has_them_and_an_import_does_not(tmp_path, monkeypatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    show = "print(open('/proc/self/environ').read())"

    def environment(*command: str) -> str:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=True
        ).stdout

    assert TUNABLE not in environment("-c", f"import jaxlm; {show}")
    commands = tmp_path / "jaxlm"
    commands.mkdir()
    package = Path(jaxlm.__file__).parent
    for name in ("__init__.py", "huge_pages.py"):
        shutil.copy(package / name, commands)
    (commands / "shown.py").write_text(show)
    monkeypatch.chdir(tmp_path)
    as_command = environment("-m", "jaxlm.shown")
    assert (f"{TUNABLE}=1" in as_command) == huge_pages._has_to_ask()
