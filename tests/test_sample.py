"""The sample command."""

import io

import pytest

import jaxlm
from jaxlm import sample
from jaxlm.errors import UserError

SETTINGS = ["--max_new_tokens=8", "--temperature=0"]


def test_it_prints_prompt_and_continuation(trained_run, capsys):
    sample.main([str(trained_run), "--prompt=ab", *SETTINGS])
    expected = jaxlm.generate(trained_run, "ab", max_new_tokens=8, temperature=0)
    assert capsys.readouterr().out == f"ab{expected}\n"


def test_a_dash_reads_standard_input(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    sample.main([str(trained_run), "--prompt=-", *SETTINGS])
    assert capsys.readouterr().out.startswith("ab")


def test_without_a_prompt_it_asks_until_an_empty_line(trained_run, capsys, monkeypatch):
    lines = iter(["ab", "x " * 200, "c", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main([str(trained_run), *SETTINGS])
    captured = capsys.readouterr()
    assert captured.out.startswith("ab") and "\nc" in captured.out
    assert "leaves no room" in captured.err


def test_mistakes_are_one_sentence(trained_run):
    for arguments in ([str(trained_run), "--promt=a"], [], ["/nowhere", "--prompt=a"]):
        with pytest.raises(UserError):
            sample.main(arguments)
