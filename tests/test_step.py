"""One update: of the whole batch however it is split, and never by something non-finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import exact, make_program, random_batch, tiny_config

from jaxlm.cli import build_config
from jaxlm.config import OptimConfig
from jaxlm.mesh import make_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.optim import make_optimizer
from jaxlm.sharding import split_boxes
from jaxlm.step import Program, accumulate, eval_step, micro_batches, train_step
from jaxlm.tasks.batch import batch_loss

SMALL = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "num_layers": 1}


def small_config(optim=(), train=(), model=()):
    """A config of one layer and eight rows."""
    return tiny_config(SMALL | dict(model), optim, {"batch_size": 8} | dict(train))


def uneven(batch):
    """The batch with most targets of the odd rows left out: micro-batches weigh differently."""
    weights = batch.weights.copy()
    weights[1::2, 3:] = 0.0
    return dataclasses.replace(batch, weights=weights)


def remembering(axes) -> optax.GradientTransformation:
    """Gradient descent that keeps the last gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(jnp.negative, updates), updates),
    )


@functools.cache
def first_update(accumulation: int, mesh: str = "dp1"):
    """(loss, targets, gradients) of the first update, computed in micro-batches."""
    config = small_config(
        train={"accumulation": accumulation, "z_loss": 1e-2}, model={"dropout": 0.1}
    )
    program = make_program(config, mesh, remembering)
    batch = program.put(uneven(random_batch(config)))
    state, metrics = program.train_step(program.init(), batch)
    return float(metrics["loss"]), float(metrics["targets"]), exact(program, state).opt_state


@pytest.mark.parametrize(("accumulation", "mesh"), [(4, "dp1"), (2, "dp2")])
@pytest.mark.slow
def test_accumulation_is_the_update_of_the_whole_batch(accumulation, mesh):
    loss, targets, gradients = first_update(accumulation, mesh)
    wanted_loss, wanted_targets, wanted_gradients = first_update(1)
    assert targets == wanted_targets == uneven(random_batch(small_config())).weights.sum()
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for got, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("mesh", "changes", "parts"),
    [
        ("dp1", {}, 6),
        ("dp2", {}, 3),
        ("tp2", {}, 6),
        # Nothing is gathered again for every part, and no chain of steps is made longer.
        ("fsdp2", {}, 1),
        ("pp2", {}, 1),
        ("dp1", {"model": {"kind": "lstm"}}, 1),
        ("dp1", {"train": {"batch_size": 24, "accumulation": 2}}, 2),
        # Whole rows, and as few of them as have 1,024 tokens.
        ("dp1", {"train": {"batch_size": 7}}, 1),
        ("dp1", {"model": {"max_seq_len": 1024}, "data": {"seq_len": 1024}}, 24),
    ],
)
def test_on_cpus_few_tokens_are_taken_at_a_time(mesh, changes, parts):
    settings = {"train": {"batch_size": 24}, "data": {"seq_len": 256}, "mesh": mesh}
    config = build_config(settings | changes)
    assert micro_batches(config, make_mesh(mesh)) == parts


@pytest.mark.parametrize("count", [1, 4])
def test_micro_batches_keep_the_tokens_places_in_the_batch(count):
    batch = jax.tree.map(jnp.asarray, random_batch(small_config()))

    def gradient(_, micro, places):
        return jnp.sum(micro.tokens * places[0].astype(jnp.int32))

    total = accumulate(gradient, None, batch, count)
    assert total == np.sum(np.asarray(batch.tokens).ravel() * np.arange(batch.tokens.size))


@pytest.fixture(scope="module")
def adamw() -> tuple[Program, object]:
    """A program with momentum and an average of the parameters, and its config."""
    config = small_config(optim={"ema_decay": 0.9, "clip_norm": None})
    return make_program(config), config


@pytest.mark.slow
def test_a_non_finite_update_is_skipped_and_counted(adamw):
    program, config = adamw
    state, _ = program.train_step(program.init(), program.put(random_batch(config)))
    before = jax.device_get(state)
    bad = random_batch(config, 1)
    bad = dataclasses.replace(bad, weights=np.where(bad.weights > 0, np.inf, 0).astype("float32"))
    for times in (1, 2):
        state, metrics = program.train_step(state, program.put(bad))
        assert not np.isfinite(metrics["loss"])
        assert (metrics["skipped"], metrics["skipped_in_row"]) == (times, times)
    after = jax.device_get(state)
    kept = lambda state: (state.params, state.opt_state, state.ema)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, kept(after), kept(before))
    assert after.step == before.step + 2
    state, metrics = program.train_step(state, program.put(random_batch(config, 2)))
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 0)
    assert np.any(state.params["final_norm"]["scale"] != after.params["final_norm"]["scale"])


class Exploding(Decoder):
    """A model whose loss is finite, but not its gradient: that of sqrt at 0."""

    def hidden(self, params, *arguments, **options):
        hidden, *others = super().hidden(params, *arguments, **options)
        return hidden + jnp.sqrt(0.0 * params["final_norm"]["scale"]), *others


def test_a_gradient_that_is_not_finite_is_enough(adamw):
    program, config = adamw
    step = functools.partial(
        train_step,
        model=Exploding(config.model),
        optimizer=optax.identity(),
        config=config,
        micro_batches=1,
    )
    state = dataclasses.replace(program.init(), opt_state=optax.EmptyState())
    new, metrics = jax.jit(step)(state, random_batch(config), 0.1)
    assert np.isfinite(metrics["loss"])
    assert new.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_a_step_is_compiled_once_for_all_schedules():
    def lowered(**optim):
        steps = optim.pop("steps", 100)
        config = small_config(optim, {"steps": steps})
        program = make_program(config)
        batch = program.put(random_batch(config))
        return program.train_step.lower(program.layout.stored, batch).as_text()

    one = lowered()
    assert lowered(steps=50) == one
    assert lowered(learning_rate=1e-3, schedule="wsd", warmup_steps=7) == one
    assert lowered(clip_norm=3.0) != one


def test_the_average_of_the_parameters(adamw):
    program, config = adamw
    state = program.init()
    average = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), average)
    for step in range(3):
        state, _ = program.train_step(state, program.put(random_batch(config, step)))
        average = jax.tree.map(
            lambda a, p: 0.9 * a + 0.1 * np.asarray(p), average, jax.device_get(state.params)
        )
    for got, wanted in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_metrics_and_init_from(adamw):
    program, config = adamw
    state = program.init()
    again = program.init_from(jax.tree.map(jnp.copy, state.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))
    batch = random_batch(config)
    sums = program.eval_step(state.params, program.put(batch))
    nats, targets = sums.nats, sums.weight
    _, metrics = program.train_step(state, program.put(batch))
    assert metrics["loss"] == pytest.approx(float(nats / targets), rel=1e-5)
    assert metrics["targets"] == targets == batch.weights.sum()
    assert metrics["learning_rate"] == pytest.approx(config.optim.learning_rate / 2)


def test_a_batch_without_targets_changes_nothing_and_is_no_failure(adamw):
    program, config = adamw
    batch = random_batch(config)
    empty = dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
    _, metrics = program.train_step(program.init(), program.put(empty))
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"]) == (0, 0, 0)


RATES = {"sgd": 0.5, "adam": 0.01, "adamw": 0.01, "adafactor": 0.01, "lion": 0.003, "muon": 0.02}


@pytest.fixture(scope="module")
def model_loss():
    """(parameters, their axes, compiled loss and gradient on one batch)."""
    config = small_config()
    model, batch = Decoder(config.model), random_batch(config)
    params, axes = split_boxes(model.init(jax.random.key(0)))

    def loss(params):
        total, sums, _ = batch_loss(model, params, batch, config.train, None)
        return total / sums.weight

    return params, axes, jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", RATES)
@pytest.mark.slow
def test_every_optimiser_lowers_the_loss(name, model_loss):
    params, axes, loss_and_gradient = model_loss
    optimizer = make_optimizer(OptimConfig(name=name), axes)
    update, state, losses = jax.jit(optimizer.update), optimizer.init(params), []
    for _ in range(12):
        loss, gradients = loss_and_gradient(params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: RATES[name] * u, updates))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_no_type_or_rank_is_promoted_in_silence(preset, dtype, strict):
    config = small_config(model={"preset": preset, "dtype": dtype})
    model, batch = Decoder(config.model), random_batch(config)
    params, _ = split_boxes(jax.eval_shape(model.init, jax.random.key(0)))
    jax.eval_shape(functools.partial(eval_step, model=model, config=config), params, batch)
    total = lambda params: batch_loss(model, params, batch, config.train, None)[0]  # noqa: E731
    gradients = jax.eval_shape(jax.grad(total), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
