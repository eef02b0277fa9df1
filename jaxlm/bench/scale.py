"""How a training step grows with devices and layers: compiled for them, and nothing is run.

A process of its own for each number of virtual CPU devices, so none of them is needed. What every
device holds is that of its shardings; what it sends is read from the compiled program.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jaxlm.bench import tables
from jaxlm.bench.turns import Competitor

MODEL = {
    "d_model": 512,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 8,
    "d_ff": 1408,
    "vocab_size": 8192,
    "max_seq_len": 128,
    "tie_embeddings": True,
    "dtype": "float32",
}
DEVICES = (8, 16, 32, 64, 128, 256)
LAYERS = (4, 8, 16, 32, 64)
QUICK_DEVICES, QUICK_LAYERS = (8, 64), (4, 64)


@dataclasses.dataclass(frozen=True)
class Result:
    """One step compiled for one mesh."""

    mesh: str
    devices: int
    layers: int
    trace_seconds: float
    compile_seconds: float
    device_bytes: int
    """Of parameters and the optimiser's state, on one device."""
    even_bytes: float
    """What that would be if all were divided evenly."""
    sent_bytes: int
    """By one device in a step, as `collectives.Collective` counts them."""
    least_bytes: float
    """What fsdp has to send: every parameter gathered twice (a layer's for the forward and for the
    backward pass, the embedding's where it is looked up and where it is the head), and its gradient
    reduced once."""
    sent: list[dict]
    versions: dict[str, str]


def run(quick: bool, out: Path, say: Callable[[str], None]) -> list[Result]:
    """Compile a step for more and more devices with `fsdp`, then one of more and more layers."""
    devices, layers = (QUICK_DEVICES, QUICK_LAYERS) if quick else (DEVICES, LAYERS)
    points = [(d, MODEL["num_layers"]) for d in devices]
    points += [(devices[0], n) for n in layers if (devices[0], n) not in points]
    results = []
    for count, depth in points:
        results.append(_compile(count, depth))
        r = results[-1]
        say(f"{r.mesh}, {depth} layers: compiled in {r.compile_seconds:.1f} s")
    return results


def _compile(devices: int, layers: int) -> Result:
    mesh = f"fsdp{devices}"
    settings = {
        "mesh": mesh,
        "model": MODEL | {"num_layers": layers},
        "train": {"batch_size": devices},
        "optim": {"name": "adamw"},
    }
    # What was compiled before must not be found again: it is what is timed.
    env = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with Competitor(
        mesh, [sys.executable, "-m", "jaxlm.bench.scale_jaxlm"], os.environ | env
    ) as side:
        found = side.ask("compile", settings=settings)
    return Result(
        mesh=mesh,
        devices=devices,
        layers=layers,
        trace_seconds=found["trace_seconds"],
        compile_seconds=found["compile_seconds"],
        device_bytes=found["device_bytes"],
        even_bytes=found["total_bytes"] / devices,
        sent_bytes=sum(traffic["bytes"] for traffic in found["sent"]),
        least_bytes=3 * found["parameter_bytes"],
        sent=found["sent"],
        versions=found["versions"],
    )


def draw(figure, results: list[Result]) -> None:
    """Plot compile time, bytes held and bytes sent."""
    figure.set_size_inches(11, 7)
    first = results[0]
    wide = [r for r in results if r.layers == first.layers]
    deep = sorted((r for r in results if r.devices == first.devices), key=lambda r: r.layers)
    (a, b), (c, d) = figure.subplots(2, 2)
    for axes, rows, name in ((a, wide, "devices"), (b, deep, "layers")):
        x = [getattr(r, name) for r in rows]
        axes.plot(x, [r.compile_seconds for r in rows], "o-", label="XLA")
        axes.plot(x, [r.trace_seconds for r in rows], "o-", label="tracing")
        axes.set(title="seconds to compile a step", ylim=(0, None))
        _finish(axes, x, name)
    x = [r.devices for r in wide]
    c.plot(x, [r.device_bytes / 2**20 for r in wide], "o-", label="held")
    c.plot(x, [r.even_bytes / 2**20 for r in wide], "k--", label="all of it, divided evenly")
    c.set(title="parameters and optimiser on a device (MiB)", yscale="log")
    d.plot(x, [r.sent_bytes / 2**20 for r in wide], "o-", label="sent")
    d.plot(x, [r.least_bytes / 2**20 for r in wide], "k--", label="what fsdp has to send")
    d.set(title="collectives of a step, by a device (MiB)", ylim=(0, None))
    for axes in (c, d):
        _finish(axes, x, "devices")


def _finish(axes, x: list[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(n) for n in x])
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def table(results: list[Result]) -> str:
    """The figures as a person reads them."""
    heads = ("mesh", "layers", "trace", "compile", "held", "of even", "sent", "of least")
    rows = [
        (
            r.mesh,
            str(r.layers),
            f"{r.trace_seconds:.1f} s",
            f"{r.compile_seconds:.1f} s",
            f"{r.device_bytes / 2**20:,.1f} MiB",
            f"{r.device_bytes / r.even_bytes:.3f}",
            f"{r.sent_bytes / 2**20:,.1f} MiB",
            f"{r.sent_bytes / r.least_bytes:.3f}",
        )
        for r in results
    ]
    return tables.table((-8, 8, 10, 10, 14, 9, 14, 10), [heads, *rows])
