"""What every task makes of its rows, and the loss that all of them share."""

import dataclasses

import jax

from jaxlm.config import TrainConfig
from jaxlm.data.tokens import Row
from jaxlm.losses import LossSums, blocked_cross_entropy
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.layers import Dropout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of T tokens, int32 [B, T]; `weights` (float32) is 0 where nothing is predicted.

    A target is the next token; to a classifier it is the label of the text, and stands where its
    head reads.
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    source: Source | None = None
    """What an encoder reads, [B, S]; a segment of the target goes with that of the same number."""


def packed_batch(rows: Row) -> Batch:
    """A batch of packed examples (`data.examples.PackedRows`), whose rows have all it needs."""
    source = None
    if "source_tokens" in rows:
        places = Places(rows["source_positions"], rows["source_segment_ids"])
        source = Source(rows["source_tokens"], places)
    names = ("tokens", "targets", "weights", "segment_ids", "positions")
    return Batch(*(rows[name] for name in names), source=source)


def loss_sums(
    model, params, batch: Batch, config: TrainConfig, dropout: Dropout | None
) -> tuple[LossSums, dict]:
    """The loss of a batch as sums over its targets, and its experts' sums (`nn.moe.route`)."""
    places = Places(batch.positions, batch.segment_ids)
    hidden_btd, experts, _ = model.hidden(
        params, batch.tokens, places, dropout, source=batch.source
    )
    sums = blocked_cross_entropy(
        hidden_btd,
        lambda hidden: model.logits(params, hidden),
        batch.targets,
        batch.weights,
        config.loss_block,
        smooth=config.label_smoothing > 0,
    )
    return sums, experts
