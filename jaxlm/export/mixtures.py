"""Mixtures of experts, as transformers stores them: Mixtral and Qwen3-MoE."""

import dataclasses
from typing import Any

from jaxlm.errors import UserError
from jaxlm.export import rope, windows
from jaxlm.export.llama import (
    ATTENTION,
    BIAS,
    ENDS,
    LAYER,
    LLAMA,
    MISTRAL,
    PRE_NORMS,
    QK_NORMS,
    QWEN2,
    QWEN3,
    STRICT_SIZES,
    UNTIED,
    read_qwen,
)
from jaxlm.export.rows import Setting, Tensor


def _experts(names: str) -> tuple[Tensor, ...]:
    """Rows of the experts' matrices, which each layer has a number of."""
    gate, up, down = (LAYER + name for name in names.split())
    return (
        Tensor(gate, "layers/mlp/gate/kernel", "df->fd"),
        Tensor(up, "layers/mlp/up/kernel", "df->fd"),
        Tensor(down, "layers/mlp/down/kernel", "fd->df"),
    )


def _read_mixtral(settings: dict[str, Any]) -> dict[str, Any]:
    return windows.read_all_alike(rope.read_rope({"rope_theta": 1_000_000.0} | settings))


def _read_qwen3_moe(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            "config.json leaves some layers without experts (mlp_only_layers, "
            "decoder_sparse_step), but jaxlm's mixtures have them in every layer"
        )
    # transformers 5 writes the second name, everyone else the first.
    count = settings.get("num_experts", settings.get("num_local_experts", 128))
    return read_qwen(settings) | {"num_experts": count, "num_local_experts": count}


MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors=(
        *ENDS,
        *ATTENTION,
        *PRE_NORMS,
        Tensor(LAYER + "block_sparse_moe.gate.weight", "layers/mlp/router/kernel", "de->ed"),
        *_experts(
            "block_sparse_moe.experts.{}.w1.weight block_sparse_moe.experts.{}.w3.weight "
            "block_sparse_moe.experts.{}.w2.weight"
        ),
    ),
    settings=(
        *STRICT_SIZES,
        *rope.SETTINGS,
        *windows.SETTINGS,
        UNTIED,
        Setting("experts.num_experts", "num_local_experts", 8),
        Setting("experts.top_k", "num_experts_per_tok", 2),
        Setting("experts.d_ff", "intermediate_size"),
        Setting("experts.balance_loss", "router_aux_loss_coef", 0.001),
    ),
    read=_read_mixtral,
)
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=(
        *ENDS,
        *ATTENTION,
        *PRE_NORMS,
        *QK_NORMS,
        Tensor(LAYER + "mlp.gate.weight", "layers/mlp/router/kernel", "de->ed"),
        *_experts(
            "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight "
            "mlp.experts.{}.down_proj.weight"
        ),
    ),
    settings=(
        *QWEN2.settings,
        *BIAS,
        Setting("experts.num_experts", "num_experts"),
        Setting("experts.num_experts", "num_local_experts"),
        Setting("experts.top_k", "num_experts_per_tok", 8),
        Setting("experts.d_ff", "moe_intermediate_size", 768),
        Setting("experts.normalize", "norm_topk_prob", False),
        Setting("experts.balance_loss", "router_aux_loss_coef", 0.001),
    ),
    expected=LLAMA.expected | {"decoder_sparse_step": 1},
    read=_read_qwen3_moe,
)
