"""Every family: a model of transformers, read from its files, computes the same here, and goes
back to the same bytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm.export import FAMILIES, family_for, family_of
from jaxlm.export.huggingface import read_model_config, read_params, read_settings
from jaxlm.export.safetensors import read_tensors
from jaxlm.mesh import make_mesh
from jaxlm.models.build import make_model
from jaxlm.models.head import LabelHead, head_logits
from jaxlm.nn.attention import Places, Source
from jaxlm.sharding import make_layout, split_boxes

pytestmark = pytest.mark.usefixtures("strict")

# An odd vocabulary, 3 query heads to a key head, heads wider than D / N.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": 97,
    "n_positions": 31,
    "n_embd": 30,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 44,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
NEOX = {"head_dim": None, "hidden_size": 48, "num_key_value_heads": None}
GEMMA2 = {
    "num_hidden_layers": 5,
    "sliding_window": 4,
    "query_pre_attn_scalar": 7,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
}
GEMMA3 = {
    "num_hidden_layers": 7,
    "sliding_window": 4,
    "query_pre_attn_scalar": 10,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
    },
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
PARTIAL = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.6}
BERT = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "initializer_range": 0.2,
    "hidden_act": "gelu",
}
T5 = {
    "vocab_size": 101,
    "d_model": 36,
    "d_kv": 10,
    "d_ff": 52,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-3,
}
T5_UNTIED = {"tie_word_embeddings": False, "scale_decoder_outputs": False}
MARIAN = {
    "vocab_size": 101,
    "d_model": 36,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "max_position_embeddings": 64,
    "activation_function": "swish",
    "scale_embedding": True,
    "init_std": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
PAD = {"pad_token_id": 0}
LABELS = {"id2label": {0: "good", 1: "bad", 2: "so so"}}
CASES = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama-tied-llama3-biases": (
        "LlamaForCausalLM",
        SIZES | TIED | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear": ("LlamaForCausalLM", SIZES | {"rope_parameters": LINEAR}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", SIZES | {"sliding_window": 5}),
    "mistral-no-window": ("MistralForCausalLM", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", SIZES | TIED),
    "qwen2-window": ("Qwen2ForCausalLM", SIZES | WINDOW),
    "qwen3": ("Qwen3ForCausalLM", SIZES | TIED | {"attention_bias": True}),
    "gemma": ("GemmaForCausalLM", SIZES),
    "gemma2": ("Gemma2ForCausalLM", SIZES | GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", SIZES | GEMMA3),
    "olmo2": ("Olmo2ForCausalLM", SIZES),
    "phi3": ("Phi3ForCausalLM", SIZES | {"head_dim": None, "sliding_window": 5}),
    "phi3-partial": ("Phi3ForCausalLM", SIZES | {"hidden_size": 60, "rope_parameters": PARTIAL}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        SIZES | NEOX | {"rope_parameters": PARTIAL | {"rope_theta": 9.0}},
    ),
    "gpt_neox-sequential": (
        "GPTNeoXForCausalLM",
        SIZES | NEOX | TIED | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 5, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", SIZES | EXPERTS),
    "bert": ("BertModel", BERT),
    "bert-tanh": ("BertModel", BERT | {"hidden_act": "gelu_new"}),
    "bert-classifier": ("BertForSequenceClassification", BERT | LABELS),
    "roberta": ("RobertaModel", BERT | {"pad_token_id": 3}),
    "roberta-classifier": ("RobertaForSequenceClassification", BERT | LABELS | {"pad_token_id": 1}),
    "llama-classifier": ("LlamaForSequenceClassification", SIZES | LABELS | PAD),
    "gpt2-classifier": ("GPT2ForSequenceClassification", GPT2 | LABELS | PAD),
    "qwen2-classifier": ("Qwen2ForSequenceClassification", SIZES | LABELS | PAD),
    "gemma3-classifier": ("Gemma3TextForSequenceClassification", SIZES | GEMMA3 | LABELS | PAD),
    "t5": ("T5ForConditionalGeneration", T5 | PAD),
    "t5-gated-untied": (
        "T5ForConditionalGeneration",
        T5 | PAD | T5_UNTIED | {"feed_forward_proj": "gated-gelu"},
    ),
    "marian": ("MarianMTModel", MARIAN),
    "qwen3_moe-normalised": ("Qwen3MoeForCausalLM", SIZES | EXPERTS | {"norm_topk_prob": True}),
}


def build(kind: str, settings: dict):
    """A model of transformers with random weights, norms and biases included."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    settings = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | settings
    settings = {key: v for key, v in settings.items() if v is not None or key.endswith("_token_id")}
    model = model(model.config_class(**settings, attn_implementation="eager")).eval()
    if settings.get("scale_decoder_outputs") is False:  # transformers 5 ties it all the same
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    tensors = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name == "final_logits_bias"}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.ndim == 1 or name == "final_logits_bias":
                tensor += 0.3 * torch.randn_like(tensor)
            assert tensor.std() > 0, name
    return model


# A case for each kind of block; the others are variants.
QUICK = ("llama-tied-llama3-biases", "gpt2", "gemma3", "olmo2", "gpt_neox", "qwen3_moe")
QUICK += ("bert", "roberta-classifier", "llama-classifier", "t5-gated-untied", "marian")


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def case(request, tmp_path_factory):
    """(the model of transformers, the folder it saved itself to)."""
    model = build(*CASES[request.param])
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def placed(folder, mesh="dp1"):
    """(configuration, parameters) of a folder."""
    config = read_model_config(folder)
    boxed = jax.eval_shape(make_model(config).init, jax.random.key(0))
    layout = make_layout(*split_boxes(boxed), make_mesh(mesh))
    return config, read_params(folder, config, layout.exact)


def _output(config, dtype, params, hidden):
    """What the model makes of hidden states, be it only its pooler's."""
    if config.labels is None and config.pooler:
        return LabelHead(config, dtype).apply({"params": params["classifier"]}, hidden)
    return head_logits(config, dtype, params, hidden)


def hidden_and_logits(config, params, tokens, source=None):
    model = make_model(config)

    def places(tokens):
        return Places(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))

    def run(params, tokens, source):
        source = None if source is None else Source(source, places(source))
        hidden, *_ = model.hidden(params, tokens, places(tokens), source=source)
        return hidden, _output(config, model.dtype, params, hidden)

    return map(np.asarray, jax.jit(run)(params, tokens, source))


def numbers(model, config, params):
    """Pairs (ours, theirs) of what the model computes of two texts."""
    draw = np.random.default_rng(0).integers
    # Above all ids that a model may take for padding.
    tokens = draw(4, config.vocab_size, (2, 23), np.int32)
    inputs, source = {"input_ids": torch.tensor(tokens).long()}, None
    if config.kind == "encoder_decoder":
        source = draw(4, config.vocab_size, (2, 17), np.int32)
        inputs = {
            "input_ids": torch.tensor(source).long(),
            "decoder_input_ids": inputs["input_ids"],
        }
    with torch.no_grad():
        theirs = model(**inputs)
    hidden, logits = hidden_and_logits(config, params, tokens, source)
    if config.labels is not None:
        read = -1 if config.kind == "decoder" else 0
        return [(logits[:, read], theirs.logits)]
    if config.kind == "encoder":
        return [(hidden, theirs.last_hidden_state), (logits[:, 0], theirs.pooler_output)]
    return [(logits, theirs.logits)]


def test_it_computes_the_same_and_goes_back(case):
    model, folder = case
    config, params = placed(folder)
    for ours, theirs in numbers(model, config, params):
        worst = np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        print(f"largest difference {worst:.1e}")
        assert worst < 1e-5
    family, files = family_of(read_settings(folder)), read_tensors(folder)
    again = dict(family.to_theirs(params, config))
    assert again.keys() == files.keys()
    for name, tensor in files.items():
        assert again[name].tobytes() == tensor.tobytes(), name


def resolved(config):
    fields = {"head_dim": config.head_size, "num_kv_heads": config.kv_heads}
    if config.kind != "encoder_decoder":
        fields["pooling"] = config.pools
    if config.experts is not None:
        width = config.experts.d_ff or config.d_ff
        fields["experts"] = dataclasses.replace(config.experts, d_ff=width)
    return dataclasses.replace(config, **fields)


def test_its_configuration_survives(case):
    """Ours to theirs, through transformers, and back; and it finds the family again."""
    model, folder = case
    config = resolved(read_model_config(folder))
    family = family_of(read_settings(folder))
    settings = family.config_to_theirs(config)
    through = transformers.AutoConfig.for_model(**settings).to_dict()
    assert settings["architectures"] == [type(model).__name__]
    for written in (settings, json.loads(json.dumps(through))):
        assert resolved(family.config_to_ours(written)) == config
    found = family_for(config)
    assert resolved(found.config_to_ours(found.config_to_theirs(config))) == config


def test_every_family_has_a_case():
    assert {name.partition("-")[0] for name in CASES} | {"gemma3_text"} == {*FAMILIES, "gemma3"}


@pytest.mark.parametrize("mesh", ["dp2,fsdp2,tp2", "pp3", "fsdp4"])
def test_it_goes_straight_onto_a_mesh(mesh, tmp_path):
    build(*CASES["phi3"]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, wanted = placed(tmp_path)
    config = read_model_config(tmp_path)
    boxed = jax.eval_shape(make_model(config).init, jax.random.key(0))
    layout = make_layout(*split_boxes(boxed), make_mesh(mesh))
    got = read_params(tmp_path, config, layout.exact)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, got, layout.exact))
    )
