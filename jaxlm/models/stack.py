"""How a stack of like layers is initialised and run, whatever the layers are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

# What the backward pass may keep instead of recomputing.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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


def unstack(layers) -> tuple:
    """One tree per layer. Slicing once, outside the token loop, is what decoding wants."""
    return tuple(_take(layers, i) for i in range(_length(layers)))


def run_stack(apply: Callable, layers, x, *, period: int, mode: str, remat: str, caches=None):
    """Run `x` through the layers; returns (x, the caches written to or None).

    `apply(kind, params, x, layer, cache)` is one layer; `kind`, static, is the layer's place in
    the repeating pattern of `period` layers. `layers` is stacked, or a tuple of trees
    (see `unstack`), which may come with a tuple of caches.
    """
    if isinstance(layers, tuple):
        written = []
        for i, params in enumerate(layers):
            x, cache = apply(i % period, params, x, i, caches[i] if caches else None)
            written.append(cache)
        return x, tuple(written) if caches else None

    def one(kind, params, x, layer):
        return apply(kind, params, x, layer, None)[0]

    if remat != "none":
        # A scan already keeps the compiler from undoing the recomputation.
        one = jax.checkpoint(
            one,
            policy=REMAT_POLICIES[remat],
            static_argnums=(0,),
            prevent_cse=mode != "scan",
        )
    length = _length(layers)
    scanned = length // period * period if mode == "scan" else 0

    def one_period(x, step):
        params, first = step
        for kind in range(period):
            x = one(kind, _take(params, kind), x, first + kind)
        return x, None

    if scanned:
        periods = jax.tree.map(
            lambda p: p[:scanned].reshape(scanned // period, period, *p.shape[1:]), layers
        )
        x, _ = jax.lax.scan(one_period, x, (periods, jnp.arange(0, scanned, period)))
    for i in range(scanned, length):
        x = one(i % period, _take(layers, i), x, i)
    return x, None


def _take(layers, index: int):
    return jax.tree.map(lambda p: p[index], layers)


def _length(layers) -> int:
    return jax.tree.leaves(layers)[0].shape[0]
