"""What a feed-forward layer does to its hidden units: in float32, returned in their type."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn


def activation(mlp: str):
    """The function on a feed-forward layer's hidden units, or on their gate."""
    if mlp == "relu":
        return nn.relu
    if mlp in ("swiglu", "silu"):
        return nn.silu
    return functools.partial(nn.gelu, approximate=False) if mlp == "gelu_exact" else _gelu


def _gelu(x):
    """GELU approximated (Hendrycks and Gimpel, 2016), 1 + tanh(u) as 2 sigmoid(2u): the cheaper."""
    return x * nn.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


def hidden_units(mlp: str, up, gate=None):
    """What a feed-forward layer makes of `up` and, if it is gated, `gate`: in float32, returned in
    their type."""
    act = activation(mlp)
    if gate is None:
        return _elementwise(act, up)
    return _elementwise(lambda gate, up: act(gate) * up, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _elementwise(f, *arrays):
    """`f` in float32, returned in the arrays' type; of them alone its gradient is made."""
    return _elementwise_forward(f, *arrays)[0]


def _in_float32(f, *arrays):
    return f(*(x.astype(jnp.float32) for x in arrays)).astype(arrays[0].dtype)


# What comes in and what goes out is kept apart from what is around it. Or XLA makes the gradient of
# float32 that the forward pass has at hand, which is then kept; and holds in float32 what a product
# reads rounded and something else, such as a bias's gradient or a scale for float8, need not.
def _elementwise_forward(f, *arrays):
    return _apart(_in_float32(f, *arrays)), arrays


def _elementwise_backward(f, arrays, slope):
    arrays, slope = _apart((arrays, slope))
    return _apart(jax.vjp(functools.partial(_in_float32, f), *arrays)[1](slope))


def _apart(arrays):
    in_float32 = jax.tree.leaves(arrays)[0].dtype == jnp.float32
    return arrays if in_float32 else jax.lax.optimization_barrier(arrays)


_elementwise.defvjp(_elementwise_forward, _elementwise_backward)
