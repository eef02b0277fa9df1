"""From tokens to the last layer's output: what every Transformer here is made of."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.models.block import Block
from jaxlm.models.stack import init_stack, run_stack
from jaxlm.nn.attention import LayerCache, Places, constrain_cache
from jaxlm.nn.flash import segments_of
from jaxlm.nn.layers import EMBEDDING, WORDS, Dropout, Embed, residual_norm
from jaxlm.nn.positions import RelativeBias, rope_turns, sinusoids
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import constrain

# Each draws its parameters from a key of its own. To add one at the end leaves the others' as they
# were.
PARTS = ("embed", "layers", "positions", "head", "relative_bias", "token_types")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model has read: keys and values by layer, and where each of S slots stands."""

    layers: tuple[LayerCache, ...]
    places: Places
    """Positions and segments [B, S]; segment 0 is an empty slot."""
    used: jax.Array
    """Slots written so far, the same in every row."""
    source: Places | None = None
    """Those of the source's tokens, in a model that reads one."""


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Embeddings, layers and the final norm. Pure: parameters are given.

    Its parameters are `embed`, `layers`, `final_norm` (but of norm_placement=post_sum) and, where
    the config asks for them, `positions`, `relative_bias`, `embedding_norm` and `token_types`.
    """

    config: ModelConfig
    num_layers: int
    schedule: Schedule = Schedule()  # noqa: RUF009
    causal: bool = True
    reads_source: bool = False
    """Every layer attends to a source, too."""

    def __post_init__(self):
        if self.config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or take the tokenizer's size")

    @property
    def dtype(self):
        """The compute type; parameters and logits are float32."""
        return compute_dtype(self.config)

    def keys(self, key) -> dict:
        """The key that each part of a model is drawn from, the head included."""
        return dict(zip(PARTS, jax.random.split(key, len(PARTS)), strict=True))

    def init(self, key) -> dict:
        """Random parameters, float32, each boxed with its logical axes."""
        c, keys = self.config, self.keys(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.d_model), self.dtype)
        places = Places(tokens)
        inputs = {"places": places, "turns": self._turns(places)[0], "memory": (x, places)}

        def block(key):
            return self._block(False).init(key, x, dropout=None, **inputs)["params"]

        params = {
            "embed": self._embed().init(keys["embed"], tokens)["params"],
            "layers": init_stack(block, keys["layers"], self.num_layers),
        }
        if c.norm_placement != "post_sum":
            params["final_norm"] = self._norm().init(key, x)["params"]
        if c.positions == "learned":
            params["positions"] = self._positions().init(keys["positions"], tokens)["params"]
        if c.positions == "relative":
            bias = RelativeBias(c, self.causal)
            params["relative_bias"] = bias.init(keys["relative_bias"], places, places)["params"]
        if c.embedding_norm:
            params["embedding_norm"] = self._norm().init(key, x)["params"]
        if c.token_types:
            params["token_types"] = self._token_types().init(keys["token_types"], tokens)["params"]
        return params

    def run(
        self,
        params,
        tokens_bt,
        places: Places,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        memory=None,
    ):
        """The last layer's normalised output [B, T, D]; returns (it, sums, the cache, extended).

        The sums are those of mixtures of experts (`nn.moe.route`), stacked by layer as they are
        stored. `params["layers"]` is stacked, or, as a cache needs it, unstacked. `memory` is what
        layers read of a source, as `Block` takes it.
        """
        c = self.config
        x = self._embedded(params, tokens_bt, places, dropout)
        keys, inputs = places, {}
        if cache is not None:
            cache = _note_places(cache, places)
            keys = cache.places
            inputs = {"slot": cache.used - tokens_bt.shape[1], "cached": keys}
        if c.positions == "relative":
            bias = RelativeBias(c, self.causal)
            inputs["bias_bnts"] = bias.apply({"params": params["relative_bias"]}, places, keys)

        def apply(kind, layer_params, x, rows, layer, layer_cache):
            places, tokens, memory = rows
            local = c.layer_pattern[kind] == "local"
            masks = None if dropout is None else Dropout(dropout.key, tokens).layer(layer + 1)
            return self._block(local).apply(
                {"params": layer_params},
                x,
                dropout=masks,
                places=places,
                turns=self._turns(places)[local],
                memory=memory,
                cache=layer_cache,
                **inputs,
            )

        x, sums, written = run_stack(
            apply,
            params["layers"],
            x,
            (places, None if dropout is None else dropout.tokens, memory),
            period=len(c.layer_pattern),
            mode=c.stack,
            remat=c.remat,
            schedule=self.schedule,
            caches=None if cache is None else cache.layers,
        )
        if c.norm_placement != "post_sum":
            x = self._norm().apply({"params": params["final_norm"]}, x)
        return x, sums, cache and dataclasses.replace(cache, layers=written)

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> Cache:
        """An empty cache of `length` slots for each of `rows` rows, laid out over the mesh.

        With layers that read a source it has `source_length` slots for that.
        """
        c = self.config

        def layer(length):
            shapes = (c.head_size, length), (length, c.head_size)
            empty = (jnp.zeros((rows, c.kv_heads, *shape), self.dtype) for shape in shapes)
            return LayerCache(*map(constrain_cache, empty))

        def slots(length):
            return Places(*(jnp.zeros((rows, length), jnp.int32),) * 2)

        one, source = layer(length), None
        if self.reads_source:
            one = dataclasses.replace(one, source=layer(source_length))
            source = slots(source_length)
        return Cache((one,) * self.num_layers, slots(length), jnp.zeros((), jnp.int32), source)

    def _embedded(self, params, tokens_bt, places: Places, dropout: Dropout | None):
        """What the first layer reads, [B, T, D]."""
        c = self.config
        x = self._embed().apply({"params": params["embed"]}, tokens_bt)
        if dropout is not None:
            x = dropout.of_texts(places.positions).words(x, tokens_bt, c.word_dropout, WORDS)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.d_model**0.5, x.dtype)
        if c.token_types:
            first = params["token_types"]["embedding"][0].astype(x.dtype)
            x = x + jnp.broadcast_to(first, x.shape)
        if c.positions == "learned":
            at = places.positions + c.position_offset
            x = x + self._positions().apply({"params": params["positions"]}, at)
        if c.positions == "sinusoidal":
            x = x + sinusoids(places.positions, c.d_model).astype(x.dtype)
        x = constrain(x, "batch", "residual_length", None)
        if c.embedding_norm:
            x = self._norm().apply({"params": params["embedding_norm"]}, x)
        return x if dropout is None else dropout(x, c.dropout, EMBEDDING)

    def _turns(self, places: Places):
        """Rotary turns of (global, local) layers, or (None, None)."""
        c = self.config
        if c.positions != "rotary":
            return None, None
        positions, size = places.positions, c.rotary_size
        everywhere = rope_turns(positions, size, c.rope_theta, c.rope_scaling)
        if c.rope_local_theta is None:
            return everywhere, everywhere
        return everywhere, rope_turns(positions, size, c.rope_local_theta, None)

    def _block(self, local: bool):
        return Block(self.config, local, self.dtype, self.causal, self.reads_source)

    def _embed(self):
        return Embed(self.config.vocab_size, self.config, self.dtype)

    def _positions(self):
        entries = self.config.max_seq_len + self.config.position_offset
        return Embed(entries, self.config, self.dtype, axis=None)

    def _token_types(self):
        return Embed(self.config.token_types, self.config, self.dtype, axis=None)

    def _norm(self):
        return residual_norm(self.config, None)


def compute_dtype(config: ModelConfig):
    """The type matrices are multiplied in: bfloat16 on GPU and float32 on CPU, unless set."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def _note_places(cache: Cache, places: Places) -> Cache:
    """The cache with the new tokens' places written behind those it has."""
    written = Places(
        jax.lax.dynamic_update_slice(cache.places.positions, places.positions, (0, cache.used)),
        jax.lax.dynamic_update_slice(cache.places.segments, segments_of(places), (0, cache.used)),
    )
    used = cache.used + places.positions.shape[1]
    return dataclasses.replace(cache, places=written, used=used)
