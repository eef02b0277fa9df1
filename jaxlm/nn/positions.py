"""How a model knows positions: rotary and sinusoidal ones, and biases by distance."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.model_config import ModelConfig, RopeScaling
from jaxlm.nn.flash import Places
from jaxlm.nn.layers import gaussian
from jaxlm.parallel.lookup import lookup
from jaxlm.sharding import constrain, with_axes

SINUSOID_BASE = 10_000.0


def rope_turns(positions_bt, size: int, theta: float, scaling: RopeScaling | None):
    """What `apply_rope` turns R features by at their positions: cosines and sines [B, T, R/2]."""
    angles = _angles(positions_bt, size, theta, scaling)
    return _computed_once(jnp.cos(angles)), jnp.sin(angles)


def _computed_once(table):
    """`table`, none of whose values is over 1, for loops to read on CPUs, and not to compute.

    XLA's CPU compiler has every loop compute anew, for every head, what it holds for cheap: cosines
    are, a remainder is not. It takes optimization barriers out before it decides.
    """
    return jax.lax.rem(table, 2.0) if jax.default_backend() == "cpu" else table


def _angles(positions_bt, size: int, theta: float, scaling: RopeScaling | None):
    """Angles [B, T, R/2], float32, of rotary positions of R features (Su et al., 2021)."""
    inverse = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None:
        inverse = _llama3_scaled(inverse, scaling)
    frequencies = jnp.asarray(inverse, jnp.float32)
    return positions_bt.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]


def _llama3_scaled(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, middling ones by a blend."""
    turns = scaling.original_max_seq_len * inverse / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * (blend + (1.0 - blend) / scaling.factor)


def apply_rope(x_btnh, turns):
    """Turn the pairs (i, i + R/2) of every head's first R features as `rope_turns` says.

    In float32, returned as `x`.
    """
    cos, sin = (table[:, :, None, None, :] for table in turns)
    half = cos.shape[-1]
    turned, rest = jnp.split(x_btnh.astype(jnp.float32), (2 * half,), axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], 2, half)
    # Reversed instead of concatenated from its halves: a CPU takes half of the time for it.
    pairs = pairs * cos + pairs[..., ::-1, :] * jnp.concatenate([-sin, sin], -2)
    turned = pairs.reshape(turned.shape)
    if rest.shape[-1]:
        turned = jnp.concatenate([turned, rest], -1)
    return turned.astype(x_btnh.dtype)


def sinusoids(positions_bt, d_model: int):
    """Positions [B, T] as D features, float32 (Vaswani et al., 2017).

    All sines come before all cosines, as in Marian; the paper has them in turn, which for a model
    is only another order of features.
    """
    angles = _angles(positions_bt, d_model, SINUSOID_BASE, None)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class RelativeBias(nn.Module):
    """Biases on attention scores by distance, for all layers (T5: Raffel et al., 2020)."""

    config: ModelConfig
    causal: bool

    @nn.compact
    def __call__(self, queries: Places, keys: Places):
        """Float32 [B, N, T, S], by each key's position less its query's."""
        c = self.config
        init = with_axes(gaussian(c.init_mean, c.init_std), (None, "heads"))
        table = self.param("embedding", init, (c.relative_buckets, c.num_heads))
        farthest = c.relative_max_distance
        by_distance = table[distance_buckets(c.relative_buckets, farthest, self.causal)]
        distances = keys.positions[:, None, :] - queries.positions[:, :, None]
        places = jnp.clip(distances, -farthest, farthest) + farthest
        batch, length, others = places.shape
        places = places.reshape(batch, length * others)
        bias = by_distance[places] if self.is_initializing() else lookup(by_distance, places, None)
        bias = jnp.moveaxis(bias.reshape(batch, length, others, c.num_heads), 3, 1)
        return constrain(bias, "batch", "heads", None, None)


def distance_buckets(count: int, farthest: int, causal: bool) -> np.ndarray:
    """The bucket of every distance from -farthest (the key is before the query) to farthest.

    Half of the buckets are for one distance each, half for ranges that widen by a logarithm. Where
    it is causal, keys behind the query share the bucket of distance 0; else they have half of all
    buckets to themselves.
    """
    distances = np.arange(-farthest, farthest + 1)
    first = np.zeros_like(distances)
    if causal:
        ago = np.maximum(-distances, 0)
    else:
        count //= 2
        first, ago = np.where(distances > 0, count, 0), np.abs(distances)
    exact = count // 2
    # In float32, as T5 did: at the edges of ranges it matters.
    share = np.log(np.maximum(ago, 1).astype(np.float32) / np.float32(exact))
    share = share / np.float32(np.log(farthest / exact)) * np.float32(count - exact)
    wide = np.minimum(exact + share.astype(np.int64), count - 1)
    return first + np.where(ago < exact, ago, wide)
