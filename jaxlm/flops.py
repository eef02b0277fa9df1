"""Arithmetic of a training step, and how much of it a device can do."""

from jaxlm.model_config import ModelConfig

# Dense bfloat16 FLOP/s of a device by the makers' data sheets, keyed by JAX's device kind.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def training_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    frozen: bool = False,
    causal: bool = False,
    predicted: float = 1.0,
) -> float:
    """FLOPs of forward and backward per token, as PaLM counts them (Chowdhery et al., 2022).

    Six for every weight of a matrix product (the head's, never the embedding lookup's) and
    attention in full, or, `causal`, without the half that a decoder masks. An encoder-decoder's are
    those per token of a target whose source is as long. Four for every weight where those are
    `frozen`: they get no gradient, and adapters beside them are too few to count. The head's count
    for the share of tokens that is `predicted`.
    """
    c = config
    if c.is_recurrent:
        return _recurrent_flops_per_token(c, seq_len)
    heads = c.d_model * c.head_size * (2 * c.num_heads + 2 * c.kv_heads)
    width = c.d_ff
    if c.experts is not None:  # of experts, those that a token goes to
        width = c.experts.top_k * (c.experts.d_ff or c.d_ff) + c.experts.d_shared
    feed_forward = c.d_model * width * (3 if c.is_gated else 2)
    if c.experts is not None:
        feed_forward += c.d_model * c.experts.num_experts
    attentions = c.num_layers
    layers = c.num_layers * (heads + feed_forward)
    if c.kind == "encoder_decoder":  # the encoder, and attention to it
        attentions += c.source_layers + c.num_layers
        layers += c.source_layers * (heads + feed_forward) + c.num_layers * heads
    head = c.d_model * (c.vocab_size if c.labels is None else len(c.labels))
    if c.pooler and c.labels is not None:
        head += c.d_model**2
    weights = (4.0 if frozen else 6.0) * (layers + predicted * head)
    attended = 12 * attentions * c.num_heads * c.head_size * seq_len
    return weights + (attended / 2 if causal else attended)


def _recurrent_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """As above; a source is as long as its target."""
    c = config
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[c.kind]
    layers = c.num_layers + (c.encoder_layers or 0)
    weights = layers * 2 * gates * c.d_model**2 + c.d_model * c.vocab_size
    attended = 12 * c.d_model * (seq_len + c.d_model) if c.source_attention else 0
    return 6.0 * weights + attended


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known for this kind and type."""
    return PEAK_FLOPS.get(device_kind) if dtype == "bfloat16" else None
