"""Next-token cross-entropy, in blocks over positions so that full logits are never held."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel import is_split, summable
from jaxlm.sharding import axes_of, constrain, mesh_axes


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


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, over which head, how many positions of each row at a time."""

    logits_fn: Callable
    """(params, hidden [B, t, D]) -> logits [B, t, V], float32."""
    block: int
    z_loss: float = 0.0
    smoothing: float = 0.0


LEAST_BLOCK = 64
LOGITS_BYTES = 2**30


def usual_block(rows: int, vocab_size: int) -> int:
    """How many positions of each of `rows` rows to hold the logits of, where nobody says.

    On CPUs few, whose logits stay in the caches. A GPU reads the head anew for every block, and
    adds to its gradient: there a device's logits may take LOGITS_BYTES.
    """
    if jax.default_backend() == "cpu":
        return LEAST_BLOCK
    mesh = jax.sharding.get_abstract_mesh()
    tokens = mesh_axes(("batch", "length"), omit=frozenset(mesh.manual_axes))
    devices = math.prod(mesh.shape.get(axis, 1) for axis in axes_of(tokens))
    return max(LEAST_BLOCK, devices * LOGITS_BYTES // (4 * vocab_size * rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_cross_entropy(objective: Objective, params, hidden_btd, targets_bt, weights_bt):
    """Cross-entropy in float32, holding the logits of `block` positions of each row.

    Returns (the objective as a sum over weighted targets, `LossSums`). Only the first has a
    gradient, in `params` and `hidden_btd`. It is formed in the forward pass, while a block's logits
    are at hand, so that they are computed once. Without smoothing the sum for it stays 0.
    """

    def one_block(sums: LossSums, inputs):
        hidden, targets, weights = inputs
        logits = objective.logits_fn(params, hidden)
        block = _block_sums(objective, logits, *token_nll(logits, targets), weights)
        return _added(sums, block), None

    blocks = _split(objective.block, hidden_btd, targets_bt, weights_bt.astype(jnp.float32))
    sums, _ = jax.lax.scan(one_block, _no_sums(), blocks)
    return _value(objective, sums), sums


def _forward(objective: Objective, params, hidden_btd, targets_bt, weights_bt):
    """The value, and the objective's gradients.

    Each device adds up what its own tokens do to the parameters, over blocks, and that is summed
    over devices once. Left to itself, the compiler sums after each block.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tokens = mesh_axes(("batch", "length"), omit=frozenset({"pp", *mesh.manual_axes}))
    axes = axes_of(tokens)
    if not is_split(axes):
        return _formed(objective, params, hidden_btd, targets_bt, weights_bt)

    def on_a_device(*arguments):
        (_, sums), (in_params, in_hidden) = _formed(objective, *arguments)
        total = lambda x: jax.lax.psum(x.astype(summable(x.dtype)), tuple(axes)).astype(x.dtype)  # noqa: E731
        sums, in_params = jax.tree.map(total, (sums, in_params))
        return (_value(objective, sums), sums), (in_params, in_hidden)

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_a_device,
        in_specs=(everywhere, tokens, tokens, tokens),
        out_specs=(everywhere, (everywhere, tokens)),
        axis_names=axes,
        check_vma=False,
    )(params, hidden_btd, targets_bt, weights_bt)


def _formed(objective: Objective, params, hidden_btd, targets_bt, weights_bt):
    """As `_forward`, of tokens that are all at hand."""

    def one_block(carry, inputs):
        sums, total = carry
        hidden, targets, weights = inputs
        logits, pull = jax.vjp(objective.logits_fn, params, hidden)
        nll, log_z = token_nll(logits, targets)
        sums = _added(sums, _block_sums(objective, logits, nll, log_z, weights))
        in_params, in_hidden = pull(_slope(objective, logits, log_z, targets, weights))
        return (sums, _added(total, in_params)), in_hidden

    blocks = _split(objective.block, hidden_btd, targets_bt, weights_bt.astype(jnp.float32))
    # Not `zeros_like`, which would lay them out as parameters that come from outside of a mesh's
    # manual axes.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    (sums, in_params), in_hidden = jax.lax.scan(one_block, (_no_sums(), zeros), blocks)
    value = _value(objective, sums), sums
    return value, (in_params, _join(in_hidden, hidden_btd.shape[1]))


def _value(objective: Objective, sums: LossSums):
    return sums.objective(objective.z_loss, objective.smoothing)


def _backward(objective: Objective, gradients, cotangents):
    scale, _ = cotangents
    scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    return *scaled, None, None


blocked_cross_entropy.defvjp(_forward, _backward)


def _block_sums(objective: Objective, logits, nll, log_z, weights) -> LossSums:
    spread = jnp.zeros((), jnp.float32)
    if objective.smoothing:
        spread = jnp.sum((log_z - logits.mean(-1)) * weights)
    z = jnp.sum(jnp.square(log_z) * weights)
    return LossSums(jnp.sum(nll * weights), z, spread, jnp.sum(weights))


def _slope(objective: Objective, logits_btv, log_z_bt, targets_bt, weights_bt):
    """The objective's gradient in the logits: a softmax, and what smoothing asks for taken off."""
    log_z = log_z_bt[:, :, None]
    smoothing = objective.smoothing
    slope = jnp.exp(logits_btv - log_z) * (1.0 + 2.0 * objective.z_loss * log_z)
    slope = slope - jnp.where(_is_target(logits_btv, targets_bt), 1.0 - smoothing, 0.0)
    return (slope - smoothing / logits_btv.shape[-1]) * weights_bt[:, :, None]


def _no_sums() -> LossSums:
    return LossSums(*(jnp.zeros((), jnp.float32) for _ in dataclasses.fields(LossSums)))


def _added(x, y):
    return jax.tree.map(jnp.add, x, y)


def blocked_token_nll(hidden_btd, logits_fn: Callable, targets_bt, block: int):
    """-log P(target) of every position, [B, T] float32, by the same blocks."""

    def one_block(inputs):
        hidden, targets = inputs
        return token_nll(logits_fn(hidden), targets)[0]

    nll = jax.lax.map(one_block, _split(block, hidden_btd, targets_bt))
    return _join(nll, targets_bt.shape[1])


def token_nll(logits_btv, targets_bt):
    """(-log P(target), log Z), each [B, T] float32, of float32 logits [B, T, V]."""
    on_gpu = jax.default_backend() == "gpu"
    log_z = (online_logsumexp if on_gpu else jax.nn.logsumexp)(logits_btv, axis=-1)
    chosen = jnp.where(_is_target(logits_btv, targets_bt), logits_btv, 0.0).sum(-1)
    return log_z - chosen, log_z


def online_logsumexp(x, axis: int):
    """As `jax.nn.logsumexp`, but `x` is read once (Milakov and Gimelshein, 2018), not twice.

    It has no gradient.
    """

    def joined(x, y):
        (top_x, sum_x), (top_y, sum_y) = x, y
        shrunk = jnp.where(top_x == top_y, 1.0, jnp.exp(-jnp.abs(top_x - top_y)))
        total = jnp.where(top_x < top_y, sum_x * shrunk + sum_y, sum_x + sum_y * shrunk)
        return jnp.maximum(top_x, top_y), total

    nothing = jnp.finfo(x.dtype).min, jnp.zeros((), x.dtype)
    top, total = jax.lax.reduce((x, jnp.ones_like(x)), nothing, joined, (axis % x.ndim,))
    return top + jnp.log(total)


def _is_target(logits_btv, targets_bt):
    """One-hot, instead of a gather: it stays local where the vocabulary is split over tp."""
    return jax.lax.broadcasted_iota(jnp.int32, logits_btv.shape, 2) == targets_bt[:, :, None]


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


def _join(blocks, length: int):
    """Blocks [n, B, block, ...] of `_split` as an array [B, length, ...]."""
    rows = jnp.moveaxis(blocks, 0, 2)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :length]
