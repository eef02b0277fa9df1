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

from jaxlm.export import FAMILIES, family_for
from jaxlm.export.huggingface import read_model_config, read_params
from jaxlm.export.safetensors import read_tensors
from jaxlm.mesh import make_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.nn.attention import Places
from jaxlm.sharding import make_layout, split_boxes

pytestmark = pytest.mark.usefixtures("quick_compile", "strict")

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
CASES = {
    "llama": ("Llama", SIZES),
    "llama-tied-llama3-biases": (
        "Llama",
        SIZES | TIED | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear": ("Llama", SIZES | {"rope_parameters": LINEAR}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}),
    "mistral-no-window": ("Mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES | TIED),
    "qwen2-window": ("Qwen2", SIZES | WINDOW),
    "qwen3": ("Qwen3", SIZES | TIED | {"attention_bias": True}),
    "gemma": ("Gemma", SIZES),
    "gemma2": ("Gemma2", SIZES | GEMMA2),
    "gemma3": ("Gemma3", SIZES | GEMMA3),
    "olmo2": ("Olmo2", SIZES),
    "phi3": ("Phi3", SIZES | {"head_dim": None, "sliding_window": 5}),
    "phi3-partial": ("Phi3", SIZES | {"hidden_size": 60, "rope_parameters": PARTIAL}),
    "gpt_neox": ("GPTNeoX", SIZES | NEOX | {"rope_parameters": PARTIAL | {"rope_theta": 9.0}}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        SIZES | NEOX | TIED | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 5, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", SIZES | EXPERTS),
    "qwen3_moe-normalised": ("Qwen3Moe", SIZES | EXPERTS | {"norm_topk_prob": True}),
}


def build(kind: str, settings: dict):
    """A model of transformers with random weights, norms and biases included."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    model = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))
    settings = {key: value for key, value in settings.items() if value is not None}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = model(config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            assert parameter.std() > 0, name
    return model


# A case for each kind of block; the others are variants.
QUICK = ("llama-tied-llama3-biases", "gpt2", "gemma3", "olmo2", "gpt_neox", "qwen3_moe")


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
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    layout = make_layout(*split_boxes(boxed), make_mesh(mesh))
    return config, read_params(folder, config, layout.exact)


def logits_of(config, params, tokens):
    decoder = Decoder(config)

    def run(params, tokens):
        places = Places(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        hidden, *_ = decoder.hidden(params, tokens, places)
        return decoder.logits(params, hidden)

    return np.asarray(jax.jit(run)(params, tokens))


def test_it_computes_the_same_and_goes_back(case):
    model, folder = case
    config, params = placed(folder)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 23), np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    ours = logits_of(config, params, tokens)
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-5
    family, files = FAMILIES[model.config.model_type], read_tensors(folder)
    again = dict(family.to_theirs(params, config))
    assert again.keys() == files.keys()
    for name, tensor in files.items():
        assert again[name].tobytes() == tensor.tobytes(), name


def resolved(config):
    fields = {"head_dim": config.head_size, "num_kv_heads": config.kv_heads}
    if config.experts is not None:
        width = config.experts.d_ff or config.d_ff
        fields["experts"] = dataclasses.replace(config.experts, d_ff=width)
    return dataclasses.replace(config, **fields)


def test_its_configuration_survives(case):
    """Ours to theirs, through transformers, and back; and it finds the family again."""
    model, folder = case
    config = resolved(read_model_config(folder))
    family = FAMILIES[model.config.model_type]
    settings = family.config_to_theirs(config)
    through = transformers.AutoConfig.for_model(**settings).to_dict()
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
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    layout = make_layout(*split_boxes(boxed), make_mesh(mesh))
    got = read_params(tmp_path, config, layout.exact)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, got, layout.exact))
    )
