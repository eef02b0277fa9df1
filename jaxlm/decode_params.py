"""A model and its parameters as decoding wants them: a layer at a time, on a mesh without pp."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.mesh import FOLDED, folded_mesh
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import param_shapes
from jaxlm.models.head import VOCABULARY_HEAD
from jaxlm.models.stack import unstack
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import Layout, make_layout, path_name, split_boxes
from jaxlm.step import on_mesh


def decoded(model, mesh: Mesh) -> tuple[object, Mesh, Layout, Callable]:
    """(the model as it decodes, the mesh it does so on, its parameters' layout there, prepare).

    `prepare` makes those parameters of training's, stacked, in stored shapes, on `mesh`.
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

    def prepare(params):
        if own_head:
            head = params.get(VOCABULARY_HEAD, {}) | {"kernel": params["embed"]["embedding"].T}
            params = params | {VOCABULARY_HEAD: head}
        params = params | {name: unstack(params[name], order) for name, order in orders.items()}
        return jax.tree_util.tree_map_with_path(cast, params)

    def cast(path, x):
        # Matrices are cast where they are used in any case: once is enough.
        is_matrix = path_name(path).rpartition("/")[2] in ("kernel", "embedding")
        return x.astype(model.dtype) if is_matrix else x

    here = jax.tree.map(lambda s: NamedSharding(mesh, unfolded(s.spec)), layout.shardings)
    compiled = jax.jit(on_mesh(prepare, mesh), out_shardings=here)

    def prepare_folded(params):
        # The same parts on the same devices, which the folded mesh lists in another order.
        return jax.device_put(compiled(params), layout.shardings)

    model = dataclasses.replace(model, config=config, schedule=Schedule())
    return model, folded, layout, compiled if folded is mesh else prepare_folded


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
