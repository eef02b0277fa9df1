"""The families that llama.cpp runs: what it takes for granted of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

# Other names of settings, in other families or older files.
ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "num_experts": "num_local_experts",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
# Settings that are written as they are: the writer's method for each.
METADATA = {
    "vocab_size": "add_vocab_size",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "use_parallel_residual": "add_parallel_residual",
    "num_local_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How llama.cpp holds one family, and how far it goes."""

    arch: str
    """The member of `gguf.MODEL_ARCH`."""
    expected: Mapping[str, Any]
    """Settings that must have this value where they are given."""
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a config.json without a setting means."""
    biases: str = r"(?!)"
    """A pattern of the biases that llama.cpp adds."""
    rope: bool = True
    pairs: bool = False
    """Rotates neighbours, not halves: rows of q and k are interleaved. Takes llama3 scaling."""
    partial: bool = False
    """May rotate a part of each head."""
    square: bool = False
    """Heads together are as wide as the model."""
    head: Literal["any", "tied", "stored"] = "any"
    """Whether the head must be the embedding, or is stored even if it is."""
    shift: float = 0.0
    """What transformers adds to norm weights and llama.cpp does not."""
    period: int = 0
    """Every so many layers one is global, the others see a window; 0 where llama.cpp has none."""
    rescaled: int = 0
    """Number of layers by which llama.cpp knows the one model with another attention scale."""


_SILU, _GELU = {"hidden_act": "silu"}, {"hidden_act": "gelu_pytorch_tanh"}
_TIED = {"tie_word_embeddings": True}
_ALL = {"use_sliding_window": False}
LLAMA = Layout("LLAMA", _SILU, pairs=True, biases=r"\.bias$")
FAMILIES = {
    "gpt2": Layout(
        "GPT2",
        {
            "hidden_act": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
        _TIED,
        biases=r"\.bias$",
        rope=False,
        square=True,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Layout("QWEN2", _SILU, _ALL, biases=r"\.self_attn\.[qkv]_proj\.bias$", square=True),
    "qwen3": Layout("QWEN3", _SILU, _ALL),
    "qwen3_moe": Layout(
        "QWEN3MOE",
        _SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _ALL | {"norm_topk_prob": False},
    ),
    "gemma": Layout("GEMMA", _GELU, _TIED, head="tied", shift=1.0),
    "gemma2": Layout("GEMMA2", _GELU, _TIED, head="tied", shift=1.0, period=2, rescaled=46),
    "gemma3_text": Layout(
        "GEMMA3",
        _GELU | {"attn_logit_softcapping": None},
        _TIED | {"rope_local_base_freq": 10_000.0},
        shift=1.0,
        period=6,
        rescaled=62,
    ),
    "olmo2": Layout("OLMO2", _SILU, square=True, head="stored"),
    "phi3": Layout("PHI3", _SILU, partial=True, square=True),
    # llama.cpp approximates gelu by the hyperbolic tangent here too.
    "gpt_neox": Layout(
        "GPTNEOX",
        {"hidden_act": "gelu", "attention_bias": True},
        {"use_parallel_residual": True},
        biases=r"\.bias$",
        partial=True,
        square=True,
        head="stored",
    ),
}
