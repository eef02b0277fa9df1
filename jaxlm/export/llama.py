"""Llama 1, 2 and 3, as transformers' LlamaForCausalLM stores them."""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.export.table import Family, Setting, Tensor
from jaxlm.model_config import RopeScaling

# Shared by the families that descend from Llama, which differ in their norms.
BODY = (
    Tensor("model.embed_tokens.weight", "embed/embedding", "vd"),
    Tensor("model.norm.weight", "final_norm/scale", "d"),
    Tensor("lm_head.weight", "head/kernel", "dv->vd"),
    Tensor("model.layers.{}.input_layernorm.weight", "layers/attention_norm/scale", "d"),
    Tensor("model.layers.{}.self_attn.q_proj.weight", "layers/attention/q/kernel", "dnh->(nh)d"),
    Tensor("model.layers.{}.self_attn.k_proj.weight", "layers/attention/k/kernel", "dkh->(kh)d"),
    Tensor("model.layers.{}.self_attn.v_proj.weight", "layers/attention/v/kernel", "dkh->(kh)d"),
    Tensor("model.layers.{}.self_attn.q_proj.bias", "layers/attention/q/bias", "nh->(nh)"),
    Tensor("model.layers.{}.self_attn.k_proj.bias", "layers/attention/k/bias", "kh->(kh)"),
    Tensor("model.layers.{}.self_attn.v_proj.bias", "layers/attention/v/bias", "kh->(kh)"),
    Tensor("model.layers.{}.self_attn.o_proj.weight", "layers/attention/out/kernel", "nhd->d(nh)"),
    Tensor("model.layers.{}.self_attn.o_proj.bias", "layers/attention/out/bias", "d"),
    Tensor("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/gate/kernel", "df->fd"),
    Tensor("model.layers.{}.mlp.gate_proj.bias", "layers/mlp/gate/bias", "f"),
    Tensor("model.layers.{}.mlp.up_proj.weight", "layers/mlp/up/kernel", "df->fd"),
    Tensor("model.layers.{}.mlp.up_proj.bias", "layers/mlp/up/bias", "f"),
    Tensor("model.layers.{}.mlp.down_proj.weight", "layers/mlp/down/kernel", "fd->df"),
    Tensor("model.layers.{}.mlp.down_proj.bias", "layers/mlp/down/bias", "d"),
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
    Setting("rope_theta", "rope_theta", 10_000.0),
    Setting("rope_scaling", "rope_scaling", None),
    Setting("init_std", "initializer_range", 0.02),
)


# Kinds of rotary scaling: our field of RopeScaling, their key.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}


def read_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with `rope_theta` and `rope_scaling` (a RopeScaling or None) at the top.

    transformers 5 keeps both in `rope_parameters`, transformers 4 beside the rest. Raises
    UserError for a kind of scaling that the decoder does not offer.
    """
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    rope = settings | rope | {"original_max_position_embeddings": _trained_length(settings, rope)}
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"config.json has partial_rotary_factor={rope['partial_rotary_factor']}, but jaxlm "
            "turns whole heads"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None if kind == "default" else _scaling(kind, rope)
    return settings | {"rope_theta": rope.get("rope_theta", 10_000.0), "rope_scaling": scaling}


def write_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_rope`, in the form of transformers 5 and in that of transformers 4."""
    scaling, rope = settings["rope_scaling"], None
    if scaling is not None:
        keys = SCALINGS[scaling.kind].items()
        rope = {"rope_type": scaling.kind} | {key: getattr(scaling, ours) for ours, key in keys}
    parameters = {"rope_theta": settings["rope_theta"]} | (rope or {"rope_type": "default"})
    return settings | {"rope_scaling": rope, "rope_parameters": parameters}


def _scaling(kind: str, rope: dict[str, Any]) -> RopeScaling:
    keys = SCALINGS.get(kind)
    if keys is None:
        raise UserError(
            f"config.json scales rotary positions by {kind!r}, but jaxlm offers "
            f"{' and '.join(SCALINGS)}"
        )
    missing = [key for key in keys.values() if key not in rope]
    if missing:
        raise UserError(f"config.json scales rotary positions by {kind!r} without {missing[0]!r}")
    return RopeScaling(kind=kind, **{ours: rope[key] for ours, key in keys.items()})


def _trained_length(settings: dict[str, Any], rope: dict[str, Any]) -> int:
    """The context length before scaling; left out, it is the length after it."""
    length = settings.get("max_position_embeddings", 2048)
    return rope.get("original_max_position_embeddings", length)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(
        *BODY,
        Tensor("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "d"),
    ),
    settings=(
        *SIZES,
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("qkv_bias", "attention_bias", False),
        Setting("out_bias", "attention_bias", False),
        Setting("mlp_bias", "mlp_bias", False),
    ),
    fixed={"mlp": "swiglu"},
    expected={"hidden_act": "silu"},
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    buffers=r"rotary_emb\.inv_freq$",
    read=read_rope,
    write=write_rope,
)
