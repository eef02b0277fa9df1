"""Attention against PyTorch's, given the mask in full."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxlm.errors import UserError
from jaxlm.nn.attention import Places, attention
from jaxlm.nn.flash import flash_attention
from jaxlm.nn.layers import Dropout

pytestmark = pytest.mark.usefixtures("strict")

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 6, 2, 4
PACKED = Places(
    jnp.array([[0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5]]),
    jnp.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]]),
)
WHOLE = Places(jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)))


def inputs(seed=0):
    draw = np.random.default_rng(seed).normal
    return tuple(
        draw(size=(BATCH, LENGTH, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def mask_of(places: Places, window=None) -> np.ndarray:
    """[B, T, S], element by element from the definition."""
    positions = np.asarray(places.positions)
    segments = np.zeros_like(positions) if places.segments is None else np.asarray(places.segments)
    mask = np.zeros((*positions.shape, positions.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        ago = positions[b, t] - positions[b, s]
        seen = ago >= 0 and (window is None or ago < window)
        mask[b, t, s] = seen and segments[b, t] == segments[b, s]
    return mask


def torch_attention(q, k, v, mask, scale):
    """PyTorch's, heads second there and third here."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(mask)[:, None], scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def softcapped_attention(q, k, v, mask, scale, cap):
    """In NumPy, float64, one query head at a time."""
    out = np.zeros(q.shape)
    for n in range(q.shape[2]):
        kv = n // (q.shape[2] // k.shape[2])
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, kv].astype(np.float64)) * scale
        scores = np.where(mask, cap * np.tanh(scores / cap), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, :, n] = np.einsum("bts,bsh->bth", weights, v[:, :, kv])
    return out


@pytest.mark.parametrize("backend", ["plain", "xla", "blocked", "stored"])
@pytest.mark.parametrize("window", [None, 3], ids=["full", "window"])
@pytest.mark.parametrize("places", [WHOLE, PACKED], ids=["whole", "packed"])
def test_values_and_gradients_are_those_of_pytorch(places, window, backend):
    arrays = inputs()
    scale = 0.7
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    theirs = torch_attention(*leaves, mask_of(places, window), scale)
    theirs.square().sum().backward()

    def loss(q, k, v):
        out = attention(
            q, k, v, queries=places, keys=places, scale=scale, window=window, backend=backend
        )
        return jnp.square(out).sum(), out

    gradients, ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(ours, theirs.detach(), atol=2e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=2e-5)


OTHERS = Places(
    jnp.array([[0, 1, 0, 1, 2, 3, 4, 0, 1], [0, 0, 0, 1, 2, 3, 0, 1, 2]]),
    jnp.array([[1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0, 0, 0]]),
)


@pytest.mark.parametrize("backend", ["plain", "xla", "blocked", "stored"])
@pytest.mark.parametrize("keys", [WHOLE, PACKED, OTHERS], ids=["whole", "packed", "source"])
def test_without_causality_a_query_sees_its_whole_segment(keys, backend):
    queries = WHOLE if keys is WHOLE else PACKED
    length = keys.positions.shape[1]
    draw = np.random.default_rng(2).normal
    shapes = (LENGTH, HEADS), (length, KV_HEADS), (length, KV_HEADS)
    arrays = [draw(size=(BATCH, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes]
    mask = np.ones((BATCH, LENGTH, length), bool)
    if queries.segments is not None:
        mask = np.asarray(queries.segments)[:, :, None] == np.asarray(keys.segments)[:, None, :]
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    theirs = torch_attention(*leaves, mask, 0.7)
    theirs.square().sum().backward()

    def loss(q, k, v):
        options = {"queries": queries, "keys": keys, "scale": 0.7, "causal": False}
        out = attention(q, k, v, backend=backend, **options)
        return jnp.square(out).sum(), out

    gradients, ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(ours, theirs.detach(), atol=2e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=2e-5)


@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("lengths", [(150,), (60, 1, 89)], ids=["whole", "packed"])
def test_blocks_of_queries_leave_out_only_what_is_masked(lengths, window):
    """Three blocks of them, the last a short one; before it, and with a window, keys are cut."""
    length = sum(lengths)
    draw = np.random.default_rng(5).normal
    heads = HEADS, KV_HEADS, KV_HEADS
    arrays = [draw(size=(BATCH, length, n, HEAD_DIM)).astype(np.float32) for n in heads]
    positions, segments = (
        jnp.broadcast_to(jnp.concatenate(parts), (BATCH, length))
        for parts in (
            [jnp.arange(n) for n in lengths],
            [jnp.full(n, i + 1) for i, n in enumerate(lengths)],
        )
    )
    places = Places(positions, segments)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(backend, arrays):
        def loss(arrays):
            options = {"queries": places, "keys": places, "window": window}
            out = attention(*arrays, scale=0.7, backend=backend, **options)
            return jnp.square(out).sum(), out

        return jax.grad(loss, has_aux=True)(arrays)

    for ours, plain in zip(
        *(jax.tree.leaves(gradients(b, arrays)) for b in ("stored", "plain")), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_blocks_that_do_not_divide_rows_hide_no_key_and_show_no_padding():
    q, k, v = inputs()
    options = {"queries": WHOLE, "keys": WHOLE, "scale": 30.0, "causal": False}

    @jax.jit
    @jax.grad
    def blocks(q):
        return jnp.square(flash_attention(q, k, v, **options, block=3)).sum()

    plain = jax.grad(lambda q: jnp.square(attention(q, k, v, **options)).sum())(q)
    np.testing.assert_allclose(blocks(q), plain, rtol=3e-5, atol=2e-4)


def test_texts_without_numbers_are_number_one():
    """As in scoring a text alone, of which the source is padded."""
    q, k, v = inputs()
    source = Places(WHOLE.positions, jnp.where(WHOLE.positions < 5, 1, 0))
    options = {"scale": 0.7, "causal": False}
    ours = attention(q, k, v, queries=WHOLE, keys=source, **options)
    cut = Places(WHOLE.positions[:, :5])
    alone = attention(q, k[:, :5], v[:, :5], queries=WHOLE, keys=cut, **options)
    np.testing.assert_allclose(ours, alone, atol=1e-6)


@pytest.mark.parametrize("backend", ["plain", "xla", "auto"])
def test_biases_are_added_to_the_scores(backend):
    arrays = inputs()
    bias = np.random.default_rng(3).normal(size=(BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)
    options = {"queries": PACKED, "keys": PACKED, "scale": 0.7, "backend": backend}
    ours = attention(*arrays, bias_bnts=jnp.asarray(bias), **options)
    mask = np.where(mask_of(PACKED)[:, None], bias, -np.inf)
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in arrays)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(mask), scale=0.7, enable_gqa=True
    )
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=2e-6)


@pytest.mark.parametrize("backend", ["plain", "blocked"])
def test_softcap_is_the_formula(backend):
    q, k, v = inputs()
    ours = attention(q, k, v, queries=PACKED, keys=PACKED, scale=2.0, softcap=1.5, backend=backend)
    theirs = softcapped_attention(q, k, v, mask_of(PACKED), 2.0, 1.5)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@jax.jit
def packed_attention(q, k, v, places):
    return attention(q, k, v, queries=places, keys=places, scale=0.5, window=4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_segments_and_positions(data):
    def rows(low, high):
        cells = st.lists(st.integers(low, high), min_size=LENGTH, max_size=LENGTH)
        return np.array([data.draw(cells) for _ in range(BATCH)], np.int32)

    places = Places(jnp.asarray(rows(0, 9)), jnp.asarray(rows(0, 3)))
    arrays = inputs(seed=1)
    theirs = torch_attention(*map(torch.tensor, arrays), mask_of(places, window=4), 0.5)
    np.testing.assert_allclose(packed_attention(*arrays, places), theirs, atol=2e-6)


@pytest.mark.parametrize("backend", ["plain", "blocked", "stored"])
def test_keys_may_stand_elsewhere_than_queries(backend):
    """As in decoding: the last two queries against all keys."""
    q, k, v = inputs()
    last = jax.tree.map(lambda x: x[:, -2:], PACKED)
    ours = attention(q[:, -2:], k, v, queries=last, keys=PACKED, scale=0.5, backend=backend)
    whole = attention(q, k, v, queries=PACKED, keys=PACKED, scale=0.5)
    np.testing.assert_allclose(ours, whole[:, -2:], atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = inputs()
    nowhere = dataclasses.replace(PACKED, segments=PACKED.segments + 9)
    out = attention(q, k, v, queries=nowhere, keys=PACKED, scale=0.5)
    assert np.isfinite(out).all()


def test_scores_are_float32_whatever_the_inputs():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    rough = attention(q, k, v, queries=PACKED, keys=PACKED, scale=0.5)
    exact = attention(
        *(x.astype(np.float32) for x in (q, k, v)), queries=PACKED, keys=PACKED, scale=0.5
    )
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), exact, atol=0.02)


def test_dropout_falls_on_probabilities():
    q, k, _ = inputs()
    ones = np.ones((BATCH, LENGTH, KV_HEADS, HEAD_DIM), np.float32)
    drop = Dropout(jax.random.key(0), jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH))
    out = attention(
        q, k, ones, queries=WHOLE, keys=WHOLE, scale=0.1, dropout=drop, dropout_rate=0.5
    )
    # The first query sees itself alone: all or nothing. The rest average one over many.
    assert set(np.unique(out[:, 0])) == {0.0, 2.0}
    assert abs(out.mean() - 1) < 0.4


@pytest.mark.parametrize("places", [WHOLE, PACKED], ids=["float32", "packed"])
def test_cudnn_is_refused_where_it_cannot_mask_or_compute(places):
    with pytest.raises(UserError, match="use model"):
        attention(*inputs(), queries=places, keys=places, scale=1.0, backend="cudnn")


def make_mesh(shape, axes):
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


def lowered(length, cached=False, backend="auto", mesh=None, **options):
    """The program of attention over rows of any length, as text."""
    q, k = (jax.ShapeDtypeStruct((1, length, n, HEAD_DIM), jnp.float32) for n in (HEADS, KV_HEADS))
    places = Places(jax.ShapeDtypeStruct((1, length), jnp.int32))

    def run(q, k, v, queries, cache):
        keys = cache if cached else queries
        return attention(q, k, v, queries=queries, keys=keys, scale=1.0, backend=backend, **options)

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(run).lower(q, k, k, places, places).as_text()


def test_auto_takes_blocks_for_long_rows_without_cache_and_dropout():
    drop = Dropout(jax.random.key(0), jnp.zeros((1, 1025), jnp.int32))
    scores = "1025x1025xf32"
    assert scores not in lowered(1025)
    # Three heads of a group times a fourth of the row, by the keys before their end.
    assert "768x1024xf32" in lowered(1024)
    assert "1024x1024xf32" in lowered(1024, backend="plain")
    assert scores in lowered(1025, cached=True)
    assert scores in lowered(1025, dropout=drop, dropout_rate=0.1)
    assert "768x1024xf32" not in lowered(1024, backend="blocked")


def test_a_mesh_that_splits_rows_makes_a_ring():
    mesh = make_mesh((2, 4), ("dp", "cp"))
    assert "collective_permute" in lowered(16, mesh=mesh)
    assert "collective_permute" in lowered(16, mesh=mesh, backend="blocked")
    # One token, as in initialisation; and a cache, which is not split.
    assert "collective_permute" not in lowered(1, mesh=mesh)
    assert "collective_permute" not in lowered(16, mesh=mesh, cached=True)
    assert "collective_permute" not in lowered(16, mesh=make_mesh((8, 1), ("dp", "cp")))


def test_what_needs_whole_rows_is_refused_where_there_are_none():
    drop = Dropout(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    mesh = make_mesh((2, 4), ("dp", "cp"))
    for backend in ("plain", "stored", "xla", "cudnn"):
        with pytest.raises(UserError, match=f"attention={backend} needs whole rows.*cp=4"):
            lowered(16, mesh=mesh, backend=backend)
    with pytest.raises(UserError, match=r"attention_dropout needs the probabilities.*cp=4"):
        lowered(16, mesh=mesh, dropout=drop, dropout_rate=0.1)
    for backend in ("blocked", "stored"):
        with pytest.raises(UserError, match=f"attention={backend} never holds"):
            lowered(16, backend=backend, dropout=drop, dropout_rate=0.1)
    with pytest.raises(UserError, match="attention=stored does not support attention_softcap"):
        lowered(16, backend="stored", softcap=5.0)
    lowered(16, mesh=mesh, dropout=drop, dropout_rate=0.0)


def test_biases_are_refused_where_whole_rows_have_no_scores():
    bias = jnp.zeros((1, HEADS, 16, 16))
    for backend in ("blocked", "stored"):
        with pytest.raises(UserError, match=f"attention={backend} has no place for the biases"):
            lowered(16, backend=backend, bias_bnts=bias)
    with pytest.raises(UserError, match=r"positions=relative needs the scores.*cp=4"):
        lowered(16, mesh=make_mesh((2, 4), ("dp", "cp")), bias_bnts=bias)
    # Scores of any length are plain's then.
    assert "1025x1025xf32" in lowered(1025, bias_bnts=jnp.zeros((1, HEADS, 1025, 1025)))


def test_with_one_segment_at_most_segments_are_not_looked_at():
    """Which a mask would cost; and that the bound is read shows where it is wrong."""
    one = Places(WHOLE.positions, jnp.ones_like(WHOLE.positions), most_segments=1)
    wrong = Places(WHOLE.positions, PACKED.segments, most_segments=1)
    whole, *others = (
        attention(*inputs(), queries=places, keys=places, scale=0.7)
        for places in (WHOLE, one, wrong, dataclasses.replace(wrong, most_segments=16))
    )
    np.testing.assert_array_equal(others[0], whole)
    np.testing.assert_array_equal(others[1], whole)
    assert not np.allclose(others[2], whole)
