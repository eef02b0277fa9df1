"""What is exported, and what it is for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxlm.model_config import ModelConfig
from jaxlm.tokenizer import Tokenizer

Use = Literal["language_model", "translator", "classifier", "encoder"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is exported."""

    name: str
    config: ModelConfig
    params: object
    """Stacked, in logical shapes."""
    tokenizer: Tokenizer
    prefix: list[int]
    """Ids that every text starts with; of a translator those of a source."""
    facts: Mapping[str, Any]
    """Figures for the model card, by name."""
    suffix: list[int] = dataclasses.field(default_factory=list)
    """Ids that every text ends with; none of a language model."""

    @property
    def use(self) -> Use:
        """What it is for, which decides how another stack loads and runs it."""
        if self.config.labels is not None:
            return "classifier"
        uses = {"encoder": "encoder", "encoder_decoder": "translator"}
        return uses.get(self.config.kind, "language_model")


def text_ends(config: ModelConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and behind the texts that a model was trained to read."""
    if config.kind == "encoder_decoder":
        return [], [tokenizer.eos_id]
    whole = config.kind == "encoder" or config.labels is not None
    return tokenizer.ends if whole else ([tokenizer.bos_id], [])
