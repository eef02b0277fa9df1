"""The encoder against transformers' models; its pooling; a decoder as a classifier."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_models_decoder import LLAMA, assert_close, imported
from test_models_encoder_decoder import (
    FEED_FORWARD,
    HEADS,
    VOCABULARY,
    WIDTH,
    Reader,
    drawn,
    places_of,
    randomised,
    tokens_of,
)

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.nn.layers import Dropout
from jaxlm.presets import PRESETS
from jaxlm.sharding import split_boxes

pytestmark = pytest.mark.usefixtures("strict")

SIZE = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": 2, "num_heads": HEADS}
SIZE |= {"d_ff": FEED_FORWARD, "dropout": 0.0, "attention_dropout": 0.0, "max_seq_len": 40}
LABELS = {"labels": ("negative", "neutral", "positive")}
PAD = 1
SEGMENTS = np.array([[1] * 9, [1] * 6 + [0] * 3])
TOKENS = np.where(SEGMENTS > 0, tokens_of(2, 9), PAD)


def imported_encoder(model, read: Reader, name: str, config: ModelConfig) -> dict:
    """The parameters of a BERT or RoBERTa of transformers with a classifier."""

    def layer(prefix: str) -> dict:
        attention, out = "attention.self.", "attention.output."
        names = f"{attention}query {attention}key {attention}value {out}dense"
        mlp = {"up": f"{prefix}intermediate.dense", "down": f"{prefix}output.dense"}
        return {
            "attention": read.attention(prefix, names),
            "attention_post_norm": read.norm(f"{prefix}{out}LayerNorm"),
            "mlp": {ours: read.dense(theirs) for ours, theirs in mlp.items()},
            "mlp_post_norm": read.norm(f"{prefix}output.LayerNorm"),
        }

    def table(kind: str) -> dict:
        return {"embedding": read.tensors[f"{name}.embeddings.{kind}_embeddings.weight"]}

    dense, out = ("bert.pooler.dense", "classifier")
    if name == "roberta":
        dense, out = ("classifier.dense", "classifier.out_proj")
    return {
        "embed": table("word"),
        "positions": table("position"),
        "token_types": table("token_type"),
        "embedding_norm": read.norm(f"{name}.embeddings.LayerNorm"),
        "layers": read.stacked(f"{name}.encoder.layer", 2, layer),
        "classifier": {"dense": read.dense(dense), "out": read.dense(out)},
    }


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_it_is_the_model_of_transformers(name):
    preset = PRESETS[f"{name}-base"]
    config = ModelConfig(**preset | SIZE | LABELS)
    kind = "Bert" if name == "bert" else "Roberta"
    theirs = randomised(
        getattr(transformers, f"{kind}ForSequenceClassification")(
            getattr(transformers, f"{kind}Config")(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2,
                num_attention_heads=HEADS, intermediate_size=FEED_FORWARD, num_labels=3,
                max_position_embeddings=40 + config.position_offset, pad_token_id=PAD,
                type_vocab_size=config.token_types, layer_norm_eps=config.norm_eps,
            )
        )
    )  # fmt: skip
    params = imported_encoder(theirs, Reader(theirs), name, config)
    model = make_model(config)
    shapes = split_boxes(jax.eval_shape(model.init, jax.random.key(0)))[0]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(TOKENS),
            attention_mask=torch.tensor(SEGMENTS),
            output_hidden_states=True,
        )

    def run(params):
        hidden, *_ = model.hidden(params, TOKENS, places_of(SEGMENTS))
        return hidden, model.logits(params, hidden)

    hidden, logits = jax.jit(run)(jax.tree.map(jnp.asarray, params))
    seen = SEGMENTS > 0
    assert_close(hidden[seen], wanted.hidden_states[-1][torch.tensor(seen)])
    assert logits.shape == (2, 9, 3) and logits.dtype == jnp.float32
    assert_close(logits[:, 0], wanted.logits)


@functools.partial(jax.jit, static_argnums=0)
def outputs(config: ModelConfig, params, tokens, places, dropout=None):
    """Hidden states, pooled as the config has it."""
    return make_model(config).hidden(params, tokens, places, dropout)[0]


ROTARY = ModelConfig(**{**SIZE, "num_kv_heads": 2}, kind="encoder", pooling="first")
MEAN = ModelConfig(**{**SIZE, "num_kv_heads": 2} | LABELS, kind="encoder")


def test_packed_texts_read_and_pool_like_texts_alone():
    segments = np.array([[1] * 4 + [2] * 3 + [0] * 2])
    params, tokens = drawn(MEAN), tokens_of(1, 9)
    first, mean = (outputs(c, params, tokens, places_of(segments)) for c in (ROTARY, MEAN))
    for number in (1, 2):
        own = segments[0] == number
        whole = places_of(np.ones((1, own.sum()), np.int32))
        alone = outputs(ROTARY, params, tokens[:, own], whole)
        assert_close(first[:, own], alone)
        average = np.broadcast_to(alone.mean(1, keepdims=True), alone.shape)
        assert_close(mean[:, own], average)
        assert np.abs(average - alone).max() > 0.1


def test_it_reads_in_both_directions():
    params, tokens, places = drawn(ROTARY), tokens_of(1, 9), places_of(np.ones((1, 9), np.int32))
    changed = np.where(np.arange(9) == 8, 3, tokens)
    difference = outputs(ROTARY, params, tokens, places) - outputs(ROTARY, params, changed, places)
    assert np.abs(difference[0, 0]).max() > 1e-3


def test_dropout_falls_on_what_is_pooled():
    config = dataclasses.replace(MEAN, dropout=0.5)
    drop = Dropout(jax.random.key(0), jnp.arange(18, dtype=jnp.uint32).reshape(2, 9))
    out = outputs(config, drawn(MEAN), TOKENS, places_of(SEGMENTS), drop)
    assert 0.3 < np.mean(np.asarray(out) == 0) < 0.7


def test_a_decoder_with_labels_is_that_of_transformers():
    torch.manual_seed(0)
    theirs = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_labels=3,
            num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2, pad_token_id=PAD,
            max_position_embeddings=40, initializer_range=0.2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    config = LLAMA.config_to_ours(theirs.config.to_dict())
    language_model = transformers.LlamaForCausalLM(theirs.config)
    language_model.model = theirs.model
    language_model.tie_weights()
    params = imported(language_model, config)
    params["classifier"] = {"out": {"kernel": jnp.asarray(theirs.score.weight.detach().numpy().T)}}
    model = make_model(dataclasses.replace(config, **LABELS))
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS), attention_mask=torch.tensor(SEGMENTS)).logits
    hidden, *_ = model.hidden(params, TOKENS, places_of(SEGMENTS))
    logits = model.logits(params, hidden)
    last = SEGMENTS.sum(1) - 1
    assert_close(logits[np.arange(2), last], wanted)
    shapes = split_boxes(jax.eval_shape(model.init, jax.random.key(0)))[0]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)


def test_without_labels_there_is_no_classifier():
    model, params = make_model(ROTARY), drawn(ROTARY)
    assert "classifier" not in params and "head" not in params
    hidden = jnp.eye(WIDTH)[None]
    assert_close(model.logits(params, hidden)[0], params["embed"]["embedding"].T)
    with_pooler = make_model(dataclasses.replace(ROTARY, pooler=True))
    assert_close(with_pooler.logits(params, hidden)[0], params["embed"]["embedding"].T)
    with pytest.raises(UserError, match="generates none"):
        model.init_cache(1, 4)
