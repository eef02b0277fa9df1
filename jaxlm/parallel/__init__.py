"""Hand-written communication, a file for each axis; it takes functions and knows no model."""

import jax
import jax.numpy as jnp


def summable(dtype):
    """The type to sum a `dtype` in inside a `shard_map`, or to gather it in, which is summed
    backward: XLA's CPU compiler crashes on bfloat16 there.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def is_split(axes) -> bool:
    """Whether the mesh in force has several devices along any of the `axes`, or of the manual ones.

    Elsewhere a `shard_map` over them is nothing but a way to make XLA fail: it does so on sums over
    axes of one device beside an automatic axis of several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in {*axes, *mesh.manual_axes})
