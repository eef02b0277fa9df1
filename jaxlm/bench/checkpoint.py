"""How long a save holds training up, and what saving and restoring take beside the bare disk.

The disk's rates are of the same number of bytes, in the same folder, in the same turn: written by
one thread and waited for, and read by one. Before each reading the system is told to forget them.
As of a run that continues, a restore is of a process that begins.
"""

import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm.bench import tables
from jaxlm.bench.turns import Competitor, jax_on
from jaxlm.errors import UserError

MODEL = {
    "d_model": 768,
    "num_layers": 12,
    "num_heads": 12,
    "num_kv_heads": 12,
    "d_ff": 2048,
    "vocab_size": 32000,
    "max_seq_len": 64,
    "tie_embeddings": True,
}
QUICK_MODEL = MODEL | {"d_model": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6}
SETTINGS = {"train": {"batch_size": 1}, "optim": {"name": "adamw"}}


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over turns, in seconds."""

    parameters: int
    bytes: int
    """Of a checkpoint."""
    copy: float
    """From the devices to the host, without a checkpoint."""
    blocked: float
    """That `save` takes before the next step can run."""
    total: float
    """Until the checkpoint is complete."""
    raw_write: float
    """Of as many bytes, to the disk."""
    verify: float
    """Reading every byte against its checksum, as a run does before it continues."""
    restore: float
    """Into the devices' memory."""
    raw_read: float
    more_bytes: int
    """Most memory during a save, beyond what the process had."""
    device: str
    versions: dict[str, str]


def run(device: str, quick: bool, out: Path, say: Callable[[str], None]) -> list[Result]:
    """Save and restore a model's training state some times. Raises UserError without psutil."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("this benchmark needs psutil: pip install 'jaxlm[bench]'")
    settings = SETTINGS | {"model": QUICK_MODEL if quick else MODEL}
    folder = out / "run"
    with _side(device) as side:
        facts = side.ask("setup", settings=settings)
        say(f"a state of {facts['state_bytes'] / 1e9:.2f} GB")
        turns = []
        for _ in range(2 if quick else 5):
            turns.append(side.ask("save", folder=str(folder)))
            seconds = turns[-1]["seconds"]
            with _side(device) as reader:
                seconds |= reader.ask("restore", settings=settings, folder=str(folder))["seconds"]
            say(", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    shutil.rmtree(folder)
    median = lambda name: float(np.median([turn["seconds"][name] for turn in turns]))  # noqa: E731
    names = [f.name for f in dataclasses.fields(Result) if f.name in turns[0]["seconds"]]
    return [
        Result(
            **{name: median(name) for name in names},
            parameters=facts["parameters"],
            bytes=turns[0]["bytes"],
            more_bytes=max(turn["more_bytes"] for turn in turns),
            device=facts["device"],
            versions=facts["versions"],
        )
    ]


def _side(device: str) -> Competitor:
    command = [sys.executable, "-m", "jaxlm.bench.checkpoint_jaxlm"]
    return Competitor("jaxlm", command, jax_on(device))


def table(results: list[Result]) -> str:
    """The figures as a person reads them."""
    (r,) = results
    rate = lambda seconds: f"{r.bytes / seconds / 1e9:.2f} GB/s"  # noqa: E731
    of_disk = lambda raw, ours: f"{tables.percent(raw / ours)} of the disk's rate"  # noqa: E731
    rows = [
        ("bytes of a checkpoint", f"{r.bytes / 1e9:.2f} GB", ""),
        ("training waits", f"{r.blocked:.2f} s", f"a copy to the host alone takes {r.copy:.2f} s"),
        ("a save takes", f"{r.total:.2f} s", of_disk(r.raw_write, r.total)),
        ("the disk writes it in", f"{r.raw_write:.2f} s", rate(r.raw_write)),
        (
            "a restore takes",
            f"{r.restore:.2f} s",
            of_disk(r.raw_read, r.restore),
        ),
        ("it is read in", f"{r.raw_read:.2f} s", rate(r.raw_read)),
        ("it is verified in", f"{r.verify:.2f} s", rate(r.verify)),
        ("memory that a save adds", f"{r.more_bytes / 1e9:.2f} GB", ""),
    ]
    return tables.table((-26, 10, -40), [(a, b, f"  {c}") for a, b, c in rows])
