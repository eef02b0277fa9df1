"""Products in float8: rounded as they should be, the same on any mesh, and for training alone."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_program, random_batch, tiny_config

import jaxlm
from jaxlm import loading
from jaxlm.cli import build_config
from jaxlm.errors import UserError
from jaxlm.mesh import make_mesh
from jaxlm.misfit import check_fits
from jaxlm.nn import float8
from jaxlm.nn.layers import multiply


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


@pytest.mark.parametrize(("dtype", "rounding"), [(float8.VALUES, 2**-4), (float8.SLOPES, 2**-3)])
@pytest.mark.parametrize("size", [1e-12, 0.3, 447.9, 448.1, 1e9])
def test_arrays_fill_the_range_of_their_type(dtype, rounding, size):
    x = normal(400)
    x = x / jnp.abs(x).max() * size
    got = float8.scaled(x, dtype)
    values = np.asarray(got.values.astype(jnp.float32))
    most = float(jnp.finfo(dtype).max)
    assert most / 2 <= np.abs(values).max() <= most
    assert np.log2(got.scale) == round(np.log2(float(got.scale)))
    large = np.abs(values) > most / 2**6
    np.testing.assert_allclose((values * got.scale)[large], x[large], rtol=rounding)


def test_parts_of_an_array_have_the_scale_of_the_whole():
    x = jnp.asarray([[1.0, 2.0], [300.0, 4.0]])
    mesh, rows = make_mesh("dp2"), jax.sharding.PartitionSpec("dp")

    def scales(part):
        return float8.scaled(part, float8.VALUES).scale[None]

    found = jax.shard_map(scales, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"dp"})(x)
    np.testing.assert_array_equal(found, [float8.scaled(x, float8.VALUES).scale] * 2)


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    assert not float8.scaled(jnp.zeros(3), float8.VALUES).values.astype(jnp.float32).any()
    y = float8.multiply(1, jnp.array([[1.0, jnp.inf]]), jnp.ones((2, 1)))
    assert not jnp.isfinite(y).any()


@pytest.mark.parametrize("num_in", [1, 2])
def test_the_product_and_its_gradients_are_the_exact_ones_rounded(num_in):
    x, slope = normal(3, 7, 4, 6), normal(*(3, 7, 4)[: 4 - num_in], 5, 2, seed=2, scale=1e-6)
    kernel = normal(*x.shape[4 - num_in :], 5, 2, seed=1, scale=0.02)

    def everything(product):
        y, pull = jax.vjp(functools.partial(product, num_in), x, kernel)
        return y, *pull(slope)

    for rounded, exact in zip(everything(float8.multiply), everything(multiply), strict=True):
        apart = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
        assert 0.005 < apart < 0.08  # e4m3 rounds by up to 1/16, e5m2 by 1/8
    whole = jnp.round(normal(3, 4, scale=3)), jnp.round(normal(4, 5, scale=3))
    np.testing.assert_array_equal(float8.multiply(1, *whole), whole[0] @ whole[1])


@functools.cache
def losses(mesh: str, float8: bool = True) -> list[float]:
    """Of three steps, of a model whose products fit float8's multiples of sixteen."""
    model = {"d_ff": 96, "float8": float8}
    config = tiny_config(model=model, train={"accumulation": 1})
    program = make_program(config, mesh)
    state, batch, found = program.init(), program.put(random_batch(config)), []
    for _ in range(3):
        state, metrics = program.train_step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    "mesh",
    ["dp2"]
    + [
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in ("fsdp2", "tp2", "cp2", "dp2,fsdp2,tp2")
    ],
)
@pytest.mark.slow
def test_losses_are_the_same_on_any_mesh(mesh):
    # One array's scale decides about all of it. From then on a last digit can move a rounding.
    np.testing.assert_allclose(losses(mesh)[0], losses("dp1")[0], rtol=1e-5)
    np.testing.assert_allclose(losses(mesh), losses("dp1"), rtol=5e-3)


def test_losses_are_near_those_without():
    apart = np.abs(np.array(losses("dp1")) / losses("dp1", float8=False) - 1)
    assert 1e-4 < apart.max() < 2e-2


def test_a_model_that_was_trained_in_float8_is_used_without(trained_run, monkeypatch):
    read = loading.read_config

    def in_float8(path):
        config = read(path)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, float8=True))

    plain = jaxlm.score(trained_run, ["some text"])
    monkeypatch.setattr(loading, "read_config", in_float8)
    np.testing.assert_array_equal(jaxlm.score(trained_run, ["some text"]), plain)


@pytest.mark.parametrize(
    ("model", "mesh", "sentence"),
    [
        ({"experts": {"num_experts": 2}}, "dp1", "has no effect without dense layers"),
        ({"kind": "lstm"}, "dp1", "model.float8=true is not read by model.kind=lstm"),
        ({}, "pp2", "pp=2 would split: leave pp out"),
    ],
)
def test_what_float8_cannot_do_is_said(model, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        check_fits(build_config({"model": model | {"float8": True}}), make_mesh(mesh))


@pytest.mark.parametrize(("capability", "fits"), [("8.0", False), ("8.9", True), ("10.0", True)])
def test_a_gpu_without_it_is_refused(capability, fits):
    gpu = types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA A100")
    mesh = types.SimpleNamespace(devices=np.array([gpu]), shape=make_mesh("dp1").shape, size=1)
    config = build_config({"model": {"float8": True}})
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="and NVIDIA A100"):
        check_fits(config, mesh)
