"""Context parallelism: attention over rows that are split over the mesh axis `cp`.

Ring attention (Liu et al., 2023, arXiv 2310.01889): every device keeps its queries and passes its
keys and values on to the next, merging what it gets by the logarithms of the softmax's sums. Under
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

    - `forward(q, k, v, queries, keys, columns)` gives the output over these keys alone and the log
      of the sum of exponentials [B, T, N] (finite where nothing is seen), in float32;
    - `backward(q, k, v, queries, keys, columns, out, lse, dout)` gives their part of (dq, dk, dv)
      in float32, `out` and `lse` being the whole row's.

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

    def visit(step, merged, held):
        out, lse = forward(q, held[0], held[1], queries, held[2], columns(step))
        if merged is None:
            return out, lse
        total = jnp.logaddexp(merged[1], lse)
        old, new = (jnp.exp(x - total)[..., None] for x in (merged[1], lse))
        return old * merged[0] + new * out, total

    def step(carry, step):
        merged, held = carry
        following = _pass_on(held)  # before the work, so that it can travel meanwhile
        return (visit(step, merged, held), following), None

    held = k, v, keys
    following = _pass_on(held)
    carry = visit(0, None, held), following
    (merged, held), _ = jax.lax.scan(step, carry, jnp.arange(1, size - 1))
    out, lse = visit(size - 1, merged, held)
    return out.astype(q.dtype), lse


def _backward_ring(backward, q, k, v, queries, keys, out, lse, dout):
    """One device's gradients in the types of q, k and v.

    The gradients of keys and values follow them round the ring and one step further, home.
    """
    size, columns = _columns(q.shape[1])

    def visit(step, held):
        k, v, keys = held
        return backward(q, k, v, queries, keys, columns(step), out, lse, dout)

    def step(carry, step):
        dq, dkv, held = carry
        following, dkv = _pass_on(held), _pass_on(dkv)  # both travel during the work
        more, *theirs = visit(step, held)
        return (dq + more, _add(dkv, theirs), following), None

    held = k, v, keys
    following = _pass_on(held)
    dq, *dkv = visit(0, held)
    (dq, dkv, held), _ = jax.lax.scan(step, (dq, dkv, following), jnp.arange(1, size - 1))
    dkv = _pass_on(dkv)
    more, *theirs = visit(size - 1, held)
    dk, dv = _pass_on(_add(dkv, theirs))
    return (dq + more).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _columns(length):
    """The size of the ring; a function from step to columns of (own queries, keys then held)."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    chunk = length // 2

    def of(device):
        starts = chunk * jnp.stack([device, 2 * size - 1 - device])
        return (starts[:, None] + jnp.arange(chunk)[None, :]).reshape(-1)

    return size, lambda step: (of(index), of((index - step) % size))


def _pass_on(tree):
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % size) for i in range(size)])


def _add(tree, other):
    return jax.tree.map(jnp.add, list(tree), list(other))
