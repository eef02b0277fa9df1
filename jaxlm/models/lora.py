"""Low-rank adapters (Hu et al., 2021): a projection W x becomes W x + alpha / rank B A x.

W stays as it was. What trains is a tree of its own beside the model's parameters,
{"layers": {"attention": {"q": {"lora_a": A, "lora_b": B}, ...}}}: optimiser state, averages and
checkpoints have the shape of that tree, and the model's configuration knows nothing of it.
"""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.config import Config, LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.head import LABEL_HEAD
from jaxlm.nn.layers import Projection

A, B = "lora_a", "lora_b"


def init_adapters(config: LoraConfig | None, boxed, key) -> dict:
    """Adapters for the projections in the stacks of a model, boxed with their logical axes.

    `boxed` are the model's parameters; their shapes are all that is looked at. Without a config
    there are no adapters. A [L, *in, R] is
    Gaussian with variance 1 / in, B [L, R, *out] zero: at the start the model computes what it
    did. Raises UserError for a target that the model does not have.
    """
    if config is None:
        return {}
    found = set()

    def visit(node: dict, path: str):
        adapters = {}
        for name, child in node.items():
            where = f"{path}/{name}"
            if not isinstance(child, dict):
                continue
            if not _is_adaptable(child.get("kernel")):
                inner = visit(child, where)
            else:
                found.add(name)
                # What tokens' experts are chosen by is left alone unless it is asked for.
                is_wanted = name in config.targets if config.targets else name != "router"
                inner = _adapter(config, child["kernel"], _key(key, where)) if is_wanted else {}
            if inner:
                adapters[name] = inner
        return adapters

    adapters = visit(boxed, "")
    if missing := [name for name in config.targets if name not in found]:
        raise UserError(
            f"lora.targets has {missing[0]!r}, but the projections of this model's layers are "
            f"{', '.join(sorted(found))}: use some of those"
        )
    return adapters


def _is_adaptable(kernel) -> bool:
    """Whether a parameter is a projection of a stack of layers."""
    return isinstance(kernel, Projection) and kernel.names[0] == "layers"


def _key(key, path: str):
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _adapter(config: LoraConfig, kernel: Projection, key) -> dict:
    layers, *shape = kernel.value.shape
    names = kernel.names[1:]
    inputs, outputs = shape[: kernel.num_in], shape[kernel.num_in :]
    std = math.prod(inputs) ** -0.5
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(layers))
    draw = lambda key: std * jax.random.normal(key, (*inputs, config.rank), jnp.float32)  # noqa: E731
    return {
        A: nn.LogicallyPartitioned(jax.vmap(draw)(keys), ("layers", *names[: kernel.num_in], None)),
        B: nn.LogicallyPartitioned(
            jnp.zeros((layers, config.rank, *outputs), jnp.float32),
            ("layers", None, *names[kernel.num_in :]),
        ),
    }


def divide(config: Config, params: dict) -> tuple[dict, dict | None]:
    """A tree like the model's parameters as (what trains, what is frozen).

    Beside adapters a classifier's head trains, which is new in most runs.
    """
    if config.lora is None:
        return params, None
    frozen = {name: child for name, child in params.items() if name != LABEL_HEAD}
    return {name: child for name, child in params.items() if name not in frozen}, frozen


def attach(config: LoraConfig | None, frozen, trained):
    """The parameters that a model computes with in training; without a config, all are trained.

    alpha / rank is taken into B, so that a layer need not know it.
    """
    if config is None:
        return trained
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * config.scale if path[-1].key == B else x, trained
    )
    return joined(frozen, scaled)


def merge(config: LoraConfig | None, frozen, trained):
    """The model's parameters with each adapter added to its kernel, in float32."""
    return trained if config is None else _merged(config.scale, frozen, trained)


def _merged(scale: float, frozen: dict, trained: dict) -> dict:
    if A in trained:
        multiply = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")  # noqa: E731
        change = jax.vmap(multiply)(trained[A], trained[B])
        return frozen | {"kernel": frozen["kernel"] + scale * change}
    inner = {
        name: _merged(scale, frozen[name], child) if name in frozen else child
        for name, child in trained.items()
    }
    return frozen | inner


def joined(first: dict, second: dict) -> dict:
    """Two trees of nested dicts as one; no leaf is in both."""
    both = {name: joined(first[name], second[name]) for name in first.keys() & second.keys()}
    return first | second | both
