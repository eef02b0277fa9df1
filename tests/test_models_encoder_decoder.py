"""The encoder-decoder against transformers' models, and against itself run in other ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.flatten_util import ravel_pytree
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.models.stack import unstack
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.layers import Dropout
from jaxlm.nn.positions import distance_buckets, sinusoids
from jaxlm.sharding import split_boxes

pytestmark = pytest.mark.usefixtures("strict")

VOCABULARY, WIDTH, HEADS, FEED_FORWARD = 61, 24, 4, 40
SIZE = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_heads": HEADS, "d_ff": FEED_FORWARD}
SIZE |= {"num_kv_heads": None, "num_layers": 2, "encoder_layers": 3, "init_std": 0.2}
MARIAN = SIZE | {
    "kind": "encoder_decoder",
    "positions": "sinusoidal",
    "norm": "layernorm",
    "norm_bias": True,
    "norm_placement": "post_sum",
    "mlp": "silu",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "scale_embeddings": True,
    "logits_bias": True,
}
T5 = SIZE | {
    "kind": "encoder_decoder",
    "positions": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 12,
    "norm_eps": 1e-6,
    "mlp": "geglu",
    "attention_scale": 1.0,
}


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length), np.int32)


def places_of(segments) -> Places:
    """Places of packed rows [B, T] of segment numbers, 0 for padding."""
    segments = np.asarray(segments)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    columns = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return Places(jnp.asarray(columns - starts), jnp.asarray(segments))


def assert_close(ours, theirs, tolerance=2e-5):
    """Equal within a tolerance relative to the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < tolerance


def randomised(model):
    """A model of transformers in which no parameter is trivial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point() and "embed_positions" not in name:
                p.copy_(p + 0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


class Reader:
    """Their tensors, as ours: kernels transposed, heads split off, layers stacked."""

    def __init__(self, model):
        self.tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}

    def stacked(self, prefix: str, layers: int, parts) -> dict:
        """`parts(prefix of a layer)` of all layers."""
        each = [parts(f"{prefix}.{i}.") for i in range(layers)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def dense(self, name: str, shape=None, out=()) -> dict:
        """A projection; `shape` splits its outputs, and with `out`, its inputs, into heads."""
        kernel = self.tensors[f"{name}.weight"].T
        if out:
            kernel = kernel.reshape(*out, -1)
        given = {"kernel": kernel.reshape(WIDTH, *shape) if shape else kernel}
        if f"{name}.bias" in self.tensors:
            bias = self.tensors[f"{name}.bias"]
            given["bias"] = bias.reshape(shape) if shape else bias
        return given

    def attention(self, prefix: str, names: str) -> dict:
        q, k, v, out = (prefix + name for name in names.split())
        heads = HEADS, WIDTH // HEADS
        three = {n: self.dense(t, heads) for n, t in zip("qkv", (q, k, v), strict=True)}
        return three | {"out": self.dense(out, out=heads)}

    def norm(self, name: str) -> dict:
        return {"scale": self.tensors[f"{name}.weight"]} | (
            {"bias": self.tensors[f"{name}.bias"]} if f"{name}.bias" in self.tensors else {}
        )


def marian():
    """(transformers' Marian, ours, its parameters)."""
    model = randomised(
        transformers.MarianMTModel(
            transformers.MarianConfig(
                vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=2,
                encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
                encoder_ffn_dim=FEED_FORWARD, decoder_ffn_dim=FEED_FORWARD, scale_embedding=True,
                activation_function="swish", max_position_embeddings=64, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
            )
        )
    )  # fmt: skip
    read = Reader(model)

    def layer(prefix: str) -> dict:
        names = "{0}.q_proj {0}.k_proj {0}.v_proj {0}.out_proj"
        ours = {
            "attention": read.attention(prefix, names.format("self_attn")),
            "attention_post_norm": read.norm(f"{prefix}self_attn_layer_norm"),
            "mlp": {"up": read.dense(f"{prefix}fc1"), "down": read.dense(f"{prefix}fc2")},
            "mlp_post_norm": read.norm(f"{prefix}final_layer_norm"),
        }
        if "decoder" in prefix:
            ours["cross_attention"] = read.attention(prefix, names.format("encoder_attn"))
            ours["cross_attention_post_norm"] = read.norm(f"{prefix}encoder_attn_layer_norm")
        return ours

    params = {
        "embed": {"embedding": read.tensors["model.shared.weight"]},
        "encoder_layers": read.stacked("model.encoder.layers", 3, layer),
        "layers": read.stacked("model.decoder.layers", 2, layer),
        "head": {"bias": read.tensors["final_logits_bias"][0]},
    }
    return model, make_model(ModelConfig(**MARIAN, max_seq_len=64)), params


def t5(gated: bool):
    """(transformers' T5, 1.1 or 1.0, ours, its parameters)."""
    model = randomised(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=FEED_FORWARD,
                num_layers=3, num_decoder_layers=2, num_heads=HEADS,
                relative_attention_num_buckets=8, relative_attention_max_distance=12,
                feed_forward_proj="gated-gelu" if gated else "relu",
                tie_word_embeddings=not gated, scale_decoder_outputs=not gated,
            )
        )
    )  # fmt: skip
    read = Reader(model)

    def layer(prefix: str) -> dict:
        last = 2 if "decoder" in prefix else 1
        names = "{0}.q {0}.k {0}.v {0}.o"
        mlp = f"{prefix}layer.{last}.DenseReluDense."
        theirs = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
        ours = {
            "attention": read.attention(prefix, names.format("layer.0.SelfAttention")),
            "attention_norm": read.norm(f"{prefix}layer.0.layer_norm"),
            "mlp": {n: read.dense(mlp + t) for n, t in (theirs | {"down": "wo"}).items()},
            "mlp_norm": read.norm(f"{prefix}layer.{last}.layer_norm"),
        }
        if last == 2:
            names = names.format("layer.1.EncDecAttention")
            ours["cross_attention"] = read.attention(prefix, names)
            ours["cross_attention_norm"] = read.norm(f"{prefix}layer.1.layer_norm")
        return ours

    def bias(stack: str) -> dict:
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {"embedding": read.tensors[name]}

    params = {
        "embed": {"embedding": read.tensors["shared.weight"]},
        "encoder_layers": read.stacked("encoder.block", 3, layer),
        "encoder_relative_bias": bias("encoder"),
        "encoder_final_norm": read.norm("encoder.final_layer_norm"),
        "layers": read.stacked("decoder.block", 2, layer),
        "relative_bias": bias("decoder"),
        "final_norm": read.norm("decoder.final_layer_norm"),
    }
    fields = {"mlp": "geglu" if gated else "relu", "tie_embeddings": not gated}
    if gated:
        params["head"] = read.dense("lm_head")
    fields["scale_logits"] = not gated
    return model, make_model(ModelConfig(**T5 | fields)), params


SEGMENTS = np.array([[1] * 9, [1] * 6 + [0] * 3])
TARGET = tokens_of(2, 14, seed=1)


@pytest.mark.parametrize("build", [marian, lambda: t5(True), lambda: t5(False)])
def test_it_is_the_model_of_transformers(build):
    theirs, model, params = build()
    shapes = split_boxes(jax.eval_shape(model.init, jax.random.key(0)))[0]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    source = tokens_of(2, 9)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(source).long(),
            attention_mask=torch.tensor(SEGMENTS),
            decoder_input_ids=torch.tensor(TARGET).long(),
            output_hidden_states=True,
        )

    def run(params):
        places = places_of(np.ones(TARGET.shape, np.int32))
        read = Source(source, places_of(SEGMENTS))
        hidden, *_ = model.hidden(params, TARGET, places, source=read)
        return model.encode(params, read), hidden, model.logits(params, hidden)

    memory, hidden, logits = jax.jit(run)(jax.tree.map(jnp.asarray, params))
    seen = SEGMENTS > 0
    assert_close(memory[seen], wanted.encoder_last_hidden_state[torch.tensor(seen)])
    assert_close(hidden, wanted.decoder_hidden_states[-1])
    assert_close(logits, wanted.logits)


MODELS = {"marian": ModelConfig(**MARIAN), "t5": ModelConfig(**T5, scale_logits=True)}


@functools.cache
def drawn(config: ModelConfig):
    """Any parameters, quickly."""
    draw = np.random.default_rng(0).normal
    boxed = jax.eval_shape(make_model(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda p: jnp.asarray(draw(0, 0.3, p.shape), p.dtype), split_boxes(boxed)[0]
    )


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params, tokens, segments, source, source_segments, dropout=None):
    """Hidden states of packed rows; segment 0 is padding."""
    read = Source(source, source_segments)
    hidden, *_ = make_model(config).hidden(params, tokens, segments, dropout, source=read)
    return hidden


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_pair_reads_like_the_pair_alone(name):
    config = MODELS[name]
    params = drawn(config)
    sources, targets = np.array([[1] * 4 + [2] * 5 + [0]]), np.array([[1] * 6 + [2] * 3 + [0] * 2])
    source, target = tokens_of(1, 10), tokens_of(1, 11, seed=1)
    packed = run(config, params, target, places_of(targets), source, places_of(sources))
    for number in (1, 2):
        own, read = targets[0] == number, sources[0] == number
        inputs = []
        for tokens, kept in ((target, own), (source, read)):
            inputs += [tokens[:, kept], places_of(np.ones((1, kept.sum()), np.int32))]
        alone = run(config, params, *inputs)
        assert_close(packed[:, own], alone)


@pytest.mark.parametrize("name", MODELS)
def test_with_a_cache_the_source_is_read_once_and_the_target_token_by_token(name):
    config = MODELS[name]
    model, params = make_model(config), drawn(config)
    source, read = tokens_of(2, 9), places_of(SEGMENTS)
    whole = run(config, params, TARGET, places_of(np.ones(TARGET.shape, np.int32)), source, read)
    params = params | {stack: unstack(params[stack]) for stack in model.stacks}
    # The second row's prompt is a token shorter: it has padding in front.
    prompt = np.stack([TARGET[0, :5], np.r_[0, TARGET[1, :4]]])
    slots = np.arange(5)[None, :] - np.array([[0], [1]])
    places = Places(jnp.maximum(slots, 0), jnp.asarray(slots >= 0, jnp.int32))

    @jax.jit
    def prefill(params):
        cache = model.init_cache(2, 14, 9)
        return model.hidden(params, prompt, places, cache=cache, source=Source(source, read))

    @jax.jit
    def step(params, last, positions, cache):
        here = Places(positions[:, None], jnp.ones_like(last))
        return model.hidden(params, last, here, cache=cache)

    hidden, _, cache = prefill(params)
    assert_close(hidden[0], whole[0, :5])
    assert_close(hidden[1, 1:], whole[1, :4])
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), model.init_cache(2, 14, 9))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == expected
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(cache) if x.ndim)
    for ahead in range(3):
        at = np.array([5, 4]) + ahead
        last = np.take_along_axis(TARGET, at[:, None], 1)
        hidden, _, cache = step(params, last, jnp.asarray(at), cache)
        for row in range(2):
            assert_close(hidden[row, 0], whole[row, at[row]])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stacks_and_recomputation_change_nothing(name):
    config = dataclasses.replace(MODELS[name], dropout=0.2, attention_dropout=0.1)
    params, read, own = drawn(MODELS[name]), places_of(SEGMENTS), places_of(np.ones_like(TARGET))
    numbers = np.arange(28).reshape(2, 14), np.arange(18).reshape(2, 9)
    drop = Dropout(jax.random.key(3), *(jnp.asarray(n, jnp.uint32) for n in numbers))

    def gradients(**fields):
        changed = dataclasses.replace(config, **fields)

        def loss(params):
            hidden = run(changed, params, TARGET, own, tokens_of(2, 9), read, drop)
            return jnp.square(hidden).mean()

        # All in one: those of the keys' biases are nothing but rounding.
        return ravel_pytree(jax.jit(jax.grad(loss))(params))[0]

    assert_close(gradients(stack="scan", remat="full"), gradients(stack="unroll"))


def test_dropout_of_both_sides_goes_by_the_number_of_the_token():
    config = dataclasses.replace(MODELS["t5"], dropout=0.4, attention_dropout=0.4)
    params, read, own = drawn(MODELS["t5"]), places_of(SEGMENTS), places_of(np.ones_like(TARGET))
    rows = TARGET, own, tokens_of(2, 9), read
    numbers = np.arange(28, dtype=np.uint32).reshape(2, 14), np.arange(18).reshape(2, 9)

    def outcome(order, target_numbers, source_numbers):
        drop = Dropout(jax.random.key(3), target_numbers[order], source_numbers[order])
        return run(config, params, *jax.tree.map(lambda x: x[order], rows), drop)

    first = outcome(slice(None), *numbers)
    assert_close(outcome(slice(None, None, -1), *numbers)[::-1], first)
    for other in ((numbers[0] + 1, numbers[1]), (numbers[0], numbers[1] + 1)):
        assert np.abs(outcome(slice(None), *other) - first).max() > 0.1


def test_sinusoids_are_those_of_marian():
    theirs = MarianSinusoidalPositionalEmbedding(512, 24).create_weight()
    ours = sinusoids(jnp.arange(512)[None], 24)[0]
    # In float32 here, in float64 there: an angle of 512 is known to 3e-5.
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_are_those_of_t5(count, farthest, causal):
    distances = torch.arange(-2 * farthest, 2 * farthest + 1)
    theirs = T5Attention._relative_position_bucket(distances, not causal, count, farthest)
    ours = distance_buckets(count, farthest, causal)[
        np.clip(distances, -farthest, farthest) + farthest
    ]
    np.testing.assert_array_equal(ours, theirs)


def test_a_target_needs_a_source():
    config = MODELS["t5"]
    with pytest.raises(ValueError, match="needs a source"):
        make_model(config).hidden(drawn(config), TARGET, places_of(np.ones_like(TARGET)))
