"""The small modules: projections, normalisation, embeddings, dropout."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxlm.model_config import ModelConfig
from jaxlm.nn import float8
from jaxlm.nn.activations import hidden_units
from jaxlm.parallel.lookup import lookup
from jaxlm.sharding import constrain, with_axes

# Dropout's sites in a block: each draws its own mask.
EMBEDDING, ATTENTION_PROBABILITIES, ATTENTION_OUTPUT, MLP_OUTPUT, POOLED, WORDS = range(6)
ENCODER = 2**31  # in place of a layer's number: beyond all of a decoder's
CROSS = 2**31 + 1  # the same for a layer's attention to a source
PRODUCT = "product"
"""What rematerialisation knows a projection's output by: inside a gradient's rule it sees none."""

ROW_PARTS = 4
"""Of a kernel that a CPU multiplies one row by: 8 and 16 are as fast for large ones."""


class Projection(nn.LogicallyPartitioned):
    """The kernel [*in, *out] of a `Dense`: what an adapter can be given to."""

    num_in: int = struct.field(pytree_node=False, default=1)


class Dense(nn.Module):
    """A linear map over the last `num_in` dimensions of its input; the kernel is [*in, *out].

    Where its parameters have an adapter, `lora_a` [*in, R] and `lora_b` [R, *out] (`models.lora`
    makes them), what these two make of the input is added.
    """

    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axes of the kernel."""
    dtype: jnp.dtype
    init_mean: float
    init_std: float
    use_bias: bool = False
    num_in: int = 1
    float8: bool = False
    """Multiply by the kernel in float8 (`nn.float8`)."""

    @nn.compact
    def __call__(self, x):
        in_shape = x.shape[x.ndim - self.num_in :]
        init = gaussian(self.init_mean, self.init_std)

        def boxed(*args):
            return Projection(init(*args), self.axes, num_in=self.num_in)

        kernel = self.param("kernel", boxed, in_shape + self.out_shape)
        if self.float8:
            y = float8.multiply(self.num_in, x.astype(self.dtype), kernel)
            y = checkpoint_name(y, PRODUCT)
        else:
            y = self._multiply(x, kernel, self.num_in)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            y = y + self._multiply(self._multiply(x, a, self.num_in), b, 1)
        if self.use_bias:
            zeros = with_axes(nn.initializers.zeros_init(), self.axes[self.num_in :])
            y = add_bias(y, self.param("bias", zeros, self.out_shape))
        return y

    def _multiply(self, x, kernel, num_in: int):
        product = multiply
        if jax.default_backend() == "cpu" and is_whole():
            one = all(isinstance(n, int) and n == 1 for n in x.shape[: x.ndim - num_in])
            product = multiply_row if one else multiply_on_cpu
        y = product(num_in, x.astype(self.dtype), kernel.astype(self.dtype))
        return checkpoint_name(y, PRODUCT)


@jax.custom_vjp
def add_bias(y, bias):
    """`y` [..., *out] and `bias` [*out] float32, in the type of `y`.

    The bias's gradient is summed in float32: as JAX derives it, it would be in the type of `y`.
    """
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _add_bias_backward(bias, slope):
    return slope, slope.sum(range(slope.ndim - bias.ndim), dtype=bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


def multiply(num_in: int, x, kernel):
    """`x` [*rows, *in] times `kernel` [*in, *out], where `in` is `num_in` dimensions."""
    rows = x.ndim - num_in
    return _contract(x, kernel, range(rows, x.ndim), range(num_in))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_on_cpu(num_in: int, x, kernel):
    """As `multiply`, but the kernel's gradient has x for its left factor.

    On a CPU the left one is copied in another order. As JAX forms it, that is the slope, together
    with all that makes the slope: a feed-forward then takes half as long again.
    """
    return multiply(num_in, x, kernel)


def multiply_row(num_in: int, x, kernel):
    """As `multiply`, of one row: products with parts of the kernel are summed.

    On a CPU a kernel [768, 2048] is read in seven tenths of the time.
    """
    out_shape, size = kernel.shape[num_in:], math.prod(kernel.shape[:num_in])
    if size % ROW_PARTS:
        return multiply(num_in, x, kernel)
    x_p1i = x.reshape(ROW_PARTS, 1, -1)
    kernel_pio = kernel.reshape(ROW_PARTS, size // ROW_PARTS, -1)
    y_p1o = jax.lax.dot_general(
        x_p1i, kernel_pio, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    y_1o = sum(y_p1o)
    return y_1o.astype(x.dtype).reshape(*x.shape[: x.ndim - num_in], *out_shape)


def is_whole() -> bool:
    """Whether a device has all of a product.

    Where devices share them, XLA's CPU devices in several processes did not always come to the
    collectives of another gradient than JAX's in the same order.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return all(n == 1 or axis in mesh.manual_axes for axis, n in mesh.shape.items())


def _multiply_forward(num_in: int, x, kernel):
    return multiply(num_in, x, kernel), (x, kernel)


def _multiply_backward(num_in: int, saved, slope):
    x, kernel = saved
    rows = x.ndim - num_in
    in_x = _contract(slope, kernel, range(rows, slope.ndim), range(num_in, kernel.ndim))
    return in_x, _contract(x, slope, range(rows), range(rows))


multiply_on_cpu.defvjp(_multiply_forward, _multiply_backward)


def _contract(x, y, dims_x: range, dims_y: range):
    return jax.lax.dot_general(x, y, ((tuple(dims_x), tuple(dims_y)), ((), ())))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016) of the last dimensions.

    Computed in float32, returned in the input's type. The RMSNorm scale is stored less
    `offset`, so that checkpoints of families that do so round-trip.
    """

    kind: str
    eps: float
    offset: float = 0.0
    use_bias: bool = False
    axes: tuple[str | None, ...] = ("embed",)
    """Logical axes of the dimensions normalised over."""

    @nn.compact
    def __call__(self, x):
        offset = self.offset if self.kind == "rmsnorm" else 0.0
        shape = x.shape[x.ndim - len(self.axes) :]
        ones = with_axes(nn.initializers.constant(1.0 - offset), self.axes)
        scale, bias = self.param("scale", ones, shape) + offset, None
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros_init(), self.axes), shape)
        on_gpu = jax.default_backend() == "gpu"
        return (normalise_on_gpu if on_gpu else normalise)(self.kind, self.eps, x, scale, bias)


def normalise(kind: str, eps: float, x, scale, bias):
    """The last dimensions of `x`, those of `scale`, by RMSNorm or LayerNorm."""
    dims = tuple(range(-scale.ndim, 0))
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - y.mean(dims, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), dims, keepdims=True) + eps)
    y = y * jnp.broadcast_to(scale, y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise_on_gpu(kind: str, eps: float, x, scale, bias):
    """As `normalise`, but only `x` and two numbers a row are kept for the gradient.

    XLA would keep `x` normalised, in float32, and read it more often than it takes to make it.
    """
    return _normalise_forward(kind, eps, x, scale, bias)[0]


def _normalise_forward(kind: str, eps: float, x, scale, bias):
    dims = tuple(range(-scale.ndim, 0))
    mean = None
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        mean = y.mean(dims, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(_centred(y, mean)), dims, keepdims=True) + eps)
    y = _centred(y, mean) * rate * jnp.broadcast_to(scale, y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape)
    return y.astype(x.dtype), (x, mean, rate, scale, bias)


def _normalise_backward(kind: str, eps: float, saved, slope):
    *saved, scale, bias = saved
    # Or it would be made of what the forward pass has at hand, which is then kept.
    (x, mean, rate), slope = jax.lax.optimization_barrier((saved, slope))
    dims = tuple(range(-scale.ndim, 0))
    y = _centred(x.astype(jnp.float32), mean) * rate
    slope = slope.astype(jnp.float32)
    in_y = slope * jnp.broadcast_to(scale, y.shape)
    in_x = in_y - y * jnp.mean(in_y * y, dims, keepdims=True)
    if kind == "layernorm":
        in_x = in_x - in_y.mean(dims, keepdims=True)
    rows = range(x.ndim - scale.ndim)
    in_bias = None if bias is None else slope.sum(rows)
    return (rate * in_x).astype(x.dtype), (slope * y).sum(rows), in_bias


def _centred(y, mean):
    return y if mean is None else y - mean


normalise_on_gpu.defvjp(_normalise_forward, _normalise_backward)


def residual_norm(config: ModelConfig, name: str) -> Norm:
    """The normalisation of the residual stream that the config asks for."""
    return Norm(config.norm, config.norm_eps, config.norm_offset, config.norm_bias, name=name)


class Embed(nn.Module):
    """A table [entries, D] looked up by integer ids."""

    entries: int
    config: ModelConfig
    dtype: jnp.dtype
    axis: str | None = "vocab"

    def setup(self):
        init = gaussian(self.config.init_mean, self.config.init_std)
        shape = self.entries, self.config.d_model
        self.embedding = self.param("embedding", with_axes(init, (self.axis, "embed")), shape)

    def __call__(self, ids):
        if self.is_initializing():  # on one token, which no mesh splits
            return self.embedding.astype(self.dtype)[ids]
        return lookup(self.embedding, ids, self.axis).astype(self.dtype)


class MLP(nn.Module):
    """The feed-forward layer; gated ones after Shazeer, "GLU Variants Improve Transformer"."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_btd):
        c = self.config
        wide = {
            "out_shape": (c.d_ff,),
            "axes": ("embed", "mlp"),
            "dtype": self.dtype,
            "init_mean": c.init_mean,
            "init_std": c.init_std,
            "use_bias": c.mlp_bias,
            "float8": c.float8,
        }
        up_btf = Dense(**wide, name="up")(x_btd)
        gate_btf = Dense(**wide, name="gate")(x_btd) if c.is_gated else None
        hidden_btf = hidden_units(c.mlp, up_btf, gate_btf)
        hidden_btf = constrain(hidden_btf, "batch", "length", "mlp")
        return Dense(
            (c.d_model,),
            ("mlp", "embed"),
            self.dtype,
            c.init_mean,
            residual_std(c),
            c.mlp_bias,
            float8=c.float8,
            name="down",
        )(hidden_btf)


def gaussian(mean: float, std: float):
    """An initialiser that draws N(mean, std^2) in float32."""

    def init(key, shape, dtype=jnp.float32):
        return mean + std * jax.random.normal(key, shape, dtype)

    return init


def residual_std(config: ModelConfig) -> float:
    """The deviation of matrices that write to the residual stream (Radford et al., 2019)."""
    scale = (2 * config.num_layers) ** -0.5 if config.scale_residual_init else 1.0
    return config.init_std * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout whose masks depend on (key, site, token) only, never on mesh or micro-batch."""

    key: jax.Array
    tokens: jax.Array
    """[B, T] uint32: each token's place in the global batch, row by row."""
    source: jax.Array | None = None
    """[B, S]: the same for what an encoder reads."""

    def layer(self, index) -> "Dropout":
        """The dropout of one layer."""
        return Dropout(jax.random.fold_in(self.key, index), self.tokens)

    def of_encoder(self) -> "Dropout":
        """The dropout of the source's tokens, with masks of its own."""
        return Dropout(jax.random.fold_in(self.key, ENCODER), self.source)

    def of_texts(self, positions_bt) -> "Dropout":
        """Dropout with one mask for each text, that of its first token."""
        return dataclasses.replace(
            self, tokens=self.tokens - positions_bt.astype(self.tokens.dtype)
        )

    def words(self, x_btd, tokens_bt, rate: float, site: int):
        """Zero all occurrences of a word in a text, with probability `rate`, and scale the rest.

        One mask for each text is assumed. The embedding's dropout of Gal and Ghahramani (2016).
        """
        if not rate:
            return x_btd
        site_key = jax.random.fold_in(self.key, site)

        def keep(place, token):
            key = jax.random.fold_in(jax.random.fold_in(site_key, place), token)
            return jax.random.bernoulli(key, 1 - rate)

        kept_bt = jax.vmap(jax.vmap(keep))(self.tokens, tokens_bt)
        return jnp.where(kept_bt[:, :, None], x_btd / (1 - rate), jnp.zeros_like(x_btd))

    def __call__(self, x, rate: float, site: int, token_dim: int = 1):
        """Zero elements of `x` with probability `rate`, and scale the rest.

        The first dimension of `x` is that of rows, `token_dim` that of tokens.
        """
        if not rate:
            return x
        site_key = jax.random.fold_in(self.key, site)
        x = jnp.moveaxis(x, token_dim, 1)

        def keep(token):
            key = jax.random.fold_in(site_key, token)
            return _bits16(key, x.shape[2:]) >= min(round(rate * 2**16), 2**16 - 1)

        kept = jax.vmap(jax.vmap(keep))(self.tokens)
        return jnp.moveaxis(jnp.where(kept, x / (1 - rate), jnp.zeros_like(x)), 1, token_dim)


def _bits16(key, shape: tuple[int, ...]):
    """Random uint16 of a shape. Two come of each word drawn: drawing is what dropout costs."""
    *outer, last = shape
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*outer, -1)[..., :last]
