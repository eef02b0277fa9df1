"""The decoder-only Transformer: GPT-2, Llama, Mistral, Qwen and Gemma by its fields."""

import dataclasses

from jaxlm.model_config import ModelConfig
from jaxlm.models.head import head_logits, init_head
from jaxlm.models.trunk import Cache, Trunk
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.layers import POOLED, Dropout
from jaxlm.parallel.pipeline import Schedule


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model P(w1..wn) as a product of P(wi | w1..wi-1). Pure: parameters are given.

    With `labels` it is a classifier instead, whose head reads the last token's output.
    """

    config: ModelConfig
    schedule: Schedule = Schedule()  # noqa: RUF009
    """How stacked layers run as a pipeline."""
    stacks = ("layers",)
    """Names of the parameters that are stacked by layer."""

    def __post_init__(self):
        self._trunk()

    @property
    def dtype(self):
        """The compute type; parameters and logits are float32."""
        return self._trunk().dtype

    def init(self, key):
        """Random parameters, float32, each boxed with its logical axes."""
        trunk = self._trunk()
        params = trunk.init(key)
        table_vd = params["embed"]["embedding"].value
        return params | init_head(self.config, self.dtype, trunk.keys(key)["head"], table_vd)

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
        if source is not None:
            raise ValueError("a decoder alone reads no source")
        x, sums, cache = self._trunk().run(params, tokens_bt, places, dropout, cache)
        if self.config.labels is not None and dropout is not None:
            x = dropout(x, self.config.dropout, POOLED)
        return x, sums, cache

    def logits(self, params, hidden_btd):
        """Logits [B, T, V], float32; of a classifier [B, T, number of labels]."""
        return head_logits(self.config, self.dtype, params, hidden_btd)

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> Cache:
        """An empty cache of `length` slots for each of `rows` rows, laid out over the mesh."""
        return self._trunk().init_cache(rows, length)

    def _trunk(self) -> Trunk:
        return Trunk(self.config, self.config.num_layers, self.schedule)
