"""Recurrent layers over packed rows: vanilla RNN, GRU and LSTM.

A layer's input is multiplied once, for all tokens, before the scan; the scan has the product with
the state and nothing else. Its backward pass leaves the gradient of that matrix to one product
after the scan, where autodiff would add to it at every step.

The state is a tuple of float32 [B, D] with the cell's output first: (h,), or (h, c) of an LSTM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.model_config import ModelConfig
from jaxlm.nn.layers import Dropout, gaussian
from jaxlm.sharding import constrain, with_axes

# Dropout's sites in a recurrent model: each draws its own mask.
WORD_TYPES, LAYER_INPUT, STATE, OUTPUT = range(4)


def rnn(x_bzd, y_bzd, state):
    """The cell of Elman (1990), with tanh: `torch.nn.RNN`'s equations."""
    return (jnp.tanh(x_bzd + y_bzd)[:, 0],)


def gru(x_bzd, y_bzd, state):
    """The gated unit of Cho et al. (2014) with the reset after the product: `torch.nn.GRU`'s."""
    (h,) = state
    reset, update = jnp.unstack(jax.nn.sigmoid(x_bzd[:, :2] + y_bzd[:, :2]), axis=1)
    new = jnp.tanh(x_bzd[:, 2] + reset * y_bzd[:, 2])
    return ((1.0 - update) * new + update * h,)


def lstm(x_bzd, y_bzd, state):
    """The cell of Hochreiter and Schmidhuber (1997) with a forget gate: `torch.nn.LSTM`'s."""
    _, c = state
    i, f, g, o = jnp.unstack(x_bzd + y_bzd, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@dataclasses.dataclass(frozen=True)
class Cell:
    """A kind of cell; gates are in the order of `torch.nn`."""

    step: object
    """(input's part [B, Z, D], state's part [B, Z, D], state) -> state, element by element."""
    gates: int
    states: int
    forget: int | None = None
    """The gate that keeps the state."""


CELLS = {"rnn": Cell(rnn, 1, 1), "gru": Cell(gru, 3, 1), "lstm": Cell(lstm, 4, 2, forget=1)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Where sequences begin and go on in rows of tokens; all [B, T]."""

    starts: jax.Array
    """The first token of a segment, which enters with its initial state."""
    real: jax.Array
    """False in padding, which leaves the state as it is."""
    first: jax.Array
    """The column of the segment's first token, as far as it is among these."""


def steps_of(segments_bt, before_b) -> tuple[Steps, jax.Array]:
    """How to step through rows whose segments are numbered upwards, 0 being padding.

    `before_b` is the segment of the last token read before. Returns (it, that of these rows).
    """
    reached = jax.lax.cummax(jnp.concatenate([before_b[:, None], segments_bt], 1), axis=1)
    starts = segments_bt > reached[:, :-1]
    columns = jnp.broadcast_to(jnp.arange(segments_bt.shape[1]), segments_bt.shape)
    first = jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)
    return Steps(starts, segments_bt > 0, first), reached[:, -1]


def variational(dropout: Dropout, steps: Steps) -> Dropout:
    """Dropout with one mask for each sequence (Gal and Ghahramani, 2016): its first token's."""
    return Dropout(dropout.key, jnp.take_along_axis(dropout.tokens, steps.first, axis=1))


class _Gates(nn.Module):
    """The weights [D, Z, D] and biases [Z, D] of one of a layer's two products."""

    config: ModelConfig
    forget_bias: float = 0.0

    @nn.compact
    def __call__(self):
        c, cell = self.config, CELLS[self.config.kind]
        init = gaussian(c.init_mean, c.init_std)
        shape = c.d_model, cell.gates, c.d_model
        kernel = self.param("kernel", with_axes(init, ("embed", None, "mlp")), shape)

        def biases(key, shape):
            zeros = jnp.zeros(shape)
            return zeros if cell.forget is None else zeros.at[cell.forget].set(self.forget_bias)

        return kernel, self.param("bias", with_axes(biases, (None, "mlp")), shape[1:])


class Recurrent(nn.Module):
    """One layer. Weights are those of `torch.nn`, both biases included, transposed.

    The input's bias of an LSTM's forget gate starts at 1, so that the cell remembers before it has
    learnt what to forget (Gers et al., 2000; Jozefowicz et al., 2015).
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_btd, *, steps: Steps, state=None, initial=None, dropout: Dropout | None = None
    ):
        """Returns (output [B, T, D], the states after each token, each [B, T, D] float32).

        `state` [B, D] is that before the first token and `initial` [B, T, D] what a sequence starts
        with, read at its first token; both are zeros if left out. `dropout` is `variational`.
        """
        c, cell = self.config, CELLS[self.config.kind]
        # The steps of a recurrence cannot be split, and features that are would be gathered at
        # every step: tp takes some of the rows. One token alone, in decoding, has no other step.
        rows, features = ("recurrent_batch", None) if x_btd.shape[1] > 1 else ("batch", "mlp")

        def by_step(x, features=features):
            return jnp.moveaxis(constrain(x, rows, None, features), 1, 0)

        kernel, bias = _Gates(c, 1.0, name="input")()
        kernel = constrain(kernel.astype(self.dtype), None, None, features)
        x_tbzd = jnp.einsum("tbd,dze->tbze", by_step(x_btd.astype(self.dtype), None), kernel)
        x_tbzd = constrain(x_tbzd + bias.astype(self.dtype)[None, None], None, rows, None, features)
        kernel, bias = _Gates(c, name="recurrent")()
        kernel = constrain(kernel.astype(self.dtype), None, None, features)
        mask = None
        if dropout is not None and c.recurrent_dropout:
            mask = by_step(dropout(jnp.ones_like(x_btd), c.recurrent_dropout, STATE))
        if state is None:
            state = (jnp.zeros((x_btd.shape[0], c.d_model)),) * cell.states
        if initial is not None:
            initial = tuple(by_step(s) for s in initial)
        state = tuple(constrain(s, rows, features) for s in state)
        flags = steps.starts.T[:, :, None], steps.real.T[:, :, None]
        states = recur(c.kind, x_tbzd, kernel, bias, state, initial, mask, flags)
        states = tuple(constrain(jnp.moveaxis(s, 0, 1), rows, None, features) for s in states)
        return states[0].astype(self.dtype), states


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(kind: str, x_tbzd, kernel_dzd, bias_zd, state, initial, mask_tbd, flags):
    """The states after each step, a tuple of float32 [T, B, D].

    `flags` are (starts, real) of `Steps`, [T, B, 1]; `mask_tbd`, or None, multiplies what the
    product reads of the state. Unrolling the scan gains nothing on a CPU.
    """
    return _forward(kind, x_tbzd, kernel_dzd, bias_zd, state, initial, mask_tbd, flags)[0]


def _forward(kind: str, x_tbzd, kernel_dzd, bias_zd, state, initial, mask_tbd, flags):
    cell = CELLS[kind]

    def step(state, inputs):
        x_bzd, initial, mask_bd, (starts, real) = inputs
        fresh = initial or tuple(jnp.zeros_like(s) for s in state)
        entering = _where(starts, fresh, state)
        y_bzd = _product(_masked(entering[0], mask_bd), kernel_dzd) + bias_zd[None]
        after = cell.step(x_bzd.astype(jnp.float32), y_bzd, entering)
        after = _where(real, after, entering)
        return after, (after, entering, y_bzd)

    _, (states, entering, y_tbzd) = jax.lax.scan(step, state, (x_tbzd, initial, mask_tbd, flags))
    marker = None if initial is None else ()  # a tree without arrays
    return states, (x_tbzd, kernel_dzd, y_tbzd, entering, marker, mask_tbd, flags)


def _backward(kind: str, residuals, dstates):
    x_tbzd, kernel_dzd, y_tbzd, entering, marker, mask_tbd, flags = residuals
    cell = CELLS[kind]
    dtype = kernel_dzd.dtype

    def step(dstate, inputs):
        x_bzd, y_bzd, entering, mask_bd, (starts, real), dafter = inputs
        dstate = jax.tree.map(jnp.add, dstate, dafter)
        zero = tuple(jnp.zeros_like(d) for d in dstate)
        _, pull = jax.vjp(cell.step, x_bzd.astype(jnp.float32), y_bzd, entering)
        dx_bzd, dy_bzd, dcell = pull(_where(real, dstate, zero))
        dread = jax.lax.dot_general(
            dy_bzd.astype(dtype),
            kernel_dzd,
            (((1, 2), (1, 2)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        dentering = jax.tree.map(jnp.add, dcell, _where(real, zero, dstate))
        dentering = (dentering[0] + _masked(dread, mask_bd), *dentering[1:])
        before = _where(starts, zero, dentering)
        dinitial = None if marker is None else _where(starts, dentering, zero)
        return before, (dx_bzd.astype(x_bzd.dtype), dy_bzd, dinitial)

    zero = tuple(jnp.zeros_like(s[0]) for s in entering)
    inputs = x_tbzd, y_tbzd, entering, mask_tbd, flags, dstates
    dstate, (dx_tbzd, dy_tbzd, dinitial) = jax.lax.scan(step, zero, inputs, reverse=True)
    dkernel = jnp.einsum(
        "tbd,tbze->dze",
        _masked(entering[0], mask_tbd).astype(dtype),
        dy_tbzd.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return dx_tbzd, dkernel.astype(dtype), dy_tbzd.sum((0, 1)), dstate, dinitial, None, None


recur.defvjp(_forward, _backward)


def _product(h_bd, kernel_dzd):
    return jnp.einsum(
        "bd,dze->bze", h_bd.astype(kernel_dzd.dtype), kernel_dzd, preferred_element_type=jnp.float32
    )


def _masked(x, mask):
    return x if mask is None else x * mask.astype(x.dtype)


def _where(flag_b1, yes: tuple, no: tuple) -> tuple:
    return tuple(jnp.where(flag_b1, y, n) for y, n in zip(yes, no, strict=True))
