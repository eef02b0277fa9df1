"""What every task makes of its rows, and the loss that all of them share."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.config import TrainConfig
from jaxlm.data.tokens import Row
from jaxlm.losses import Objective, blocked_cross_entropy, usual_block
from jaxlm.models.head import head_params
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.layers import Dropout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of T tokens, int32 [B, T]; `weights` (float32) is 0 where nothing is predicted.

    A target is the next token; to a classifier it is the label of the text, and stands where its
    head reads. With `reads`, targets (hidden tokens) and weights are [B, n].
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    source: Source | None = None
    """What an encoder reads, [B, S]; a segment of the target goes with that of the same number."""
    reads: jax.Array | None = None
    """int32 [B, n]: where the targets' outputs stand; None: at every token."""
    most_segments: int | None = dataclasses.field(default=None, metadata={"static": True})
    """How many segments a row has at most, padding counted; None: not known."""

    @property
    def places(self) -> Places:
        """Where the tokens stand."""
        return Places(self.positions, self.segment_ids, self.most_segments)


def packed_batch(rows: Row) -> Batch:
    """A batch of packed examples (`data.examples.PackedRows`), whose rows have all it needs."""
    source = None
    if "source_tokens" in rows:
        places = Places(rows["source_positions"], rows["source_segment_ids"])
        source = Source(rows["source_tokens"], places)
    names = ("tokens", "targets", "weights", "segment_ids", "positions")
    return Batch(*(rows[name] for name in names), source=source)


def batch_loss(model, params, batch: Batch, config: TrainConfig, dropout: Dropout | None):
    """(The objective as a sum over the batch's targets, `LossSums`, experts' sums of `nn.moe`)."""
    hidden_btd, experts, _ = model.hidden(
        params, batch.tokens, batch.places, dropout, source=batch.source
    )
    if batch.reads is not None:
        # A product, as the partitioner aborts at a gather inside of manual axes.
        is_read_bnt = jax.nn.one_hot(batch.reads, hidden_btd.shape[1], dtype=hidden_btd.dtype)
        hidden_btd = jnp.einsum("bnt,btd->bnd", is_read_bnt, hidden_btd)
    block = config.loss_block or usual_block(len(hidden_btd), model.config.vocab_size)
    objective = Objective(model.logits, block, config.z_loss, config.label_smoothing)
    total, sums = blocked_cross_entropy(
        objective, head_params(model.config, params), hidden_btd, batch.targets, batch.weights
    )
    return total, sums, experts
