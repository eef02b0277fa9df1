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
from jaxlm.parity import LATER_TOLERANCE
from jaxlm.sharding import path_name

# Meshes, and what else the run on them has: two rounds of an interleaved pipeline, accumulation.
DENSE = ["dp2,fsdp2,tp2", "cp4,dp2"]
MORE_DENSE = ["dp8", "fsdp8", "fsdp6", "tp3", "dp2,tp3", "pp2,tp2", "dp2,fsdp2,tp2 muon", "pp4,dp2"]
MORE_DENSE += [
    "pp2,dp2,tp2",
    "pp2,cp2,tp2",
    "cp2,tp2,dp2",
    "pp2,fsdp2 rounds",
    "dp2,pp2,cp2 accumulation",
]
MORE_EXPERTS = [
    "ep2,tp2,dp2 experts",
    "tp3 experts",
    "pp2,tp2 experts",
    "ep4,dp2 experts",
    "pp2,fsdp2,ep2 experts",
    "cp2,ep2,fsdp2 experts",
]
MORE_EXPERTS += ["pp2,ep2,dp2 experts muon", "pp2,ep2 capacity", "ep2,dp2 experts accumulation"]
# Two stacks, relative positions; an encoder's classifier.
OTHERS = ["dp2,fsdp2,tp2 bert"]
MORE_OTHERS = [
    "dp2,fsdp2,tp2 t5",
    "dp8 t5",
    "fsdp8 t5",
    "tp3 t5",
    "dp2,tp2 t5 accumulation",
    "dp2,fsdp2,tp2 marian",
]
MORE_OTHERS += [
    "dp2,fsdp2,tp2 masked",
    "pp2,tp2,dp2 masked",
    "dp8 bert",
    "fsdp8 bert",
    "tp3 bert",
    "pp2,cp2,tp2 bert",
    "dp2,fsdp2,tp2 scores",
]
MESHES = DENSE + OTHERS
MORE = MORE_DENSE + MORE_EXPERTS + MORE_OTHERS
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE]
EXPERT_FIELDS = {
    "num_experts": 8,
    "top_k": 2,
    "d_ff": 21,
    "d_shared": 10,
    "router_z_loss": 1e-3,
    "bias_rate": 1e-2,
}
BIASED = {"norm": "layernorm", "norm_bias": True, "norm_placement": "post_sum", "mlp_bias": True}
BIASED |= {"qkv_bias": True, "out_bias": True}
LABELS = {"labels": ("a", "b", "c")}
# What other models than a language model's decoder are, and their tasks.
KINDS = {
    "t5": (
        "translation",
        {"kind": "encoder_decoder", "positions": "relative", "encoder_layers": 2},
    ),
    "marian": (
        "translation",
        BIASED
        | {"kind": "encoder_decoder", "positions": "sinusoidal", "mlp": "relu", "logits_bias": True}
        | {"scale_embeddings": True},
    ),
    "bert": (
        "classification",
        BIASED
        | LABELS
        | {"kind": "encoder", "positions": "learned", "mlp": "gelu_exact", "pooler": True}
        | {"embedding_norm": True, "token_types": 2},
    ),
    "scores": ("classification", LABELS),
    "masked": ("masked_language_modelling", {"kind": "encoder"}),
}
COMPARED = ("loss", "grad_norm", "balance_loss", "router_z_loss", "expert_load_max", "dropped")
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
def run(case: str, dropout: float = 0.0) -> Run:
    """A few steps from the initial parameters, on the mesh that the case begins with."""
    mesh, *extras = case.split()
    experts = None
    if "experts" in extras or "capacity" in extras:
        experts = EXPERT_FIELDS | ({"capacity": 1.2} if "capacity" in extras else {})
    kinds = [KINDS[word] for word in extras if word in KINDS]
    task, fields = kinds[0] if kinds else ("language_modelling", {})
    config = tiny_config(
        task=task,
        model={
            "num_layers": 4,
            "dropout": dropout,
            "word_dropout": dropout,
            "attention_dropout": 0.0 if "cp" in case else dropout,
            "experts": experts,
        }
        | fields,
        train={"z_loss": 1e-3, "accumulation": 2 if "accumulation" in extras else 1},
        parallel={"rounds": 2 if "rounds" in extras else 1},
        optim={"name": "muon" if "muon" in extras else "adamw"},
    )
    program = make_program(config, mesh, functools.partial(remembering, config))
    with jax.default_matmul_precision("highest"):
        state = program.init()
        params, losses = exact(program, state).params, []
        for step in range(STEPS):
            state, metrics = program.train_step(state, program.put(random_batch(config, step)))
            losses.append([float(metrics[name]) for name in COMPARED if name in metrics])
            if step == 0:
                gradients = exact(program, state).opt_state[0]
    return Run(params, gradients, np.array(losses))


def one_device(case: str) -> str:
    """The same numbers' run without a mesh."""
    known = ("experts", "capacity", "muon", *KINDS)
    extras = [word for word in case.split()[1:] if word in known]
    return " ".join(["dp1", *extras])


def assert_same_losses(got, wanted):
    # An update can make more of a rounding: Adam turns that of a gradient of zero, such as that of
    # a key's bias, into a full step. `python -m jaxlm.check` allows as much.
    np.testing.assert_allclose(got[:1], wanted[:1], rtol=TOLERANCE)
    np.testing.assert_allclose(got, wanted, rtol=LATER_TOLERANCE)


def assert_same_gradients(got, wanted):
    """Every tensor's difference is small against its norm, or a tenth of the global norm."""
    total = float(optax.tree.norm(wanted))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert a.shape == b.shape
        allowed = TOLERANCE * max(np.linalg.norm(b), 0.1 * total)
        assert np.linalg.norm(a - b) <= allowed, path_name(path)


@pytest.mark.parametrize("case", MESHES)
def test_initial_parameters_are_bit_identical(case):
    assert digest(run(case).params) == digest(run(one_device(case)).params)


@pytest.mark.parametrize("mesh", ["dp8", "fsdp8", "pp2,dp2,tp2", "cp4,dp2", "ep2,tp2,dp2", "tp3"])
def test_batches_are_bit_identical(mesh):
    experts = EXPERT_FIELDS if "ep" in mesh else None
    config = tiny_config(model={"experts": experts})
    batch = random_batch(config)
    assert digest(jax.device_get(make_program(config, mesh).put(batch))) == digest(batch)


@pytest.mark.parametrize("case", MESHES)
def test_losses_of_the_first_steps_are_the_same(case):
    wanted = run(one_device(case)).losses
    few = any(word in case for word in ("bert", "scores"))
    assert wanted[0, 0] == pytest.approx(np.log(3 if few else 101), rel=0.5)
    assert_same_losses(run(case).losses, wanted)


@pytest.mark.parametrize("case", MESHES)
def test_gradients_are_the_same(case):
    wanted = run(one_device(case)).gradients
    norms = {
        path_name(path): np.linalg.norm(g)
        for path, g in jax.tree_util.tree_leaves_with_path(wanted)
    }
    assert min(n for name, n in norms.items() if not name.endswith("balance_bias")) > 0
    assert_same_gradients(run(case).gradients, wanted)


@pytest.mark.slow
def test_a_capacity_drops_some():
    dropped = run("dp1 capacity").losses[:, COMPARED.index("dropped")]
    assert 0.01 < dropped.min() < dropped.max() < 0.5


DROPOUT = [
    "cp2,dp2",
    "tp3",
    "pp2,dp2,tp2",
    "dp2,tp2 accumulation",
    "dp2,tp2 t5 accumulation",
    "fsdp8 bert",
]


@pytest.mark.slow
@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_is_the_same(case):
    # A ring never has the probabilities of a whole row to drop some of.
    same = one_device(case)
    one = run(f"{same} cp" if "cp" in case else same, 0.2)
    many = run(case, 0.2)
    assert abs(one.losses[0, 0] - run(same).losses[0, 0]) > 1e-3, "dropout does nothing"
    assert_same_losses(many.losses, one.losses)
    assert_same_gradients(many.gradients, one.gradients)
