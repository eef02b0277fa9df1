"""Next-token cross-entropy, in blocks over positions so that full logits are never held."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over weighted targets; sums add up over micro-batches and devices, means do not."""

    nats: jax.Array
    """Cross-entropy."""
    z: jax.Array
    """log(Z)^2, what z-loss penalises (Chowdhery et al., 2022)."""
    spread: jax.Array
    """Cross-entropy of the uniform distribution, where label smoothing asks for it."""
    weight: jax.Array
    """Number of targets."""

    def objective(self, z_loss: float, smoothing: float):
        """What training minimises, as a sum: label smoothing is that of Szegedy et al. (2016)."""
        nats = (1.0 - smoothing) * self.nats + smoothing * self.spread if smoothing else self.nats
        return nats + z_loss * self.z


def blocked_cross_entropy(
    hidden_btd, logits_fn: Callable, targets_bt, weights_bt, block: int, smooth: bool = False
) -> LossSums:
    """Cross-entropy sums in float32, holding the logits of `block` positions of each row.

    Backward recomputes the logits. Without `smooth` the sum for label smoothing stays 0.
    """

    @jax.checkpoint
    def one_block(sums: LossSums, inputs):
        hidden, targets, weights = inputs
        logits = logits_fn(hidden)
        nll, log_z = token_nll(logits, targets)
        spread = sums.spread
        if smooth:
            spread = spread + jnp.sum((log_z - logits.mean(-1)) * weights)
        return LossSums(
            sums.nats + jnp.sum(nll * weights),
            sums.z + jnp.sum(jnp.square(log_z) * weights),
            spread,
            sums.weight + jnp.sum(weights),
        ), None

    zero = jnp.zeros((), jnp.float32)
    blocks = _split(block, hidden_btd, targets_bt, weights_bt.astype(jnp.float32))
    sums, _ = jax.lax.scan(one_block, LossSums(zero, zero, zero, zero), blocks)
    return sums


def blocked_token_nll(hidden_btd, logits_fn: Callable, targets_bt, block: int):
    """-log P(target) of every position, [B, T] float32, by the same blocks."""

    def one_block(inputs):
        hidden, targets = inputs
        return token_nll(logits_fn(hidden), targets)[0]

    nll = jax.lax.map(one_block, _split(block, hidden_btd, targets_bt))
    batch, length = targets_bt.shape
    return jnp.moveaxis(nll, 0, 2).reshape(batch, -1)[:, :length]


def token_nll(logits_btv, targets_bt):
    """(-log P(target), log Z), each [B, T] float32, of float32 logits [B, T, V]."""
    log_z = jax.nn.logsumexp(logits_btv, axis=-1)
    # A one-hot sum instead of a gather: it stays local where the vocabulary is split over tp.
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_btv.shape, 2)
    chosen = jnp.where(vocabulary == targets_bt[:, :, None], logits_btv, 0.0).sum(-1)
    return log_z - chosen, log_z


def _split(block: int, hidden_btd, *others_bt):
    """Arrays [B, T, ...] as blocks [n, B, block, ...]; what is missing at the end is zeros.

    Block j takes positions j, j + n, j + 2n, ... so that where positions are split over devices
    every device has an equal share of every block.
    """
    hidden_btd = constrain(hidden_btd, "batch", "length", None)
    length = hidden_btd.shape[1]
    block = min(block, length)
    count = -(-length // block)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], block, count, *x.shape[2:]), 2, 0)

    return tuple(split(x) for x in (hidden_btd, *others_bt))
