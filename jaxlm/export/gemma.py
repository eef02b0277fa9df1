"""Gemma 1, 2 and 3 (text), as transformers stores them: norms hold their scale less one."""

import dataclasses
from typing import Any

from jaxlm.export import rope, windows
from jaxlm.export.llama import (
    ATTENTION,
    BIAS,
    ENDS,
    LAYER,
    LLAMA,
    MLP,
    QK_NORMS,
    STRICT_SIZES,
    TIED,
)
from jaxlm.export.rope import read_rope, read_two_ropes, write_rope, write_two_ropes
from jaxlm.export.rows import Setting, Tensor
from jaxlm.export.table import check_whole_heads

TANH = "gelu_pytorch_tanh"
NORMS = (
    Tensor(LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "d"),
    Tensor(LAYER + "post_attention_layernorm.weight", "layers/attention_post_norm/scale", "d"),
    Tensor(LAYER + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "d"),
    Tensor(LAYER + "post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d"),
)
FIXED = {"mlp": "geglu", "norm_offset": 1.0, "scale_embeddings": True}
# A config.json without a head_dim means 256, whatever the other sizes.
GEMMA_SIZES = (
    *(row for row in STRICT_SIZES if row.ours != "head_dim"),
    Setting("head_dim", "head_dim", 256),
)


def _read_gemma(settings: dict[str, Any]) -> dict[str, Any]:
    """Early files name the exact GELU and mean the other one."""
    name = settings.get("hidden_activation") or settings.get("hidden_act", TANH)
    return read_rope(settings) | {"hidden_act": TANH if name == "gelu" else name}


def _read_scale(settings: dict[str, Any], default: float) -> dict[str, Any]:
    scalar = settings.get("query_pre_attn_scalar", default)
    return settings | {"attention_scale": scalar**-0.5}


def _write_scale(settings: dict[str, Any]) -> dict[str, Any]:
    check_whole_heads(settings)
    scalar = settings.pop("attention_scale") ** -2
    # Whole in every published model, and floats lose that on the way.
    whole = round(scalar)
    return settings | {"query_pre_attn_scalar": whole if abs(scalar - whole) < 1e-9 else scalar}


def _read_gemma2(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {"sliding_window": 4096} | settings
    settings = windows.read_layers(read_rope(settings), lambda settings, i: i % 2 == 0)
    return _read_scale(settings, 256)


def _write_gemma2(settings: dict[str, Any]) -> dict[str, Any]:
    return _write_scale(windows.write_layers(write_rope(settings)))


def _read_gemma3(settings: dict[str, Any]) -> dict[str, Any]:
    every = settings.get("sliding_window_pattern", 6)
    settings = {"sliding_window": 4096} | read_two_ropes(settings)
    settings = windows.read_layers(settings, lambda settings, i: (i + 1) % every != 0)
    if "local" not in settings["layer_pattern"]:
        settings["rope_local_base_freq"] = None
    if "global" not in settings["layer_pattern"]:
        settings |= {"rope_theta": 10_000.0, "rope_scaling": None}
    return _read_scale(settings, 256)


def _write_gemma3(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["rope_local_base_freq"] is None:
        settings["rope_local_base_freq"] = settings["rope_theta"]
    return _write_scale(windows.write_layers(write_two_ropes(settings)))


GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    settings=(*GEMMA_SIZES, *rope.SETTINGS, TIED, *BIAS),
    fixed=FIXED,
    expected={"hidden_act": TANH},
    read=_read_gemma,
    write=write_rope,
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=(*ENDS, *ATTENTION, *MLP, *NORMS),
    settings=(
        *GEMMA.settings,
        *windows.SETTINGS,
        Setting("attention_scale", "attention_scale"),
        Setting("attention_softcap", "attn_logit_softcapping", 50.0),
        Setting("logit_softcap", "final_logit_softcapping", 30.0),
    ),
    fixed=FIXED | {"norm_placement": "pre_post"},
    expected={"hidden_activation": TANH},
    read=_read_gemma2,
    write=_write_gemma2,
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=(*GEMMA2.tensors, *QK_NORMS),
    settings=(
        *GEMMA.settings,
        *windows.SETTINGS,
        Setting("attention_scale", "attention_scale"),
        Setting("attention_softcap", "attn_logit_softcapping", None),
        Setting("logit_softcap", "final_logit_softcapping", None),
        Setting("rope_local_theta", "rope_local_base_freq", 10_000.0),
    ),
    fixed=FIXED | {"norm_placement": "pre_post", "qk_norm": "head"},
    expected={"hidden_activation": TANH, "use_bidirectional_attention": False},
    read=_read_gemma3,
    write=_write_gemma3,
)
