"""One layer of a Transformer, whatever it is a layer of."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from jaxlm.model_config import ModelConfig
from jaxlm.nn.attention import Attention, CrossAttention, LayerCache, Places
from jaxlm.nn.layers import ATTENTION_OUTPUT, CROSS, MLP, MLP_OUTPUT, Dropout, residual_norm
from jaxlm.nn.moe import Experts
from jaxlm.sharding import constrain


class Block(nn.Module):
    """Attention, to a source too where there is one, and feed-forward, each around the residual."""

    config: ModelConfig
    local: bool
    dtype: jnp.dtype
    causal: bool = True
    reads_source: bool = False

    @nn.compact
    def __call__(
        self,
        x_btd,
        *,
        dropout: Dropout | None,
        places: Places,
        memory=None,
        cache: LayerCache | None = None,
        **attention_inputs,
    ):
        """Returns ([B, T, D], auxiliary sums, the cache written to).

        `memory` is what a layer reads of the source: (the encoder's output [B, S, D], or None where
        the cache has its keys and values, their places).
        """
        c = self.config
        y, cache = Attention(c, self.local, self.dtype, self.causal, name="attention")(
            self._before(x_btd, "attention_norm"),
            dropout=dropout,
            places=places,
            cache=cache,
            **attention_inputs,
        )
        after = self._add(x_btd, y, "attention_post_norm", dropout, ATTENTION_OUTPUT)
        if self.reads_source:
            drop = None if dropout is None else dropout.layer(CROSS)
            y, read = CrossAttention(c, False, self.dtype, name="cross_attention")(
                self._before(after, "cross_attention_norm"),
                places=places,
                memory=memory,
                dropout=drop,
                cache=cache and cache.source,
            )
            cache = cache and dataclasses.replace(cache, source=read)
            after = self._add(after, y, "cross_attention_post_norm", drop, ATTENTION_OUTPUT)
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
        reads_norm = self.config.norm_placement in ("pre", "pre_post")
        return residual_norm(self.config, norm)(x_btd) if reads_norm else x_btd

    def _add(self, x_btd, y_btd, norm: str, dropout: Dropout | None, site: int):
        """The residual stream with a sub-layer's output."""
        c = self.config
        y_btd = constrain(y_btd, "batch", "residual_length", None)
        if c.norm_placement in ("post", "pre_post"):
            y_btd = residual_norm(c, norm)(y_btd)
        if dropout is not None:
            y_btd = dropout(y_btd, c.dropout, site)
        total_btd = x_btd + y_btd
        return residual_norm(c, norm)(total_btd) if c.norm_placement == "post_sum" else total_btd
