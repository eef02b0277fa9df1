"""The bidirectional encoder: BERT and RoBERTa by its fields, to classify, or to predict tokens."""

import dataclasses

import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.models.head import head_logits, init_head
from jaxlm.models.trunk import Trunk
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.flash import segments_of
from jaxlm.nn.layers import POOLED, Dropout
from jaxlm.parallel.pipeline import Schedule
from jaxlm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A reader of texts (Devlin et al., 2019). Pure: parameters are given.

    Its parameters are the trunk's and, with `labels` or a `pooler`, a `classifier`; without, its
    logits are those of the vocabulary, by the table of the embeddings.
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
        if self.config.labels is None and not self.config.pooler:
            return params
        return params | init_head(self.config, self.dtype, trunk.keys(key)["head"], None)

    def hidden(
        self,
        params,
        tokens_bt,
        places: Places,
        dropout: Dropout | None = None,
        cache: None = None,
        source: Source | None = None,
    ):
        """(hidden [B, T, D], the sums of mixtures of experts, None).

        That is the last layer's output. Of a classifier, a text's first token has what its head
        reads or, with pooling=mean, every token, which is the mean over its text.
        """
        if cache is not None or source is not None:
            raise ValueError("an encoder alone has no cache and reads no source")
        x, sums, _ = self._trunk().run(params, tokens_bt, places, dropout)
        if self.config.labels is None:
            return x, sums, None
        if self.config.pools == "mean":
            x = mean_by_segment(x, segments_of(places))
        if dropout is not None:
            x = dropout(x, self.config.dropout, POOLED)
        return x, sums, None

    def logits(self, params, hidden_btd):
        """Logits of the labels, or of the vocabulary, [B, T, V], float32, for every position."""
        return head_logits(self.config, self.dtype, params, hidden_btd)

    def init_cache(self, rows: int, length: int, source_length: int = 0):
        """Nothing to keep: an encoder reads a text at once, and raises UserError."""
        raise UserError("model.kind=encoder reads whole texts and generates none: use a decoder")

    def _trunk(self) -> Trunk:
        return Trunk(self.config, self.config.num_layers, self.schedule, causal=False)


def mean_by_segment(x_btd, segments_bt):
    """At every position of [B, T, D] the mean over its segment, summed in float32."""
    same_bts = (segments_bt[:, :, None] == segments_bt[:, None, :]).astype(jnp.float32)
    sums_btd = jnp.einsum("bts,bsd->btd", same_bts, x_btd, preferred_element_type=jnp.float32)
    means_btd = sums_btd / same_bts.sum(-1, keepdims=True)
    return constrain(means_btd.astype(x_btd.dtype), "batch", "residual_length", None)
