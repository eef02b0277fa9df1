"""Checkpoints of Hugging Face transformers: one table per family, read in both directions."""

from jaxlm.errors import UserError, nearest
from jaxlm.export.gpt2 import GPT2
from jaxlm.export.llama import LLAMA
from jaxlm.export.table import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, GPT2)}


def family_of(settings: dict) -> Family:
    """The family that a config.json names. Raises UserError for one without a table."""
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type={model_type!r}, for which jaxlm has no table"
            f"{nearest(str(model_type), FAMILIES)} (it has {', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type]
