"""Folders made once: by whom they are made, and what is left when that fails."""

import threading
import time
from pathlib import Path

import pytest

from jaxlm.data.cache import cache_folder, cache_key, cached
from jaxlm.errors import UserError


def opened(folder):
    text = (folder / "file").read_text()
    if text == "damaged":
        raise UserError(f"{folder} is damaged")
    return text


def maker(text, calls):
    def make(folder):
        calls.append(folder)
        (folder / "file").write_text(text)

    return make


def test_is_made_once_and_then_opened(tmp_path):
    calls = []
    for _ in range(3):
        assert cached(tmp_path / "new" / "key", opened, maker("x", calls), print) == "x"
    assert calls == [tmp_path / "new" / "key.partial"]


def test_a_failure_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "file").write_text("half")
        raise UserError("no more text")

    with pytest.raises(UserError, match="no more text"):
        cached(tmp_path / "key", opened, make, print)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_damaged_folders_are_made_again_and_it_is_said_once(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "file").write_text("damaged")
    lines = []
    assert cached(tmp_path / "key", opened, maker("sound", []), lines.append) == "sound"
    assert lines == [f"damaged, so made again: {tmp_path}/key is damaged"]


def test_what_dead_processes_left_is_removed(tmp_path):
    for name in ("key.partial", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    assert cached(tmp_path / "key", opened, maker("x", []), print) == "x"
    assert not list(tmp_path.glob("*.partial"))


def test_one_makes_while_the_others_wait(tmp_path):
    calls, lines, results = [], [], []

    def make(folder):
        time.sleep(0.2)
        maker("x", calls)(folder)

    def run():
        results.append(cached(tmp_path / "key", opened, make, lines.append))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    # Cleaning up for another key must not touch what is being made.
    time.sleep(0.1)
    cached(tmp_path / "other", opened, maker("y", []), print)
    for thread in threads:
        thread.join()
    assert results == ["x"] * 4
    assert len(calls) == 1
    assert lines == [f"waiting for another process that makes {tmp_path}/key"] * 3


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*set data\.cache to a folder"):
        cached(tmp_path / "file" / "key", opened, maker("x", []), print)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None) == Path("/somewhere/jaxlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "jaxlm"
    assert cache_folder("~/here") == Path.home() / "here"


def test_a_key_depends_on_every_fact_and_not_on_their_order():
    assert cache_key("tokens", {"a": 1, "b": 2}) == cache_key("tokens", {"b": 2, "a": 1})
    assert cache_key("tokens", {"a": 1, "b": 2}) != cache_key("tokens", {"a": 1, "b": 3})
