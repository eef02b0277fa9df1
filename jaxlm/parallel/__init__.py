"""Hand-written communication, a file for each axis; it takes functions and knows no model."""

import jax
import jax.numpy as jnp


def summable(dtype):
    """The type to sum a `dtype` in inside a `shard_map`, or to gather it in, which is summed
    backward: XLA's CPU compiler crashes on bfloat16 there.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else dtype
