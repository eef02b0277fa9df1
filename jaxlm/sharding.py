"""Where every array lies: one table from logical axes to mesh axes.

A parameter names its logical axes once, where it is made; activations name theirs in
`constrain`. Everything else here follows from `RULES`.

Storage. A compiled function's arguments must divide evenly, so what `tp` does not divide is
zero-padded at that boundary, and only there: a `Layout` pads and unpads. Inside, and in
checkpoints, arrays have their logical shapes. `fsdp` never pads: it takes the first dimension it
divides, or replicates.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.axes import MESH_AXES

Axes = Sequence[str | None]

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": ("pp",),
    "embed": ("fsdp",),
    "vocab": ("tp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "experts": ("ep",),
    # activations; heads, kv_heads, mlp and vocab are as above
    # Outside the pipeline its stages share the rows. Micro-batch i of n has rows i, i + n, ...
    "batch": ("dp", "fsdp", "ep", "pp"),
    "length": ("cp",),
    # Between sub-layers tp splits positions (sequence parallelism), inside them features.
    "residual_length": ("cp", "tp"),
    # A recurrence takes its steps one by one: tp splits rows, and no step sends anything.
    "recurrent_batch": ("dp", "fsdp", "tp"),
    # Work on whole layers that dp would otherwise repeat.
    "layer_updates": ("dp",),
}


def mesh_axes(axes: Axes, omit: frozenset[str] = frozenset()) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry the logical `axes`.

    Raises ValueError for a logical axis the table lacks and for two dimensions that want the
    same mesh axis.
    """
    entries, taken = [], {}
    for logical in axes:
        if logical is not None and logical not in RULES:
            raise ValueError(f"logical axis {logical!r} is not in sharding.RULES")
        wanted = tuple(a for a in RULES.get(logical, ()) if a not in omit)
        for axis in wanted:
            if axis in taken:
                raise ValueError(
                    f"{taken[axis]!r} and {logical!r} of one array both want mesh axis {axis!r}"
                )
            taken[axis] = logical
        entries.append(wanted or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay an activation out by its logical axes on the mesh in force; without one, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = mesh_axes(axes, omit=frozenset(mesh.manual_axes))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_first(x: jax.Array, axis: str) -> jax.Array:
    """Lay out the first dimension by a logical axis and leave the others to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    (entry,) = mesh_axes((axis,), omit=frozenset(mesh.manual_axes))
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(entry, *others))


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How a tree of arrays is stored on a mesh. Its fields are trees like it, one leaf an array."""

    logical: object
    """ShapeDtypeStruct in logical shape."""
    stored: object
    """ShapeDtypeStruct in padded shape with its sharding: what compiled functions take."""
    exact: object
    """ShapeDtypeStruct in logical shape with a sharding that divides it: what is saved."""
    stacked: object
    """Whether the first dimension is that of layers."""
    replicated: tuple[str, ...] = ()
    """Paths of the parameters that fsdp had to replicate."""
    order: np.ndarray | None = None
    """The layer at each stored place, where that is another."""

    @property
    def shardings(self):
        """The stored arrays' shardings."""
        return jax.tree.map(lambda s: s.sharding, self.stored)

    def pad(self, tree):
        """Logical shapes to stored shapes. For use under jit."""
        return jax.tree.map(_pad, tree, self.stored)

    def unpad(self, tree):
        """Stored shapes to logical shapes. For use under jit."""
        return jax.tree.map(_unpad, tree, self.logical)

    def store(self, tree):
        """Logical shapes with layers in their order to what is stored. For use under jit."""
        return self.pad(self._take_layers(tree, self.order))

    def unstore(self, tree):
        """Undo `store`. For use under jit."""
        places = None if self.order is None else np.argsort(self.order)
        return self._take_layers(self.unpad(tree), places)

    def to_exact(self, tree):
        """Stored arrays as arrays of logical shape, layers in their order, for a checkpoint."""
        return tree if self._is_exact else self._exactly(tree)

    def to_stored(self, tree):
        """Arrays of logical shape, as restored, to stored arrays."""
        return tree if self._is_exact else self._storing(tree)

    def _take_layers(self, tree, places):
        if places is None:
            return tree
        return jax.tree.map(lambda x, many: x[places] if many else x, tree, self.stacked)

    @functools.cached_property
    def _is_exact(self) -> bool:
        return self.order is None and _shapes(self.logical) == _shapes(self.stored)

    @functools.cached_property
    def _exactly(self):
        shardings = jax.tree.map(lambda s: s.sharding, self.exact)
        return jax.jit(self.unstore, out_shardings=shardings)

    @functools.cached_property
    def _storing(self):
        return jax.jit(self.store, out_shardings=self.shardings)


def make_layout(logical, axes, mesh: Mesh, order: np.ndarray | None = None) -> Layout:
    """The layout of a tree of ShapeDtypeStructs whose logical axes are the leaves of `axes`.

    `order` says which layer is stored at each place of a stack; None is their own order.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(logical)
    all_axes = treedef.flatten_up_to(axes)
    stored, exact, replicated = [], [], []
    for (path, leaf), leaf_axes in zip(leaves, all_axes, strict=True):
        spec = storage_spec(leaf.shape, leaf_axes, mesh)
        if mesh.shape["fsdp"] > 1 and leaf_axes and "fsdp" not in axes_of(spec):
            replicated.append(f"{path_name(path)} {leaf.shape}")
        sizes = [math.prod(mesh.shape[a] for a in _names(entry)) for entry in spec]
        shape = tuple(-(-n // size) * size for n, size in zip(leaf.shape, sizes, strict=True))
        fits = [e if n == p else None for e, n, p in zip(spec, leaf.shape, shape, strict=True)]
        stored.append(_struct(shape, leaf.dtype, mesh, spec))
        exact.append(_struct(leaf.shape, leaf.dtype, mesh, PartitionSpec(*fits)))
    build = treedef.unflatten
    stacked = build([leaf_axes[:1] == ("layers",) for leaf_axes in all_axes])
    if order is not None and np.array_equal(order, np.arange(len(order))):
        order = None
    return Layout(logical, build(stored), build(exact), stacked, tuple(replicated), order)


def storage_spec(shape: Sequence[int], axes: Axes, mesh: Mesh) -> PartitionSpec:
    """The mesh axes an array of parameters is stored by: the table's, fsdp moved to where it fits.

    Scanned layers are sliced along `layers`, so fsdp stays off that dimension. What is not in a
    layer, such as the embedding, no stage of a pipeline needs more than another: pp splits it too.
    """
    if not axes:
        return PartitionSpec(*[None] * len(shape))
    entries = list(mesh_axes(axes, omit=frozenset({"fsdp"})))
    choices = [("fsdp",)]
    if mesh.shape["pp"] > 1 and "layers" not in axes:
        choices = [("pp", "fsdp"), *choices, ("pp",)]
    preferred = [i for i, a in enumerate(axes) if "fsdp" in RULES.get(a, ())]
    others = [i for i, a in enumerate(axes) if entries[i] is None and a != "layers"]
    for chosen, i in itertools.product(choices, preferred + others):
        if shape[i] % math.prod(mesh.shape[axis] for axis in chosen) == 0:
            entries[i] = (*_names(entries[i]), *chosen)
            break
    return PartitionSpec(*entries)


def split_boxes(boxed):
    """A tree of Flax's partitioned boxes as (tree of values, tree of logical axes)."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    values = jax.tree.map(lambda b: b.value, boxed, is_leaf=is_box)
    axes = jax.tree.map(lambda b: b.names, boxed, is_leaf=is_box)
    return values, axes


def axes_like(tree, params, param_axes):
    """Logical axes for a tree that mirrors `params` inside it, such as an optimiser's state.

    A leaf is a parameter's twin if its path ends in the parameter's and the shapes agree; any
    other leaf (a counter, a factored statistic) gets no axes: it is replicated.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    twins = {
        path_name(path): (leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, treedef.flatten_up_to(param_axes), strict=True)
    }

    def find(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, axes = twins.get("/".join(parts[start:]), (None, ()))
            if shape == leaf.shape:
                return axes
        return ()

    return jax.tree_util.tree_map_with_path(find, tree)


def path_name(path) -> str:
    """A tree path as `layers/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree) -> dict[str, object]:
    """The leaves of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_tree(leaves: Mapping[str, object]) -> dict:
    """Undo `by_path`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an input array [B, T] (every input array has the batch first).

    Each stage of a pipeline gets all rows: the stages need not divide them.
    """
    return NamedSharding(mesh, mesh_axes(("batch", "length"), omit=frozenset({"pp"})))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_axes(initializer: Callable, axes: Axes) -> Callable:
    """An initialiser whose parameter carries its logical axes."""
    return nn.with_logical_partitioning(initializer, tuple(axes))


def _struct(shape, dtype, mesh, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _shapes(tree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _names(entry) -> tuple[str, ...]:
    """The mesh axes of one dimension; PartitionSpec stores a single one as a string."""
    return (entry,) if isinstance(entry, str) else entry or ()


def axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec names."""
    return {axis for entry in spec for axis in _names(entry)}


def _pad(x, target):
    widths = [(0, n - m) for m, n in zip(x.shape, target.shape, strict=True)]
    return jnp.pad(x, widths) if any(w for _, w in widths) else x


def _unpad(x, target):
    return x if x.shape == target.shape else jax.lax.slice(x, (0,) * x.ndim, target.shape)


assert {axis for entry in RULES.values() for axis in entry} <= set(MESH_AXES)
