"""Optimisers against torch's, schedules against their formulas, masks and clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import OptimConfig
from jaxlm.optim import _muon_dimensions, decays, learning_rate, make_optimizer, stretched

RATE = 0.1
SHAPES = {"kernel": (6, 5), "scale": (5,), "bias": (4,)}
AXES = {"kernel": ("embed", "mlp"), "scale": ("embed",), "bias": ("mlp",)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def updated(config: OptimConfig, steps: int = 5):
    """Parameters after a few updates from given gradients."""
    optimizer = make_optimizer(config, AXES)
    params = jax.tree.map(jnp.asarray, draw(0))
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(draw(step + 1), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: RATE * u, updates))
    return params


def updated_by_torch(kind: str, steps: int = 5, decay: float = 0.0, **options):
    """The same by torch, with weight decay on the kernel only."""
    torch = pytest.importorskip("torch")
    params = {name: torch.tensor(value, requires_grad=True) for name, value in draw(0).items()}
    groups = [
        {"params": [params["kernel"]], "weight_decay": decay},
        {"params": [params["scale"], params["bias"]], "weight_decay": 0.0},
    ]
    optimizer = getattr(torch.optim, kind)(groups, lr=RATE, **options)
    for step in range(steps):
        for name, gradient in draw(step + 1).items():
            params[name].grad = torch.tensor(gradient)
        optimizer.step()
    return {name: value.detach().numpy() for name, value in params.items()}


BETAS = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
TORCH = {"betas": (0.8, 0.9), "eps": 1e-3}
AGAINST_TORCH = [
    ({"name": "sgd"}, "SGD", {}),
    ({"name": "sgd", "momentum": 0.9}, "SGD", {"momentum": 0.9}),
    (
        {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "SGD",
        {"momentum": 0.9, "nesterov": True, "decay": 0.1},
    ),
    ({"name": "adam", **BETAS}, "Adam", TORCH),
    ({"name": "adam", "weight_decay": 0.1, **BETAS}, "Adam", TORCH | {"decay": 0.1}),
    ({"name": "adamw", "weight_decay": 0.1, **BETAS}, "AdamW", TORCH | {"decay": 0.1}),
]


@pytest.mark.parametrize(("fields", "kind", "options"), AGAINST_TORCH, ids=lambda x: str(x)[:60])
def test_updates_are_those_of_torch(fields, kind, options):
    got = updated(OptimConfig(clip_norm=None, **fields))
    wanted = updated_by_torch(kind, **options)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=2e-6)


def test_lion_is_the_sign_of_an_interpolation():
    config = OptimConfig(name="lion", beta1=0.8, beta2=0.9, weight_decay=0.1, clip_norm=None)
    param, momentum = draw(0)["kernel"].astype(np.float64), 0.0
    for step in range(5):
        gradient = draw(step + 1)["kernel"]
        direction = np.sign(0.8 * momentum + 0.2 * gradient)
        param = param - RATE * (direction + 0.1 * param)
        momentum = 0.9 * momentum + 0.1 * gradient
    np.testing.assert_allclose(updated(config)["kernel"], param, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adafactor", "lion", "muon"])
def test_decay_shrinks_matrices_only(name):
    plain, decayed = (updated(OptimConfig(name=name, weight_decay=d)) for d in (0.0, 0.5))
    assert np.linalg.norm(decayed["kernel"]) < np.linalg.norm(plain["kernel"])
    for kept in ("scale", "bias"):
        np.testing.assert_array_equal(decayed[kept], plain[kept])


def test_what_decays():
    norm, dense = {"scale": 0, "bias": 0}, {"kernel": 0, "bias": 0}
    params = {"embed": {"embedding": 0}, "layers": {"norm": norm, "mlp": dense}}
    assert decays(params) == {
        "embed": {"embedding": True},
        "layers": {
            "norm": {"scale": False, "bias": False},
            "mlp": {"kernel": True, "bias": False},
        },
    }


def test_clipping_keeps_the_direction_of_the_global_gradient():
    params = jax.tree.map(jnp.asarray, draw(0))
    gradients = draw(1)
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    for limit, factor in ((norm / 4, 0.25), (norm * 4, 1.0)):
        optimizer = make_optimizer(OptimConfig(name="sgd", clip_norm=limit), AXES)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        for name in SHAPES:
            np.testing.assert_allclose(updates[name], -factor * gradients[name], rtol=1e-5)


@pytest.mark.slow
def test_muon_orthogonalises_the_layers_matrices():
    shapes = {
        "layers": {
            "q": {"kernel": (2, 16, 4, 4)},
            "out": {"kernel": (2, 4, 4, 16)},
            "down": {"kernel": (2, 32, 16)},
            "norm": {"scale": (2, 16)},
        },
        "embed": {"embedding": (64, 16)},
    }
    axes = {
        "layers": {
            "q": {"kernel": ("layers", "embed", "heads", None)},
            "out": {"kernel": ("layers", "heads", None, "embed")},
            "down": {"kernel": ("layers", "mlp", "embed")},
            "norm": {"scale": ("layers", "embed")},
        },
        "embed": {"embedding": ("vocab", "embed")},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    layers = _muon_dimensions(params, axes)["layers"]
    sides = {name: tuple(layers[name]["kernel"]) for name in ("q", "out", "down")}
    assert sides == {"q": ((1,), (2, 3)), "out": ((1, 2), (3,)), "down": ((1,), (2,))}
    assert layers["norm"]["scale"] is None
    draw_like = lambda p: jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731
    gradients = jax.tree.map(draw_like, params)
    optimizer = make_optimizer(OptimConfig(name="muon"), axes)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for name, rows in (("q", 16), ("out", 16), ("down", 32)):
        matrix = np.asarray(updates["layers"][name]["kernel"][0]).reshape(rows, -1)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 4, "not orthogonal"
        assert 0.1 < np.sqrt((matrix**2).mean()) < 0.3, "not of AdamW's size"


STEPS, WARMUP, PEAK = 100, 10, 0.5
AFTER = {
    "constant": {10: 1.0, 55: 1.0, 99: 1.0},
    "linear": {10: 1.0, 55: 0.6, 99: 0.2 + 0.8 / 90},
    "cosine": {10: 1.0, 55: 0.6, 99: 0.2 + 0.4 * (1 + math.cos(math.pi * 89 / 90))},
    "wsd": {10: 1.0, 79: 1.0, 80: 1.0, 90: 0.6, 99: 0.2 + 0.8 / 20},
    "inverse_sqrt": {9: 1.0, 39: 0.5, 89: 1 / 3},
}
READS = {"linear": ("final_fraction",), "cosine": ("final_fraction",)}
READS["wsd"] = ("final_fraction", "decay_fraction")


@pytest.mark.parametrize("schedule", AFTER)
def test_schedules_at_key_steps(schedule):
    fields = {"final_fraction": 0.2, "decay_fraction": 0.2}
    fields = {key: fields[key] for key in READS.get(schedule, ())}
    config = OptimConfig(learning_rate=PEAK, schedule=schedule, warmup_steps=WARMUP, **fields)
    rate = learning_rate(config, STEPS)
    for step in range(WARMUP):
        assert float(rate(step)) == pytest.approx(PEAK * (step + 1) / WARMUP)
    for step, factor in AFTER[schedule].items():
        assert float(rate(step)) == pytest.approx(PEAK * factor, rel=1e-5), step
    assert rate(3).dtype == jnp.float32
    assert float(jax.jit(rate)(55)) == pytest.approx(float(rate(55)))


def test_warmup_is_short_in_a_short_run():
    for total, warmup in ((8, 2), (80, 20), (1000, 20)):
        rate = learning_rate(OptimConfig(learning_rate=PEAK), total)
        assert float(rate(warmup - 1)) == pytest.approx(PEAK)
        assert float(rate(0)) == pytest.approx(PEAK / warmup)


def test_no_warmup_starts_at_the_peak():
    config = OptimConfig(learning_rate=PEAK, warmup_steps=0)
    assert float(learning_rate(config, STEPS)(0)) == pytest.approx(PEAK)


def test_adapters_decay_and_are_adams_under_muon():
    params = {"layers": {"q": {"lora_a": jnp.ones((2, 6, 3)), "lora_b": jnp.zeros((2, 3, 5))}}}
    axes = {
        "layers": {"q": {"lora_a": ("layers", "embed", None), "lora_b": ("layers", None, None)}}
    }
    assert all(jax.tree.leaves(decays(params)))
    config = OptimConfig(name="muon", weight_decay=0.1, clip_norm=None)
    # Optax gives Muon's share of Adam Nesterov momentum too.
    adam = optax.adamw(1.0, config.beta1, config.beta2, config.eps, weight_decay=0.1, nesterov=True)
    updates = []
    for optimizer in (make_optimizer(config, axes), adam):
        gradients = jax.tree.map(lambda p: 0.5 + p, params)
        update, _ = optimizer.update(gradients, optimizer.init(params), params)
        updates.append(update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *updates)


@pytest.mark.parametrize(
    ("schedule", "before", "line"),
    [
        ("cosine", 100, "from 1.00e-02 at step 100 to 6.28e-02 at step 101"),
        ("linear", 100, "the linear schedule is over 200 steps now"),
        ("wsd", 100, "from 1.45e-02 at step 100 to 1.00e-01 at step 101"),
        ("inverse_sqrt", 100, None),
        ("constant", 100, None),
        # Warm-up is a quarter of so few steps, and over.
        ("inverse_sqrt", 60, "the inverse_sqrt schedule"),
        ("constant", 60, None),
    ],
)
def test_a_schedule_that_more_steps_stretch_is_said(schedule, before, line):
    config = OptimConfig(learning_rate=RATE, schedule=schedule)
    said = stretched(config, before, 200, before)
    assert said is None if line is None else line in said
