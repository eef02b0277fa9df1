"""Model fields of well-known models, over the defaults of `ModelConfig`.

`vocab_size` is left to the tokenizer, and `max_seq_len` is the length of a training row: set
either to match a published checkpoint.
"""

_GPT2 = {
    "num_kv_heads": None,
    "max_seq_len": 1024,
    "mlp": "gelu",
    "norm": "layernorm",
    "norm_bias": True,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "positions": "learned",
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
_LLAMA3 = {"num_kv_heads": 8, "max_seq_len": 8192, "rope_theta": 500_000.0}
_LLAMA32_ROPE = {
    "kind": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}
_QWEN2 = {"max_seq_len": 4096, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN3 = {
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_seq_len": 4096,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": "head",
}
_GEMMA = {
    "head_dim": 256,
    "max_seq_len": 8192,
    "mlp": "geglu",
    "norm_eps": 1e-6,
    "norm_offset": 1.0,
    "scale_embeddings": True,
}
_GEMMA2 = _GEMMA | {
    "norm_placement": "pre_post",
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "sliding_window": 4096,
    "layer_pattern": ["local", "global"],
}
_GEMMA3 = _GEMMA | {
    "norm_placement": "pre_post",
    "qk_norm": "head",
    "rope_theta": 1e6,
    "rope_local_theta": 10_000.0,
    "layer_pattern": ["local"] * 5 + ["global"],
}
_BIASES = {"norm_bias": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
_TRANSFORMER = _BIASES | {
    "kind": "encoder_decoder",
    "num_kv_heads": None,
    "max_seq_len": 512,
    "mlp": "relu",
    "norm": "layernorm",
    "norm_placement": "post_sum",
    "positions": "sinusoidal",
    "scale_embeddings": True,
    "dropout": 0.1,
    "scale_residual_init": False,
}
_BERT = _BIASES | {
    "kind": "encoder",
    "num_kv_heads": None,
    "max_seq_len": 512,
    "mlp": "gelu_exact",
    "norm": "layernorm",
    "norm_eps": 1e-12,
    "norm_placement": "post_sum",
    "positions": "learned",
    "embedding_norm": True,
    "token_types": 2,
    "pooling": "first",
    "pooler": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "scale_residual_init": False,
}
_ROBERTA = _BERT | {"norm_eps": 1e-5, "position_offset": 2, "token_types": 1}


def _size(d_model: int, num_layers: int, num_heads: int, d_ff: int, **fields) -> dict:
    return {
        "d_model": d_model,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "d_ff": d_ff,
        **fields,
    }


PRESETS: dict[str, dict] = {
    "llama-tiny": {},  # the defaults themselves
    "gpt2-tiny": _GPT2 | _size(192, 4, 8, 768, max_seq_len=256, dropout=0.0, attention_dropout=0.0),
    "gpt2-124m": _GPT2 | _size(768, 12, 12, 3072),
    "gpt2-355m": _GPT2 | _size(1024, 24, 16, 4096),
    "gpt2-774m": _GPT2 | _size(1280, 36, 20, 5120),
    "gpt2-1.5b": _GPT2 | _size(1600, 48, 25, 6400),
    "llama2-7b": _size(
        4096, 32, 32, 11008, num_kv_heads=None, max_seq_len=4096, tie_embeddings=False
    ),
    "llama3-1b": _LLAMA3 | _size(2048, 16, 32, 8192, rope_scaling=_LLAMA32_ROPE),
    "llama3-3b": _LLAMA3 | _size(3072, 28, 24, 8192, rope_scaling=_LLAMA32_ROPE),
    "llama3-8b": _LLAMA3 | _size(4096, 32, 32, 14336, tie_embeddings=False),
    "llama3-70b": _LLAMA3 | _size(8192, 80, 64, 28672, tie_embeddings=False),
    "mistral-7b": _size(
        4096,
        32,
        32,
        14336,
        num_kv_heads=8,
        max_seq_len=8192,
        sliding_window=4096,
        layer_pattern=["local"],
        tie_embeddings=False,
    ),
    "qwen2-0.5b": _QWEN2 | _size(896, 24, 14, 4864, num_kv_heads=2),
    "qwen2-7b": _QWEN2 | _size(3584, 28, 28, 18944, num_kv_heads=4, tie_embeddings=False),
    "qwen3-0.6b": _QWEN3 | _size(1024, 28, 16, 3072),
    "qwen3-1.7b": _QWEN3 | _size(2048, 28, 16, 6144),
    "qwen3-8b": _QWEN3 | _size(4096, 36, 32, 12288, tie_embeddings=False),
    "mixtral-8x7b": _size(
        4096,
        32,
        32,
        14336,
        num_kv_heads=8,
        max_seq_len=8192,
        rope_theta=1e6,
        tie_embeddings=False,
        experts={"num_experts": 8, "top_k": 2},
    ),
    "qwen3-30b-a3b": _QWEN3
    | _size(
        2048,
        48,
        32,
        6144,
        num_kv_heads=4,
        tie_embeddings=False,
        experts={"num_experts": 128, "top_k": 8, "d_ff": 768, "balance_loss": 1e-3},
    ),
    "lstm-tiny": {"kind": "lstm", "d_model": 256, "num_layers": 2, "init_std": 0.05},
    # The medium model of Zaremba et al. (2014), whose weights are drawn from [-0.05, 0.05], with
    # the dropout of Gal and Ghahramani (2016).
    "lstm-medium": {
        "kind": "lstm",
        "d_model": 650,
        "num_layers": 2,
        "tie_embeddings": False,
        "logits_bias": True,
        "dropout": 0.35,
        "recurrent_dropout": 0.2,
        "word_dropout": 0.2,
        "init_std": 0.05 / 3**0.5,
    },
    "lstm-seq2seq-tiny": {
        "kind": "lstm",
        "d_model": 256,
        "num_layers": 2,
        "encoder_layers": 2,
        "source_attention": True,
        "init_std": 0.05,
    },
    "gemma-2b": _GEMMA | _size(2048, 18, 8, 16384, num_kv_heads=1),
    "gemma2-2b": _GEMMA2 | _size(2304, 26, 8, 9216, num_kv_heads=4, attention_scale=256**-0.5),
    "gemma3-1b": _GEMMA3 | _size(1152, 26, 4, 6912, num_kv_heads=1, sliding_window=512),
    # Deviations near d_model ** -0.5, with which scaled embeddings are as large as positions.
    "transformer-tiny": _TRANSFORMER | _size(256, 3, 4, 1024, max_seq_len=256, init_std=0.05),
    "transformer-base": _TRANSFORMER | _size(512, 6, 8, 2048, init_std=0.04),
    "marian-base": _TRANSFORMER | _size(512, 6, 8, 2048, mlp="silu", logits_bias=True),
    "t5-small": _size(
        512,
        6,
        8,
        2048,
        kind="encoder_decoder",
        num_kv_heads=None,
        max_seq_len=512,
        mlp="relu",
        norm_eps=1e-6,
        positions="relative",
        attention_scale=1.0,
        scale_logits=True,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "bert-tiny": _BERT | _size(128, 2, 2, 512),
    "bert-base": _BERT | _size(768, 12, 12, 3072),
    "roberta-base": _ROBERTA | _size(768, 12, 12, 3072),
    "minilm-l6": _BERT | _size(384, 6, 12, 1536, pooling="mean", pooler=False),
}
