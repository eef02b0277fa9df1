"""A model and its parameters as decoding wants them: a layer at a time, on a mesh without pp."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.mesh import FOLDED, folded_mesh
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import param_shapes
from jaxlm.models.head import VOCABULARY_HEAD
from jaxlm.models.stack import unstack
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import Layout, as_tree, by_path, make_layout, path_name, split_boxes
from jaxlm.step import on_mesh

PART_BYTES = 2**30
"""Of parameters that are consumed at a time: a smaller model is compiled for once."""


def decoded(model, mesh: Mesh) -> tuple[object, Mesh, Layout, Callable]:
    """(the model as it decodes, the mesh it does so on, its parameters' layout there, prepare).

    `prepare(params, consume=False)` makes those parameters of training's, stacked, in stored
    shapes, on `mesh`. With `consume` these are freed, part by part, so that there is little of them
    twice.
    """
    folded = folded_mesh(mesh)
    config = _decoded_config(model.config)
    own_head = config.tie_embeddings != model.config.tie_embeddings
    params, axes = split_boxes(param_shapes(config))
    depths = {name: jax.tree.leaves(params[name])[0].shape[0] for name in model.stacks}
    orders = {name: model.schedule.order(depth) for name, depth in depths.items()}
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    for name, depth in depths.items():
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), params[name])
        one_axes = jax.tree.map(lambda names: names[1:], axes[name], is_leaf=is_axes)
        params, axes = params | {name: (one,) * depth}, axes | {name: (one_axes,) * depth}
    layout = make_layout(params, axes, folded)

    def apart(params):
        if own_head and "embedding" in params.get("embed", {}):
            head = params.get(VOCABULARY_HEAD, {}) | {"kernel": params["embed"]["embedding"].T}
            params = params | {VOCABULARY_HEAD: head}
        here = {name: order for name, order in orders.items() if name in params}
        params = params | {name: unstack(params[name], order) for name, order in here.items()}
        return as_computed(params, model.dtype)

    unfold = lambda s: NamedSharding(mesh, unfolded(s.spec))  # noqa: E731
    places = {name: unfold(sharding) for name, sharding in by_path(layout.shardings).items()}
    compiled = {}

    def prepare(params, consume: bool = False):
        made = {}
        for part in _parts(by_path(params), PART_BYTES if consume else math.inf):
            tree, names = as_tree(part), tuple(part)
            if names not in compiled:
                results = jax.eval_shape(apart, tree)
                put = jax.tree_util.tree_map_with_path(lambda p, _: places[path_name(p)], results)
                compiled[names] = jax.jit(on_mesh(apart, mesh), out_shardings=put)
            made |= by_path(compiled[names](tree))
            if consume:
                jax.block_until_ready(made)
                for x in part.values():
                    x.delete()
        made = jax.tree.unflatten(jax.tree.structure(layout.shardings), [made[n] for n in places])
        # The same parts on the same devices, which the folded mesh lists in another order.
        return made if folded is mesh else jax.device_put(made, layout.shardings)

    return dataclasses.replace(model, config=config, schedule=Schedule()), folded, layout, prepare


def as_computed(params, dtype):
    """Parameters, or their shapes, with matrices in the type that they are multiplied in.

    They are cast where they are used in any case: once is enough.
    """

    def cast(path, x):
        if path_name(path).rpartition("/")[2] not in ("kernel", "embedding"):
            return x
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _parts(leaves: dict[str, jax.Array], size: float) -> Iterator[dict[str, jax.Array]]:
    """Leaves in parts of at least `size` bytes, the last aside."""
    part = {}
    for name, leaf in leaves.items():
        part[name] = leaf
        if sum(x.nbytes for x in part.values()) >= size:
            yield part
            part = {}
    if part:
        yield part


def _decoded_config(config: ModelConfig) -> ModelConfig:
    """Experts have no capacity, which would make a row's text depend on the padding around it.

    On CPUs the table of embeddings [V, D] is not the head, too: the head is a copy [D, V], of which
    a product takes three quarters of the time.
    """
    if config.experts is not None:
        experts = dataclasses.replace(config.experts, capacity=None)
        config = dataclasses.replace(config, experts=experts)
    tied = config.tie_embeddings and not config.scale_logits and config.labels is None
    if tied and config.kind != "encoder" and jax.default_backend() == "cpu":
        config = dataclasses.replace(config, tie_embeddings=False)
    return config


def unfolded(spec: PartitionSpec) -> PartitionSpec:
    """What a spec of a folded mesh is on the mesh that was folded."""

    def names(entry):
        entry = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(a for axis in entry for a in (FOLDED if axis == "fsdp" else (axis,)))

    return PartitionSpec(*map(names, spec))
