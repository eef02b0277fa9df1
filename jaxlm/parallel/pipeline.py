"""Pipeline parallelism: layers split over stages, micro-batches streamed through them.

One loop over ticks, the same program on every stage. In tick t, stage s works on item t - s: items
are the micro-batches, then, with more rounds, the same micro-batches again for the next layers.
One round is GPipe (Huang et al., 2019); more are the interleaved, or circular, schedule (Narayanan
et al., 2021): each device holds `rounds` stages of fewer layers, and the first item comes out of
the last device after fewer layers.

Every stage's work is recomputed in the backward pass from its input. What a device keeps of the
forward pass is therefore its inputs, one per tick, and the stream of micro-batches.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel import summable
from jaxlm.sharding import axes_of, mesh_axes


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a batch runs through `stages` devices; with one, there is no pipeline."""

    stages: int = 1
    microbatches: int = 1
    """Parts of the batch; at least as many as stages."""
    rounds: int = 1
    """Stages that each device holds, in turn: 1 is GPipe, more are interleaved."""

    @property
    def ticks(self) -> int:
        """Steps of the loop, in each of which every stage does the work of one item."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of a device's time that it has nothing to do: (S - 1) / (R M + S - 1)."""
        return (self.stages - 1) / self.ticks

    def describe(self, hidden_bytes: int) -> str:
        """One line on bubble and memory; a device's part of a micro-batch has `hidden_bytes`."""
        kept = (self.ticks + self.microbatches) * hidden_bytes / 2**20
        rounds = f" of {self.rounds} rounds" if self.rounds > 1 else ""
        return (
            f"pipeline: {self.stages} stages{rounds}, {self.microbatches} micro-batches, bubble "
            f"{self.bubble:.1%}; for the backward pass a device keeps {self.ticks} inputs and a "
            f"stream of {self.microbatches}, {kept:,.1f} MiB, and recomputes the rest"
        )

    def order(self, num_layers: int) -> np.ndarray:
        """The layer at each stored place: a device's layers lie together, round after round."""
        layers = np.arange(num_layers).reshape(self.rounds, self.stages, -1)
        return layers.swapaxes(0, 1).reshape(-1)


def make_schedule(stages: int, rounds: int, microbatches: int | None, rows: int) -> Schedule:
    """The schedule for `rows` rows on each device that shares a batch.

    `microbatches` None takes, of the divisors of the rows that keep all stages busy, the one
    nearest to two per stage.
    """
    if stages == 1:
        return Schedule()
    if microbatches is None:
        choices = [n for n in range(min(stages, rows), rows + 1) if rows % n == 0]
        microbatches = min(choices, key=lambda n: abs(n - 2 * stages))
    return Schedule(stages, microbatches, rounds)


def run_pipeline(stage: Callable, layers, x, rows, schedule: Schedule):
    """Run `x` [B, T, D] through all layers; returns (x, auxiliary sums by layer).

    `stage(layers, x, rows, first)` runs a run of layers, `first` the index of the first, and
    returns (x, a tree of sums, one entry a layer). `layers` is stacked in `schedule.order` and
    split over the mesh axis `pp`; `rows` is a tree of arrays [B, ...] that go with `x` without
    being changed. Outside the pipeline, `pp` splits micro-batches: each device embeds and judges
    its share of the rows.
    """
    count = schedule.microbatches
    spare = -count % schedule.stages
    x, rows = jax.tree.map(lambda a: _split_rows(a, count), (x, rows))
    x = jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))
    share, copies, axes = _stream_specs(x)
    by_stage, everywhere = PartitionSpec("pp"), PartitionSpec()
    options = {"check_vma": False}
    x = jax.shard_map(_gather, in_specs=share, out_specs=copies, axis_names=axes, **options)(x)
    x, sums = jax.shard_map(
        lambda layers, x, rows: _one_device(stage, layers, x[0], rows, schedule),
        in_specs=(by_stage, by_stage, everywhere),
        out_specs=(by_stage, by_stage),
        axis_names={"pp"},
        **options,
    )(layers, x, rows)
    x = jax.shard_map(_scatter, in_specs=copies, out_specs=share, axis_names=axes, **options)(x)
    return _join_rows(x[:count]), sums


def _stream_specs(x):
    """Specs of the stream [M, B, T, D] as shared out over stages, and as a copy for each of them,
    and the axes they name: all that split it, or the compiler would gather over the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    omit = frozenset({"pp", *mesh.manual_axes})
    batch, length, _ = mesh_axes(("batch", "residual_length", None), omit=omit)
    if x.shape[2] % (mesh.shape["cp"] * mesh.shape["tp"]):
        (length,) = mesh_axes(("length",), omit=omit)
    share, copies = (PartitionSpec(*first, batch, length) for first in (("pp",), ("pp", None)))
    return share, copies, axes_of(share)


def _one_device(stage: Callable, layers, x, rows, schedule: Schedule):
    """What each device of the pipeline does; arrays are its own parts."""
    stages, count, rounds = schedule.stages, schedule.microbatches, schedule.rounds
    place = jax.lax.axis_index("pp")
    layers = jax.tree.map(lambda p: p.reshape(rounds, -1, *p.shape[1:]), layers)
    run_length = jax.tree.leaves(layers)[0].shape[1]
    # Stage 0 alone reads the stream: inputs at first, then what came round from the last stage.
    stream = x[:count]

    def work(round_, x, item):
        layers_now, rows_now = _at(layers, round_), _at(rows, item)
        return stage(layers_now, x, rows_now, (round_ * stages + place) * run_length)

    def arrive(stream, arriving, tick):
        """Put what left the last stage one tick ago back into the stream."""
        item = jnp.maximum(tick - stages, 0) % count
        kept = jnp.where(tick >= stages, arriving, _at(stream, item))
        return jax.lax.dynamic_update_index_in_dim(stream, kept, item, 0)

    def tick(carry, now):
        stream, arriving, sums = carry
        stream = arrive(stream, arriving, now)
        item = now - place
        is_real = (item >= 0) & (item < rounds * count)
        item = jnp.clip(item, 0, rounds * count - 1)
        round_, item = item // count, item % count
        x, new = work(round_, jnp.where(place == 0, _at(stream, item), arriving), item)
        sums = jax.tree.map(lambda a, b: a.at[round_].add(jnp.where(is_real, b, 0)), sums, new)
        arriving = jax.lax.ppermute(x, "pp", [(i, (i + 1) % stages) for i in range(stages)])
        return (stream, arriving, sums), None

    shapes = jax.eval_shape(work, 0, stream[0], 0)[1]
    sums = jax.tree.map(lambda s: jnp.zeros((rounds, *s.shape), s.dtype), shapes)
    start = stream, jnp.zeros_like(stream[0]), sums
    (stream, arriving, sums), _ = jax.lax.scan(tick, start, jnp.arange(schedule.ticks))
    stream = arrive(stream, arriving, schedule.ticks)
    stream = jnp.pad(stream, [(0, x.shape[0] - count)] + [(0, 0)] * (stream.ndim - 1))
    sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums)
    return stream[None], sums


def _split_rows(x, count: int):
    """[B, ...] as [count, B / count, ...]: micro-batch i has rows i, i + count, ..., so that every
    device keeps the rows it holds.
    """
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)


def _join_rows(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, *x.shape[2:])


def _at(tree, index):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), tree)


def _gather(x):
    """All stages' shares."""
    wide = x.astype(summable(x.dtype))
    return jax.lax.all_gather(wide, "pp", axis=0, tiled=True).astype(x.dtype)[None]


def _scatter(x):
    """Each stage's share of what stage 0 holds."""
    mine = jnp.where(jax.lax.axis_index("pp") == 0, x[0], 0).astype(summable(x.dtype))
    return jax.lax.psum_scatter(mine, "pp", scatter_dimension=0, tiled=True).astype(x.dtype)
