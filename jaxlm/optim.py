"""Optax chains and schedules by name.

Every optimiser here returns updates for a learning rate of 1; the train step multiplies them by
`learning_rate(...)(step)`, so that a skipped update does not shift the schedule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.config import OptimConfig
from jaxlm.sharding import constrain_first, path_name

# What the paths of parameters start with that are stacked by layer.
STACKS = ("layers/", "encoder_layers/")


def learning_rate(config: OptimConfig, total_steps: int) -> Callable:
    """The learning rate as a function of the step (0 is the first update's), float32.

    Warm-up is linear and reaches the peak at step `warmup_steps`; `wsd` is warm-up, stable,
    decay (Hu et al., 2024), `inverse_sqrt` is that of Vaswani et al. (2017).
    """
    warmup = min(20, total_steps // 4) if config.warmup_steps is None else config.warmup_steps
    left = max(1, total_steps - warmup)

    def shape(step):
        after = jnp.maximum(step - warmup, 0).astype(jnp.float32)
        done = jnp.minimum(after / left, 1.0)
        low = config.final_fraction
        if config.schedule == "constant":
            return jnp.ones_like(done)
        if config.schedule == "linear":
            return 1.0 - (1.0 - low) * done
        if config.schedule == "cosine":
            return low + (1.0 - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        if config.schedule == "wsd":
            decay = max(1.0, config.decay_fraction * total_steps)
            return 1.0 - (1.0 - low) * jnp.clip((step - total_steps + decay) / decay, 0.0, 1.0)
        start = float(max(warmup, 1))
        return jnp.sqrt(start / jnp.maximum(step.astype(jnp.float32) + 1.0, start))

    def rate(step):
        step = jnp.asarray(step, jnp.int32)
        warm = jnp.minimum((step + 1) / max(warmup, 1), 1.0).astype(jnp.float32)
        return config.learning_rate * warm * shape(step)

    return rate


def stretched(config: OptimConfig, before: int, total: int, step: int) -> str | None:
    """What to say where a run of `before` steps goes on after `step` as one of `total`.

    None where the steps to come have the same learning rate as they would have had.
    """
    old, new = (learning_rate(config, steps) for steps in (before, total))
    to_come = jnp.arange(step, max(before, total))
    if bool(jnp.allclose(old(to_come), new(to_come), rtol=1e-5, atol=0.0)):
        return None
    return (
        f"train.steps was {before} and is {total}: the {config.schedule} schedule is over {total} "
        f"steps now, so the learning rate goes from {old(step - 1):.2e} at step {step} to "
        f"{new(step):.2e} at step {step + 1}"
    )


def make_optimizer(config: OptimConfig, axes) -> optax.GradientTransformation:
    """Clipping and the optimiser for parameters whose logical axes are the leaves of `axes`."""
    optimizer = _optimizer(config, axes)
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def decays(params):
    """True for matrices, False for norms' scales and biases, which are never decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).split("/")[-1] not in ("scale", "bias", "balance_bias"),
        params,
    )


def _optimizer(config: OptimConfig, axes) -> optax.GradientTransformation:
    decay, b1, b2 = config.weight_decay, config.beta1, config.beta2
    l2 = optax.add_decayed_weights(decay, decays) if decay else optax.identity()
    if config.name == "sgd":
        return optax.chain(l2, optax.sgd(1.0, config.momentum or None, config.nesterov))
    if config.name == "adam":
        return optax.chain(l2, optax.adam(1.0, b1, b2, config.eps))
    if config.name == "adamw":
        return optax.adamw(1.0, b1, b2, config.eps, weight_decay=decay, mask=decays)
    if config.name == "lion":
        return optax.lion(1.0, b1, b2, weight_decay=decay, mask=decays)
    if config.name == "adafactor":
        return optax.chain(optax.adafactor(1.0), _decoupled(decay))
    update = muon(
        1.0,
        beta=b1,
        eps=config.eps,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=lambda params: _muon_dimensions(params, axes),
        consistent_rms=0.2,  # updates as large as AdamW's (Liu et al., 2025): one learning rate
    )
    # Muon's own decay knows no mask for the parameters it leaves to Adam.
    return optax.chain(optax.stateless(_split_layers), update, _decoupled(decay))


def _decoupled(decay: float) -> optax.GradientTransformation:
    """Weight decay after the optimiser, where updates are already negative."""
    return optax.add_decayed_weights(-decay, decays) if decay else optax.identity()


def _split_layers(gradients, params=None):
    """Share Muon's matrix products out: each dp replica orthogonalises some of the layers."""

    def split(path, x):
        stacked = path_name(path).startswith(STACKS) and x.ndim > 2
        return constrain_first(x, "layer_updates") if stacked else x

    return jax.tree_util.tree_map_with_path(split, gradients)


def _muon_dimensions(params, axes):
    """Which matrices Muon orthogonalises: those of the layers. The rest is Adam's (None)."""
    names_at = {
        path_name(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(
            axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
        )
    }

    def dimensions(path, _):
        name = path_name(path)
        if not (name.startswith(STACKS) and name.endswith("kernel")):
            return None
        names = names_at[name]
        dims = [i for i, axis in enumerate(names) if axis not in ("layers", "experts")]  # a batch
        inputs = tuple(dims[:1] if names[dims[0]] == "embed" else dims[:-1])
        return MuonDimensionNumbers(inputs, tuple(d for d in dims if d not in inputs))

    # Optax calls this on masked trees too.
    return jax.tree_util.tree_map_with_path(dimensions, params)
