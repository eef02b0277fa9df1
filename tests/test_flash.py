"""Attention by blocks against the plain reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.nn import flash
from jaxlm.nn.attention import attention
from jaxlm.nn.flash import Places, flash_attention

pytestmark = pytest.mark.usefixtures("strict")

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 22, 6, 2, 4
SCALE = 0.6


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def inputs(length=LENGTH, seed=0):
    """q, k, v and the weights of a loss."""
    shapes = ((BATCH, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    return [normal(seed + i, *shape) for i, shape in enumerate(shapes)]


def packed(starts) -> Places:
    """Documents that start where `starts` [B, T] is true."""
    starts = np.asarray(starts, bool)
    columns = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
    begins = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Places(jnp.asarray(columns - begins), jnp.asarray(np.cumsum(starts, axis=1)))


def whole(length=LENGTH) -> Places:
    return Places(jnp.broadcast_to(jnp.arange(length), (BATCH, length)))


@functools.cache
def with_gradients(**options):
    """A jitted function to (output, gradients of q, k and v); blocks of `block`, or plain."""

    def loss(q, k, v, weights, places):
        if "block" in options:
            out = flash_attention(q, k, v, queries=places, keys=places, scale=SCALE, **options)
        else:
            kinds = {"scale": SCALE, "backend": "plain", **options}
            out = attention(q, k, v, queries=places, keys=places, **kinds)
        return (jnp.sin(out) * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def assert_as_plain(block, places, arrays, **options):
    (_, theirs), their_gradients = with_gradients(**options)(*arrays, places)
    (_, ours), gradients = with_gradients(block=block, **options)(*arrays, places)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


OPTIONS = [{}, {"window": 5}, {"softcap": 1.5}, {"window": 9, "softcap": 0.7}]
STARTS = st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH)


@settings(max_examples=30)
@given(STARTS, st.sampled_from([4, 5, 11]), st.sampled_from(OPTIONS), st.integers(0, 99))
def test_any_documents_windows_and_blocks(starts, block, options, seed):
    places = packed(np.reshape(starts, (BATCH, LENGTH)))
    assert_as_plain(block, places, inputs(seed=seed), **options)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("block", [4, 64])
def test_any_length_without_segments(length, block):
    assert_as_plain(block, whole(length), inputs(length))


def scattered(segments, positions):
    keys = Places(*(jnp.asarray(x).reshape(BATCH, LENGTH) for x in (positions, segments)))
    return jax.tree.map(lambda x: x[:, 3:11], keys), keys


CELLS = {"min_size": BATCH * LENGTH, "max_size": BATCH * LENGTH}


@jax.jit
def elsewhere(q, k, v, weights, queries, keys):
    """Value and gradients by blocks and plainly, where queries are not the keys."""

    def loss(by_blocks, q, k, v):
        options = {"queries": queries, "keys": keys, "scale": SCALE, "window": 4}
        if by_blocks:
            out = flash_attention(q, k, v, **options, block=5)
        else:
            out = attention(q, k, v, **options, backend="plain")
        return (out * weights).sum()

    pair = (jax.value_and_grad(functools.partial(loss, b), (0, 1, 2)) for b in (True, False))
    return [f(q, k, v) for f in pair]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), **CELLS), st.lists(st.integers(0, 9), **CELLS))
def test_keys_in_any_order_are_masked_by_their_places_alone(segments, positions):
    """As in decoding. A query always sees itself, since it is one of the keys."""
    queries, keys = scattered(segments, positions)
    q, k, v, weights = inputs()
    pair = elsewhere(q[:, 3:11], k, v, weights[:, 3:11], queries, keys)
    for ours, theirs in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v, weights = inputs()
    keys = packed(np.zeros((BATCH, LENGTH)))
    nowhere = Places(keys.positions, keys.segments.at[:, 3:9].add(7))

    def loss(q, k, v):
        out = flash_attention(q, k, v, queries=nowhere, keys=keys, scale=SCALE, block=4)
        return (out * weights).sum(), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    assert not out[:, 3:9].any() and out[:, 9:].all()
    assert not gradients[0][:, 3:9].any()
    assert all(np.isfinite(g).all() for g in gradients)


HALVES = slice(LENGTH // 2), slice(LENGTH // 2, None)


def test_log_sums_are_those_of_the_scores():
    """Two halves of the keys merge to the whole, which is what the ring relies on."""
    q, k, v, _ = inputs()
    places, kernel = packed(np.arange(2 * LENGTH).reshape(2, -1) % 9 == 0), flash.Kernel(SCALE)
    first, last = (jax.tree.map(lambda x, s=s: x[:, s], (k, v, places)) for s in HALVES)
    outs, sums = zip(
        *(flash.forward(kernel, q, k, v, places, p) for k, v, p in (first, last)), strict=True
    )
    total = np.logaddexp(*sums)
    merged = sum(np.exp(s - total)[..., None] * o for s, o in zip(sums, outs, strict=True))
    out, lse = flash.forward(kernel, q, k, v, places, places)
    np.testing.assert_allclose(merged, out, atol=2e-6)
    np.testing.assert_allclose(total, lse, atol=2e-6)
    # The first half of the rows sees none of the last half of the keys.
    assert (sums[1][0, : LENGTH // 2] == flash.MASKED).all()


def test_scores_are_float32_whatever_the_inputs():
    *arrays, weights = (x.astype(jnp.bfloat16) for x in inputs())
    places = packed(np.arange(2 * LENGTH).reshape(2, -1) % 9 == 0)
    exact = [x.astype(np.float32) for x in (*arrays, weights)]
    (_, rough), gradients = with_gradients(block=4)(*arrays, weights, places)
    (_, fine), fine_gradients = with_gradients(block=4)(*exact, places)
    assert rough.dtype == gradients[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), fine, atol=0.03)
    for ours, theirs in zip(gradients, fine_gradients, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.06)


def seen_by_columns(window, queries, keys):
    kernel = flash.Kernel(SCALE, window, None, 4)
    columns = jnp.asarray(queries), jnp.asarray(keys)
    q, k = (jnp.zeros((1, len(c), 1, 2)) for c in columns)
    places = (Places(c[None]) for c in columns)
    blocks = flash._Blocks(kernel, q, k, k, *places, columns)
    spans = [range(*map(int, blocks.keys_seen(i))) for i in range(blocks.num_query_blocks)]
    seeing = [range(*map(int, blocks.queries_seeing(j))) for j in range(blocks.num_key_blocks)]
    for i, j in np.ndindex(len(spans), len(seeing)):
        assert (j in spans[i]) == (i in seeing[j])
    return [list(span) for span in spans]


def test_blocks_that_no_query_sees_are_skipped():
    row = np.arange(16)
    assert seen_by_columns(None, row, row) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    # Four tokens before a block are as far as a window of five reaches.
    assert seen_by_columns(5, row, row) == [[0], [0, 1], [1, 2], [2, 3]]
    assert seen_by_columns(6, row, row) == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    # Chunks 0 and 3 of four against 1 and 2: half the blocks, the late queries'.
    outer, inner = np.r_[row[:4], row[12:]], row[4:12]
    assert seen_by_columns(None, outer, inner) == [[], [0, 1]]
    assert seen_by_columns(None, inner, outer) == [[0], [0]]
    # A block of keys may begin within one of queries.
    assert seen_by_columns(None, np.arange(2, 10), inner) == [[0], [0, 1]]


def test_memory_grows_with_the_block_not_with_the_row():
    def memory(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        places = Places(jax.ShapeDtypeStruct((1, length), jnp.int32))

        def loss(q, k, v, places):
            return flash_attention(q, k, v, queries=places, keys=places, scale=1.0, block=64).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8192) < 10 * memory(1024)
    assert memory(8192) < 8192 * 8192 * 4 / 50
