"""The small modules against PyTorch's and transformers' own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxlm.model_config import ModelConfig, RopeScaling
from jaxlm.nn.activations import hidden_units
from jaxlm.nn.layers import (
    MLP,
    Dense,
    Dropout,
    Embed,
    Norm,
    add_bias,
    multiply,
    normalise,
    normalise_on_gpu,
)
from jaxlm.nn.positions import apply_rope, rope_turns
from jaxlm.sharding import split_boxes

pytestmark = pytest.mark.usefixtures("strict")

EPS = 1e-3
NARROW = {"d_model": 8, "num_heads": 4}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def as_torch(x):
    return torch.tensor(np.asarray(x))


def with_params(module, x):
    """A module's parameters drawn anew, so that no scale is one and no bias zero."""
    shapes, _ = split_boxes(jax.eval_shape(module.init, jax.random.key(0), x))
    return jax.tree.map(lambda s: jnp.asarray(normal(*s.shape, seed=1)), shapes)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rmsnorm(offset):
    x, norm = normal(2, 3, 8), Norm("rmsnorm", EPS, offset)
    params = with_params(norm, x)
    scale = as_torch(params["params"]["scale"])
    theirs = torch.nn.functional.rms_norm(as_torch(x), (8,), scale + offset, EPS)
    np.testing.assert_allclose(norm.apply(params, x), theirs, atol=2e-6)
    if offset:
        gemma = GemmaRMSNorm(8, EPS)
        gemma.weight.data = scale
        np.testing.assert_allclose(norm.apply(params, x), gemma(as_torch(x)).detach(), atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_layernorm(bias):
    x, norm = normal(2, 3, 8) + 5, Norm("layernorm", EPS, use_bias=bias)
    params = with_params(norm, x)
    assert ("bias" in params["params"]) == bias
    weights = [
        as_torch(params["params"][name]) for name in (("scale", "bias") if bias else ["scale"])
    ]
    theirs = torch.nn.functional.layer_norm(as_torch(x), (8,), *weights, eps=EPS)
    np.testing.assert_allclose(norm.apply(params, x), theirs, atol=5e-6)


def test_norms_are_computed_in_float32_and_returned_as_given():
    x, norm = jnp.asarray(normal(4, 64) * 100, jnp.bfloat16), Norm("rmsnorm", 1e-6)
    params = with_params(norm, x)
    y = norm.apply(params, x)
    exact = norm.apply(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, {"rope_type": "default"}),
        (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ],
    ids=["plain", "linear", "llama3"],
)
def test_rotary_positions(ours, theirs):
    head_dim, theta = 16, 50.0
    positions = np.array([[0, 1, 2, 30, 31], [0, 5, 0, 1, 90]])
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    x = normal(2, 5, 3, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(as_torch(x), as_torch(positions))
    turned, _ = apply_rotary_pos_emb(as_torch(x), as_torch(x), cos, sin, unsqueeze_dim=2)
    turns = rope_turns(jnp.asarray(positions), head_dim, theta, ours)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), turns), turned, atol=2e-5)


def test_cosines_are_computed_once_for_all_that_read_them():
    def turned(q, k, positions):
        turns = rope_turns(positions, 8, 10_000.0, None)
        return apply_rope(q, turns), apply_rope(k, turns)

    x = jnp.zeros((2, 5, 3, 8))
    compiled = jax.jit(turned).lower(x, x, jnp.zeros((2, 5), jnp.int32)).compile()
    assert compiled.as_text().count(" cosine(") == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu"])
def test_mlp(kind, bias):
    x = normal(2, 3, 8)
    module = MLP(ModelConfig(**NARROW, d_ff=12, mlp=kind, mlp_bias=bias), jnp.float32)
    params = with_params(module, x)

    def linear(name, x):
        layer = params["params"][name]
        y = x @ as_torch(layer["kernel"])
        return y + as_torch(layer["bias"]) if bias else y

    def gelu(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    hidden = linear("up", as_torch(x))
    if kind == "gelu":
        hidden = gelu(hidden)
    else:
        act = torch.nn.functional.silu if kind == "swiglu" else gelu
        hidden = act(linear("gate", as_torch(x))) * hidden
    np.testing.assert_allclose(module.apply(params, x), linear("down", hidden), atol=2e-5)


def test_dense_contracts_several_dimensions():
    x = normal(2, 3, 4, 5)
    dense = Dense((6, 7), (None,) * 4, jnp.float32, 0.0, 0.1, use_bias=True, num_in=2)
    params = with_params(dense, x)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    expected = torch.tensordot(as_torch(x), as_torch(kernel), 2) + as_torch(bias)
    np.testing.assert_allclose(dense.apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "parts"), [((1, 1, 4, 6), 4), ((1, 1, 3, 3), 1)])
def test_one_row_is_multiplied_by_parts_of_a_kernel_that_can_be_parted(shape, parts, dtype):
    x = normal(*shape)
    dense = Dense((6, 7), (None,) * 4, dtype, 0.0, 0.1, num_in=2)
    params = with_params(dense, x)
    kernel = params["params"]["kernel"]
    expected = multiply(2, x.astype(dtype), kernel.astype(dtype)).astype(jnp.float32)
    found = dense.apply(params, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-2 if dtype == jnp.bfloat16 else 1e-5)
    (product,) = (
        e.params["dimension_numbers"][1]
        for e in jax.make_jaxpr(dense.apply)(params, x).eqns
        if e.primitive.name == "dot_general"
    )
    assert product == (((0,), (0,)) if parts > 1 else ((), ()))


def test_embed_looks_up_rows_in_the_compute_type():
    embed = Embed(9, ModelConfig(**NARROW), jnp.bfloat16)
    ids = jnp.array([[3, 0, 8]])
    params = with_params(embed, ids)
    table = params["params"]["embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(embed.apply(params, ids), table[np.array(ids)])


PLACES = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64)


def drop(tokens, rate=0.25, site=0, seed=0, layer=0, width=8):
    """Ones [B, T, width] after dropout, for tokens [B, T] of the global batch."""
    dropout = Dropout(jax.random.key(seed), jnp.asarray(tokens)).layer(layer)
    return np.asarray(dropout(jnp.ones((*tokens.shape, width)), rate, site))


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
    y = drop(PLACES)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    # Five standard deviations of the mean of 8,192 draws.
    assert abs((y == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / y.size) ** 0.5


def test_dropout_belongs_to_the_global_token_however_the_batch_is_split():
    whole = drop(PLACES)
    np.testing.assert_array_equal(whole[3:], drop(PLACES[3:]))
    np.testing.assert_array_equal(whole[::2, 5::3], drop(PLACES[::2, 5::3]))
    assert len({row.tobytes() for row in drop(PLACES, width=64).reshape(-1, 64)}) == PLACES.size


def test_dropout_finds_the_tokens_dimension():
    dropout = Dropout(jax.random.key(0), jnp.asarray(PLACES[:2]))
    x = jnp.ones((2, 3, 64, 8))
    got = dropout(x, 0.25, 0, token_dim=2)
    wanted = dropout(jnp.moveaxis(x, 2, 1), 0.25, 0)
    np.testing.assert_array_equal(got, jnp.moveaxis(wanted, 1, 2))


def test_dropout_differs_by_key_layer_and_site():
    some = PLACES[:1]
    masks = [drop(some), drop(some, seed=1), drop(some, site=1), drop(some, layer=1)]
    for i, one in enumerate(masks):
        assert all(not np.array_equal(one, other) for other in masks[:i])


def test_a_word_is_dropped_wherever_a_text_has_it():
    tokens = jnp.asarray([[3, 4, 3, 4, 3, 4, 3, 4]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]])
    seen = set()
    for seed in range(32):
        dropout = Dropout(jax.random.key(seed), jnp.arange(8, dtype=jnp.uint32)[None])
        x = dropout.of_texts(positions).words(jnp.ones((1, 8, 2)), tokens, 0.5, 0)[0]
        a, b, c, d = x[0, 0], x[1, 0], x[4, 0], x[5, 0]
        wanted = jnp.repeat(jnp.array([a, b, a, b, c, d, c, d])[:, None], 2, 1)
        np.testing.assert_array_equal(x, wanted)
        seen.add((float(a), float(b), float(c), float(d)))
    assert len(seen) > 8  # of 16: words of a text, and a word of two texts, are dropped apart
    assert set().union(*seen) == {0.0, 2.0}


def test_no_rate_is_no_dropout():
    np.testing.assert_array_equal(drop(PLACES, rate=0.0), np.ones((16, 64, 8)))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norm_on_gpus_is_the_plain_one_with_its_gradient(kind, bias, axes):
    x = jnp.asarray(normal(3, 5, 4, 6) + 2)
    scale = jnp.asarray(normal(*x.shape[-axes:], seed=1))
    given = x, scale, jnp.asarray(normal(*scale.shape, seed=2)) if bias else None
    slope = jnp.asarray(normal(*x.shape, seed=3))
    results = []
    for f in (normalise, normalise_on_gpu):
        y, pull = jax.vjp(functools.partial(f, kind, EPS), *given)
        results.append((y, *pull(slope)))
    for plain, ours in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_a_bias_has_its_gradient_summed_in_float32():
    y, bias = jnp.zeros((64, 64, 2), jnp.bfloat16), jnp.zeros(2)
    slope = jnp.full(y.shape, 1 + 2**-7, jnp.bfloat16)
    in_bias = jax.vjp(add_bias, y, bias)[1](slope)[1]
    # In bfloat16 a sum of 4,096 ones would stop at 256.
    np.testing.assert_array_equal(in_bias, np.full(2, 4096 * (1 + 2**-7), np.float32))


@pytest.mark.parametrize("kind", ["gelu", "gelu_exact", "swiglu", "relu"])
def test_hidden_units_of_bfloat16_are_those_of_float32_rounded_once(kind):
    up, gate = jnp.asarray(normal(2, 64, 8), jnp.bfloat16), None
    if kind == "swiglu":
        gate = jnp.asarray(normal(2, 64, 8, seed=1), jnp.bfloat16)
    arrays = (up,) if gate is None else (up, gate)
    exact = [x.astype(jnp.float32) for x in arrays]
    slope = jnp.asarray(normal(2, 64, 8, seed=2), jnp.bfloat16)
    y, pull = jax.vjp(functools.partial(hidden_units, kind), *arrays)
    wanted, exact_pull = jax.vjp(functools.partial(hidden_units, kind), *exact)
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))
    for ours, theirs in zip(pull(slope), exact_pull(slope.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
