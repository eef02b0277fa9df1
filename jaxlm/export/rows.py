"""The rows of a family's table: a tensor, a setting, and what is read of a tensor."""

import dataclasses
import math
import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row: their tensor, our parameter (several where theirs fuses them), the layout.

    Each `{}` in `theirs` counts along a leading dimension of ours, such as layers. `layout`
    spells the other dimensions, ours -> theirs, a letter each: brackets merge dimensions, and
    `+` marks the one along which fused parameters are joined. "dnh->(nh)d" flattens heads and
    transposes; "dnh->d(+nh)" puts query, key and value heads side by side. A 1 is a dimension of
    size one that ours lacks.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: str
    given: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Others of our parameters, and whether they are there, for the row to count."""

    def counts(self, ours: Container[str]) -> bool:
        """Whether it is a row of a model that has these parameters."""
        there = all((path in ours) == wanted for path, wanted in self.given.items())
        return there and self.parts[0] in ours

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths of our parameters."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def to_theirs(self, parts: list[np.ndarray]) -> np.ndarray:
        """Our parameters, one layer's, as their tensor."""
        split = [part.transpose(self.order) for part in parts]
        whole = split[0] if len(split) == 1 else np.concatenate(split, self._joined)
        return whole.reshape(self.shape([part.shape for part in parts]))

    def split(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Views of their tensor, one for each of our parameters, their dimensions in `order`."""
        split = self._split_shapes(shapes)
        ends = np.cumsum([shape[self._joined] for shape in split])
        return np.split(tensor.reshape(self._whole(split)), ends[:-1], self._joined)

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of their tensor, for our parameters' shapes."""
        sizes = iter(self._whole(self._split_shapes(shapes)))
        groups = re.findall(r"\(\w+\)|\w", self._spelt[1].replace("+", ""))
        return tuple(math.prod(next(sizes) for _ in group.strip("()1")) for group in groups)

    @property
    def _spelt(self) -> tuple[str, str]:
        ours, _, theirs = self.layout.partition("->")
        return ours, theirs or ours

    @property
    def order(self) -> tuple[int, ...]:
        """Our dimensions in the order in which theirs have them."""
        ours, theirs = self._spelt
        return tuple(ours.index(letter) for letter in re.sub(r"[()+1]", "", theirs))

    @property
    def _joined(self) -> int:
        """The dimension along which parts are joined, before dimensions are merged."""
        return max(re.sub(r"[()1]", "", self._spelt[1]).find("+"), 0)

    def _split_shapes(self, shapes):
        return [tuple(shape[i] for i in self.order) for shape in shapes]

    def _whole(self, split_shapes) -> tuple[int, ...]:
        whole = list(split_shapes[0])
        whole[self._joined] = sum(shape[self._joined] for shape in split_shapes)
        return tuple(whole)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: our field, their key, and what a config.json without the key means."""

    ours: str
    theirs: str
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of one of our parameters, as it lies in a tensor of theirs."""

    path: str
    index: tuple[int, ...]
    """Where in the parameter's leading dimensions: empty, (layer,) or (layer, expert)."""
    view: np.ndarray
    """The values, in their type; nothing is read from the disk before they are."""
    order: tuple[int, ...]
    """Which of our other dimensions each of the view's is."""
