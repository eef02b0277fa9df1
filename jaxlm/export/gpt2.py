"""GPT-2, as transformers' GPT2LMHeadModel stores it: matrices input first, q, k and v fused."""

from typing import Any

from jaxlm.export.table import Family, Setting, Tensor

_QKV = ("layers/attention/q/{}", "layers/attention/k/{}", "layers/attention/v/{}")


def _read(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the feed-forward width written out."""
    if settings.get("n_inner") is None and "n_embd" in settings:
        settings["n_inner"] = 4 * settings["n_embd"]
    return settings


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
    fixed={
        "num_kv_heads": None,
        "mlp": "gelu",
        "norm": "layernorm",
        "norm_bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
    },
    expected={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    buffers=r"\.attn\.(masked_)?bias$",
    read=_read,
)
