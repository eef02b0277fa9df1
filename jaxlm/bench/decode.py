"""Decoding beside `generate` of transformers: same weights, same prompts, greedy.

jaxlm is asked by its public `generate`, texts in and texts out; transformers gets the ids. Before
anything is timed, both continue prompts with a copy of the model in float32 and two layers, and
have to say the same.
"""

import dataclasses
import functools
import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxlm.bench import tables
from jaxlm.bench.drawing import bars
from jaxlm.bench.turns import Competitor, Speed, chosen, jax_on, peer_on, take_turns
from jaxlm.errors import UserError

CHECK_LAYERS = 2
OURS = "jaxlm"
PEERS = {"hf dynamic": "dynamic", "hf static": "static", "hf compiled": "compiled"}
"""What the caches of transformers are called in the table."""
PEER = Path(__file__).with_name("decode_transformers.py")
BANDWIDTH_BYTES = {"cpu": 2**30, "gpu": 2**33}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how many prompts it continues at once."""

    settings: dict
    """jaxlm's, of the model."""
    dtype: str
    batches: tuple[int, ...]
    prompt: int = 64
    """Tokens, that which begins a text among them."""
    new: int = 128
    """Tokens, in every row."""


def _llama(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> dict:
    sizes = {"d_model": d_model, "num_layers": num_layers, "d_ff": d_ff}
    sizes |= {"num_heads": num_heads, "num_kv_heads": num_heads}
    return sizes | {"vocab_size": 32000, "max_seq_len": 1024, "tie_embeddings": True}


_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 4096, "rope_scaling": None}
WORKLOADS = {
    "cpu": {
        "15M": Workload(_llama(288, 6, 6, 768), "float32", (1, 8)),
        "110M": Workload(_llama(768, 12, 12, 2048), "float32", (1, 8)),
    },
    "gpu": {
        "1B": Workload({"preset": "llama3-1b"} | _LLAMA3, "bfloat16", (1, 8, 64, 256)),
        "8B": Workload({"preset": "llama3-8b"} | _LLAMA3, "bfloat16", (1, 8, 64, 256)),
    },
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one competitor came to with one model and batch."""

    workload: str
    batch: int
    name: str
    parameters: int
    tokens_per_second: Speed
    """New tokens of all rows, the reading of the prompts in the time."""
    ratio: float | None
    """Of jaxlm's speed to this one's, each the third quartile of its turns."""
    compile_seconds: float
    """What the first call took beyond a later one."""
    peak_bytes: int
    of_bandwidth: float
    """Of what reading weights and cache once a token allows, at the bandwidth of the same run."""
    device: str
    versions: dict[str, str]


def run(
    device: str,
    models: str | None,
    batches: list[int] | None,
    quick: bool,
    out: Path,
    say: Callable[[str], None],
) -> list[Result]:
    """Measure the workloads of a device (`cpu` or `gpu`), at `batches` instead of their own.

    Raises UserError for a name that there is not, and where the sides do not say the same.
    """
    known = WORKLOADS[device]
    names = chosen(models, known)
    if batches:
        known = {n: dataclasses.replace(w, batches=tuple(batches)) for n, w in known.items()}
    present = importlib.util.find_spec("transformers") is not None
    if not present:
        say("transformers is not installed, so jaxlm is measured alone: pip install 'jaxlm[bench]'")
    results = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            measure = functools.partial(_measure, name, known[name], device, Path(folder))
            results += measure(present, 2 if quick else 5, say)
    return results


def _measure(
    name: str,
    workload: Workload,
    device: str,
    folder: Path,
    present: bool,
    rounds: int,
    say: Callable[[str], None],
) -> list[Result]:
    small = workload.settings | {"num_layers": CHECK_LAYERS}
    say(f"{name}: writing random weights")
    with _start(OURS, device) as maker:  # whose memory is not that of decoding
        maker.ask("write", settings=small, dtype="float32", out=f"{folder}/check")
        maker.ask("write", settings=workload.settings, dtype=workload.dtype, out=f"{folder}/model")
        bandwidth = maker.ask("bandwidth", size=BANDWIDTH_BYTES[device])["bytes_per_second"]
    sides = [_start(n, device) for n in (OURS, *(PEERS if present else ()))]
    ours = sides[0]
    try:
        _check(name, workload, sides, f"{folder}/check", say)
        request = {"folder": f"{folder}/model", "dtype": workload.dtype}
        say(f"{name}: loading the model in {', '.join(side.name for side in sides)}")
        facts = {side.name: side.ask("setup", **request) for side in sides}
        results = []
        for batch in workload.batches:
            prompts = _prompts(workload, batch, ours)
            asked = {n: {"prompts": p, "new_tokens": workload.new} for n, p in prompts.items()}
            first = {s.name: s.ask("steps", count=1, **asked[s.name])["seconds"] for s in sides}
            say(f"{name}: batch {batch}, ready in {sum(first.values()):.0f} s")
            seconds = take_turns(sides, rounds, asked, count=1)
            for side in sides:
                times = seconds[side.name]
                speed = Speed.of([batch * workload.new / s for s in times])
                read = facts[OURS]["weight_bytes"] + batch * (
                    facts[OURS]["cache_bytes_per_position"] * (workload.prompt + workload.new / 2)
                )
                results.append(
                    Result(
                        workload=name,
                        batch=batch,
                        name=side.name,
                        parameters=facts[side.name]["parameters"],
                        tokens_per_second=speed,
                        ratio=None,
                        compile_seconds=max(0.0, first[side.name] - min(times)),
                        peak_bytes=side.ask("memory")["peak_bytes"],
                        of_bandwidth=speed.median / batch * read / bandwidth,
                        device=facts[OURS]["device"],
                        versions=facts[side.name]["versions"],
                    )
                )
    finally:
        for side in sides:
            side.close()
    return [_beside(r, results) for r in results]


def _beside(result: Result, results: list[Result]) -> Result:
    """With its ratio to jaxlm's of the same batch."""
    if result.name == OURS:
        return result
    (ours,) = (r for r in results if (r.batch, r.name) == (result.batch, OURS))
    ratio = ours.tokens_per_second.high / result.tokens_per_second.high
    return dataclasses.replace(result, ratio=ratio)


def _prompts(workload: Workload, batch: int, ours: Competitor) -> dict[str, list]:
    """Random words for jaxlm, and their ids for the others."""
    choose = random.Random(0)
    length, words = workload.prompt - 1, range(1, workload.settings["vocab_size"])
    texts = [" ".join(f"w{i}" for i in choose.choices(words, k=length)) for _ in range(batch)]
    ids = ours.ask("encode", prompts=texts)["ids"]
    assert {len(row) for row in ids} == {workload.prompt}
    return {OURS: texts} | dict.fromkeys(PEERS, ids)


def _start(name: str, device: str) -> Competitor:
    if name == OURS:
        command = [sys.executable, "-m", "jaxlm.bench.decode_jaxlm"]
        return Competitor(name, command, jax_on(device))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return Competitor(name, [sys.executable, "-P", str(PEER), PEERS[name]], peer_on(device) | quiet)


def _check(name: str, workload: Workload, sides, folder: str, say: Callable[[str], None]) -> None:
    """Hold what the sides say against each other."""
    ours, *peers = sides
    if peers:
        say(f"{name}: comparing greedy tokens")
    for side in sides:
        side.ask("setup", folder=folder, dtype="float32")
    prompts = _prompts(workload, 2, ours)
    made = {
        # Compiled or not, transformers runs the same modules.
        side.name: side.ask("generate", prompts=prompts[side.name], new_tokens=workload.new)["made"]
        for side in sides
        if PEERS.get(side.name) != "compiled"
    }
    said = made.pop(OURS)
    for peer, ids in made.items():
        words = [[f"w{i}" for i in row] for row in ids]
        if words != said:
            raise UserError(
                f"{name}: jaxlm and {peer} do not say the same: from the same weights and prompts "
                f"{said} and {words}"
            )
    if peers:
        names = ", ".join((OURS, *made))
        say(f"{name}: {workload.new} greedy tokens are the same: {names}")


def table(results: list[Result]) -> str:
    """The figures as a person reads them."""
    rows = [("model", "batch", "", *tables.SPEED_HEADS, "of bandwidth")]
    for r in results:
        cells = tables.speeds(r), tables.percent(r.of_bandwidth)
        rows.append((r.workload, str(r.batch), f"  {r.name}", *cells[0], cells[1]))
    return tables.table((-6, 6, -15, *tables.SPEED_WIDTHS, 14), rows)


def draw(figure, results: list[Result]) -> None:
    """Plot the speeds."""
    bars(figure, results, lambda r: f"{r.workload}, batch {r.batch}", OURS)
