"""Preparing text beside `datasets.map` with a fast tokenizer; the loader beside training.

Both sides tokenise the same texts with the same tokenizer.json, with the same tokens around each,
and have to come to as many tokens. Every turn is a process of its own with an empty cache.
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm.bench import tables
from jaxlm.bench.turns import Competitor, Speed, jax_on, peer_on
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared, prepare
from jaxlm.data.forms import Counts
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError
from jaxlm.export.vocabulary import write_tokenizer

OURS, THEIRS = "jaxlm", "datasets"
PEER = Path(__file__).with_name("data_datasets.py")
SEQ_LEN = 256
LOADED = 400  # batches
STEPS = 10  # in a turn


@dataclasses.dataclass(frozen=True)
class Preparing:
    """What one side came to."""

    name: str
    tokens: int
    bytes_per_second: Speed
    """Of text."""
    ratio: float | None
    """Of jaxlm's speed to this one's, each the third quartile of its turns."""
    peak_bytes: int
    """Resident in all its processes together."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """The loader, and the default model training on what it gives."""

    tokens_per_second: float
    """Of the loader alone."""
    trained_per_second: float
    slower: float
    """A step on the data's batches, of one on a batch that is there already: 1 is no slower."""


def run(train: str, quick: bool, out: Path, say: Callable[[str], None]) -> list:
    """Prepare a source on both sides, then load and train on it.

    Raises UserError without psutil, for a source that cannot be read, and where the sides do not
    come to the same tokens.
    """
    if importlib.util.find_spec("psutil") is None:
        raise UserError("this benchmark needs psutil: pip install 'jaxlm[bench]'")
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prepared = prepare(DataConfig(train=(train,)), Config().tokenizer, say)
    write_tokenizer(prepared.tokenizer, _made(work / "tokenizer"), SEQ_LEN)
    texts = work / "texts.jsonl"
    size = _write(texts, prepared)
    say(f"{size / 1e6:.1f} MB of text")
    results = _prepare(work, texts, size, 2 if quick else 4, say)
    results.append(_load(train, 3 if quick else 10, say))
    shutil.rmtree(work)
    return results


def _write(path: Path, prepared: Prepared) -> int:
    """Write every text as a line; bytes of text."""
    size = 0
    form = prepared.form
    with path.open("w", encoding="utf-8") as file:
        for origin in form.origins("train"):
            for item in form.items(origin, Counts()):
                text = form.key(item)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
    return size


def _prepare(
    work: Path, texts: Path, size: int, rounds: int, say: Callable[[str], None]
) -> list[Preparing]:
    names = [OURS]
    if all(importlib.util.find_spec(name) for name in ("datasets", "transformers")):
        names.append(THEIRS)
    else:
        say("datasets is not installed, so jaxlm is measured alone: pip install 'jaxlm[bench]'")
    found: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            cache = _made(work / "cache")
            one = {OURS: _prepare_ours, THEIRS: _prepare_theirs}[name]
            found[name].append(one(work, texts, cache))
            shutil.rmtree(cache)
            say(f"{name}: {found[name][-1]['seconds']:.1f} s")
    tokens = {name: {turn["tokens"] for turn in turns} for name, turns in found.items()}
    if len(set().union(*tokens.values())) > 1:
        raise UserError(f"jaxlm and datasets do not come to the same tokens: {tokens}")
    speeds = {
        name: Speed.of([size / turn["seconds"] for turn in turns]) for name, turns in found.items()
    }
    return [
        Preparing(
            name,
            tokens=turns[0]["tokens"],
            bytes_per_second=speeds[name],
            ratio=None if name == OURS else speeds[OURS].high / speeds[name].high,
            peak_bytes=max(turn["peak_bytes"] for turn in turns),
        )
        for name, turns in found.items()
    ]


def _prepare_ours(work: Path, texts: Path, cache: Path) -> dict:
    from jaxlm.bench.memory import Peak

    settings = {
        "data": {"train": [str(texts)], "cache": str(cache)},
        "tokenizer": {"kind": "file", "path": str(work / "tokenizer")},
    }
    with _side() as side, Peak(side.pid) as peak:
        answer = side.ask("prepare", settings=settings)
    return answer | {"peak_bytes": peak.bytes}


def _prepare_theirs(work: Path, texts: Path, cache: Path) -> dict:
    from jaxlm.bench.memory import Peak

    request = {"texts": str(texts), "tokenizer": str(work / "tokenizer")}
    asked = work / "request.json"
    asked.write_text(json.dumps(request | {"seq_len": SEQ_LEN, "out": str(cache)}))
    command = [sys.executable, "-P", str(PEER), str(asked)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=peer_on("cpu")) as process,
        Peak(process.pid) as peak,
    ):
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise UserError(f"datasets ended with exit code {process.returncode}")
    return json.loads(lines[-1]) | {"peak_bytes": peak.bytes}


def _load(train: str, rounds: int, say: Callable[[str], None]) -> Loading:
    settings = {"data": {"train": [train]}, "model": {"max_seq_len": SEQ_LEN}}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with _side() as side:
        tokens = side.ask("setup", settings=settings)["tokens"]
        loading = side.ask("load", count=LOADED)["seconds"]
        for turn in range(rounds):
            for real in (True, False) if turn % 2 == 0 else (False, True):
                answer = side.ask("steps", real=real, count=STEPS)
                seconds[real].append(answer["seconds"] / STEPS)
    say(f"loader: {LOADED} batches in {loading:.2f} s")
    real, again = (float(np.median(seconds[kind])) for kind in (True, False))
    return Loading(LOADED * tokens / loading, tokens / real, real / again)


def _side() -> Competitor:
    return Competitor(OURS, [sys.executable, "-m", "jaxlm.bench.data_jaxlm"], jax_on("cpu"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def table(results: list) -> str:
    """The figures as a person reads them."""
    *preparing, loading = results
    rows = [("preparing", "MB/s (quartiles)", "jaxlm is", "peak", "tokens")]
    for r in preparing:
        low, median, high = (x / 1e6 for x in dataclasses.astuple(r.bytes_per_second))
        speed, peak = f"{median:.2f} ({low:.2f}-{high:.2f})", f"{r.peak_bytes / 1e9:.2f} GB"
        rows.append((r.name, speed, tables.ratio(r.ratio), peak, f"{r.tokens:,}"))
    times = loading.tokens_per_second / loading.trained_per_second
    return "\n".join(
        (
            tables.table((-14, 24, 10, 10, 14), rows),
            f"loader: {loading.tokens_per_second:,.0f} tok/s, {times:,.0f}x what training takes",
            f"a step on its batches takes {loading.slower:.3f}x one on a batch that is there",
        )
    )
