"""Attention that stores what it weighs values by, and with it forms its own gradient.

The softmax is divided out after the weighted sum, and its gradient's correction comes from the
output, as in FlashAttention-2 (Dao, 2023): of the arrays that are as large as the scores, one is
kept. Blocks of queries leave out the keys that none of them sees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxlm.nn.flash import MASKED, Places, visible

MOST_BLOCKS, LEAST_BLOCK = 4, 64
"""More or smaller blocks of queries leave out more scores, and cost more to compile and start."""


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What stays the same from call to call."""

    scale: float
    spans: tuple[tuple[slice, slice], ...]
    """Blocks of queries, and the keys that each may see."""


def stored_attention(
    q_btnh,
    k_bskh,
    v_bskh,
    *,
    queries: Places,
    keys: Places,
    scale: float,
    window: int | None = None,
    causal: bool = True,
):
    """Attention as `attention.attention` defines it; [B, T, N, H] in the type of `q_btnh`.

    Where it is causal and `queries is keys`, keys are left out by the order of columns: in a row, a
    document's tokens stand next to each other and in order. A query that sees nothing gets zeros.
    """
    in_order = causal and queries is keys
    batch, length, heads, head_dim = q_btnh.shape
    kv_heads = k_bskh.shape[2]
    group = heads // kv_heads
    size = max(LEAST_BLOCK, -(-length // MOST_BLOCKS)) if in_order else length
    spans = []
    for first in range(0, length, size):
        last = min(first + size, length)
        oldest = 0 if window is None else max(0, first - window + 1)
        seen = slice(oldest, last) if in_order else slice(None)
        spans.append((slice(first * group, last * group), seen))
    # The heads of a group are rows R of one matrix, a token's side by side.
    q_bkrh = jnp.moveaxis(q_btnh.reshape(batch, length, kv_heads, group, head_dim), 2, 1)
    out_bkrh = _attend(
        _Kernel(scale, tuple(spans)),
        q_bkrh.reshape(batch, kv_heads, length * group, head_dim),
        jnp.moveaxis(k_bskh, 1, 2),
        jnp.moveaxis(v_bskh, 1, 2),
        jnp.repeat(visible(queries, keys, window, causal), group, axis=1),
    )
    out_bktgh = out_bkrh.reshape(batch, kv_heads, length, group, head_dim)
    return jnp.moveaxis(out_bktgh, 1, 2).reshape(q_btnh.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: _Kernel, q_bkrh, k_bksh, v_bksh, mask_brs):
    return _attend_forward(kernel, q_bkrh, k_bksh, v_bksh, mask_brs)[0]


def _attend_forward(kernel: _Kernel, q_bkrh, k_bksh, v_bksh, mask_brs):
    outs, stored = [], []
    for rows, seen in kernel.spans:
        scores = _einsum("bkrh,bksh->bkrs", q_bkrh[:, :, rows], k_bksh[:, :, seen])
        scores = jnp.where(mask_brs[:, None, rows, seen], scores * kernel.scale, MASKED)
        # Where all is masked, exponentials are zero.
        top = jnp.maximum(scores.max(-1, keepdims=True), MASKED / 2)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        share = jnp.where(total > 0, 1.0 / total, 0.0)
        weights = weights.astype(v_bksh.dtype)
        out = _einsum("bkrs,bksh->bkrh", weights, v_bksh[:, :, seen]) * share
        outs.append(out.astype(q_bkrh.dtype))
        stored.append((weights, share))
    out = jnp.concatenate(outs, 2)
    return out, (q_bkrh, k_bksh, v_bksh, stored, out)


def _attend_backward(kernel: _Kernel, saved, dout_bkrh):
    q_bkrh, k_bksh, v_bksh, stored, out_bkrh = saved
    dq, dk, dv = [], jnp.zeros(k_bksh.shape), jnp.zeros(v_bksh.shape)
    for (rows, seen), (weights, share) in zip(kernel.spans, stored, strict=True):
        q, out, dout = (x[:, :, rows] for x in (q_bkrh, out_bkrh, dout_bkrh))
        k, v = k_bksh[:, :, seen], v_bksh[:, :, seen]
        dout = dout.astype(jnp.float32) * share
        delta = jnp.sum(dout * out.astype(jnp.float32), -1, keepdims=True)
        dout = dout.astype(v.dtype)
        dweights = _einsum("bkrh,bksh->bkrs", dout, v)
        dscores = (weights.astype(jnp.float32) * (dweights - delta)).astype(q.dtype)
        dq.append(_einsum("bkrs,bksh->bkrh", dscores, k) * kernel.scale)
        dk = dk.at[:, :, seen].add(_einsum("bkrs,bkrh->bksh", dscores, q) * kernel.scale)
        dv = dv.at[:, :, seen].add(_einsum("bkrs,bkrh->bksh", weights, dout))
    dq = jnp.concatenate(dq, 2)
    given = zip((dq, dk, dv), (q_bkrh, k_bksh, v_bksh), strict=True)
    return *(d.astype(x.dtype) for d, x in given), None


_attend.defvjp(_attend_forward, _attend_backward)


def _einsum(subscripts: str, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
