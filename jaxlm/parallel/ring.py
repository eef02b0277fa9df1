"""Context parallelism: attention over rows that are split over the mesh axis `cp`.

Ring attention (Liu et al., 2023, arXiv 2310.01889): every device keeps its queries and passes its
keys and values on to the next, merging what it finds by the logarithms of the softmax's sums. Under
a causal mask, contiguous parts would leave the first devices idle (Brandon et al., 2023, "Striped
Attention"); device i instead holds the chunks i and 2n - 1 - i of 2n, one early and one late (as
in Llama 3, Dubey et al., 2024), and then each step is about half visible on every device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

AXIS = "cp"


def ring_order(length: int, size: int) -> np.ndarray:
    """The natural column at each stored place of a row [length] split over `size` devices.

    Raises ValueError unless 2 * size chunks divide the row evenly; a size of 1 takes any length.
    """
    if size == 1:
        return np.arange(length)
    if length % (2 * size):
        raise ValueError(f"{length} columns do not divide into {2 * size} chunks")
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([np.r_[chunks[i], chunks[2 * size - 1 - i]] for i in range(size)])


def ring_attention(q_btnh, k_btkh, v_btkh, queries, keys, *, forward: Callable, backward: Callable):
    """Attention over rows in `ring_order`; returns [B, T, N, H] in the type of `q_btnh`.

    `queries` and `keys` are trees of arrays [B, T] that only the two functions look into:

    - `forward(q, k, v, queries, keys, columns, before)` gives the output, the log of the sum of
      exponentials [B, T, N], both float32, over these keys and those that gave `before` (or None);
    - `backward(q, k, v, queries, keys, columns, out, lse, dout, dq)` gives, in float32, the `dq` it
      was given (or None) with these keys' part added, and their own dk and dv; `out` and `lse` are
      the whole row's.

    `columns` are the natural columns, rising, ([T] of queries, [S] of keys) of what they are given.
    A device holds its own part of every array, and one more of keys and values. The mesh is the one
    in force; its other axes may be automatic, or manual by a `shard_map` with `check_vma=False`.
    """
    split = PartitionSpec(None, AXIS)

    def mapped(function, count):
        return jax.shard_map(
            function, in_specs=split, out_specs=(split,) * count, axis_names={AXIS}, check_vma=False
        )

    @jax.custom_vjp
    def attend(q, k, v, queries, keys):
        return attend_forward(q, k, v, queries, keys)[0]

    def attend_forward(q, k, v, queries, keys):
        inputs = q, k, v, queries, keys
        out, lse = mapped(lambda *local: _forward_ring(forward, *local), 2)(*inputs)
        return out, (*inputs, out, lse)

    def attend_backward(residuals, dout):
        ring = mapped(lambda *local: _backward_ring(backward, *local), 3)
        return *ring(*residuals, dout), None, None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_btnh, k_btkh, v_btkh, queries, keys)


def _forward_ring(forward, q, k, v, queries, keys):
    """One device's output in the type of `q`, and its log-sums."""
    size, columns = _columns(q.shape[1])

    def visit(step, before, held):
        k, v, keys = held
        return forward(q, k, v, queries, keys, columns(step), before)

    def middle(carry, step):
        before, held = carry
        following = _pass_on(held)  # ahead of the work, so that they can travel meanwhile
        return (visit(step, before, held), following), None

    held = k, v, keys
    following = _pass_on(held)
    carry = visit(0, None, held), following
    (before, held), _ = jax.lax.scan(middle, carry, jnp.arange(1, size - 1))
    out, lse = visit(size - 1, before, held)
    return out.astype(q.dtype), lse


def _backward_ring(backward, q, k, v, queries, keys, out, lse, dout):
    """One device's gradients in the types of q, k and v.

    The gradients of keys and values follow them round the ring and one step further, home.
    """
    size, columns = _columns(q.shape[1])

    def visit(step, dq, held):
        k, v, keys = held
        dq, *dkv = backward(q, k, v, queries, keys, columns(step), out, lse, dout, dq)
        return dq, dkv

    def middle(carry, step):
        dq, dkv, held = carry
        following, dkv = _pass_on(held), _pass_on(dkv)  # both travel during the work
        dq, more = visit(step, dq, held)
        return (dq, _add(dkv, more), following), None

    held = k, v, keys
    following = _pass_on(held)
    carry = *visit(0, None, held), following
    (dq, dkv, held), _ = jax.lax.scan(middle, carry, jnp.arange(1, size - 1))
    dkv = _pass_on(dkv)
    dq, more = visit(size - 1, dq, held)
    dk, dv = _pass_on(_add(dkv, more))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _columns(length):
    """The size of the ring; a function from step to columns of (own queries, keys then held)."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    if length % 2:
        raise ValueError(f"{length * size} columns do not divide into {2 * size} chunks")
    chunk = length // 2

    def of(device):
        starts = chunk * jnp.stack([device, 2 * size - 1 - device])
        return (starts[:, None] + jnp.arange(chunk)[None, :]).reshape(-1)

    return size, lambda step: (of(index), of((index - step) % size))


def _pass_on(tree):
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % size) for i in range(size)])


def _add(tree, other):
    return jax.tree.map(jnp.add, tree, other)
