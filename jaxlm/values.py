"""Types of the experiment's values: their ranges, and what may stand for them."""

import os
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("at least 0 and less than 1")
    return value


Fraction = Annotated[float, AfterValidator(_below_one)]


def as_tuple(value):
    """Let YAML's lists, and a single value, stand for a tuple."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def as_names(value):
    """`as_tuple`, without empty names: as a path, one would be the current folder."""
    names = as_tuple(value)
    if isinstance(names, tuple) and "" in names:
        raise ValueError("names, none of them empty")
    return names


def as_numbers(value):
    """`as_tuple`, and a better word about text than that it is no number."""
    if isinstance(value, str):
        raise ValueError("a number, or several such as [3,1]")
    return as_tuple(value)


def as_text(value):
    """Let a number stand for its digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_path(value):
    """Expand `~`, so that the config that a run keeps says where its files are."""
    if value == "":
        raise ValueError("a path; leave it out for none")
    return os.path.expanduser(value) if isinstance(value, str) else value


MAX_SEED = 2**32 - 1  # what NumPy's and JAX's generators take

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
PathText = Annotated[str, BeforeValidator(as_path)]
Text = Annotated[str, BeforeValidator(as_text), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
Weights = Annotated[tuple[Positive, ...], BeforeValidator(as_numbers)]
