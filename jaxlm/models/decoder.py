"""The decoder-only Transformer: GPT-2, Llama, Mistral, Qwen and Gemma by its fields."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.models.stack import init_stack, run_stack
from jaxlm.nn.attention import Attention, LayerCache, Places, Source, constrain_cache
from jaxlm.nn.layers import (
    ATTENTION_OUTPUT,
    EMBEDDING,
    MLP,
    MLP_OUTPUT,
    Dense,
    Dropout,
    Embed,
    residual_norm,
    rope_angles,
)
from jaxlm.nn.moe import Experts
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import constrain


class Block(nn.Module):
    """One layer: attention and feed-forward, each around the residual stream."""

    config: ModelConfig
    local: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_btd, *, dropout: Dropout | None, places: Places, **attention_inputs):
        """Returns ([B, T, D], auxiliary sums, the cache written to)."""
        c = self.config
        y, cache = Attention(c, self.local, self.dtype, name="attention")(
            self._before(x_btd, "attention_norm"),
            dropout=dropout,
            places=places,
            **attention_inputs,
        )
        after = self._add(x_btd, y, "attention_post_norm", dropout, ATTENTION_OUTPUT)
        y = self._before(x_btd if c.parallel_residual else after, "mlp_norm")
        sums = {}
        if c.experts is None:
            y = MLP(c, self.dtype, name="mlp")(y)
        else:
            is_token = jnp.ones_like(places.positions, bool)
            if places.segments is not None:
                is_token = places.segments > 0
            y, sums = Experts(c, self.dtype, name="mlp")(y, is_token)
        return self._add(after, y, "mlp_post_norm", dropout, MLP_OUTPUT), sums, cache

    def _before(self, x_btd, norm: str):
        """What a sub-layer reads of the residual stream."""
        return (
            x_btd
            if self.config.norm_placement == "post"
            else residual_norm(self.config, norm)(x_btd)
        )

    def _add(self, x_btd, y_btd, norm: str, dropout: Dropout | None, site: int):
        y_btd = constrain(y_btd, "batch", "residual_length", None)
        if self.config.norm_placement != "pre":
            y_btd = residual_norm(self.config, norm)(y_btd)
        if dropout is not None:
            y_btd = dropout(y_btd, self.config.dropout, site)
        return x_btd + y_btd


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder has read: keys and values by layer, and where each of S slots stands."""

    layers: tuple[LayerCache, ...]
    places: Places
    """Positions and segments [B, S]; segment 0 is an empty slot."""
    used: jax.Array
    """Slots written so far, the same in every row."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model P(w1..wn) as a product of P(wi | w1..wi-1). Pure: parameters are given."""

    config: ModelConfig
    schedule: Schedule = Schedule()  # noqa: RUF009
    """How stacked layers run as a pipeline."""
    stacks = ("layers",)
    """Names of the parameters that are stacked by layer."""

    def __post_init__(self):
        if self.config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or take the tokenizer's size")

    @property
    def dtype(self):
        """The compute type; parameters and logits are float32."""
        return compute_dtype(self.config)

    def init(self, key):
        """Random parameters, float32, each boxed with its logical axes."""
        c = self.config
        tokens = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.d_model), self.dtype)
        places = Places(tokens)
        angles = self._angles(places)[0]

        def block(key):
            module = Block(c, False, self.dtype)
            return module.init(key, x, dropout=None, places=places, angles=angles)["params"]

        keys = dict(
            zip(("embed", "layers", "positions", "head"), jax.random.split(key, 4), strict=True)
        )
        params = {
            "embed": self._embed().init(keys["embed"], tokens)["params"],
            "layers": init_stack(block, keys["layers"], c.num_layers),
            "final_norm": self._final_norm().init(key, x)["params"],
        }
        if c.positions == "learned":
            params["positions"] = self._positions().init(keys["positions"], tokens)["params"]
        if not c.tie_embeddings:
            params["head"] = self._head().init(keys["head"], x)["params"]
        return params

    def hidden(
        self,
        params,
        tokens_bt,
        places: Places,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        source: Source | None = None,
    ):
        """The last layer's normalised output [B, T, D]; returns (it, sums, the cache, extended).

        The sums are those of mixtures of experts (`nn.moe.route`), stacked by layer as they are
        stored. `params["layers"]` is stacked, or, as a cache needs it, unstacked.
        """
        c = self.config
        if source is not None:
            raise ValueError("a decoder alone reads no source")
        x = self._embed().apply({"params": params["embed"]}, tokens_bt)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.d_model**0.5, x.dtype)
        if c.positions == "learned":
            x = x + self._positions().apply({"params": params["positions"]}, places.positions)
        x = constrain(x, "batch", "residual_length", None)
        if dropout is not None:
            x = dropout(x, c.dropout, EMBEDDING)
        inputs = {}
        if cache is not None:
            cache = _note_places(cache, places)
            inputs = {"slot": cache.used - tokens_bt.shape[1], "cached": cache.places}

        def apply(kind, layer_params, x, rows, layer, layer_cache):
            places, tokens = rows
            local = c.layer_pattern[kind] == "local"
            masks = None if dropout is None else Dropout(dropout.key, tokens).layer(layer + 1)
            return Block(c, local, self.dtype).apply(
                {"params": layer_params},
                x,
                dropout=masks,
                places=places,
                angles=self._angles(places)[local],
                cache=layer_cache,
                **inputs,
            )

        x, sums, written = run_stack(
            apply,
            params["layers"],
            x,
            (places, None if dropout is None else dropout.tokens),
            period=len(c.layer_pattern),
            mode=c.stack,
            remat=c.remat,
            schedule=self.schedule,
            caches=None if cache is None else cache.layers,
        )
        x = self._final_norm().apply({"params": params["final_norm"]}, x)
        return x, sums, cache and dataclasses.replace(cache, layers=written)

    def logits(self, params, hidden_btd):
        """Logits [B, T, V], float32."""
        c = self.config
        if c.tie_embeddings:
            table_vd = params["embed"]["embedding"].astype(self.dtype)
            logits_btv = jnp.einsum(
                "btd,vd->btv", hidden_btd, table_vd, preferred_element_type=jnp.float32
            )
        else:
            kernel_dv = params["head"]["kernel"].astype(self.dtype)
            logits_btv = jnp.einsum(
                "btd,dv->btv", hidden_btd, kernel_dv, preferred_element_type=jnp.float32
            )
        logits_btv = constrain(logits_btv, "batch", "length", "vocab")
        if c.logit_softcap is not None:
            logits_btv = c.logit_softcap * jnp.tanh(logits_btv / c.logit_softcap)
        return logits_btv

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> Cache:
        """An empty cache of `length` slots for each of `rows` rows, laid out over the mesh."""
        c = self.config
        empty = constrain_cache(jnp.zeros((rows, length, c.kv_heads, c.head_size), self.dtype))
        slots = jnp.zeros((rows, length), jnp.int32)
        layers = tuple(LayerCache(empty, empty) for _ in range(c.num_layers))
        return Cache(layers, Places(slots, slots), jnp.zeros((), jnp.int32))

    def _angles(self, places: Places):
        """Rotary angles of (global, local) layers, or (None, None)."""
        c = self.config
        if c.positions != "rotary":
            return None, None
        positions, size = places.positions, c.rotary_size
        everywhere = rope_angles(positions, size, c.rope_theta, c.rope_scaling)
        if c.rope_local_theta is None:
            return everywhere, everywhere
        return everywhere, rope_angles(positions, size, c.rope_local_theta, None)

    def _embed(self):
        return Embed(self.config.vocab_size, self.config, self.dtype)

    def _positions(self):
        return Embed(self.config.max_seq_len, self.config, self.dtype, axis=None)

    def _final_norm(self):
        return residual_norm(self.config, None)

    def _head(self):
        c = self.config
        return Dense((c.vocab_size,), ("embed", "vocab"), self.dtype, c.init_mean, c.init_std)


def compute_dtype(config: ModelConfig):
    """The type matrices are multiplied in: bfloat16 on GPU and float32 on CPU, unless set."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def _note_places(cache: Cache, places: Places) -> Cache:
    """The cache with the new tokens' places written behind those it has."""
    segments = jnp.ones_like(places.positions) if places.segments is None else places.segments
    written = Places(
        jax.lax.dynamic_update_slice(cache.places.positions, places.positions, (0, cache.used)),
        jax.lax.dynamic_update_slice(cache.places.segments, segments, (0, cache.used)),
    )
    used = cache.used + places.positions.shape[1]
    return dataclasses.replace(cache, places=written, used=used)
