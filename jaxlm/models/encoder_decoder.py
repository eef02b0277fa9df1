"""The Transformer as it was first: an encoder of a source and a decoder that attends to it.

Marian and T5 by its fields, and "Attention Is All You Need" (Vaswani et al., 2017).
"""

import dataclasses

import jax

from jaxlm.model_config import ModelConfig
from jaxlm.models.head import head_logits, init_head
from jaxlm.models.trunk import Cache, Trunk
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.flash import segments_of
from jaxlm.nn.layers import ENCODER, Dropout
from jaxlm.parallel.pipeline import Schedule

PREFIX = "encoder_"


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """P(target | source) as a product over the target's tokens. Pure: parameters are given.

    The decoder's parameters are named as in `Decoder`, and `layers` have a `cross_attention`. The
    encoder's have the same names with `encoder_` before them; `embed` is common to both.
    """

    config: ModelConfig
    schedule: Schedule = Schedule()  # noqa: RUF009
    """How stacked layers run as a pipeline; there is none for these models."""
    stacks = ("encoder_layers", "layers")
    """Names of the parameters that are stacked by layer."""

    def __post_init__(self):
        self._decoder()

    @property
    def dtype(self):
        """The compute type; parameters and logits are float32."""
        return self._decoder().dtype

    def init(self, key):
        """Random parameters, float32, each boxed with its logical axes."""
        decoder = self._decoder()
        params = decoder.init(key)
        table_vd = params["embed"]["embedding"].value
        encoder = self._encoder().init(jax.random.fold_in(key, ENCODER))
        encoder = {PREFIX + name: part for name, part in encoder.items() if name != "embed"}
        head = init_head(self.config, self.dtype, decoder.keys(key)["head"], table_vd)
        return encoder | params | head

    def hidden(
        self,
        params,
        tokens_bt,
        places: Places,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        source: Source | None = None,
    ):
        """The decoder's normalised output [B, T, D]; returns (it, sums, the cache, extended).

        `source` is what the target is of. With a cache it is given once, with the target's first
        tokens: the cache then has each layer's keys and values of it, and its places. Both stacks
        are stacked, or, as a cache needs it, unstacked.
        """
        if source is not None:
            memory = self.encode(params, source, dropout), source.places
        elif cache is not None:
            memory = None, cache.source
        else:
            raise ValueError("an encoder-decoder without a cache needs a source")
        if cache is not None and source is not None:
            read = Places(source.places.positions, segments_of(source.places))
            cache = dataclasses.replace(cache, source=read)
        x, _, cache = self._decoder().run(params, tokens_bt, places, dropout, cache, memory)
        return x, {}, cache

    def encode(self, params, source: Source, dropout: Dropout | None = None):
        """The encoder's normalised output [B, S, D]."""
        own = {
            name.removeprefix(PREFIX): part
            for name, part in params.items()
            if name.startswith(PREFIX)
        }
        drop = None if dropout is None else dropout.of_encoder()
        own["embed"] = params["embed"]
        return self._encoder().run(own, source.tokens, source.places, drop)[0]

    def logits(self, params, hidden_btd):
        """Logits [B, T, V], float32."""
        return head_logits(self.config, self.dtype, params, hidden_btd)

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> Cache:
        """An empty cache of `length` target slots and `source_length` source slots a row."""
        return self._decoder().init_cache(rows, length, source_length)

    def _encoder(self) -> Trunk:
        return Trunk(self.config, self.config.source_layers, causal=False)

    def _decoder(self) -> Trunk:
        return Trunk(self.config, self.config.num_layers, reads_source=True)
