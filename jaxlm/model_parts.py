"""Parts of a model that have fields of their own. Imports no JAX."""

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from jaxlm.errors import UserError, check_read, needs
from jaxlm.values import Count, Natural, NonNegative, Positive

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, config=STRICT)
class RopeScaling:
    """How rotary frequencies are stretched to contexts longer than those first trained on."""

    kind: Literal["linear", "llama3"] = "linear"
    """`linear` divides every frequency by `factor`; `llama3` only the low ones, with a ramp."""
    factor: Positive = 1.0
    """By how much low frequencies are divided."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above original_max_seq_len / this are divided in full."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below original_max_seq_len / this are left alone."""
    original_max_seq_len: Count = 8192
    """llama3: the context length before scaling."""

    def __post_init__(self):
        llama3 = needs("model.rope_scaling", self, "kind", "llama3")
        check_read(
            "model.rope_scaling",
            self,
            low_freq_factor=llama3,
            high_freq_factor=llama3,
            original_max_seq_len=llama3,
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}: raise it, or lower the other"
            )


@dataclass(frozen=True, config=STRICT)
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward layer: Mixtral, Qwen3-MoE, DeepSeek."""

    num_experts: Count = 8
    """Experts the router chooses among."""
    top_k: Count = 2
    """Experts a token goes to."""
    d_ff: Count | None = None
    """Width of an expert; null: model.d_ff."""
    d_shared: Natural = 0
    """Width of the shared expert, which every token goes to; 0: there is none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: over all experts, or each alone (DeepSeek-V3)."""
    normalize: bool = True
    """Divide the chosen experts' scores by their sum."""
    scale: Positive = 1.0
    """Factor on the chosen experts' weights (DeepSeek)."""
    balance_loss: NonNegative = 0.01
    """Weight of the load-balancing loss, taken over each row (Fedus et al., 2021)."""
    router_z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser of router logits (Zoph et al., 2022)."""
    bias_rate: NonNegative = 0.0
    """Step of a bias per expert, against its load, that only choosing sees (Wang et al., 2024)."""
    capacity: Positive | None = None
    """Places per expert in each row, as a multiple of the even share; the tokens beyond are dropped
    and counted; null: no limit, and no token is ever dropped."""

    def __post_init__(self):
        if self.top_k > self.num_experts:
            raise UserError(
                f"model.experts.top_k={self.top_k} is more than model.experts.num_experts="
                f"{self.num_experts}: use {self.num_experts} or less"
            )
