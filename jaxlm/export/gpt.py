"""GPT-2 and GPT-NeoX (Pythia), as transformers stores them: q, k and v in one."""

from typing import Any

from jaxlm.export import rope
from jaxlm.export.rope import read_rope, write_rope
from jaxlm.export.rows import Setting, Tensor
from jaxlm.export.table import Family, check_whole_heads

_QKV = ("layers/attention/q/{}", "layers/attention/k/{}", "layers/attention/v/{}")


def _read_gpt2(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the feed-forward width written out."""
    if settings.get("n_inner") is None and "n_embd" in settings:
        settings["n_inner"] = 4 * settings["n_embd"]
    return settings


def _read_neox(settings: dict[str, Any]) -> dict[str, Any]:
    old = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    moved = {new: settings[key] for new, key in old.items() if key in settings}
    return read_rope(moved | settings, fraction=0.25)


def _write_neox(settings: dict[str, Any]) -> dict[str, Any]:
    check_whole_heads(settings)
    settings = settings | {
        "rotary_emb_base": settings["rope_theta"],
        "rotary_pct": settings["partial_rotary_factor"],
    }
    return write_rope(settings)


# What both imply beyond the shape of their blocks.
_FIXED = {"num_kv_heads": None, "norm": "layernorm", "norm_bias": True, "mlp_bias": True}

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=(
        Tensor("transformer.wte.weight", "embed/embedding", "vd"),
        Tensor("transformer.wpe.weight", "positions/embedding", "td"),
        Tensor("transformer.h.{}.ln_1.weight", "layers/attention_norm/scale", "d"),
        Tensor("transformer.h.{}.ln_1.bias", "layers/attention_norm/bias", "d"),
        Tensor(
            "transformer.h.{}.attn.c_attn.weight",
            tuple(path.format("kernel") for path in _QKV),
            "dnh->d(+nh)",
        ),
        Tensor(
            "transformer.h.{}.attn.c_attn.bias",
            tuple(path.format("bias") for path in _QKV),
            "nh->(+nh)",
        ),
        Tensor("transformer.h.{}.attn.c_proj.weight", "layers/attention/out/kernel", "nhd->(nh)d"),
        Tensor("transformer.h.{}.attn.c_proj.bias", "layers/attention/out/bias", "d"),
        Tensor("transformer.h.{}.ln_2.weight", "layers/mlp_norm/scale", "d"),
        Tensor("transformer.h.{}.ln_2.bias", "layers/mlp_norm/bias", "d"),
        Tensor("transformer.h.{}.mlp.c_fc.weight", "layers/mlp/up/kernel", "df"),
        Tensor("transformer.h.{}.mlp.c_fc.bias", "layers/mlp/up/bias", "f"),
        Tensor("transformer.h.{}.mlp.c_proj.weight", "layers/mlp/down/kernel", "fd"),
        Tensor("transformer.h.{}.mlp.c_proj.bias", "layers/mlp/down/bias", "d"),
        Tensor("transformer.ln_f.weight", "final_norm/scale", "d"),
        Tensor("transformer.ln_f.bias", "final_norm/bias", "d"),
        Tensor("lm_head.weight", "head/kernel", "dv->vd"),
    ),
    settings=(
        Setting("vocab_size", "vocab_size"),
        Setting("max_seq_len", "n_positions", 1024),
        Setting("d_model", "n_embd"),
        Setting("num_layers", "n_layer"),
        Setting("num_heads", "n_head"),
        Setting("d_ff", "n_inner"),
        Setting("norm_eps", "layer_norm_epsilon", 1e-5),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("init_std", "initializer_range", 0.02),
        # One rate here, two there: the same number in every published model.
        Setting("dropout", "embd_pdrop", 0.1),
        Setting("dropout", "resid_pdrop", 0.1),
        Setting("attention_dropout", "attn_pdrop", 0.1),
    ),
    fixed=_FIXED | {"mlp": "gelu", "qkv_bias": True, "out_bias": True, "positions": "learned"},
    expected={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    spare=r"\.attn\.(masked_)?bias$",
    read=_read_gpt2,
)


_LAYER = "gpt_neox.layers.{}."

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    tensors=(
        Tensor("gpt_neox.embed_in.weight", "embed/embedding", "vd"),
        Tensor(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "d"),
        Tensor(_LAYER + "input_layernorm.bias", "layers/attention_norm/bias", "d"),
        Tensor(
            _LAYER + "attention.query_key_value.weight",
            tuple(path.format("kernel") for path in _QKV),
            "dnh->(n+h)d",
        ),
        Tensor(
            _LAYER + "attention.query_key_value.bias",
            tuple(path.format("bias") for path in _QKV),
            "nh->(n+h)",
        ),
        Tensor(_LAYER + "attention.dense.weight", "layers/attention/out/kernel", "nhd->d(nh)"),
        Tensor(_LAYER + "attention.dense.bias", "layers/attention/out/bias", "d"),
        Tensor(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "d"),
        Tensor(_LAYER + "post_attention_layernorm.bias", "layers/mlp_norm/bias", "d"),
        Tensor(_LAYER + "mlp.dense_h_to_4h.weight", "layers/mlp/up/kernel", "df->fd"),
        Tensor(_LAYER + "mlp.dense_h_to_4h.bias", "layers/mlp/up/bias", "f"),
        Tensor(_LAYER + "mlp.dense_4h_to_h.weight", "layers/mlp/down/kernel", "fd->df"),
        Tensor(_LAYER + "mlp.dense_4h_to_h.bias", "layers/mlp/down/bias", "d"),
        Tensor("gpt_neox.final_layer_norm.weight", "final_norm/scale", "d"),
        Tensor("gpt_neox.final_layer_norm.bias", "final_norm/bias", "d"),
        Tensor("embed_out.weight", "head/kernel", "dv->vd"),
    ),
    settings=(
        Setting("vocab_size", "vocab_size"),
        Setting("max_seq_len", "max_position_embeddings", 2048),
        Setting("d_model", "hidden_size"),
        Setting("num_layers", "num_hidden_layers"),
        Setting("num_heads", "num_attention_heads"),
        Setting("d_ff", "intermediate_size"),
        Setting("norm_eps", "layer_norm_eps", 1e-5),
        *rope.SETTINGS,
        Setting("rotary_fraction", "partial_rotary_factor", 0.25),
        Setting("parallel_residual", "use_parallel_residual", True),
        Setting("qkv_bias", "attention_bias", True),
        Setting("out_bias", "attention_bias", True),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("init_std", "initializer_range", 0.02),
        Setting("dropout", "hidden_dropout", 0.0),
        Setting("attention_dropout", "attention_dropout", 0.0),
    ),
    fixed=_FIXED | {"mlp": "gelu_exact"},
    expected={"hidden_act": "gelu"},
    prefix="gpt_neox.",
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    spare=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    read=_read_neox,
    write=_write_neox,
)
