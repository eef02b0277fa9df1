"""The pipeline's schedule, and its numbers and memory against layers run in sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.mesh import make_mesh
from jaxlm.models.stack import run_stack
from jaxlm.parallel.pipeline import Schedule, make_schedule, run_pipeline
from jaxlm.sharding import replicated_sharding
from jaxlm.step import on_mesh

WIDTH = 4


def simulate(stages: int, count: int, rounds: int) -> tuple[int, float]:
    """(ticks, share of idle places) of devices that work on what is there, older rounds first."""
    done = set()  # (round, micro-batch, stage)
    ticks = 0
    while len(done) < rounds * count * stages:
        now = []
        for stage in range(stages):
            for round_, micro in ((r, m) for r in range(rounds) for m in range(count)):
                before = (round_, micro, stage - 1) if stage else (round_ - 1, micro, stages - 1)
                ready = before in done or (round_, stage) == (0, 0)
                if ready and (round_, micro, stage) not in done:
                    now.append((round_, micro, stage))
                    break
        done.update(now)
        ticks += 1
    return ticks, 1 - rounds * count / ticks


@given(stages=st.integers(1, 5), more=st.integers(0, 4), rounds=st.integers(1, 4))
def test_ticks_and_bubble_are_those_of_a_simulation(stages, more, rounds):
    count = stages + more
    schedule = Schedule(stages, count, rounds)
    ticks, idle = simulate(stages, count, rounds)
    assert schedule.ticks == ticks
    assert schedule.bubble == pytest.approx(idle, abs=1e-12)
    assert schedule.bubble == (stages - 1) / (rounds * count + stages - 1)


@pytest.mark.parametrize(
    ("stages", "rounds", "num_layers", "order"),
    [
        (1, 1, 3, [0, 1, 2]),
        (2, 1, 4, [0, 1, 2, 3]),
        (2, 2, 4, [0, 2, 1, 3]),
        (2, 2, 8, [0, 1, 4, 5, 2, 3, 6, 7]),
        (3, 2, 6, [0, 3, 1, 4, 2, 5]),
    ],
)
def test_a_devices_layers_lie_together(stages, rounds, num_layers, order):
    assert Schedule(stages, stages, rounds).order(num_layers).tolist() == order


@pytest.mark.parametrize(
    ("stages", "microbatches", "rows", "count"),
    [
        (2, None, 12, 4),
        (2, None, 10, 5),
        (4, None, 24, 8),
        (4, None, 5, 5),  # 5 is nearer to 8 than 1
        (2, None, 2, 2),
        (4, None, 14, 7),
        (4, None, 6, 6),
        (4, None, 34, 17),  # 2 is nearest to 8, but fewer than the stages
        (2, 3, 12, 3),
    ],
)
def test_micro_batches_are_two_per_stage_where_rows_allow(stages, microbatches, rows, count):
    assert make_schedule(stages, 3, microbatches, rows) == Schedule(stages, count, 3)


def test_one_stage_is_no_pipeline():
    assert make_schedule(1, 3, 4, 12) == Schedule()
    assert Schedule().bubble == 0


def draw(num_layers: int, rows: int):
    """(layers, x [B, 3, D], what goes with x) at random."""
    rng = np.random.default_rng(num_layers * 100 + rows)
    layers = {
        "w": rng.normal(0, 0.7, (num_layers, WIDTH, WIDTH)).astype("float32"),
        "b": rng.normal(0, 0.5, (num_layers, WIDTH)).astype("float32"),
    }
    x = rng.normal(size=(rows, 3, WIDTH)).astype("float32")
    return layers, x, {"bias": rng.normal(size=(rows, 3)).astype("float32"), "id": np.arange(rows)}


def stage(layers, x, rows, first):
    """Layers that depend on their index and on what goes with the rows."""

    def layer(x, now):
        params, index = now
        push = rows["bias"][:, :, None] * (rows["id"][:, None, None] + 1 + index)
        x = jnp.tanh(x @ params["w"] + params["b"] + 0.1 * push)
        # Sums of two shapes, over rows and unlike in every row.
        weighed = x * (1.0 + rows["id"][:, None, None])
        return x, {"square": jnp.square(weighed).sum(), "each": weighed.sum((0, 1))}

    indices = first + jnp.arange(layers["b"].shape[0])
    return jax.lax.scan(layer, x, (layers, indices))


def loss_of(x, sums):
    weights = jnp.arange(1.0, x.size + 1).reshape(x.shape) / x.size
    per_layer = jnp.arange(1.0, sums["square"].size + 1)
    return (
        jnp.sum(jnp.sin(x) * weights)
        + per_layer @ sums["square"] / 50
        + jnp.sum(per_layer[:, None] * jnp.sin(sums["each"] / 9))
    )


@functools.cache
def in_sequence(num_layers: int, rows: int):
    """((loss, (x, sums)), gradients of layers and x) without a pipeline."""

    def loss(layers, x, rows):
        x, sums = stage(layers, x, rows, 0)
        return loss_of(x, sums), (x, sums)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*draw(num_layers, rows))


def in_pipeline(num_layers: int, rows: int, schedule: Schedule, mesh: str):
    """As `in_sequence`, layers in their own order."""
    mesh = make_mesh(mesh)
    order = schedule.order(num_layers)
    back = np.argsort(order)

    def loss(layers, x, rows):
        x, sums = run_pipeline(stage, layers, x, rows, schedule)
        sums = jax.tree.map(lambda s: s[back], sums)
        return loss_of(x, sums), (x, sums)

    layers, x, rows = draw(num_layers, rows)
    layers = jax.tree.map(lambda p: p[order], layers)
    layers = jax.device_put(layers, NamedSharding(mesh, P("pp")))
    x, rows = jax.device_put((x, rows), replicated_sharding(mesh))
    run = jax.jit(on_mesh(jax.value_and_grad(loss, (0, 1), has_aux=True), mesh))
    value, (layers, x) = run(layers, x, rows)
    return value, (jax.tree.map(lambda p: np.asarray(p)[back], layers), x)


# (mesh, layers, rows, micro-batches, rounds)
CASES = {
    "gpipe": ("pp2", 4, 8, 4, 1),
    "an odd micro-batch": ("pp2", 4, 6, 3, 1),
    "as many as stages": ("pp4", 4, 4, 4, 1),
    "five on four stages": ("pp4", 8, 10, 5, 1),
    "two rounds": ("pp2", 4, 6, 3, 2),
    "two rounds, few": ("pp2", 8, 4, 2, 2),
    "three rounds": ("pp2", 6, 6, 3, 3),
    "two rounds on four": ("pp4", 8, 10, 5, 2),
    "rows over dp too": ("pp2,dp2", 4, 12, 3, 2),
}


MORE = ["three rounds", "two rounds, few", "as many as stages", "two rounds on four"]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in MORE else c for c in CASES]
)
def test_a_pipeline_computes_what_layers_in_sequence_do(case):
    mesh, num_layers, rows, count, rounds = CASES[case]
    schedule = Schedule(make_mesh(mesh).shape["pp"], count, rounds)
    got, wanted = in_pipeline(num_layers, rows, schedule, mesh), in_sequence(num_layers, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(b).max()


def temporaries(num_layers: int, checkpointed: bool) -> int:
    """Bytes on a device, beside arguments and results, of a gradient through two stages."""
    mesh = make_mesh("pp2")
    schedule = Schedule(2, 16)
    layers = jnp.ones((num_layers, 32, 32))

    def apply(kind, params, x, rows, layer, cache):
        return x + jnp.tanh(x @ params), {"sum": x.sum()}, cache

    def stack(layers, x):
        options = {"period": 1, "mode": "scan", "remat": "none"}
        if checkpointed:
            return run_stack(apply, layers, x, (), schedule=schedule, **options)[:2]

        def keep(layers, x, rows, first):
            return run_stack(apply, layers, x, rows, schedule=Schedule(), **options)[:2]

        return run_pipeline(keep, layers, x, (), schedule)

    def loss(layers, x):
        x, sums = stack(layers, x)
        return jnp.sin(x).sum() + sums["sum"].sum()

    shardings = NamedSharding(mesh, P("pp")), replicated_sharding(mesh)
    compiled = jax.jit(on_mesh(jax.grad(loss), mesh), in_shardings=shardings).lower(
        layers, jnp.ones((64, 64, 32))
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_what_a_tick_keeps_does_not_grow_with_layers():
    micro_batch = 4 * 64 * 32 * 4
    kept = {n: temporaries(n, True) for n in (2, 16)}
    # Seven layers more on a device: their inputs and what they compute, of one micro-batch.
    assert kept[16] - kept[2] < 7 * 4 * micro_batch
    # The measure does see what is kept of each of the 17 ticks.
    assert temporaries(16, False) - kept[16] > 17 * 6 * micro_batch
