"""Llama and its descendants, as transformers stores them: Mistral, Qwen 2 and 3, OLMo 2, Phi-3."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxlm.export import rope, windows
from jaxlm.export.rope import read_rope, write_rope
from jaxlm.export.rows import REQUIRED, Setting, Tensor
from jaxlm.export.table import Family, check_whole_heads

LAYER = "model.layers.{}."
ENDS = (
    Tensor("model.embed_tokens.weight", "embed/embedding", "vd"),
    Tensor("model.norm.weight", "final_norm/scale", "d"),
    Tensor("lm_head.weight", "head/kernel", "dv->vd"),
)
ATTENTION = (
    Tensor(LAYER + "self_attn.q_proj.weight", "layers/attention/q/kernel", "dnh->(nh)d"),
    Tensor(LAYER + "self_attn.k_proj.weight", "layers/attention/k/kernel", "dkh->(kh)d"),
    Tensor(LAYER + "self_attn.v_proj.weight", "layers/attention/v/kernel", "dkh->(kh)d"),
    Tensor(LAYER + "self_attn.q_proj.bias", "layers/attention/q/bias", "nh->(nh)"),
    Tensor(LAYER + "self_attn.k_proj.bias", "layers/attention/k/bias", "kh->(kh)"),
    Tensor(LAYER + "self_attn.v_proj.bias", "layers/attention/v/bias", "kh->(kh)"),
    Tensor(LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "nhd->d(nh)"),
    Tensor(LAYER + "self_attn.o_proj.bias", "layers/attention/out/bias", "d"),
)
MLP = (
    Tensor(LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "df->fd"),
    Tensor(LAYER + "mlp.gate_proj.bias", "layers/mlp/gate/bias", "f"),
    Tensor(LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "df->fd"),
    Tensor(LAYER + "mlp.up_proj.bias", "layers/mlp/up/bias", "f"),
    Tensor(LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "fd->df"),
    Tensor(LAYER + "mlp.down_proj.bias", "layers/mlp/down/bias", "d"),
)
PRE_NORMS = (
    Tensor(LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "d"),
    Tensor(LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "d"),
)
QK_NORMS = (
    Tensor(LAYER + "self_attn.q_norm.weight", "layers/attention/q_norm/scale", "h"),
    Tensor(LAYER + "self_attn.k_norm.weight", "layers/attention/k_norm/scale", "h"),
)
SIZES = (
    Setting("vocab_size", "vocab_size"),
    Setting("max_seq_len", "max_position_embeddings", 2048),
    Setting("d_model", "hidden_size"),
    Setting("num_layers", "num_hidden_layers"),
    Setting("num_heads", "num_attention_heads"),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("head_dim", "head_dim", None),
    Setting("d_ff", "intermediate_size"),
    Setting("norm_eps", "rms_norm_eps", 1e-6),
    Setting("init_std", "initializer_range", 0.02),
    Setting("attention_dropout", "attention_dropout", 0.0),
)


def required(rows: Iterable[Setting], *keys: str) -> tuple[Setting, ...]:
    """The rows, of which those with these keys of theirs may not be left out of a config.json:
    what transformers then takes is the size of one model.
    """
    return tuple(
        dataclasses.replace(row, default=REQUIRED) if row.theirs in keys else row for row in rows
    )


STRICT_SIZES = required(SIZES, "max_position_embeddings", "num_key_value_heads", "rms_norm_eps")
BIAS = (
    Setting("qkv_bias", "attention_bias", False),
    Setting("out_bias", "attention_bias", False),
)
TIED = Setting("tie_embeddings", "tie_word_embeddings", True)
UNTIED = Setting("tie_embeddings", "tie_word_embeddings", False)


def _write_llama(settings: dict[str, Any]) -> dict[str, Any]:
    check_whole_heads(settings)
    return write_rope(settings)


def _read_mistral(settings: dict[str, Any]) -> dict[str, Any]:
    return windows.read_all_alike(read_rope({"sliding_window": 4096} | settings))


def _write_mistral(settings: dict[str, Any]) -> dict[str, Any]:
    return windows.write_all_alike(write_rope(settings))


def _is_local(settings: dict[str, Any], layer: int) -> bool:
    return settings.get("use_sliding_window", False) and layer >= settings.get(
        "max_window_layers", 28
    )


def read_qwen(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a Qwen; its window is off unless `use_sliding_window` says otherwise."""
    if not settings.get("use_sliding_window", False) and not settings.get("layer_types"):
        settings = settings | {"sliding_window": None}
    return windows.read_layers(read_rope(settings), _is_local)


def write_qwen(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_qwen`."""
    return windows.write_layers(write_rope(settings))


def _read_phi(settings: dict[str, Any]) -> dict[str, Any]:
    return windows.read_all_alike(read_rope(settings, fraction=1.0))


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(*ENDS, *ATTENTION, *MLP, *PRE_NORMS),
    settings=(*SIZES, *rope.SETTINGS, UNTIED, *BIAS, Setting("mlp_bias", "mlp_bias", False)),
    fixed={"mlp": "swiglu"},
    expected={"hidden_act": "silu"},
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    spare=r"rotary_emb\.inv_freq$",
    read=read_rope,
    write=_write_llama,
)
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings=(*STRICT_SIZES, *rope.SETTINGS, *windows.SETTINGS, UNTIED),
    read=_read_mistral,
    write=_write_mistral,
)
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    settings=(*STRICT_SIZES, *rope.SETTINGS, *windows.SETTINGS, UNTIED),
    fixed={"mlp": "swiglu", "qkv_bias": True},
    read=read_qwen,
    write=write_qwen,
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=(*LLAMA.tensors, *QK_NORMS),
    settings=(*required(QWEN2.settings, "head_dim"), *BIAS),
    fixed={"mlp": "swiglu", "qk_norm": "head"},
)
OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=(
        *ENDS,
        *ATTENTION,
        *MLP,
        Tensor(LAYER + "post_attention_layernorm.weight", "layers/attention_post_norm/scale", "d"),
        Tensor(LAYER + "post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d"),
        Tensor(LAYER + "self_attn.q_norm.weight", "layers/attention/q_norm/scale", "nh->(nh)"),
        Tensor(LAYER + "self_attn.k_norm.weight", "layers/attention/k_norm/scale", "kh->(kh)"),
    ),
    settings=(*required(SIZES, "rms_norm_eps"), *rope.SETTINGS, UNTIED, *BIAS),
    fixed={"mlp": "swiglu", "norm_placement": "post", "qk_norm": "all"},
    write=write_rope,
)
PHI3 = dataclasses.replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=(
        *ENDS,
        *PRE_NORMS,
        Tensor(
            LAYER + "self_attn.qkv_proj.weight",
            tuple(f"layers/attention/{name}/kernel" for name in "qkv"),
            "dnh->(+nh)d",
        ),
        Tensor(LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "nhd->d(nh)"),
        Tensor(
            LAYER + "mlp.gate_up_proj.weight",
            ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"),
            "df->+fd",
        ),
        Tensor(LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "fd->df"),
    ),
    settings=(
        *STRICT_SIZES,
        *rope.SETTINGS,
        *windows.SETTINGS,
        UNTIED,
        Setting("rotary_fraction", "partial_rotary_factor", 1.0),
        Setting("dropout", "embd_pdrop", 0.0),
        Setting("dropout", "resid_pdrop", 0.0),
    ),
    read=_read_phi,
    write=_write_mistral,
)
DESCENDANTS = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, PHI3)
