"""A picture of which part of which array each device of a mesh holds, from the real shardings."""

import dataclasses
from collections.abc import Sequence
from xml.sax.saxutils import escape

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxlm.axes import format_mesh
from jaxlm.sharding import make_layout, mesh_axes, path_name

CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, HEAD_HEIGHT, GAP = 76, 44, 190, 60, 7
FILL, EMPTY, LINE, TEXT, FAINT = "#2f6fb5", "#eef1f5", "#c3cad4", "#1d2733", "#5d6b7a"


# Parameters worth a row: one of each kind of layout.
SHOWN = (
    "embed/embedding",
    "layers/attention/q/kernel",
    "layers/attention/out/kernel",
    "layers/mlp/up/kernel",
    "layers/mlp/down/kernel",
    "layers/mlp_norm/scale",
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One array of the picture."""

    name: str
    shape: tuple[int, ...]
    """[panels, height, width], or [height, width]."""
    labels: tuple[str, ...]
    """What the dimensions are."""
    sharding: Sharding


def picture(params, axes, batch: tuple[int, int], mesh: Mesh) -> str:
    """An SVG of a model's arrays on a mesh.

    `params` are ShapeDtypeStructs in logical shapes, `axes` their logical axes, `batch` is (rows,
    tokens in a row).
    """
    layout = make_layout(params, axes, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(layout.stored)
    names = jax.tree.structure(params).flatten_up_to(axes)
    parameters = {path_name(p): (leaf, n) for (p, leaf), n in zip(leaves, names, strict=True)}
    arrays = [_parameter(name, *parameters[name], mesh) for name in SHOWN if name in parameters]
    for name, dims in (
        ("tokens", ("batch", "length")),
        ("hidden states, in a layer", ("batch", "length")),
        ("hidden states, between", ("batch", "residual_length")),
    ):
        # In the pipeline, every stage sees every row in its turn.
        sharding = NamedSharding(mesh, mesh_axes(dims, omit=frozenset({"pp"})))
        arrays.append(Drawn(name, batch, ("rows", "tokens"), sharding))
    return draw(
        "blue is what a device holds; moments of the optimiser lie as their parameters do",
        mesh,
        arrays,
    )


def _parameter(name: str, leaf, axes, mesh: Mesh) -> Drawn:
    """At most three of its dimensions: layers, and those that the mesh splits."""
    spec = leaf.sharding.spec
    is_split = [
        any(mesh.shape[a] > 1 for a in ((e,) if isinstance(e, str) else e or ())) for e in spec
    ]
    first = [0] if axes[0] == "layers" else []
    others = [i for i in range(len(axes)) if i not in first]
    chosen = sorted(sorted(others, key=lambda i: (not is_split[i], i))[:2])
    dims = first + chosen
    shape = [leaf.shape[i] for i in dims]
    entries, labels = [spec[i] for i in dims], [axes[i] or "head" for i in dims]
    if len(chosen) == 1:  # a vector is drawn as a row of one
        place = len(first)
        shape.insert(place, 1), entries.insert(place, None), labels.insert(place, "")
    sharding = NamedSharding(mesh, PartitionSpec(*entries))
    return Drawn(name.removesuffix("/kernel"), tuple(shape), tuple(labels), sharding)


def draw(title: str, mesh: Mesh, arrays: Sequence[Drawn]) -> str:
    """An SVG: a column for each device, a row for each array, what the device holds filled in."""
    devices = list(mesh.devices.flat)
    width = LABEL_WIDTH + len(devices) * CELL_WIDTH + GAP
    height = HEAD_HEIGHT + 26 + len(arrays) * CELL_HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(GAP, 18, f"--mesh={format_mesh(dict(mesh.shape))}", size=14, weight="bold"),
        _text(GAP, 36, title, color=FAINT),
    ]
    for column, coordinates in enumerate(_coordinates(mesh)):
        x = LABEL_WIDTH + column * CELL_WIDTH
        parts.append(_text(x + GAP, HEAD_HEIGHT + 2, f"device {column}", weight="bold"))
        parts.append(_text(x + GAP, HEAD_HEIGHT + 16, coordinates, size=10, color=FAINT))
    for row, array in enumerate(arrays):
        y = HEAD_HEIGHT + 24 + row * CELL_HEIGHT
        named = zip(array.shape, array.labels, strict=True)
        dims = " × ".join(f"{n} {label}" for n, label in named if label)
        parts.append(_text(GAP, y + 18, array.name, weight="bold"))
        parts.append(_text(GAP, y + 33, dims, size=10, color=FAINT))
        held = array.sharding.devices_indices_map(array.shape)
        for column, device in enumerate(devices):
            parts += _cell(LABEL_WIDTH + column * CELL_WIDTH, y, array.shape, held[device])
    return "\n".join([*parts, "</svg>"]) + "\n"


def stack_pictures(pictures: Sequence[str]) -> str:
    """Pictures below one another in one."""
    sizes = [_size(picture) for picture in pictures]
    width, height = max(w for w, _ in sizes), sum(h for _, h in sizes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    y = 0
    for picture, (_, size) in zip(pictures, sizes, strict=True):
        parts.append(picture.replace("<svg ", f'<svg y="{y}" ', 1).rstrip())
        y += size
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: float, y: float, shape: tuple[int, ...], index: tuple[slice, ...]) -> list[str]:
    """The array's outline, its panels beside one another, and the part of `index` filled."""
    panels, index = (shape[0], index) if len(shape) == 3 else (1, (slice(None), *index))
    held = range(panels)[index[0]]
    panel_width = (CELL_WIDTH - 2 * GAP - 2 * (panels - 1)) / panels
    panel_height = CELL_HEIGHT - 2 * GAP
    parts = []
    for panel in range(panels):
        left, top = x + GAP + panel * (panel_width + 2), y + GAP
        parts.append(_rectangle(left, top, panel_width, panel_height, EMPTY, LINE))
        if panel in held:
            rows, columns = (_share(s, n) for s, n in zip(index[1:], shape[-2:], strict=True))
            parts.append(
                _rectangle(
                    left + columns[0] * panel_width,
                    top + rows[0] * panel_height,
                    (columns[1] - columns[0]) * panel_width,
                    (rows[1] - rows[0]) * panel_height,
                    FILL,
                )
            )
    return parts


def _share(part: slice, size: int) -> tuple[float, float]:
    start, stop, _ = part.indices(size)
    return start / size, stop / size


def _coordinates(mesh: Mesh) -> list[str]:
    """Each device's place, such as `dp0 tp1`, along the axes that are used."""
    names = [axis for axis, n in mesh.shape.items() if n > 1]
    indices = jax.tree.map(int, [*_indices(tuple(mesh.shape.values()))])
    used = [i for i, n in enumerate(mesh.shape.values()) if n > 1]
    return [
        " ".join(f"{name}{index[i]}" for name, i in zip(names, used, strict=True))
        for index in indices
    ]


def _indices(sizes: tuple[int, ...]):
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in _indices(sizes[1:]):
            yield (first, *rest)


def _size(picture: str) -> tuple[int, int]:
    box = picture.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    return int(box[0]), int(box[1])


def _rectangle(x, y, width, height, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def _text(x, y, text: str, size: int = 12, weight: str = "normal", color: str = TEXT) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}">'
        f"{escape(text)}</text>"
    )
