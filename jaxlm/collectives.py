"""What a compiled program sends between devices: its collectives, by kind, bytes and mesh axes.

Read from the text of the compiled program (`jax.stages.Compiled.as_text()`), after partitioning and
optimisation: what stands there is what runs. Which collectives form depends on the backend: XLA's
CPU compiler writes a reduce-scatter as an all-reduce of which every device keeps its part.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
UNKNOWN = "?"

_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([^\s,]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^\s,]+))"
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA_GROUPS = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_MESH_GROUPS = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    """One of `KINDS`; one that starts here and ends elsewhere is the same as one that waits."""
    bytes: int
    """Of one execution, for one device: what it gives or what it gets, whichever is larger. An
    all-gather's result, a reduce-scatter's operand, the one size of the others."""
    count: int
    """Executions in one run of the program: the trip counts of the loops around it, multiplied.
    A loop of unknown length counts once."""
    axes: tuple[str, ...]
    """Mesh axes along which the devices that take part together differ, outermost first;
    (`UNKNOWN`,) where the program's text does not tell."""
    is_exact: bool
    """All loops around it have known lengths and no conditional is around it: else `count` is of
    one pass of such loops, as if every branch were taken."""
    op_name: str
    """The operation of the traced program it serves, as a path."""

    @property
    def total(self) -> int:
        """Bytes of all executions, for one device."""
        return self.bytes * self.count


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    is_exact: bool


def collectives(compiled_text: str, mesh: Mesh) -> list[Collective]:
    """Every collective that moves data between devices, in the order of the program's text.

    `compiled_text` is HLO compiled for `mesh`: its devices are numbered as they stand in the mesh.
    """
    computations, entry = _read(compiled_text)
    found = []

    def visit(name: str, count: int, is_exact: bool):
        for instruction in computations.get(name, ()):
            kind = instruction.op.removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, instruction, mesh, count, is_exact))
            elif instruction.op == "while":
                trips = _trip_count(instruction, computations)
                for called in re.findall(r"\b(?:condition|body)=%?([^\s,]+)", instruction.rest):
                    visit(called, count * (trips or 1), is_exact and trips is not None)
            elif instruction.op == "conditional":
                for several, one in _BRANCHES.findall(instruction.rest):
                    for branch in (several or one).split(","):
                        visit(branch.strip().removeprefix("%"), count, False)
            elif instruction.op in ("call", "fusion", "async-start"):
                for called in _CALLED.findall(instruction.rest):
                    visit(called, count, is_exact)

    visit(entry, 1, True)
    return [c for c in found if c.axes]


def summarise(found: Iterable[Collective]) -> list[Traffic]:
    """Collectives added up by kind and mesh axes, those with most bytes first."""
    groups: dict[tuple, list[Collective]] = {}
    for collective in found:
        groups.setdefault((collective.kind, collective.axes), []).append(collective)
    rows = [
        Traffic(
            kind,
            axes,
            count=sum(c.count for c in group),
            bytes=sum(c.total for c in group),
            is_exact=all(c.is_exact for c in group),
        )
        for (kind, axes), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str
    """Operands and attributes."""


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of every computation, and the name of the entry. Raises ValueError."""
    computations, entry, current = {}, None, []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return computations, entry


def _collective(kind, instruction: _Instruction, mesh: Mesh, count: int, is_exact: bool):
    groups = list(_groups(instruction.rest, mesh))
    size = max((len(group) for group in groups), default=0)
    op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
        kind=kind,
        bytes=_payload(kind, instruction, size),
        count=count,
        axes=_axes(groups, mesh) if groups else (UNKNOWN,),
        is_exact=is_exact,
        op_name=op_name[1].removeprefix("jit(traced)/") if op_name else "",
    )


def _payload(kind: str, instruction: _Instruction, size: int) -> int:
    arrays = [array for array in _ARRAY.findall(instruction.shape) if array[0] != "token"]
    is_start = instruction.op.endswith("-start")
    if is_start and kind == "collective-permute":
        # (operand, result, two numbers of the runtime's)
        arrays = [a for a in arrays if a != ("u32", "")]
    held = sum(_bytes(dtype, dims) for dtype, dims in arrays)
    if kind == "reduce-scatter":
        return held * max(size, 1)
    if is_start and kind == "all-gather":
        return held * size // (size + 1)  # operands stand beside the results, 1 / size of them
    if is_start and kind != "all-reduce":
        return held // 2  # operands stand beside the results
    return held


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8
    return -(-math.prod(int(n) for n in dims.split(",") if n) * bits // 8)


def _trip_count(loop: _Instruction, computations) -> int | None:
    """How often a loop runs: as the compiler notes it, or as JAX's loops from zero end."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([^\s,]+)", loop.rest)
    instructions = list(computations.get(condition[1], ())) if condition else []
    for called in [name for i in instructions for name in _CALLED.findall(i.rest)]:
        instructions += computations.get(called, ())
    compares = [i for i in instructions if i.op == "compare"]
    limits = [i for i in instructions if i.op == "constant"]
    if len(compares) == len(limits) == 1 and "direction=LT" in compares[0].rest:
        number = re.match(r"(\d+)\)", limits[0].rest)
        return int(number[1]) if number else None
    return None


def _groups(attributes: str, mesh: Mesh) -> Iterator[list[int]]:
    """Numbers of the devices that take part together, a list for each group."""
    if match := _PAIRS.search(attributes):
        yield from _listed(match[1])
    elif match := _IOTA_GROUPS.search(attributes):
        yield from _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    elif match := _MESH_GROUPS.search(attributes):
        yield from _along(match[1], match[2], match[3])
    elif match := _LISTED_GROUPS.search(attributes):
        yield from _listed(match[1]) if match[1] else [list(range(mesh.size))]


def _listed(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n.strip()]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """0, 1, ... in an array of these dimensions, transposed."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _along(sizes: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """Groups along axes of the compiler's own mesh: `'a'=2,'b'=4` with `'b'`, or `'b':(2)2` for a
    part of an axis: the two neighbours at distance 4 / (2 * 2).
    """
    named = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    order = re.fullmatch(_IOTA, device_ids or "")
    ids = _iota(*order.groups()).reshape(-1) if order else np.array(_numbers(device_ids))
    if not device_ids:
        ids = np.arange(math.prod(named.values()))
    dims, chosen = [], []
    parts = {
        name: (int(before), int(size)) if size else (1, named[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in named.items():
        before, part = parts.get(name, (size, 1))
        chosen.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    others = [dim for dim in range(len(dims)) if dim not in chosen]
    width = math.prod(dims[dim] for dim in chosen)
    return ids.reshape(dims).transpose(others + chosen).reshape(-1, width).tolist()


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ."""
    shape = tuple(mesh.shape.values())
    varying = set()
    for group in groups:
        places = np.array(np.unravel_index(group, shape))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axis for i, axis in enumerate(mesh.shape) if i in varying)
