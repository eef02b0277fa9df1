"""How a stack of like layers is initialised and run, whatever the layers are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.nn.layers import PRODUCT
from jaxlm.parallel.pipeline import Schedule, run_pipeline

# The most layers that `auto` unrolls.
FEW = 12

# What the backward pass may keep instead of recomputing.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def init_stack(init: Callable, key, num_layers: int):
    """Parameters of `num_layers` layers, stacked on a leading `layers` axis.

    Layer i is drawn from fold_in(key, i), so that it does not depend on how many there are.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_layers))
    stacked = jax.vmap(init)(keys)
    return jax.tree.map(
        lambda box: box.replace(names=("layers", *box.names)),
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def unstack(layers, order: np.ndarray | None = None) -> tuple:
    """One tree per layer. Slicing once, outside the token loop, is what decoding wants.

    `order` says which layer is at each place of the stack.
    """
    places = range(_length(layers)) if order is None else np.argsort(order)
    return tuple(_take(layers, i) for i in places)


def run_stack(
    apply: Callable,
    layers,
    x,
    rows,
    *,
    period: int,
    mode: str,
    remat: str,
    schedule: Schedule,
    caches=None,
):
    """Run `x` through the layers; returns (x, auxiliary sums by layer, the caches written to).

    `apply(kind, params, x, rows, layer, cache)` is one layer and returns (x, sums, cache); `kind`,
    static, is the layer's place in the repeating pattern of `period` layers, and `rows` a tree of
    arrays [B, ...] that go with `x`. `layers` is stacked, or a tuple of trees (see `unstack`),
    which may come with a tuple of caches. With more than one stage in `schedule`, the stack runs
    as a pipeline.
    """
    if isinstance(layers, tuple):
        written, sums = [], []
        for i, params in enumerate(layers):
            cache = caches[i] if caches else None
            x, new, cache = apply(i % period, params, x, rows, i, cache)
            written.append(cache)
            sums.append(new)
        return x, _stack(sums), tuple(written) if caches else None

    def one(kind, params, x, rows, layer):
        return apply(kind, params, x, rows, layer, None)[:2]

    scan = mode == "scan" or (mode == "auto" and _is_scan_due(_length(layers), remat))
    piped = schedule.stages > 1
    if remat == "full" or (remat == "dots" and not piped):
        # A scan already keeps the compiler from undoing the recomputation.
        one = jax.checkpoint(
            one,
            policy=REMAT_POLICIES[remat],
            static_argnums=(0,),
            prevent_cse=not scan,
        )

    def run(layers, x, rows, first=0):
        return _run_layers(one, layers, x, rows, first, period, scan)

    if piped:
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return *run_pipeline(run, layers, x, rows, schedule), None
    return *run(layers, x, rows), None


def _is_scan_due(length: int, remat: str) -> bool:
    """Whether layers written out would compile too long, or hold too much.

    Of layers written out the compiler keeps what was to be computed, or gathered by fsdp, again.
    """
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    return length > FEW or remat != "none" or fsdp > 1


def _run_layers(one: Callable, layers, x, rows, first, period: int, scan: bool):
    """Stacked layers in sequence, `first` the index of the first; returns (x, sums by layer)."""
    length = _length(layers)
    scanned = length // period * period if scan else 0

    def one_period(x, step):
        params, index = step
        sums = []
        for kind in range(period):
            x, new = one(kind, _take(params, kind), x, rows, index + kind)
            sums.append(new)
        return x, _stack(sums)

    parts = []
    if scanned:
        periods = jax.tree.map(
            lambda p: p[:scanned].reshape(scanned // period, period, *p.shape[1:]), layers
        )
        x, sums = jax.lax.scan(one_period, x, (periods, first + jnp.arange(0, scanned, period)))
        parts.append(jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), sums))
    rest = []
    if scanned < length:
        # Like layers are traced and lowered once; XLA compiles them as if they were written out.
        one = jax.jit(one, static_argnums=0)
        for i, params in enumerate(_split(layers, scanned), scanned):
            x, new = one(i % period, params, x, rows, first + i)
            rest.append(new)
    if rest:
        parts.append(_stack(rest))
    return x, jax.tree.map(lambda *s: jnp.concatenate(s), *parts)


def _stack(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _take(layers, index: int):
    return jax.tree.map(lambda p: p[index], layers)


def _split(layers, first: int) -> list:
    """The layers from `first` on, one tree each.

    Split instead of taken one by one, because what a split does to gradients is one concatenation.
    """
    leaves, structure = jax.tree.flatten(layers)
    rest = [jax.lax.split(p[first:], [1] * (len(p) - first)) for p in leaves]
    return [structure.unflatten(p.squeeze(0) for p in layer) for layer in zip(*rest, strict=True)]


def _length(layers) -> int:
    return jax.tree.leaves(layers)[0].shape[0]
