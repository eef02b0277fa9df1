"""Benchmarks, in the smallest: both sides run and are measured on the same texts."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import yaml

from jaxlm.bench import __main__ as bench
from jaxlm.bench import checkpoint, data, decode, scale, train, turns
from jaxlm.errors import UserError

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
    ours, theirs = json.loads((out / "results.json").read_text())["results"]
    assert (ours["name"], theirs["name"]) == ("jaxlm", "marian")
    assert ours["tokens"] == pytest.approx(1000, rel=0.3)
    assert ours["tokens"] <= theirs["tokens"] <= ours["tokens"] + 2 * 2048
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.05)
    assert ours["seconds"] > 0 < theirs["seconds"]
    assert ours["scores"].keys() == theirs["scores"].keys() == {"beam1", "beam4"}
    assert "marian" in capsys.readouterr().out


SMALL = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 48, "vocab_size": 64}
SMALL |= {"max_seq_len": 16}
LLAMA = SMALL | {"num_kv_heads": 2, "tie_embeddings": False, "dtype": "float32"}
GPT2 = SMALL | {"preset": "gpt2-tiny", "num_kv_heads": None, "dtype": "bfloat16"}


def test_the_page_on_speed_begins_with_every_benchmark():
    page = Path(__file__).parent.parent / "docs" / "speed.md"
    commands = page.read_text(encoding="utf-8").split("```")[1]
    named = re.findall(r"python -m jaxlm\.bench (\w+)", commands)
    assert named == [*bench.ALL, "all", *(bench.BENCHMARKS.keys() - {*bench.ALL})]


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_finds_gpu", lambda environment=None: False)
    for name in ("train", "all"):
        with pytest.raises(UserError, match="--on=gpu: JAX finds no GPU here; use --on=cpu"):
            bench.main([name, "--on=gpu", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_is_refused_leaves_no_folder_but_what_was_there(tmp_path):
    for kept in (False, True):
        out = tmp_path / str(kept)
        if kept:
            out.mkdir()
            (out / "results.json").write_text("{}", encoding="utf-8")
        with pytest.raises(UserError, match="--models=2B: use 14M"):
            bench.main(["train", "--on=cpu", "--models=2B", f"--out={out}"])
        assert out.exists() == kept


def test_turns_rotate_and_begin_with_steps_that_are_not_timed():
    class Side:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def ask(self, do, count):
            asked.append((self.name, count))
            return {"seconds": next(self.seconds)}

    asked = []
    sides = [Side("a", [9.0, 4.0, 9.0, 6.0]), Side("b", [8.0, 2.0, 8.0, 2.0])]
    seconds = turns.take_turns(sides, 2, count=2, untimed=1)
    assert seconds == {"a": [2.0, 3.0], "b": [1.0, 1.0]}
    assert asked == [(name, count) for name in "abba" for count in (1, 2)]


def test_without_a_name_the_benchmarks_are_named():
    with pytest.raises(UserError, match=re.escape("|".join([*bench.BENCHMARKS, "all"]))):
        bench.main([])


def workloads(**models):
    train_ = {"batch_size": 2, "loss_block": 8}
    settings = {name: {"model": model, "train": train_} for name, model in models.items()}
    return {"cpu": {n: train.Workload(s, (train.EAGER,), 0.01) for n, s in settings.items()}}


@pytest.mark.slow
def test_a_training_step_is_that_of_pytorch_and_both_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORKLOADS", workloads(llama=LLAMA, gpt2=GPT2))
    bench.main(["train", "--on=cpu", "--quick", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["command"] == f"python -m jaxlm.bench train --on=cpu --quick --out={tmp_path}"
    names = [(r["workload"], r["name"]) for r in found["results"]]
    sides = ("jaxlm", "torch eager")
    assert names == [(model, side) for model in ("llama", "gpt2") for side in sides]
    for ours, theirs in (found["results"][:2], found["results"][2:]):
        assert ours["parameters"] == theirs["parameters"]
        assert ours["flops_per_second"] > ours["causal_flops_per_second"] > 0
        speeds = [r["tokens_per_second"] for r in (ours, theirs)]
        assert all(0 < s["low"] <= s["median"] <= s["high"] for s in speeds)
        assert theirs["ratio"] == pytest.approx(speeds[0]["high"] / speeds[1]["high"])
        assert ours["ratio"] is ours["mfu"] is None
        assert min(r["peak_bytes"] for r in (ours, theirs)) > 1e8
    assert "losses agree with torch eager" in capsys.readouterr().out


@pytest.mark.slow
def test_float8_is_timed_beside_bfloat16(tmp_path, monkeypatch, capsys):
    float8 = workloads(float8=LLAMA | {"dtype": "bfloat16", "float8": True})["cpu"]["float8"]
    float8 = dataclasses.replace(float8, peers=(train.BFLOAT16,))
    monkeypatch.setattr(train, "WORKLOADS", {"cpu": {"float8": float8}})
    bench.main(["train", "--on=cpu", "--quick", f"--out={tmp_path}"])
    ours, theirs = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (ours["name"], theirs["name"]) == ("jaxlm", "jaxlm bfloat16")
    assert ours["parameters"] == theirs["parameters"] and theirs["ratio"] > 0
    said = re.search("losses agree with jaxlm bfloat16's to (.*)", capsys.readouterr().out)
    assert 0 < float(said[1]) < train.FLOAT8_TOLERANCE  # 0 would be the same run twice


@pytest.mark.slow
def test_sides_that_do_not_compute_the_same_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORKLOADS", workloads(llama=LLAMA))
    told = train._told
    monkeypatch.setattr(train, "_told", lambda *given: told(*given) | {"norm_eps": 0.1})
    with pytest.raises(UserError, match="llama: jaxlm and torch eager do not compute the same"):
        bench.main(["train", "--on=cpu", "--quick", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="--models=x: use llama"):
        bench.main(["train", "--on=cpu", "--models=x", f"--out={tmp_path}"])


def decoding(dtype="float32"):
    model = SMALL | {"num_kv_heads": 4, "max_seq_len": 64}
    return {"cpu": {"tiny": decode.Workload(model, dtype, (1, 2), prompt=16, new=8)}}


@pytest.mark.slow
def test_generated_tokens_are_those_of_transformers_and_all_are_timed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(decode, "WORKLOADS", decoding())
    peers = {"hf dynamic": "dynamic", "hf static": "static"}  # compiling takes a minute
    monkeypatch.setattr(decode, "PEERS", peers)
    bench.main(["decode", "--on=cpu", "--quick", f"--out={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    sides = ["jaxlm", *peers]
    assert [(r["batch"], r["name"]) for r in results] == [(b, s) for b in (1, 2) for s in sides]
    assert len({r["parameters"] for r in results}) == 1
    for r in results:
        ours = results[sides.index("jaxlm") + len(sides) * (r["batch"] - 1)]
        high = (ours["tokens_per_second"]["high"], r["tokens_per_second"]["high"])
        expected = None if r is ours else pytest.approx(high[0] / high[1])
        assert r["ratio"] == expected
        assert 0 < r["of_bandwidth"] < 1
        assert r["peak_bytes"] > 1e8
    shown = capsys.readouterr().out
    assert "tiny: writing random weights\ntiny: comparing greedy tokens\n" in shown
    assert "tiny: 8 greedy tokens are the same: jaxlm, hf dynamic, hf static\n" in shown
    assert "hf static" in shown


@pytest.mark.slow
def test_generation_that_differs_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "WORKLOADS", decoding())
    monkeypatch.setattr(decode, "PEERS", {"hf dynamic": "dynamic"})
    prompts = decode._prompts

    def others(workload, batch, ours):
        found = prompts(workload, batch, ours)
        return {n: [row[::-1] for row in p] if n != "jaxlm" else p for n, p in found.items()}

    monkeypatch.setattr(decode, "_prompts", others)
    with pytest.raises(UserError, match="tiny: jaxlm and hf dynamic do not say the same"):
        bench.main(["decode", "--on=cpu", "--quick", f"--out={tmp_path}"])


@pytest.mark.slow
def test_a_step_is_compiled_for_devices_that_are_not_there(tmp_path, monkeypatch):
    model = {"d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 128, "vocab_size": 2048}
    monkeypatch.setattr(scale, "MODEL", scale.MODEL | model | {"num_layers": 2})
    monkeypatch.setattr(scale, "QUICK_DEVICES", (4,))
    monkeypatch.setattr(scale, "QUICK_LAYERS", (2, 5))
    bench.main(["scale", "--quick", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(r["mesh"], r["layers"]) for r in found] == [("fsdp4", 2), ("fsdp4", 5)]
    for r in found:
        assert r["device_bytes"] == pytest.approx(r["even_bytes"], rel=0.05)
        assert r["sent_bytes"] == pytest.approx(r["least_bytes"], rel=0.1)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.slow
def test_saving_and_restoring_is_timed_beside_the_disk(tmp_path, monkeypatch, capsys):
    model = {"d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "d_ff": 128}
    monkeypatch.setattr(checkpoint, "QUICK_MODEL", checkpoint.MODEL | model)
    bench.main(["checkpoint", "--quick", "--on=cpu", f"--out={tmp_path}"])
    (r,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert r["bytes"] > 12 * r["parameters"]  # parameters and two moments
    assert 0 < r["blocked"] <= r["total"]
    assert min(r["restore"], r["raw_read"], r["raw_write"], r["verify"]) > 0
    assert "training waits" in capsys.readouterr().out


@pytest.mark.slow
def test_both_sides_prepare_the_same_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "LOADED", 4)
    monkeypatch.setattr(data, "STEPS", 1)
    choose = random.Random(0)
    words = [
        "".join(choose.choices("abcdefghijklmnop", k=choose.randint(2, 9))) for _ in range(999)
    ]
    texts = [" ".join(choose.choices(words, k=200)) for _ in range(400)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    bench.main(["data", f"--train={tmp_path / 'texts.jsonl'}", "--quick", f"--out={out}"])
    *sides, loading = json.loads((out / "results.json").read_text())["results"]
    assert [side["name"] for side in sides] == ["jaxlm", "datasets"]
    assert sides[0]["tokens"] == sides[1]["tokens"] > 400 * 200
    assert min(side["peak_bytes"] for side in sides) > 1e8
    assert loading["tokens_per_second"] > 0 < loading["trained_per_second"]
    assert "what training takes" in capsys.readouterr().out
