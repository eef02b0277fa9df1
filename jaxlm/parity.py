"""The training step on a mesh against the same step on one device: what differs, and by how much.

Compared are initial parameters and batches bit for bit, loss and gradients to rounding. After
updates only losses are: Adam turns rounding of a zero gradient into a full step.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.collectives import Traffic, collectives, summarise
from jaxlm.config import Config
from jaxlm.nn.attention import Places, Source
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.sharding import path_name
from jaxlm.step import build_model, build_program
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.language_modelling import make_batch
from jaxlm.tasks.masked import num_targets

STEPS = 3
MOST_SEGMENTS = 16  # in a random row, about
TOLERANCE = 1e-5
LATER_TOLERANCE = 1e-4


def random_batch(config: Config, seed: int = 0) -> Batch:
    """Rows packed with texts of random lengths, some with padding behind the last.

    Of a translation, rows of sources go with them, a text for each; of a classification, labels
    where the head reads; masked, some tokens of each row are targets.
    """
    rng = np.random.default_rng(seed)
    shape = config.train.batch_size, config.seq_len + 1
    starts = rng.random(shape) < 4 / shape[1]
    starts[:, 0] = True
    padding = np.arange(shape[1]) >= rng.integers(shape[1] // 2, shape[1] + 1, (shape[0], 1))
    segments = np.where(padding, 0, np.cumsum(starts, axis=1))
    batch = make_batch(_rows(rng, segments, config.model.vocab_size))
    # The same for nearly every seed: other batches can be run by what was compiled for one.
    most = max(MOST_SEGMENTS, int(segments.max()) + 1)
    batch = dataclasses.replace(batch, most_segments=most)
    if config.task == "translation":
        counts = batch.segment_ids.max(axis=1)
        segments = np.stack([_segments(rng, count, config.seq_len) for count in counts])
        rows = _rows(rng, segments, config.model.vocab_size)
        source = Source(rows["tokens"], Places(rows["positions"], rows["segment_ids"]))
        batch = dataclasses.replace(batch, source=source)
    if config.task == "classification":
        labels = rng.integers(0, len(config.model.labels), batch.tokens.shape)
        read = _ends(batch.segment_ids, last=config.model.pools == "last")
        batch = dataclasses.replace(
            batch,
            targets=np.where(read, labels, 0).astype(np.int32),
            weights=read.astype(np.float32),
        )
    if config.task == "masked_language_modelling":
        count = num_targets(config.train.mask_rate, config.seq_len)
        columns = np.tile(np.arange(config.seq_len), (shape[0], 1))
        reads = rng.permuted(columns, axis=1)[:, :count]
        pick = lambda x: np.take_along_axis(x, reads, axis=1)  # noqa: E731
        batch = dataclasses.replace(
            batch,
            targets=pick(batch.targets),
            weights=(pick(batch.segment_ids) > 0).astype(np.float32),
            reads=reads.astype(np.int32),
        )
    return batch


def _rows(rng, segments: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """Random tokens in rows of these segments, int32 [B, T]."""
    columns = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.where(_ends(segments, last=False), columns, 0)
    positions = np.where(segments > 0, columns - np.maximum.accumulate(starts, axis=1), 0)
    tokens = rng.integers(0, vocab_size, segments.shape)
    rows = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in rows.items()}


def _segments(rng, count: int, length: int) -> np.ndarray:
    """A row [length] of `count` segments of random lengths, with padding behind the last."""
    end = rng.integers(max(count, length // 2), length + 1)
    starts = np.concatenate([[0], 1 + rng.choice(end - 1, count - 1, replace=False)])
    segments = np.cumsum(np.isin(np.arange(length), starts))
    return np.where(np.arange(length) < end, segments, 0)


def _ends(segments: np.ndarray, last: bool) -> np.ndarray:
    """True at each segment's first token, or at its last."""
    outside = np.zeros((segments.shape[0], 1), segments.dtype)
    beside = (segments[:, 1:], outside) if last else (outside, segments[:, :-1])
    return (segments > 0) & (segments != np.concatenate(beside, axis=1))


# -- a run on one mesh ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a few steps on one mesh came to; arrays by name, in logical shape."""

    mesh: str
    devices: int
    parameters: dict[str, str]
    """Hash of each initial parameter."""
    batch: dict[str, str]
    """Hash of each array of the first batch, put together from the devices."""
    gradients: dict[str, np.ndarray]
    """Of the first step."""
    gradient_norm: float
    losses: list[float]
    torn: str | None
    """An array of which two devices hold different copies of the same part."""
    traffic: list[Traffic] | None


def measure(
    config: Config,
    mesh: Mesh,
    name: str,
    audited: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Initialise and take `STEPS` steps on a mesh; with `audited`, list what the step sends."""
    started = time.monotonic()
    program = build_program(
        build_model(config, mesh),
        functools.partial(_remembering, config),
        learning_rate(config.optim, max(config.train.steps, STEPS)),
        config,
        mesh,
    )
    losses, torn = [], []
    with jax.default_matmul_precision("highest"):
        state = program.init()
        parameters = _hashes(program.layout.to_exact(state).params)
        batch = program.put(random_batch(config, 0))
        fields = _hashes(batch)
        torn += _torn(batch) + _torn(state.params)
        update = program.train_step.lower(state, batch).compile()
        report(f"{name}: compiled in {time.monotonic() - started:.1f} s")
        for step in range(STEPS):
            rate = program.train_step.rate(state.step)
            state, metrics = update(state, program.put(random_batch(config, step)), rate)
            losses.append(float(metrics["loss"]))
            if step == 0:
                norm = float(metrics["grad_norm"])
                remembered = program.layout.to_exact(state).opt_state[0]
                gradients = {n: np.array(g) for n, g in _named(remembered).items()}
                torn += _torn(state.opt_state[0])
        torn += _torn(state.params)
    traffic = summarise(collectives(update.as_text(), mesh)) if audited else None
    first_torn = torn[0] if torn else None
    return Measured(
        name, mesh.size, parameters, fields, gradients, norm, losses, first_torn, traffic
    )


def _remembering(config: Config, axes) -> optax.GradientTransformation:
    """The config's optimiser, with the last gradients first in its state: so they come from the
    very program that trains.
    """
    memory = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    return optax.chain(memory, make_optimizer(config.optim, axes))


def _named(tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _hashes(tree) -> dict[str, str]:
    return {
        name: _hash(f"{x.dtype} {x.shape}".encode(), np.ascontiguousarray(x).tobytes())
        for name, x in _named(tree).items()
    }


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _torn(tree) -> list[str]:
    """Names of arrays that devices should hold the same part of, and do not."""
    names = []
    for name, x in _named(tree).items():
        parts = {}
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            if not np.array_equal(parts.setdefault(str(shard.index), data), data, equal_nan=True):
                names.append(name)
                break
    return names


# -- against one device ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """How a mesh compares with one device."""

    mesh: str
    devices: int
    parameters: str
    """Hash of all initial parameters."""
    batch: str
    loss_differences: list[float]
    """Of each step, relative."""
    gradient_difference: float
    """The largest of a tensor: norm of the difference by the tensor's norm, or by a tenth of the
    global norm if that is more."""
    gradient_parameter: str
    """The tensor with that difference."""
    gradient_norm: float
    losses: list[float]
    failures: list[str]
    first_tensor: str | None
    """The first that differs."""
    collectives: list[Traffic] | None


def compare(run: Measured, one: Measured) -> Row:
    """Every difference between a run and one device's, and which of them are too large."""
    losses = [abs(a - b) / abs(b) for a, b in zip(run.losses, one.losses, strict=True)]
    total = math.sqrt(sum(float(np.linalg.norm(g)) ** 2 for g in one.gradients.values()))
    differences = {
        name: float(np.linalg.norm(run.gradients[name] - g))
        / max(float(np.linalg.norm(g)), 0.1 * total)
        for name, g in one.gradients.items()
    }
    worst = max(differences, key=lambda name: _size(differences[name]))
    tensors, failures = [], []

    def note(tensor: str | None, sentence: str):
        tensors.append(tensor)
        failures.append(sentence)

    for name in [n for n, digest in one.parameters.items() if run.parameters[n] != digest]:
        note(name, f"initial parameter {name} differs")
    for name in [n for n, digest in one.batch.items() if run.batch[n] != digest]:
        note(name, f"{name} of the batch differs")
    for name in [n for n, d in differences.items() if not d <= TOLERANCE]:
        note(name, f"gradient of {name} differs by {differences[name]:.1e} (bound {TOLERANCE:g})")
    if run.torn:
        note(run.torn, f"two devices hold different copies of {run.torn}")
    for step, difference in enumerate(losses):
        bound = LATER_TOLERANCE if step else TOLERANCE
        if not difference <= bound:
            note(None, f"loss of step {step + 1} differs by {difference:.1e} (bound {bound:g})")
    return Row(
        run.mesh,
        run.devices,
        parameters=_hash("".join(run.parameters.values()).encode()),
        batch=_hash("".join(run.batch.values()).encode()),
        loss_differences=losses,
        gradient_difference=differences[worst],
        gradient_parameter=worst,
        gradient_norm=run.gradient_norm,
        losses=run.losses,
        failures=failures,
        first_tensor=next((t for t in tensors if t), None),
        collectives=run.traffic,
    )


def _size(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference
