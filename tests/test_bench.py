"""Benchmarks, in the smallest: both sides run and are measured on the same texts."""

import json
import random

import pytest
import yaml

from jaxlm.bench import __main__ as bench

TINY = {
    "task": "translation",
    "model": {
        "preset": "transformer-tiny",
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "d_ff": 32,
        "max_seq_len": 32,
    },
    "tokenizer": {"vocab_size": 300},
    "train": {"batch_size": 4, "steps": 1, "eval_texts": 2, "eval_batches": 1},
}


@pytest.fixture
def pairs(tmp_path):
    """Words and the same words backwards, with each letter moved by one."""
    choose = random.Random(0)
    lines = []
    for _ in range(200):
        source = " ".join("".join(choose.choices("abcdefg", k=4)) for _ in range(4))
        lines.append(f"{source}\t{source[::-1].translate({ord(c): ord(c) + 1 for c in 'abcdefg'})}")
    for name, part in (("train", lines[:180]), ("valid", lines[180:])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(part) + "\n")
    return tmp_path


@pytest.mark.slow
def test_translation_is_measured_on_both_sides(pairs, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(pairs / "cache"))
    (pairs / "config.yaml").write_text(yaml.safe_dump(TINY))
    files = [f"--{name}={pairs / name}.tsv" for name in ("train", "valid")]
    out = pairs / "out"
    options = ["--language=de", "--tokens=1000", "--limit=3", f"--out={out}"]
    bench.main(["translation", f"--config={pairs / 'config.yaml'}", *files, *options])
    ours, theirs = json.loads((out / "results.json").read_text())
    assert (ours["name"], theirs["name"]) == ("jaxlm", "marian")
    assert ours["tokens"] == pytest.approx(1000, rel=0.3)
    assert ours["tokens"] <= theirs["tokens"] <= ours["tokens"] + 2 * 2048
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.05)
    assert ours["seconds"] > 0 < theirs["seconds"]
    assert ours["scores"].keys() == theirs["scores"].keys() == {"beam1", "beam4"}
    assert "marian" in capsys.readouterr().out
