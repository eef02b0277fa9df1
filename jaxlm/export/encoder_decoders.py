"""T5 and Marian, as transformers stores them: an encoder, and a decoder that attends to it."""

from typing import Any

from jaxlm.errors import UserError, nearest
from jaxlm.export.encoders import activation, activation_name, dense, norm
from jaxlm.export.rows import Setting, Tensor
from jaxlm.export.table import Family

# T5's names of feed-forward layers; "gelu" is exact where nothing gates it.
FEED_FORWARD = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "silu": "silu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
# Marian has one of each for either stack.
TWICE = ("attention_heads", "ffn_dim")


def _t5_stack(stack: str, ours: str) -> tuple[Tensor, ...]:
    """The rows of a stack; `ours` begins our names of its parameters."""
    block, layers = f"{stack}.block.{{}}.layer.", f"{ours}layers/"
    names = (("0.SelfAttention", "attention"), ("1.EncDecAttention", "cross_attention"))
    names = names[: 1 if ours else 2]
    rows = [
        Tensor(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{ours}relative_bias/embedding",
            "bn",
        ),
        Tensor(f"{stack}.final_layer_norm.weight", f"{ours}final_norm/scale", "d"),
    ]
    for i, (theirs, attention) in enumerate(names):
        rows += [
            *(
                Tensor(
                    f"{block}{theirs}.{name}.weight",
                    f"{layers}{attention}/{name}/kernel",
                    "dnh->(nh)d",
                )
                for name in "qkv"
            ),
            Tensor(f"{block}{theirs}.o.weight", f"{layers}{attention}/out/kernel", "nhd->d(nh)"),
            Tensor(f"{block}{i}.layer_norm.weight", f"{layers}{attention}_norm/scale", "d"),
        ]
    mlp = f"{block}{len(names)}.DenseReluDense."
    up, gate = f"{layers}mlp/up/kernel", f"{layers}mlp/gate/kernel"
    return (
        *rows,
        Tensor(f"{mlp}wi.weight", up, "df->fd", {gate: False}),
        Tensor(f"{mlp}wi_0.weight", gate, "df->fd"),
        Tensor(f"{mlp}wi_1.weight", up, "df->fd", {gate: True}),
        Tensor(f"{mlp}wo.weight", f"{layers}mlp/down/kernel", "fd->df"),
        Tensor(f"{block}{len(names)}.layer_norm.weight", f"{layers}mlp_norm/scale", "d"),
    )


def _read_t5(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with our name of the feed-forward layer, and `tied`.

    From T5 1.1 on the head is a matrix of its own. transformers 5 writes that it is tied all the
    same, and only that its input is not scaled.
    """
    mlp = settings.get("feed_forward_proj", "relu")
    if mlp not in FEED_FORWARD:
        raise UserError(
            f"config.json has feed_forward_proj={mlp!r}, but jaxlm computes "
            f"{', '.join(FEED_FORWARD)}{nearest(str(mlp), FEED_FORWARD)}"
        )
    unscaled = settings.get("scale_decoder_outputs") is False
    tied = settings.get("tie_word_embeddings", True) and not unscaled
    layers = settings.get("num_decoder_layers") or settings.get("num_layers")
    return settings | {
        "feed_forward_proj": FEED_FORWARD[mlp],
        "num_decoder_layers": layers,
        "tied": tied,
    }


def _write_t5(settings: dict[str, Any]) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in FEED_FORWARD.items()}
    settings = settings | {"feed_forward_proj": names[settings["feed_forward_proj"]]}
    return settings | {"tie_word_embeddings": settings.pop("tied")}


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    tensors=(
        Tensor("shared.weight", "embed/embedding", "vd"),
        *_t5_stack("encoder", "encoder_"),
        *_t5_stack("decoder", ""),
        Tensor("lm_head.weight", "head/kernel", "dv->vd"),
    ),
    settings=(
        Setting("vocab_size", "vocab_size"),
        # Distances are all it knows of positions; texts it was trained on had as many tokens.
        Setting("max_seq_len", "n_positions", 512),
        Setting("d_model", "d_model"),
        Setting("encoder_layers", "num_layers"),
        Setting("num_layers", "num_decoder_layers"),
        Setting("num_heads", "num_heads"),
        Setting("head_dim", "d_kv", 64),
        Setting("d_ff", "d_ff"),
        Setting("mlp", "feed_forward_proj"),
        Setting("norm_eps", "layer_norm_epsilon", 1e-6),
        Setting("relative_buckets", "relative_attention_num_buckets", 32),
        Setting("relative_max_distance", "relative_attention_max_distance", 128),
        Setting("tie_embeddings", "tied"),
        Setting("scale_logits", "tied"),
        Setting("dropout", "dropout_rate", 0.1),
    ),
    fixed={
        "kind": "encoder_decoder",
        "num_kv_heads": None,
        "positions": "relative",
        "attention_scale": 1.0,
    },
    expected={},
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    spare=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    read=_read_t5,
    write=_write_t5,
)


def _marian_stack(stack: str, ours: str) -> tuple[Tensor, ...]:
    layer, layers = f"model.{stack}.layers.{{}}.", f"{ours}layers/"
    names = (("self_attn", "attention"), ("encoder_attn", "cross_attention"))
    rows = [
        *dense(f"{layer}fc1", f"{layers}mlp/up", "df->fd"),
        *dense(f"{layer}fc2", f"{layers}mlp/down", "fd->df"),
        *norm(f"{layer}final_layer_norm", f"{layers}mlp_post_norm"),
    ]
    for theirs, attention in names[: 1 if ours else 2]:
        rows += [
            *dense(f"{layer}{theirs}.q_proj", f"{layers}{attention}/q", "dnh->(nh)d"),
            *dense(f"{layer}{theirs}.k_proj", f"{layers}{attention}/k", "dnh->(nh)d"),
            *dense(f"{layer}{theirs}.v_proj", f"{layers}{attention}/v", "dnh->(nh)d"),
            *dense(f"{layer}{theirs}.out_proj", f"{layers}{attention}/out", "nhd->d(nh)"),
            *norm(f"{layer}{theirs}_layer_norm", f"{layers}{attention}_post_norm"),
        ]
    return tuple(rows)


def _read_marian(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with one of what both stacks have alike, and our name of the activation."""
    for name in TWICE:
        both = [key for key in (f"encoder_{name}", f"decoder_{name}") if key in settings]
        if len({settings[key] for key in both}) > 1:
            sizes = " and ".join(f"{key}={settings[key]}" for key in both)
            raise UserError(
                f"config.json has {sizes}, but jaxlm's encoder-decoders have the same in both"
            )
    vocabulary = settings.get("decoder_vocab_size")
    if vocabulary is not None and settings.get("vocab_size", vocabulary) != vocabulary:
        raise UserError(
            f"config.json has decoder_vocab_size={vocabulary}, but jaxlm's encoder-decoders have "
            "one vocabulary for both sides"
        )
    name = activation(settings, "activation_function")
    return settings | {"activation_function": name}


def _write_marian(settings: dict[str, Any]) -> dict[str, Any]:
    name = activation_name(settings["activation_function"], settings["model_type"])
    settings = settings | {"activation_function": name}
    return settings | {"decoder_vocab_size": settings["vocab_size"]}


MARIAN = Family(
    model_type="marian",
    architecture="MarianMTModel",
    tensors=(
        Tensor("model.shared.weight", "embed/embedding", "vd"),
        *_marian_stack("encoder", "encoder_"),
        *_marian_stack("decoder", ""),
        Tensor("final_logits_bias", "head/bias", "v->1v"),
    ),
    settings=(
        Setting("vocab_size", "vocab_size"),
        Setting("max_seq_len", "max_position_embeddings", 1024),
        Setting("d_model", "d_model"),
        Setting("encoder_layers", "encoder_layers"),
        Setting("num_layers", "decoder_layers"),
        Setting("num_heads", "encoder_attention_heads"),
        Setting("num_heads", "decoder_attention_heads"),
        Setting("d_ff", "encoder_ffn_dim"),
        Setting("d_ff", "decoder_ffn_dim"),
        Setting("mlp", "activation_function"),
        Setting("scale_embeddings", "scale_embedding", False),
        Setting("logits_bias", "add_bias_logits", True),
        Setting("init_std", "init_std", 0.02),
        Setting("dropout", "dropout", 0.1),
        Setting("attention_dropout", "attention_dropout", 0.0),
    ),
    fixed={
        "kind": "encoder_decoder",
        "num_kv_heads": None,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "post_sum",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "sinusoidal",
    },
    expected={
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
    },
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    # Older configurations say that there is none where there is.
    optional={"final_logits_bias": "add_bias_logits"},
    spare=r"embed_positions\.weight$",
    read=_read_marian,
    write=_write_marian,
)
