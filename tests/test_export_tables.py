"""Export tables: both directions, and what they refuse. Values are checked with the decoder."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import transformers

from jaxlm.errors import UserError
from jaxlm.export import FAMILIES, family_of
from jaxlm.export.rows import Tensor
from jaxlm.export.table import _resolved, shapes_of
from jaxlm.model_config import ModelConfig, RopeScaling
from jaxlm.models.decoder import Decoder
from jaxlm.presets import PRESETS
from jaxlm.sharding import as_tree, split_boxes

LLAMA, GPT2 = FAMILIES["llama"], FAMILIES["gpt2"]
SMALL = {"vocab_size": 13, "max_seq_len": 16, "d_model": 12, "num_layers": 2, "d_ff": 10}
SMALL_LLAMA = ModelConfig(
    **SMALL, num_heads=6, num_kv_heads=2, head_dim=4, qkv_bias=True, out_bias=True
)
SMALL_GPT2 = ModelConfig(**PRESETS["gpt2-tiny"] | SMALL | {"num_heads": 3})
MODELS = [(LLAMA, SMALL_LLAMA), (GPT2, SMALL_GPT2)]
UNTIED = dataclasses.replace(SMALL_LLAMA, tie_embeddings=False)


def params_of(config):
    draw = np.random.default_rng(0).normal
    shapes, _ = split_boxes(jax.eval_shape(Decoder(config).init, jax.random.key(0)))
    return jax.tree.map(lambda s: draw(size=s.shape).astype(s.dtype), shapes)


def read(family, tensors, config):
    ours = {path: np.empty(shape, np.float32) for path, shape in shapes_of(config).items()}
    for part in family.to_ours(tensors, config):
        ours[part.path][part.index] = part.view.transpose(np.argsort(part.order))
    return as_tree(ours)


def refuses(sentence: str):
    return pytest.raises(UserError, match=re.escape(sentence))


@pytest.mark.parametrize(
    ("family", "config"), [*MODELS, (LLAMA, UNTIED)], ids=["llama", "gpt2", "untied"]
)
def test_out_and_in_again_is_the_same(family, config):
    params = params_of(config)
    again = read(family, dict(family.to_theirs(params, config)), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(("family", "config"), MODELS, ids=["llama", "gpt2"])
def test_names_and_shapes_are_those_of_transformers(family, config):
    settings = family.config_to_theirs(config)
    theirs = transformers.AutoConfig.for_model(**settings)
    model = getattr(transformers, family.architecture)(theirs)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = dict(family.to_theirs(params_of(config), config))
    assert {name: tensor.shape for name, tensor in ours.items()} == wanted


@pytest.mark.parametrize(
    ("layout", "shapes", "theirs"),
    [
        ("d", [(3,)], (3,)),
        ("df->fd", [(3, 5)], (5, 3)),
        ("dnh->(nh)d", [(3, 4, 2)], (8, 3)),
        ("dnh->d(+nh)", [(3, 4, 2), (3, 2, 2), (3, 2, 2)], (3, 16)),  # grouped, side by side
        ("dnh->(n+h)d", [(3, 4, 2)] * 3, (24, 3)),  # interleaved by head
        ("df->+fd", [(3, 5)] * 2, (10, 3)),  # gate and up
    ],
)
def test_layouts(layout, shapes, theirs):
    row = Tensor("name", tuple("abc"[: len(shapes)]), layout)
    parts = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    tensor = row.to_theirs(parts)
    assert tensor.shape == row.shape(shapes) == theirs
    for part, again in zip(parts, row.split(tensor, shapes), strict=True):
        np.testing.assert_array_equal(again, part.transpose(row.order))


def test_interleaved_heads_lie_head_by_head():
    q, k, v = (np.full((1, 2, 1), i) + np.array([0, 10])[None, :, None] for i in range(3))
    row = Tensor("qkv", ("q", "k", "v"), "dnh->(n+h)d")
    assert row.to_theirs([q, k, v])[:, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_a_checkpoint_must_have_each_tensor_and_no_other():
    tensors = dict(LLAMA.to_theirs(params_of(SMALL_LLAMA), SMALL_LLAMA))
    name = "model.layers.1.mlp.up_proj.weight"
    without = {n: t for n, t in tensors.items() if n != name}
    with refuses(f"lacks {name}"):
        read(LLAMA, without, SMALL_LLAMA)
    with refuses("has unknown model.extra"):
        read(LLAMA, tensors | {"model.extra": np.zeros(1)}, SMALL_LLAMA)
    with refuses(f"lacks {name} and has unknown model.extra"):
        read(LLAMA, without | {"model.extra": np.zeros(1)}, SMALL_LLAMA)
    with refuses(f"tensor {name} of the llama checkpoint has shape (3, 4), but its"):
        read(LLAMA, tensors | {name: np.zeros((3, 4))}, SMALL_LLAMA)


def test_a_transposed_matrix_is_refused():
    """Even though it has as many numbers as it should."""
    tensors = dict(LLAMA.to_theirs(params_of(SMALL_LLAMA), SMALL_LLAMA))
    name = "model.layers.0.self_attn.q_proj.weight"
    with refuses(f"asks for {tensors[name].shape}"):
        read(LLAMA, tensors | {name: tensors[name].T}, SMALL_LLAMA)


def test_a_parameter_without_a_place_is_refused():
    config = dataclasses.replace(SMALL_LLAMA, qk_norm="head")
    with refuses("llama checkpoints have no place for layers/attention/k_norm/scale"):
        dict(LLAMA.to_theirs(params_of(config), config))


def test_a_tied_head_may_be_stored_twice_but_not_differ():
    tensors = dict(LLAMA.to_theirs(params_of(SMALL_LLAMA), SMALL_LLAMA))
    embedding = tensors["model.embed_tokens.weight"]
    read(LLAMA, tensors | {"lm_head.weight": embedding}, SMALL_LLAMA)
    with refuses("set tie_word_embeddings to false"):
        read(LLAMA, tensors | {"lm_head.weight": embedding + 1}, SMALL_LLAMA)


def test_old_gpt2_checkpoints_are_read():
    """Those of the body alone, which also carry masks."""
    params = params_of(SMALL_GPT2)
    tensors = dict(GPT2.to_theirs(params, SMALL_GPT2))
    body = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    body["h.0.attn.bias"] = np.ones((1, 1, 16, 16))
    jax.tree.map(np.testing.assert_array_equal, read(GPT2, body, SMALL_GPT2), params)


@pytest.mark.parametrize(
    "config",
    [
        SMALL_LLAMA,
        UNTIED,
        dataclasses.replace(UNTIED, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
        dataclasses.replace(UNTIED, rope_scaling=RopeScaling("linear", 2.0), rope_theta=7.0),
        SMALL_GPT2,
        dataclasses.replace(SMALL_GPT2, tie_embeddings=False),
    ],
)
def test_configurations_survive_transformers(config):
    family = GPT2 if config.norm == "layernorm" else LLAMA
    settings = family.config_to_theirs(config)
    theirs = transformers.AutoConfig.for_model(**settings).to_dict()
    resolved = dataclasses.replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads)
    for written in (settings, theirs):
        again = family_of(written).config_to_ours(written)
        again = dataclasses.replace(
            again,
            head_dim=again.head_size,
            num_kv_heads=again.kv_heads,
            preset=config.preset,
            scale_residual_init=config.scale_residual_init,
        )
        assert again == resolved


def test_rope_is_read_in_the_form_of_transformers_4():
    old = LLAMA.config_to_theirs(UNTIED)
    del old["rope_parameters"]
    old |= {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    config = LLAMA.config_to_ours(old)
    assert (config.rope_theta, config.rope_scaling) == (9.0, RopeScaling("linear", 3.0))
    del old["rope_theta"], old["rope_scaling"]
    config = LLAMA.config_to_ours(old)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)


@pytest.mark.parametrize(
    ("family", "config", "change", "sentence"),
    [
        (LLAMA, UNTIED, {"hidden_act": "relu"}, "jaxlm computes hidden_act='silu' only"),
        (LLAMA, UNTIED, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "by 'yarn', but"),
        (LLAMA, UNTIED, {"rope_scaling": {"type": "linear"}}, "by 'linear' without 'factor'"),
        (LLAMA, UNTIED, {"partial_rotary_factor": 0.5}, "turns whole heads"),
        (LLAMA, UNTIED, {"hidden_size": "wide"}, "d_model='wide': Input should be"),
        (LLAMA, UNTIED, {"num_attention_heads": 5}, "model: model.num_heads=5 is not a"),
        (GPT2, SMALL_GPT2, {"activation_function": "relu"}, "'gelu_new' only"),
        (GPT2, SMALL_GPT2, {"scale_attn_by_inverse_layer_idx": True}, "=False only"),
    ],
)
def test_settings_that_change_the_computation_are_refused(family, config, change, sentence):
    with refuses(sentence):
        family.config_to_ours(family.config_to_theirs(config) | change)


def test_a_missing_setting_is_named():
    settings = LLAMA.config_to_theirs(UNTIED)
    del settings["hidden_size"]
    with refuses("config.json of a llama model has no 'hidden_size'"):
        LLAMA.config_to_ours(settings)


@pytest.mark.parametrize(
    ("family", "config", "change", "sentence"),
    [
        (LLAMA, UNTIED, {"logit_softcap": 3.0}, "model.logit_softcap=3.0 cannot be written as"),
        (LLAMA, UNTIED, {"positions": "learned"}, "which implies positions='rotary'"),
        (LLAMA, UNTIED, {"out_bias": False}, "llama has one 'attention_bias' for both"),
        (LLAMA, UNTIED, {"vocab_size": None}, "model.vocab_size is not set"),
        (GPT2, SMALL_GPT2, {"head_dim": 8}, "which implies head_dim=4"),
        (GPT2, SMALL_GPT2, {"num_kv_heads": 1}, "which implies num_kv_heads=3"),
    ],
)
def test_models_that_a_family_cannot_express_are_refused(family, config, change, sentence):
    with refuses(sentence):
        family.config_to_theirs(dataclasses.replace(config, **change))


WRONG = (None, "x", [], [[]], {}, {"x": "y"}, 0, -1, 1.5, float("inf"), True)


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_of_a_wrong_kind_are_one_sentence(name):
    """Whatever config.json has under a key, it is a model or an error of the user's."""
    family = FAMILIES[name]
    settings = settings_of(family)
    family.config_to_ours(settings)
    keys = {*settings, "rope_scaling", "rope_parameters", "layer_types", "sliding_window_pattern"}
    refused = 0
    for key in sorted(keys - {"model_type"}):
        for value in WRONG:
            try:
                family.config_to_ours(settings | {key: value})
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 30


def settings_of(family):
    """The settings that transformers writes for its default model of a family."""
    return transformers.AutoConfig.for_model(family.model_type).to_dict()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_config_json_leaves_out_means_what_transformers_takes(name):
    family = FAMILIES[name]
    settings = settings_of(family)
    keys = {row.theirs for row in family.settings} | {"layer_types", "rope_parameters"}
    for key in keys & settings.keys():
        rest = {name: value for name, value in settings.items() if name != key}
        theirs = transformers.AutoConfig.for_model(**rest).to_dict()
        try:
            ours = family.config_to_ours(rest)
        except UserError as error:
            assert f"has no {key!r}" in str(error)
        else:
            assert _resolved(ours) == _resolved(family.config_to_ours(theirs)), key


@pytest.mark.parametrize("model_type", [None, [], {"llama": 1}])
def test_a_family_is_named_by_a_text(model_type):
    with refuses("for which jaxlm has no table"):
        family_of({"model_type": model_type})


def test_an_unknown_family_is_refused():
    with refuses("no table; did you mean 'llama'? (it has llama, mistral, qwen2, "):
        family_of({"model_type": "lama"})
