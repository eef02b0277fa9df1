"""Same numbers on any mesh: parameters, batches, losses and gradients against one device."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import exact, make_program, random_batch, tiny_config

from jaxlm.optim import make_optimizer
from jaxlm.sharding import path_name

pytestmark = pytest.mark.usefixtures("quick_compile")

MESHES = ["dp8", "fsdp8", "dp2,fsdp2,tp2", "tp3"]
MORE_MESHES = ["tp4", "fsdp6", "dp2,tp4", "fsdp4,tp2", "dp2,tp3"]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES]
STEPS = 3
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Run:
    """What a few steps on one mesh came to, in logical shapes."""

    params: object
    gradients: object
    losses: np.ndarray


def digest(tree) -> str:
    """A hash of every array's path, type, shape and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def remembering(config, axes) -> optax.GradientTransformation:
    """The config's optimiser, with the last gradients first in its state."""
    memory = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    return optax.chain(memory, make_optimizer(config.optim, axes))


@functools.cache
def run(mesh: str, dropout: float = 0.0) -> Run:
    """A few steps from the initial parameters."""
    config = tiny_config(
        model={"dropout": dropout, "attention_dropout": dropout}, train={"z_loss": 1e-3}
    )
    program = make_program(config, mesh, functools.partial(remembering, config))
    with jax.default_matmul_precision("highest"):
        state = program.init()
        params, losses = exact(program, state).params, []
        for step in range(STEPS):
            state, metrics = program.train_step(state, program.put(random_batch(config, step)))
            losses.append(float(metrics["loss"]))
            if step == 0:
                gradients = exact(program, state).opt_state[0]
    return Run(params, gradients, np.array(losses))


def assert_same_gradients(got, wanted):
    """Every tensor's difference is small against its norm, or a tenth of the global norm."""
    total = float(optax.tree.norm(wanted))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert a.shape == b.shape
        allowed = TOLERANCE * max(np.linalg.norm(b), 0.1 * total)
        assert np.linalg.norm(a - b) <= allowed, path_name(path)


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_parameters_are_bit_identical(mesh):
    assert digest(run(mesh).params) == digest(run("dp1").params)


@pytest.mark.parametrize("mesh", MESHES)
def test_batches_are_bit_identical(mesh):
    config = tiny_config()
    batch = random_batch(config)
    assert digest(jax.device_get(make_program(config, mesh).put(batch))) == digest(batch)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_of_the_first_steps_are_the_same(mesh):
    assert run("dp1").losses[0] == pytest.approx(np.log(101), rel=0.5)
    np.testing.assert_allclose(run(mesh).losses, run("dp1").losses, rtol=TOLERANCE)


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_are_the_same(mesh):
    wanted = run("dp1").gradients
    assert min(np.linalg.norm(g) for g in jax.tree.leaves(wanted)) > 0
    assert_same_gradients(run(mesh).gradients, wanted)


@pytest.mark.parametrize("mesh", ["dp2,fsdp2,tp2", pytest.param("tp3", marks=pytest.mark.slow)])
def test_dropout_is_the_same(mesh):
    one, many = run("dp1", 0.2), run(mesh, 0.2)
    assert abs(one.losses[0] - run("dp1").losses[0]) > 1e-3, "dropout does nothing"
    np.testing.assert_allclose(many.losses, one.losses, rtol=TOLERANCE)
    assert_same_gradients(many.gradients, one.gradients)
