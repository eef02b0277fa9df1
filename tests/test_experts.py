"""Sending tokens to their experts and back: against a loop, dropped or not, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.mesh import make_mesh
from jaxlm.parallel.experts import run_experts
from jaxlm.sharding import replicated_sharding
from jaxlm.step import on_mesh

BATCH, LENGTH, WIDTH, FF, EXPERTS = 8, 6, 4, 6, 8
AXES = {"up": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
MESHES = ["ep4", "ep2,tp2,dp2"]
MESHES += [pytest.param(m, marks=pytest.mark.slow) for m in ("ep2", "fsdp2,ep2", "dp2,fsdp2")]


def apply(kernels, rows, sizes):
    """The experts: two matrices and a tanh."""

    def multiply(x, kernel):
        if sizes is None:
            return jnp.einsum("erd,edf->erf", x, kernel)
        return jax.lax.ragged_dot(x, kernel, sizes)

    return multiply(jnp.tanh(multiply(rows, kernels["up"])), kernels["down"])


def choices(kind: str, top_k: int) -> np.ndarray:
    """Expert ids [B, T, k], different ones for each token."""
    rng = np.random.default_rng(top_k)
    if kind == "same":  # the worst load: a few experts get all
        return np.broadcast_to(np.arange(top_k)[::-1], (BATCH, LENGTH, top_k)).astype(np.int32)
    likely = rng.gumbel(size=(BATCH, LENGTH, EXPERTS)) + 1.5 * np.arange(EXPERTS) / EXPERTS
    return np.argsort(-likely, axis=-1)[..., :top_k].astype(np.int32)


@functools.cache
def inputs(kind: str = "random", top_k: int = 2):
    """(kernels, x, chosen, weights)."""
    rng = np.random.default_rng(top_k)
    kernels = {
        "up": rng.normal(size=(EXPERTS, WIDTH, FF)).astype("float32"),
        "down": rng.normal(size=(EXPERTS, FF, WIDTH)).astype("float32"),
    }
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
    weights = rng.uniform(0.2, 1.0, (BATCH, LENGTH, top_k)).astype("float32")
    return kernels, x, choices(kind, top_k), weights


def kept_by_a_loop(chosen, capacity: int | None) -> np.ndarray:
    """Which assignments [B, T, k] find a place: row by row, first come, first served."""
    kept = np.ones(chosen.shape, bool)
    for b, row in enumerate(chosen):
        taken = np.zeros(EXPERTS, int)
        for t, token in enumerate(row):
            for k, expert in enumerate(token):
                kept[b, t, k] = capacity is None or taken[expert] < capacity
                taken[expert] += 1
    return kept


@functools.cache
def reference(kind: str, top_k: int, capacity: int | None):
    """(loss, (out, dropped)), gradients of (kernels, x, weights): every expert on every token."""
    kernels, x, chosen, weights = inputs(kind, top_k)
    kept = kept_by_a_loop(chosen, capacity)

    def loss(kernels, x, weights):
        hidden = jnp.tanh(jnp.einsum("btd,edf->btef", x, kernels["up"]))
        all_out = jnp.einsum("btef,efd->bted", hidden, kernels["down"])
        picked = (chosen[..., None] == np.arange(EXPERTS)) & kept[..., None]
        out = jnp.einsum("bted,btke,btk->btd", all_out, picked.astype("float32"), weights)
        return loss_of(out), (out, (~kept).sum(-1))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(kernels, x, weights)


def loss_of(out):
    return jnp.sum(jnp.sin(out) * jnp.arange(1.0, out.size + 1).reshape(out.shape)) / out.size


@functools.cache
def computed(mesh: str | None, kind: str, top_k: int, capacity: int | None):
    """As `reference`, by run_experts on a mesh or none."""
    kernels, x, chosen, weights = inputs(kind, top_k)

    def loss(kernels, x, weights, chosen):
        out, dropped = run_experts(apply, kernels, AXES, x, chosen, weights, capacity)
        return loss_of(out), (out, dropped)

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    if mesh is None:
        return jax.jit(run)(kernels, x, weights, chosen)
    mesh = make_mesh(mesh)
    arguments = jax.device_put((kernels, x, weights, chosen), replicated_sharding(mesh))
    return jax.jit(on_mesh(run, mesh))(*arguments)


def assert_same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5 * max(np.abs(b).max(), 1e-3))


# (how tokens choose, how many, places)
CASES = {
    "dropless": ("random", 2, None),
    "dropless, one each": ("random", 1, None),
    "dropless, all to the same": ("same", 3, None),
    "capacity": ("random", 2, 2),
    "capacity, all to the same": ("same", 2, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_over_tokens_computes_the_same(case):
    assert_same(computed(None, *CASES[case]), reference(*CASES[case]))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["dropless", "dropless, all to the same", "capacity"])
def test_a_mesh_computes_the_same(case, mesh):
    assert_same(computed(mesh, *CASES[case]), reference(*CASES[case]))


def test_the_later_tokens_of_a_row_are_dropped():
    (_, (out, dropped)), _ = computed(None, *CASES["capacity, all to the same"])
    np.testing.assert_array_equal(dropped, [[0, 0, 0, 0, 2, 2]] * BATCH)
    assert not np.any(out[:, 4:])
    assert np.all(np.any(out[:, :4], axis=-1))


@pytest.mark.parametrize("mesh", MESHES)
def test_as_many_are_dropped_on_every_mesh(mesh):
    (_, (_, dropped)), _ = computed(mesh, *CASES["capacity"])
    wanted = (~kept_by_a_loop(choices("random", 2), 2)).sum(-1)
    np.testing.assert_array_equal(dropped, wanted)
    assert 0 < wanted.sum() < wanted.size


@pytest.mark.parametrize("mesh", [None, "ep2"])
def test_places_for_all_drop_nobody(mesh):
    generous = computed(mesh, "random", 2, LENGTH)
    assert_same(generous, computed(mesh, "random", 2, None))
    assert not np.any(generous[0][1][1])


def test_bfloat16_stays_bfloat16_and_close():
    kernels, x, chosen, weights = inputs()
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (kernels, x))
    run = jax.jit(lambda kernels, x: run_experts(apply, kernels, AXES, x, chosen, weights, None))
    out, _ = run(*low)
    assert out.dtype == jnp.bfloat16
    (_, (wanted, _)), _ = computed(None, *CASES["dropless"])
    assert np.abs(np.float32(out) - wanted).max() < 0.05 * np.abs(wanted).max()
