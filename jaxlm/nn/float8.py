"""Products of matrices in eight-bit floats (Micikevicius et al., 2022).

Each array is scaled as a whole to the type's range when it is read ("current scaling"), so that
nothing has to be remembered from step to step. Weights, and what they multiply, are e4m3, which has
more digits; their slopes are e5m2, which has more range.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

VALUES, SLOPES = jnp.float8_e4m3fn, jnp.float8_e5m2
EXPONENT = 0x7F800000  # of a float32's bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An array as float8 `values` times a `scale`."""

    values: jax.Array
    scale: jax.Array
    """A scalar, float32: a power of two, so that it rounds nothing."""


def scaled(x, dtype) -> Scaled:
    """`x` in a float8 type, its largest magnitude in the upper half of what the type holds.

    Where the mesh has manual axes, `x` is a part of an array, and the scale is that of all parts:
    numbers do not depend on how many there are.
    """
    most = float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual:
        largest = jax.lax.pmax(largest, manual)
    largest = jnp.maximum(largest, 1e-30)  # of zeros
    # The power of two above: an exponent's bits, since `exp2` is not exact everywhere.
    bits = jax.lax.bitcast_convert_type(largest / most, jnp.int32) & EXPONENT
    scale = 2.0 * jax.lax.bitcast_convert_type(bits, jnp.float32)
    values = jnp.clip(x.astype(jnp.float32) / scale, -most, most)
    return Scaled(values.astype(dtype), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(num_in: int, x, kernel):
    """`x` [*rows, *in] times `kernel` [*in, *out], where `in` is `num_in` dimensions, and both of
    its gradients: three products in float8.

    All three come out in the type of `x`; the kernel, and so its gradient, may be in another.
    """
    return _forward(num_in, x, kernel)[0]


def _forward(num_in: int, x, kernel):
    rows = x.ndim - num_in
    x8, kernel8 = scaled(x, VALUES), scaled(kernel, VALUES)
    y = _product(x8, kernel8, range(rows, x.ndim), range(num_in), x.dtype)
    # Of an array of no elements a gradient's rule can learn a type.
    return y, (x8, kernel8, jnp.zeros(0, x.dtype), jnp.zeros(0, kernel.dtype))


def _backward(num_in: int, saved, slope):
    x8, kernel8, like_x, like_kernel = saved
    rows = x8.values.ndim - num_in
    slope8 = scaled(slope, SLOPES)
    out = range(rows, slope.ndim), range(num_in, kernel8.values.ndim)
    in_x = _product(slope8, kernel8, *out, like_x.dtype)
    in_kernel = _product(x8, slope8, range(rows), range(rows), like_x.dtype)
    return in_x, in_kernel.astype(like_kernel.dtype)


multiply.defvjp(_forward, _backward)


def _product(x: Scaled, y: Scaled, dims_x: range, dims_y: range, dtype):
    """Contract the dimensions; sums are float32 inside of it."""
    dims = (tuple(dims_x), tuple(dims_y)), ((), ())
    product = jax.lax.dot_general(x.values, y.values, dims, preferred_element_type=dtype)
    return product * (x.scale * y.scale).astype(dtype)
