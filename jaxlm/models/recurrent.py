"""Recurrent language models, and sequence to sequence with them: RNN, GRU and LSTM."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.models.head import head_logits, init_head
from jaxlm.models.stack import init_stack, run_stack
from jaxlm.models.trunk import compute_dtype
from jaxlm.nn.attention import Places, Source, attention
from jaxlm.nn.flash import segments_of
from jaxlm.nn.layers import Dense, Dropout, Embed
from jaxlm.nn.recurrent import (
    CELLS,
    LAYER_INPUT,
    OUTPUT,
    WORD_TYPES,
    Recurrent,
    Steps,
    steps_of,
    variational,
)
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What attention reads of a source: the encoder's outputs [B, S, D] and segments [B, S]."""

    outputs: jax.Array
    segments: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a recurrent model has read."""

    layers: tuple
    """Each layer's state, a tuple of float32 [B, D]."""
    segments: jax.Array
    """[B]: the segment of the last token; 0 before the first."""
    memory: Memory | None
    """Of the source, where the model attends to it."""


@dataclasses.dataclass(frozen=True)
class RecurrentModel:
    """P(w1..wn), or P(target | source), token by token from a state. Pure: parameters are given.

    A language model is a stack of layers between an embedding and a head (Mikolov et al., 2010;
    Zaremba et al., 2014). With `encoder_layers` it is sequence to sequence (Sutskever et al.,
    2014): the state in which a stack like it ends a source's segment is the one the target's
    segment of the same number begins with. `source_attention` adds the global attention with dot
    products of Luong et al. (2015). Dropout is Gal and Ghahramani's (2016).
    """

    config: ModelConfig
    schedule: Schedule = Schedule()  # noqa: RUF009
    """How stacked layers run as a pipeline; there is none for these models."""

    def __post_init__(self):
        if self.config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or take the tokenizer's size")

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the parameters that are stacked by layer."""
        return ("encoder_layers", "layers") if self.config.reads_source else ("layers",)

    @property
    def dtype(self):
        """The type matrices are multiplied in; parameters, states and logits are float32."""
        return compute_dtype(self.config)

    def init(self, key):
        """Random parameters, float32, each boxed with its logical axes."""
        c = self.config
        tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, c.d_model), self.dtype)
        steps, _ = steps_of(tokens, tokens[:, 0])
        names = "embed", "layers", "encoder_layers", "source_attention", "head"
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

        def layer(key):
            return Recurrent(c, self.dtype).init(key, x, steps=steps)["params"]

        params = {"embed": self._embed().init(keys["embed"], tokens)["params"]}
        params |= {name: init_stack(layer, keys[name], c.num_layers) for name in self.stacks}
        if c.source_attention:
            both = jnp.concatenate([x, x], -1)
            attend = self._combine().init(keys["source_attention"], both)
            params["source_attention"] = attend["params"]
        table_vd = params["embed"]["embedding"].value
        return params | init_head(c, self.dtype, keys["head"], table_vd)

    def hidden(
        self,
        params,
        tokens_bt,
        places: Places,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        source: Source | None = None,
    ):
        """What the head reads, [B, T, D]; returns (it, {}, the cache, extended).

        With a cache `source` is given once, with the target's first tokens. Stacks of parameters
        are stacked, or, as a cache needs it, unstacked.
        """
        c, segments_bt = self.config, segments_of(places)
        memory, initial = None if cache is None else cache.memory, None
        if source is not None and not c.reads_source:
            raise ValueError("a recurrent model without an encoder reads no source")
        if source is not None:
            memory, initial = self._encode(params, source, segments_bt, dropout)
        elif c.reads_source and cache is None:
            raise ValueError("a model with an encoder and no cache needs a source")
        before = jnp.zeros_like(segments_bt[:, 0]) if cache is None else cache.segments
        steps, after = steps_of(segments_bt, before)
        dropout = dropout and variational(dropout, steps)
        caches = cache and cache.layers
        x, _, states = self._run(
            params, "layers", tokens_bt, steps, dropout, initial=initial, caches=caches
        )
        if c.source_attention:
            x = self._attend(params, x, places, memory)
        if dropout is not None:
            x = dropout(x, c.dropout, OUTPUT)
        return x, {}, cache and Cache(states, after, memory)

    def logits(self, params, hidden_btd):
        """Logits [B, T, V], float32."""
        return head_logits(self.config, self.dtype, params, hidden_btd)

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> Cache:
        """The cache before the first token; a state is as large after any `length` of them."""
        c = self.config
        state = (constrain(jnp.zeros((rows, c.d_model)), "batch", "mlp"),) * CELLS[c.kind].states
        memory = None
        if c.source_attention:
            outputs = jnp.zeros((rows, source_length, c.d_model), self.dtype)
            memory = Memory(outputs, jnp.zeros((rows, source_length), jnp.int32))
        return Cache((state,) * c.num_layers, jnp.zeros(rows, jnp.int32), memory)

    def _run(
        self,
        params,
        name: str,
        tokens_bt,
        steps: Steps,
        dropout: Dropout | None,
        *,
        initial=None,
        ends_bt=None,
        caches=None,
    ):
        """Embed tokens and run a stack; returns (x [B, T, D], states by layer, the last states).

        `initial` are the states by layer that sequences start with, [L, B, T, D]. The states by
        layer that are returned are those after the columns `ends_bt`, if that is given.
        """
        c = self.config
        x = self._embed().apply({"params": params["embed"]}, tokens_bt)
        if dropout is not None:
            x = dropout.words(x, tokens_bt, c.word_dropout, WORD_TYPES)

        def apply(kind, layer, x, rows, index, state):
            steps, places, ends = rows
            masks = None if places is None else Dropout(dropout.key, places).layer(index + 1)
            if masks is not None:
                x = masks(x, c.dropout, LAYER_INPUT)
            x, states = Recurrent(c, self.dtype).apply(
                {"params": layer["params"]},
                x,
                steps=steps,
                state=state,
                initial=layer["initial"],
                dropout=masks,
            )
            picked = None if ends is None else tuple(_take(s, ends) for s in states)
            return x, picked, tuple(s[:, -1] for s in states)

        rows = steps, dropout and dropout.tokens, ends_bt
        options = {"period": 1, "mode": c.stack, "remat": c.remat, "schedule": self.schedule}
        layers = _zipped(params[name], initial)
        return run_stack(apply, layers, x, rows, caches=caches, **options)

    def _encode(self, params, source: Source, segments_bt, dropout: Dropout | None):
        """What attention reads of a source, and what each target token's segment starts with.

        Returns (Memory or None, states by layer [L, B, T, D]); without a source they are zeros.
        """
        tokens_bs, segments_bs = source.tokens, segments_of(source.places)
        if self.config.reverse_source:
            tokens_bs = reverse_segments(tokens_bs, segments_bs)
        steps, _ = steps_of(segments_bs, jnp.zeros_like(segments_bs[:, 0]))
        dropout = dropout and variational(dropout.of_encoder(), steps)
        same_bts = segments_bt[:, :, None] == segments_bs[:, None, :]
        columns = jnp.arange(segments_bs.shape[1])[None, None, :]
        ends_bt = jnp.where(same_bts, columns, -1).max(-1)
        x, initial, _ = self._run(
            params, "encoder_layers", tokens_bs, steps, dropout, ends_bt=ends_bt
        )
        memory = Memory(x, segments_bs) if self.config.source_attention else None
        return memory, initial

    def _attend(self, params, x_btd, places: Places, memory: Memory):
        """tanh(W [context; x]), the context being what dot products with x choose of a memory."""
        keys = Places(jnp.zeros_like(memory.segments), memory.segments)
        queries = Places(places.positions, segments_of(places))
        values = memory.outputs[:, :, None].astype(self.dtype)
        context = attention(
            x_btd[:, :, None], values, values, queries=queries, keys=keys, scale=1.0, causal=False
        )
        both = jnp.concatenate([context[:, :, 0], x_btd], axis=-1)
        return jnp.tanh(self._combine().apply({"params": params["source_attention"]}, both))

    def _embed(self):
        return Embed(self.config.vocab_size, self.config, self.dtype)

    def _combine(self):
        c = self.config
        return Dense((c.d_model,), ("embed", None), self.dtype, c.init_mean, c.init_std)


def reverse_segments(tokens_bs, segments_bs):
    """The tokens of each segment in reverse order (Sutskever et al., 2014), at its columns."""
    columns = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)
    differs = segments_bs[:, 1:] != segments_bs[:, :-1]
    edge = jnp.ones_like(segments_bs[:, :1], bool)
    begins, ends = (jnp.concatenate(x, 1) for x in ((edge, differs), (differs, edge)))
    first = jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, columns, columns.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(tokens_bs, first + last - columns, axis=1)


def _take(states_bsd, columns_bt):
    """States [B, T, D] after the columns, zeros where a column is negative."""
    taken = jnp.take_along_axis(states_bsd, jnp.maximum(columns_bt, 0)[:, :, None], axis=1)
    return jnp.where(columns_bt[:, :, None] >= 0, taken, jnp.zeros_like(taken))


def _zipped(layers, initial):
    """Each layer's parameters with the states it starts with, stacked or not as the layers are."""
    if not isinstance(layers, tuple):
        return {"params": layers, "initial": initial}
    initials = [jax.tree.map(lambda s, i=i: s[i], initial) for i in range(len(layers))]
    return tuple({"params": p, "initial": s} for p, s in zip(layers, initials, strict=True))
