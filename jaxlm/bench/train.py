"""A training step beside the same model in PyTorch: same weights, same batch, same update.

Each competitor lives in a process of its own; they take turns on the machine, in an order that
rotates. Before anything is timed, both take a few steps from the same weights (of a copy of two
layers, which is quick), and their losses have to agree.
"""

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxlm.bench import tables
from jaxlm.bench.drawing import bars
from jaxlm.bench.turns import Competitor, Speed, chosen, jax_on, peer_on, take_turns
from jaxlm.cli import build_config
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.flops import peak_flops

CHECK_LAYERS, CHECK_STEPS = 2, 3
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}  # of the loss, relative
FLOAT8_TOLERANCE = 1e-2
OURS, EAGER, COMPILED = "jaxlm", "torch eager", "torch compile"
BFLOAT16 = "jaxlm bfloat16"
"""What training in float8 is measured against."""
PEER = Path(__file__).with_name("train_torch.py")
CEILING_SIZE = {"cpu": 1536, "gpu": 8192}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch to train it on."""

    settings: dict
    """jaxlm's, over its defaults and `COMMON`."""
    peers: tuple[str, ...] = (EAGER, COMPILED)
    seconds: float = 2.0
    """About how long a turn takes."""


COMMON = {
    "optim": {"name": "adamw", "schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3},
}
_GPT2 = {"preset": "gpt2-124m", "dropout": 0.0, "attention_dropout": 0.0, "vocab_size": 50304}
_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 4096, "rope_scaling": None}
_GPU = {"dtype": "bfloat16", "stack": "unroll"}
_1B = {
    "model": {"preset": "llama3-1b"} | _LLAMA3 | _GPU,
    "train": {"batch_size": 2, "loss_block": 4096},
}
WORKLOADS = {
    "cpu": {
        "14M": Workload(
            {
                "model": {
                    "d_model": 384,
                    "num_layers": 6,
                    "num_heads": 6,
                    "num_kv_heads": 6,
                    "d_ff": 1024,
                    "vocab_size": 8192,
                    "max_seq_len": 256,
                    "dtype": "float32",
                },
                "train": {"batch_size": 8},
            },
            seconds=6.0,  # five steps or so
        )
    },
    "gpu": {
        "124M": Workload(
            {"model": _GPT2 | _GPU, "train": {"batch_size": 32, "loss_block": 1024}}, seconds=1.0
        ),
        "1B": Workload(_1B, peers=(COMPILED,)),
        "1B float8": Workload(_1B | {"model": _1B["model"] | {"float8": True}}, peers=(BFLOAT16,)),
        # AdamW's moments would not fit beside parameters and gradients in float32.
        "8B": Workload(
            {
                "model": {"preset": "llama3-8b", "remat": "dots"} | _LLAMA3 | _GPU,
                "train": {"batch_size": 2, "loss_block": 1024},
                "optim": COMMON["optim"] | {"name": "adafactor"},
            },
            peers=(),
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one competitor came to on one workload."""

    workload: str
    name: str
    parameters: int
    tokens_per_second: Speed
    ratio: float | None
    """Of jaxlm's speed to this one's, each the third quartile of its turns."""
    compile_seconds: float
    peak_bytes: int
    flops_per_second: float
    """With attention counted in full; causally in the next."""
    causal_flops_per_second: float
    mfu: float | None
    """Of the device's peak by its data sheet; None: not known."""
    causal_mfu: float | None
    of_matmul: float
    """`flops_per_second` of what a large product of matrices reached in the same run."""
    dispatch_seconds: float | None
    """Until the call of jaxlm's step returns, while the device works."""
    device: str
    versions: dict[str, str]


def run(
    device: str, models: str | None, quick: bool, out: Path, say: Callable[[str], None]
) -> list[Result]:
    """Measure the workloads of a device (`cpu` or `gpu`).

    Raises UserError for a name that there is not, and where the sides do not compute the same.
    """
    known = WORKLOADS[device]
    names = chosen(models, known)
    results = []
    for name in names:
        results += _measure(name, known[name], device, 3 if quick else 8, say)
    return results


def _measure(
    name: str, workload: Workload, device: str, rounds: int, say: Callable[[str], None]
) -> list[Result]:
    config = _config(workload.settings)
    ours = COMMON | workload.settings
    settings = {OURS: ours} | {n: _told(n, ours, config) for n in workload.peers}
    theirs = {EAGER, COMPILED} & settings.keys()
    if theirs and importlib.util.find_spec("torch") is None:
        settings = {n: told for n, told in settings.items() if n not in theirs}
        say("PyTorch is not installed, so jaxlm is measured alone: pip install 'jaxlm[bench]'")
    sides = [_start(n, device, alone=len(settings) == 1) for n in settings]
    try:
        if len(sides) > 1:
            _check(name, sides, settings, config, say)
        facts = {}
        for side in sides:
            facts[side.name] = side.ask("setup", settings=settings[side.name])
            say(f"{name}: {side.name} ready in {facts[side.name]['compile_seconds']:.0f} s")
        for side in sides:  # past what the first steps allocate and tune
            side.ask("steps", count=2)
        per_step = sides[0].ask("steps", count=1)["seconds"]
        count = max(1, round(workload.seconds / per_step))
        seconds = take_turns(sides, rounds, count=count, untimed=1)
        memory = {side.name: side.ask("memory")["peak_bytes"] for side in sides}
        dispatch = sides[0].ask("dispatch")["seconds"]
        say(f"{name}: the call of a step returns in {1e3 * dispatch:.2f} ms")
        ceiling = sides[0].ask("ceiling", size=CEILING_SIZE[device])["flops_per_second"]
    finally:
        for side in sides:
            side.close()
    tokens = config.train.batch_size * config.seq_len
    speeds = {n: Speed.of([tokens / s for s in times]) for n, times in seconds.items()}
    ours = facts[OURS]
    peak = peak_flops(ours["device"], config.model.dtype)
    results = []
    for n, speed in speeds.items():
        full, causal = (
            speed.median * ours[key] for key in ("flops_per_token", "causal_flops_per_token")
        )
        results.append(
            Result(
                workload=name,
                name=n,
                parameters=facts[n]["parameters"],
                tokens_per_second=speed,
                ratio=None if n == OURS else speeds[OURS].high / speed.high,
                compile_seconds=facts[n]["compile_seconds"],
                peak_bytes=memory[n],
                flops_per_second=full,
                causal_flops_per_second=causal,
                mfu=peak and full / peak,
                causal_mfu=peak and causal / peak,
                of_matmul=full / ceiling,
                dispatch_seconds=dispatch if n == OURS else None,
                device=ours["device"],
                versions=facts[n]["versions"],
            )
        )
    return results


def _config(settings: dict) -> Config:
    return build_config(COMMON | settings)


def _start(name: str, device: str, alone: bool) -> Competitor:
    if name in (OURS, BFLOAT16):
        command = [sys.executable, "-m", "jaxlm.bench.train_jaxlm"]
        return Competitor(name, command, jax_on(device, alone))
    command = [sys.executable, "-P", str(PEER), *(["--compile"] if name == COMPILED else [])]
    return Competitor(name, command, peer_on(device))


def _told(name: str, ours: dict, config: Config) -> dict:
    """What a competitor is told."""
    if name == BFLOAT16:
        return ours | {"model": ours["model"] | {"float8": False}}
    model, optim = config.model, config.optim
    names = ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "mlp", "norm", "norm_eps")
    names += ("positions", "rope_theta", "tie_embeddings", "dtype")
    rates = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "clip_norm")
    return {
        **{name: getattr(model, name) for name in names},
        **{name: getattr(optim, name) for name in rates},
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "biases": model.qkv_bias,
        "seq_len": config.seq_len,
        "batch_size": config.train.batch_size,
    }


def _check(name: str, sides, settings: dict, config: Config, say: Callable[[str], None]) -> None:
    """Hold the sides' first losses against each other."""
    small = {}
    for side, told in settings.items():
        if side in (OURS, BFLOAT16):
            model = told["model"] | {"num_layers": CHECK_LAYERS}
            small[side] = told | {"model": model}
        else:
            small[side] = told | {"num_layers": CHECK_LAYERS}
    with tempfile.TemporaryDirectory() as folder:
        request = {"weights": f"{folder}/weights.npz", "count": CHECK_STEPS}
        # Both of PyTorch's sides would run the same module, eagerly: one of them is enough.
        losses = {
            side.name: side.ask("check", settings=small[side.name], **request)["losses"]
            for side in sides
            if side.name != COMPILED or len(sides) == 2
        }
    ours = losses.pop(OURS)
    for side, theirs in losses.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        allowed = FLOAT8_TOLERANCE if config.model.float8 else TOLERANCE[config.model.dtype]
        if not apart <= allowed:
            raise UserError(
                f"{name}: jaxlm and {side} do not compute the same: from the same weights their "
                f"first losses are {ours} and {theirs}"
            )
        say(f"{name}: the first {CHECK_STEPS} losses agree with {side}'s to {apart:.1e}")


def table(results: list[Result]) -> str:
    """The figures as a person reads them."""
    rows = [("model", "", *tables.SPEED_HEADS, "MFU", "causal", "of matmul")]
    for r in results:
        shares = map(tables.percent, (r.mfu, r.causal_mfu, r.of_matmul))
        rows.append((r.workload, r.name, *tables.speeds(r), *shares))
    return tables.table((-6, -14, *tables.SPEED_WIDTHS, 8, 8, 11), rows)


def draw(figure, results: list[Result]) -> None:
    """Plot the speeds."""
    bars(figure, results, lambda r: r.workload, OURS)
