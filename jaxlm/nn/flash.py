"""Attention by blocks, in plain JAX: no array of scores larger than one block by another.

FlashAttention-2 (Dao, 2023): the softmax is computed online, and the backward pass computes the
scores again from the logarithm of each row's sum. `forward` and `backward` are also what the ring
of `parallel.ring` does with each device's keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN
BLOCK = 512
BEFORE, NEVER = -1, 2**30  # positions of padding: its queries see nothing, its keys are not seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand: [B, T] positions within a document, and the document they belong to.

    `segments` None: one document a row, causal by index.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    most_segments: int | None = dataclasses.field(default=None, metadata={"static": True})
    """How many segments a row has at most, padding counted; None: not known. With 1, `segments`
    need not be looked at, and positions are columns."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What stays the same from call to call."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    block: int = BLOCK
    causal: bool = True


def visible(queries: Places, keys: Places, window: int | None, causal: bool = True):
    """Boolean mask [B, T, S]: which keys a query sees."""
    if causal:
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    else:
        mask = (queries.positions > BEFORE)[:, :, None] & (keys.positions < NEVER)[:, None, :]
    if queries.segments is not None or keys.segments is not None:
        mask &= segments_of(queries)[:, :, None] == segments_of(keys)[:, None, :]
    return mask


def segments_of(places: Places):
    """[B, T]: the document of each token; 1 where there is one a row."""
    return jnp.ones_like(places.positions) if places.segments is None else places.segments


def flash_attention(
    q_btnh,
    k_bskh,
    v_bskh,
    *,
    queries: Places,
    keys: Places,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
    causal: bool = True,
):
    """Attention as `attention.attention` defines it; [B, T, N, H] in the type of `q_btnh`.

    Where it is causal and `queries is keys`, blocks are skipped by the order of columns: in a row,
    a document's tokens stand next to each other and in order. A query that sees nothing gets zeros.
    """
    kernel = Kernel(scale, window, softcap, block, causal)
    columns = None
    if queries is keys:
        columns = (jnp.arange(q_btnh.shape[1]),) * 2
    return _attend(kernel, q_btnh, k_bskh, v_bskh, queries, keys, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, q, k, v, queries, keys, columns):
    return forward(kernel, q, k, v, queries, keys, columns)[0].astype(q.dtype)


def _attend_forward(kernel, q, k, v, queries, keys, columns):
    out, lse = forward(kernel, q, k, v, queries, keys, columns)
    out = out.astype(q.dtype)
    return out, (q, k, v, queries, keys, columns, out, lse)


def _attend_backward(kernel, residuals, dout):
    q, k, v, queries, keys, columns, out, lse = residuals
    gradients = backward(kernel, q, k, v, queries, keys, columns, out, lse, dout)
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(kernel: Kernel, q_btnh, k_bskh, v_bskh, queries, keys, columns=None, before=None):
    """(output [B, T, N, H], log of the sum of exponentials [B, T, N]), both float32.

    `columns` are the natural columns ([T] of queries, [S] of keys) by which blocks are skipped;
    keys' columns rise. None skips nothing. `before` is what this function gave for other keys: the
    result is then that of both. A query that sees nothing gets zeros and `MASKED`.
    """
    batch, length, heads, _ = q_btnh.shape
    blocks = _Blocks(kernel, q_btnh, k_bskh, v_bskh, queries, keys, columns)
    size = blocks.query_block
    if before is None:
        before = jnp.zeros(q_btnh.shape), jnp.full(q_btnh.shape[:3], MASKED)

    def query_block(i, carry):
        q, own = blocks.query(i)

        def key_block(j, carry):
            acc, top, total = carry
            k, v, theirs = blocks.key(j)
            scores, _ = _scores(kernel, q, k, own, theirs)
            new_top = jnp.maximum(top, scores.max(-1))
            # Where all is masked so far, any finite reference makes the exponentials zero.
            base = jnp.where(new_top == MASKED, 0.0, new_top)
            weights = jnp.exp(scores - base[..., None])
            shrink = jnp.exp(top - base)
            update = _einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), v)
            return acc * shrink[..., None] + update, new_top, total * shrink + weights.sum(-1)

        out, lse = (_cut(x, i, size) for x in carry)
        acc, top = jnp.einsum("btkgh->bkgth", out), jnp.einsum("btkg->bkgt", lse)
        # Other keys' part goes on as if it were one key with their output as its value.
        start = acc, top, jnp.where(top == MASKED, 0.0, 1.0)
        acc, top, total = jax.lax.fori_loop(*blocks.keys_seen(i), key_block, start)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out = jnp.einsum("bkgth->btkgh", acc / total[..., None])
        lse = jnp.einsum("bkgt->btkg", jnp.where(seen, top + jnp.log(total), MASKED))
        return tuple(_put(x, new, i, size) for x, new in zip(carry, (out, lse), strict=True))

    start = tuple(map(blocks.as_queries, before))
    out, lse = jax.lax.fori_loop(0, blocks.num_query_blocks, query_block, start)
    out, lse = (x.reshape(batch, -1, heads, *x.shape[4:]) for x in (out, lse))
    return out[:, :length], lse[:, :length]


def backward(
    kernel: Kernel,
    q_btnh,
    k_bskh,
    v_bskh,
    queries,
    keys,
    columns,
    out_btnh,
    lse_btn,
    dout_btnh,
    dq_btnh=None,
):
    """Gradients (dq [B, T, N, H], dk, dv [B, S, K, H]) in float32, of these keys' part.

    `out_btnh` and `lse_btn` are the whole row's, over keys elsewhere too; `dq_btnh` is added to.
    """
    # FlashAttention's D: what the softmax's gradient takes off each row.
    delta_btn = jnp.sum(dout_btnh.astype(jnp.float32) * out_btnh.astype(jnp.float32), -1)
    batch, length, heads, head_dim = q_btnh.shape
    blocks = _Blocks(kernel, q_btnh, k_bskh, v_bskh, queries, keys, columns)
    dout_btkgh, lse_btkg, delta_btkg = map(
        blocks.as_queries, (dout_btnh.astype(q_btnh.dtype), lse_btn, delta_btn)
    )
    lse_btkg = jnp.where(lse_btkg == MASKED, 0.0, lse_btkg)
    size = blocks.query_block

    def key_block(dq, j):
        k, v, theirs = blocks.key(j)

        def query_block(i, carry):
            dq, dk, dv = carry
            q, own = blocks.query(i)
            dout, lse, delta = (_cut(x, i, size) for x in (dout_btkgh, lse_btkg, delta_btkg))
            lse, delta = (jnp.einsum("btkg->bkgt", x)[..., None] for x in (lse, delta))
            scores, slope = _scores(kernel, q, k, own, theirs)
            weights = jnp.exp(scores - lse)
            dv += _einsum("bkgts,btkgh->bskh", weights.astype(v.dtype), dout)
            dweights = _einsum("btkgh,bskh->bkgts", dout, v)
            dscores = (weights * (dweights - delta) * slope * kernel.scale).astype(q.dtype)
            dk += _einsum("bkgts,btkgh->bskh", dscores, q)
            new = _cut(dq, i, size) + _einsum("bkgts,bskh->btkgh", dscores, k)
            return _put(dq, new, i, size), dk, dv

        zeros = jnp.zeros(k.shape)
        dq, dk, dv = jax.lax.fori_loop(*blocks.queries_seeing(j), query_block, (dq, zeros, zeros))
        return dq, (dk, dv)

    start = jnp.zeros(blocks.q.shape) if dq_btnh is None else blocks.as_queries(dq_btnh)
    dq, dkv = jax.lax.scan(key_block, start, jnp.arange(blocks.num_key_blocks))
    dk, dv = (jnp.moveaxis(d, 0, 1).reshape(batch, -1, *k_bskh.shape[2:]) for d in dkv)
    keep = k_bskh.shape[1]
    dq = dq.reshape(batch, -1, heads, head_dim)
    return dq[:, :length], dk[:, :keep], dv[:, :keep]


class _Blocks:
    """The arguments, padded to whole blocks, and which blocks see which."""

    def __init__(self, kernel, q_btnh, k_bskh, v_bskh, queries, keys, columns):
        self.kv_heads = k_bskh.shape[2]
        self.query_block = min(kernel.block, q_btnh.shape[1])
        self.key_block = min(kernel.block, k_bskh.shape[1])
        self.q = self.as_queries(q_btnh)
        self.k, self.v = (_whole(x, self.key_block) for x in (k_bskh, v_bskh))
        self.queries = _whole_places(queries, self.query_block, BEFORE)
        self.keys = _whole_places(keys, self.key_block, NEVER)
        self.num_query_blocks = self.q.shape[1] // self.query_block
        self.num_key_blocks = self.k.shape[1] // self.key_block
        skips = kernel.causal and columns is not None
        self._sees = self._column_rule(columns, kernel.window) if skips else None

    def as_queries(self, x_btn):
        """[B, T, N, ...] as [B, T, K, G, ...] with T padded."""
        batch, length, heads = x_btn.shape[:3]
        shape = batch, length, self.kv_heads, heads // self.kv_heads, *x_btn.shape[3:]
        return _whole(x_btn.reshape(shape), self.query_block)

    def query(self, i):
        """Queries and places of a block."""
        return jax.tree.map(lambda x: _cut(x, i, self.query_block), (self.q, self.queries))

    def key(self, j):
        """Keys, values and places of a block."""
        return jax.tree.map(lambda x: _cut(x, j, self.key_block), (self.k, self.v, self.keys))

    def keys_seen(self, i):
        """The first key block that a query block may see, and the one behind the last."""
        return (0, self.num_key_blocks) if self._sees is None else _span(self._sees[i])

    def queries_seeing(self, j):
        """The first query block that may see a key block, and the one behind the last."""
        return (0, self.num_query_blocks) if self._sees is None else _span(self._sees[:, j])

    def _column_rule(self, columns, window):
        first_q, last_q = _bounds(columns[0], self.query_block)
        first_k, last_k = _bounds(columns[1], self.key_block)
        sees = first_k[None, :] <= last_q[:, None]
        if window is not None:
            sees &= first_q[:, None] - last_k[None, :] < window
        return sees


def _scores(kernel, q_btkgh, k_bskh, queries, keys):
    """Masked scores [B, K, G, T, S], float32, and the softcap's slope at them."""
    scores = _einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh) * kernel.scale
    slope = jnp.float32(1.0)
    if kernel.softcap is not None:
        bent = jnp.tanh(scores / kernel.softcap)
        scores, slope = kernel.softcap * bent, 1.0 - bent * bent
    mask_bts = visible(queries, keys, kernel.window, kernel.causal)
    return jnp.where(mask_bts[:, None, None], scores, MASKED), slope


def _einsum(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _cut(x, index, size):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, 1)


def _put(x, new, index, size):
    return jax.lax.dynamic_update_slice_in_dim(x, new, index * size, 1)


def _whole(x, block, fill=0):
    """Pad the second dimension to a multiple of the block."""
    missing = -x.shape[1] % block
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill) if missing else x


def _whole_places(places, block, position):
    segments = None if places.segments is None else _whole(places.segments, block)
    return Places(_whole(places.positions, block, position), segments)


def _bounds(columns, block):
    """The lowest and the highest column of each block."""
    columns = jnp.pad(columns, (0, -columns.shape[0] % block), mode="edge").reshape(-1, block)
    return columns.min(1), columns.max(1)


def _span(seen):
    """The range of indices outside which `seen` is False; (0, 0) where all is."""
    some = seen.any()
    first, last = jnp.argmax(seen), seen.size - jnp.argmax(seen[::-1])
    return jnp.where(some, first, 0), jnp.where(some, last, 0)
