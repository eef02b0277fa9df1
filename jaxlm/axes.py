"""The mesh's axes, and the text that names them: `dp4,tp2`."""

from jaxlm.errors import UserError, nearest

# The mesh's order, outermost first: what communicates least comes first, tp innermost.
MESH_AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")
OPEN = -1


def parse_mesh(text: str) -> dict[str, int]:
    """Read `dp4,tp2` into a size per axis of `MESH_AXES`; unnamed axes are 1, an open one `OPEN`.

    Raises UserError for an unknown axis, a size that is not a positive number, an axis named
    twice, and more than one open axis.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    named = []
    for part in text.split(","):
        axis = part.strip().rstrip("0123456789")
        digits = part.strip()[len(axis) :]
        if axis not in MESH_AXES:
            raise UserError(
                f"mesh={text!r}: {part.strip()!r} is not an axis and its size; write "
                f"AXISn[,AXISn...] with axes {', '.join(MESH_AXES)}, such as dp4,tp2"
                f"{nearest(axis, MESH_AXES)}"
            )
        if axis in named:
            raise UserError(f"mesh={text!r} names axis {axis!r} twice: name it once")
        if digits and int(digits) == 0:
            raise UserError(f"mesh={text!r}: axis {axis!r} has size 0: use at least 1")
        named.append(axis)
        sizes[axis] = int(digits) if digits else OPEN
    open_axes = [axis for axis in MESH_AXES if sizes[axis] == OPEN]
    if len(open_axes) > 1:
        raise UserError(
            f"mesh={text!r} leaves {' and '.join(open_axes)} open, but only one axis can take "
            f"what is left: give {open_axes[0]} a size"
        )
    return sizes


def format_mesh(sizes: dict[str, int]) -> str:
    """The shortest text that `parse_mesh` reads back to `sizes`."""
    parts = [
        axis + ("" if n == OPEN else str(n)) for axis, n in sizes.items() if n != 1 or n == OPEN
    ]
    return ",".join(parts) or "dp1"
