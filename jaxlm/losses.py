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
    weight: jax.Array
    """Number of targets."""


def blocked_cross_entropy(
    hidden_btd, logits_fn: Callable, targets_bt, weights_bt, block: int
) -> LossSums:
    """Cross-entropy sums in float32, holding the logits of `block` positions of each row.

    Block j takes positions j, j + n, j + 2n, ... of n blocks, so that where positions are split
    over devices every device has an equal share of every block. Backward recomputes the logits.
    """
    hidden_btd = constrain(hidden_btd, "batch", "length", None)
    length = hidden_btd.shape[1]
    block = min(block, length)
    count = -(-length // block)
    padding = count * block - length
    if padding:
        hidden_btd = jnp.pad(hidden_btd, ((0, 0), (0, padding), (0, 0)))
        targets_bt = jnp.pad(targets_bt, ((0, 0), (0, padding)))
        weights_bt = jnp.pad(weights_bt, ((0, 0), (0, padding)))

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], block, count, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def one_block(sums: LossSums, inputs):
        hidden, targets, weights = inputs
        nll, log_z = token_nll(logits_fn(hidden), targets)
        return LossSums(
            sums.nats + jnp.sum(nll * weights),
            sums.z + jnp.sum(jnp.square(log_z) * weights),
            sums.weight + jnp.sum(weights),
        ), None

    zero = jnp.zeros((), jnp.float32)
    blocks = split(hidden_btd), split(targets_bt), split(weights_bt.astype(jnp.float32))
    sums, _ = jax.lax.scan(one_block, LossSums(zero, zero, zero), blocks)
    return sums


def token_nll(logits_btv, targets_bt):
    """(-log P(target), log Z), each [B, T] float32, of float32 logits [B, T, V]."""
    log_z = jax.nn.logsumexp(logits_btv, axis=-1)
    # A one-hot sum instead of a gather: it stays local where the vocabulary is split over tp.
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_btv.shape, 2)
    chosen = jnp.where(vocabulary == targets_bt[:, :, None], logits_btv, 0.0).sum(-1)
    return log_z - chosen, log_z
