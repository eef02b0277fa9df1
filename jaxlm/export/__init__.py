"""Models of other stacks, read and written: one table per family of Hugging Face transformers."""

from jaxlm.export.families import FAMILIES, family_for, family_of
from jaxlm.export.table import Family

__all__ = ["FAMILIES", "Family", "family_for", "family_of"]
