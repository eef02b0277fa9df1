"""Beam search: all of it is one compiled loop, which knows no model."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel import is_split
from jaxlm.sharding import axes_of, mesh_axes


@dataclasses.dataclass(frozen=True)
class Beams:
    """How a beam search goes and what it calls best; the rules are those of `transformers`.

    Of every row the `num_beams` likeliest unfinished texts are kept. Finished ones, at their
    end-of-text or at the longest text allowed, are ranked by

        log P(text) / length ** length_penalty

    where the length counts the end-of-text (Wu et al., 2016, divide by ((5 + length) / 6) ** alpha
    instead). At most `num_beams` finished texts are kept, and a text can only finish while it is
    among the `num_beams` likeliest of its row.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    """When a row whose `num_beams` finished texts are there may stop before the longest text. True:
    at once. False: when the likeliest unfinished text, ranked as if it ended now, is no better
    than the worst finished one. "never": when it could not be at any length, which is exact."""

    def numbers(self) -> dict[str, np.ndarray]:
        """The settings that are traced; `num_beams` alone is compiled for."""
        looks_ahead = self.early_stopping == "never" and self.length_penalty > 0
        return {
            "length_penalty": np.float32(self.length_penalty),
            "stops_when_full": np.bool_(self.early_stopping is True),
            "looks_ahead": np.bool_(looks_ahead),
        }


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished text of a beam search."""

    tokens: list[int]
    """Without the end-of-text."""
    score: float
    """log P(tokens, end-of-text if there is one) / length ** length_penalty, in nats."""


def hypotheses(tokens_kn, lengths_k, scores_k, eos_id: int | None) -> list[Hypothesis]:
    """What `search` found for one row, the best first; there may be fewer than K."""
    found = []
    for tokens, length, score in zip(tokens_kn, lengths_k, scores_k, strict=True):
        if score > -np.inf:
            text = tokens[:length].tolist()
            found.append(Hypothesis(text[:-1] if text[-1] == eos_id else text, float(score)))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """A batch of rows being searched, K beams each, the best first."""

    cache: object
    """Of B K rows."""
    tokens: jax.Array
    """[B, K, N] int32: the unfinished texts so far; behind them, anything."""
    logprobs: jax.Array
    """[B, K] float32: log P of them; -inf is no text."""
    finished: jax.Array
    """[B, K, N] int32."""
    scores: jax.Array
    """[B, K] float32: what finished texts are ranked by; -inf is no text."""
    lengths: jax.Array
    """[B, K] int32: of finished texts."""
    count: jax.Array
    """Tokens that every unfinished text has."""
    closed: jax.Array
    """[B] bool: nothing more will finish in this row."""


def search(log_p_bv, cache, extend: Callable, num_beams: int, capacity: int, settings):
    """Search from the first token's log-probabilities on.

    `cache` is that of the B prompts: a tree whose arrays with dimensions have the rows first.
    `extend(tokens [B K], count, cache)` reads the last of `count` tokens of every text and returns
    (log-probabilities [B K, V], cache). `settings` are (`Beams.numbers`, end-of-text id, the most
    tokens [B] of a text, at most `capacity`).

    Returns the finished texts: tokens [B, K, capacity], lengths and scores [B, K], the best first.
    """
    rows = log_p_bv.shape[0]
    several = lambda x: jnp.repeat(x, num_beams, axis=0) if x.ndim else x  # noqa: E731
    empty = jnp.zeros((rows, num_beams, capacity), jnp.int32)
    nothing = jnp.full((rows, num_beams), -jnp.inf)
    state = BeamState(
        cache=jax.tree.map(several, cache),
        tokens=empty,
        # All beams are the prompt: one of them is enough.
        logprobs=nothing.at[:, 0].set(0.0),
        finished=empty,
        scores=nothing,
        lengths=jnp.zeros((rows, num_beams), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        closed=jnp.zeros((rows,), bool),
    )
    state = _on_own_rows(_advance, state, several(log_p_bv), settings)

    def one(state):
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, 2, keepdims=False)
        log_p, cache = extend(last.reshape(-1), state.count, state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _on_own_rows(_advance, state, log_p, settings)

    state = jax.lax.while_loop(lambda state: ~state.closed.all(), one, state)
    return state.finished, state.lengths, state.scores


def _on_own_rows(advance: Callable, state: BeamState, *inputs) -> BeamState:
    """`advance` on each device's own rows: the compiler would gather the logits of all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = mesh_axes(("batch",), omit=frozenset({"pp", *mesh.manual_axes}))
    if not is_split(axes_of(rows)):
        return advance(state, *inputs)
    specs = jax.tree.map(lambda x: rows if x.ndim else PartitionSpec(), (state, *inputs))
    return jax.shard_map(
        advance, in_specs=specs, out_specs=specs[0], axis_names=axes_of(rows), check_vma=False
    )(state, *inputs)


def _advance(state: BeamState, log_p, settings) -> BeamState:
    """Every row's best continuations by one token: which go on, which finish, whether it closes."""
    numbers, eos_id, limits = settings
    beams, count = state.logprobs.shape[1], state.count + 1
    parents, tokens, logprobs = _candidates(state.logprobs, log_p)
    is_last = (count >= limits)[:, None]
    ends = (tokens == eos_id) | is_last
    texts = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
    texts = jax.lax.dynamic_update_index_in_dim(texts, tokens, state.count, axis=2)

    going, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, logprobs), beams)

    finishes = (ends & ~state.closed[:, None])[:, :beams]
    ranks = logprobs[:, :beams] / _norm(count, numbers)
    scores = jnp.concatenate([state.scores, jnp.where(finishes, ranks, -jnp.inf)], axis=1)
    lengths = jnp.concatenate([state.lengths, jnp.full_like(state.lengths, count)], axis=1)
    scores, best = jax.lax.top_k(scores, beams)

    horizon = jnp.where(numbers["looks_ahead"], limits, count)
    hopeless = going[:, 0] / _norm(horizon, numbers) <= scores[:, -1]
    # One beam is greedy: its text ends where it ends.
    full = (numbers["stops_when_full"] | (beams == 1)) & (scores[:, -1] > -jnp.inf)
    return BeamState(
        cache=_reorder(state.cache, jnp.take_along_axis(parents, kept, axis=1)),
        tokens=jnp.take_along_axis(texts, kept[..., None], axis=1),
        logprobs=going,
        finished=jnp.take_along_axis(
            jnp.concatenate([state.finished, texts[:, :beams]], axis=1), best[..., None], axis=1
        ),
        scores=scores,
        lengths=jnp.take_along_axis(lengths, best, axis=1),
        count=count,
        closed=state.closed | is_last[:, 0] | full | hopeless,
    )


def _candidates(logprobs_bk, log_p):
    """The 2 K likeliest continuations of each row: (parents, tokens, log P), each [B, 2 K].

    As each beam can only end in one way, K of them go on.
    """
    rows, beams = logprobs_bk.shape
    # First within each beam: the vocabulary may be spread over devices.
    each = min(2 * beams, log_p.shape[-1])
    best, tokens = jax.lax.top_k(log_p.reshape(rows, beams, -1), each)
    totals = (logprobs_bk[..., None] + best).reshape(rows, beams * each)
    logprobs, at = jax.lax.top_k(totals, 2 * beams)
    tokens = jnp.take_along_axis(tokens.reshape(totals.shape), at, axis=1)
    return at // each, tokens, logprobs


def _norm(length, numbers: dict):
    return length.astype(jnp.float32) ** numbers["length_penalty"]


def _reorder(cache, parents_bk):
    """The cache with each beam's row that of its parent."""
    rows, beams = parents_bk.shape
    if beams == 1:
        return cache

    def pick(x):
        groups = x.reshape(rows, beams, *x.shape[1:])
        return jax.vmap(lambda group, parents: group[parents])(groups, parents_bk).reshape(x.shape)

    return jax.tree.map(lambda x: pick(x) if x.ndim else x, cache)
