"""Recurrent layers against torch's, and rows that hold several sequences and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.model_config import ModelConfig
from jaxlm.nn.layers import Dropout
from jaxlm.nn.recurrent import CELLS, WORD_TYPES, Recurrent, steps_of, variational
from jaxlm.sharding import split_boxes

pytestmark = pytest.mark.usefixtures("strict")

D, T = 5, 12
KINDS = ["rnn", "gru", "lstm"]
TORCH = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


def layer(kind: str, **fields) -> Recurrent:
    config = ModelConfig(kind=kind, d_model=D, **fields)
    return Recurrent(config, jnp.dtype(jnp.float32))


def steps(*rows):
    segments = jnp.asarray(rows, jnp.int32)
    return steps_of(segments, jnp.zeros(len(rows), jnp.int32))[0]


def inputs(rows: int, length: int = T, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(rows, length, D)).astype(np.float32)


@functools.cache
def params_of(kind: str):
    """Weights large enough for every gate to matter, all biases included."""
    module = layer(kind)
    x = jnp.zeros((1, 1, D))
    shapes, _ = split_boxes(jax.eval_shape(module.init, jax.random.key(0), x, steps=steps([1])))
    rng = np.random.default_rng(1)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.6).astype(np.float32))  # noqa: E731
    return jax.tree.map(draw, shapes["params"])


@functools.partial(jax.jit, static_argnames=("kind", "rate"))
def run(kind, params, x, steps, rate=0.0, **others):
    return layer(kind, recurrent_dropout=rate).apply({"params": params}, x, steps=steps, **others)


def reference(kind: str, params):
    """torch's layer with the same weights, which it stores transposed and gate by gate."""
    module = TORCH[kind](D, D, batch_first=True)
    with torch.no_grad():
        for ours, theirs in (("input", "ih"), ("recurrent", "hh")):
            kernel = np.asarray(params[ours]["kernel"]).transpose(1, 2, 0).reshape(-1, D)
            getattr(module, f"weight_{theirs}_l0").copy_(torch.tensor(kernel))
            bias = np.asarray(params[ours]["bias"]).reshape(-1)
            getattr(module, f"bias_{theirs}_l0").copy_(torch.tensor(bias))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_those_of_torch(kind):
    params, x = params_of(kind), inputs(3)
    weights = np.random.default_rng(2).normal(size=(3, T, D)).astype(np.float32)
    first = [inputs(3, 1, seed)[:, 0] for seed in (5, 6)][: CELLS[kind].states]

    def loss(params, x, first):
        segments = jnp.ones((3, T), jnp.int32)
        begun = steps_of(segments, jnp.ones(3, jnp.int32))[0]
        out, states = run(kind, params, x, begun, state=tuple(first))
        return jnp.sum(out * weights) + jnp.sum(states[-1][:, -1]), (out, states)

    (_, (out, states)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, first)
    module = reference(kind, params)
    begin = [torch.tensor(s[None], requires_grad=True) for s in first]
    their_x = torch.tensor(x, requires_grad=True)
    theirs, last = module(their_x, tuple(begin) if kind == "lstm" else begin[0])
    last = last if kind == "lstm" else (last,)
    ((theirs * torch.tensor(weights)).sum() + last[-1].sum()).backward()

    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(out, theirs.detach())
    for ours, wanted in zip(states, last, strict=True):
        close(ours[:, -1], wanted.detach()[0])
    close(grads[1], their_x.grad)
    for ours, wanted in zip(grads[2], begin, strict=True):
        close(ours, wanted.grad[0])
    for ours, name in (("input", "ih"), ("recurrent", "hh")):
        kernel = np.asarray(grads[0][ours]["kernel"]).transpose(1, 2, 0).reshape(-1, D)
        close(kernel, getattr(module, f"weight_{name}_l0").grad)
        close(grads[0][ours]["bias"].reshape(-1), getattr(module, f"bias_{name}_l0").grad)


PACKED = [1, 1, 1, 1, 1, 2, 2, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_sequences_of_a_row_are_as_if_each_had_its_own(kind):
    params, x = params_of(kind), inputs(1)
    initial = tuple(jnp.asarray(inputs(1, seed=s)) for s in range(CELLS[kind].states))
    weights = jnp.asarray(inputs(1, seed=9))

    def loss(x, initial, begin, end, *segments):
        """Of the columns from `begin` to `end`, as a row of their own."""
        part = lambda a: a[:, begin:end]  # noqa: E731
        out, _ = run(kind, params, part(x), steps(segments), initial=tuple(map(part, initial)))
        return jnp.sum(
            part(weights) * out * jnp.sign(jnp.asarray(segments, jnp.float32))[None, :, None]
        ), out

    both = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    together, out = both(loss)(x, initial, 0, T, *PACKED)
    alone = jax.tree.map(jnp.zeros_like, together)
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        one, own = both(loss)(x, initial, begin, end, *[1] * (end - begin))
        alone = jax.tree.map(jnp.add, alone, one)
        np.testing.assert_allclose(out[:, begin:end], own, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)
    assert all(np.abs(g[:, 5]).min() > 0 for g in together[1]), "initial states do nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_in_front_or_behind_leaves_the_state(kind):
    params, x = params_of(kind), inputs(1)
    out, states = run(kind, params, x[:, 3:8], steps([1] * 5))
    padded, after = run(kind, params, x, steps([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]))
    np.testing.assert_allclose(padded[:, 3:8], out, atol=1e-6)
    for ours, wanted in zip(after, states, strict=True):
        np.testing.assert_allclose(ours[:, -1], wanted[:, -1], atol=1e-6)
        assert not np.any(ours[:, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_after_another_is_the_whole(kind):
    params, x = params_of(kind), inputs(2)
    rows = jnp.asarray([PACKED, [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]], jnp.int32)
    whole, _ = run(kind, params, x, steps(*rows.tolist()))
    state, seen = (jnp.zeros((2, D)),) * CELLS[kind].states, jnp.zeros(2, jnp.int32)
    for t in range(T):
        step, seen = steps_of(rows[:, t : t + 1], seen)
        out, states = run(kind, params, x[:, t : t + 1], step, state=state)
        state = tuple(s[:, 0] for s in states)
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-6)


def test_steps_of_packed_rows():
    got, seen = steps_of(jnp.asarray([[0, 1, 1, 2, 2, 0]]), jnp.asarray([0]))
    assert got.starts.tolist() == [[False, True, False, True, False, False]]
    assert got.real.tolist() == [[False, True, True, True, True, False]]
    assert got.first.tolist() == [[0, 1, 1, 3, 3, 3]]
    assert seen.tolist() == [2]
    assert not np.any(steps_of(jnp.asarray([[0, 2]]), seen)[0].starts)


def masks(segments, key=0):
    """Variational dropout of rows of tokens, as the columns of a batch's second row."""
    tokens = jnp.arange(T, 2 * T, dtype=jnp.uint32)[None]
    return variational(Dropout(jax.random.key(key), tokens), steps(segments))


def test_a_variational_mask_is_the_same_at_all_steps_and_differs_between_sequences():
    mask = np.asarray(masks(PACKED)(jnp.ones((1, T, 64)), 0.5, 1))[0]
    assert set(np.unique(mask)) == {0.0, 2.0}
    for begin, end in ((0, 5), (5, 8)):
        assert (mask[begin:end] == mask[begin]).all()
    assert 16 < (mask[0] != mask[5]).sum() < 48
    other = np.asarray(masks(PACKED, key=1)(jnp.ones((1, T, 64)), 0.5, 1))[0]
    assert 16 < (mask[0] != other[0]).sum() < 48


def test_word_types_are_dropped_throughout_a_sequence():
    tokens = jnp.asarray([[3, 4, 3, 5, 4, 3, 3, 4, 3, 6, 6, 6]])
    segments = [1] * 6 + [2] * 6
    kept = []
    for key in range(64):
        x = masks(segments, key).words(jnp.ones((1, T, D)), tokens, 0.25, WORD_TYPES)[0]
        assert (x == x[:, :1]).all()
        x = x[:, 0]
        assert x[0] == x[2] == x[5] and x[1] == x[4] and x[6] == x[8] and (x[9:] == x[9]).all()
        kept.append([x[0], x[1], x[3], x[6], x[7], x[9]])
    kept = np.array(kept)
    np.testing.assert_allclose(kept.mean(0), 1.0, atol=0.3)
    assert np.abs(np.corrcoef(kept.T) - np.eye(6)).max() < 0.45


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_product_reads_of_the_state_is_dropped(kind):
    """By gradients too: against a loop over steps that autodiff takes apart."""
    params, x = params_of(kind), jnp.asarray(inputs(1))
    dropout = masks(PACKED)
    mask = dropout(jnp.ones((1, T, D)), 0.5, 2)
    weights = jnp.asarray(inputs(1, seed=9))

    def loss(params, x):
        out, _ = run(kind, params, x, steps(PACKED), rate=0.5, dropout=dropout)
        return jnp.sum(out * weights)

    def by_hand(params, x):
        state, total = (jnp.zeros((1, D)),) * CELLS[kind].states, 0.0
        for t, segment in enumerate(PACKED):
            if segment and (t == 0 or segment != PACKED[t - 1]):
                state = tuple(jnp.zeros_like(s) for s in state)
            gates = lambda name, v: (  # noqa: E731
                jnp.einsum("bd,dze->bze", v, params[name]["kernel"]) + params[name]["bias"][None]
            )
            y = gates("recurrent", state[0] * mask[:, t])
            after = CELLS[kind].step(gates("input", x[:, t]), y, state)
            state = after if segment else state
            total = total + jnp.sum(state[0] * weights[:, t])
        return total

    ours, wanted = (jax.value_and_grad(f, (0, 1))(params, x) for f in (loss, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, wanted)
    undropped = run(kind, params, x, steps(PACKED))[0]
    assert abs(float(jnp.sum(undropped * weights)) - float(ours[0])) > 1e-3


def test_the_forget_gate_starts_open():
    module = layer("lstm")
    x = jnp.zeros((1, 1, D))
    params, axes = split_boxes(module.init(jax.random.key(0), x, steps=steps([1]))["params"])
    assert params["input"]["bias"].tolist() == [[0.0] * D, [1.0] * D, [0.0] * D, [0.0] * D]
    assert not np.any(params["recurrent"]["bias"])
    assert axes["recurrent"]["kernel"] == ("embed", None, "mlp")
    gates = layer("gru").init(jax.random.key(0), x, steps=steps([1]))["params"]
    assert not any(np.any(gates[name]["bias"].value) for name in gates)


def test_states_stay_float32_in_bfloat16():
    config = layer("lstm").config
    module = Recurrent(config, jnp.dtype(jnp.bfloat16))
    x = jnp.asarray(inputs(1), jnp.bfloat16)

    def loss(params, x):
        out, states = module.apply({"params": params}, x, steps=steps(PACKED))
        assert out.dtype == jnp.bfloat16 and {s.dtype for s in states} == {jnp.dtype("float32")}
        return jnp.sum(out.astype(jnp.float32)), out

    (dparams, dx), out = jax.grad(loss, (0, 1), has_aux=True)(params_of("lstm"), x)
    assert dx.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(dparams)} == {jnp.dtype("float32")}
    exact = run("lstm", params_of("lstm"), inputs(1), steps(PACKED))[0]
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.05)
