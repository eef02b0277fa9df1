"""Next-token prediction on packed documents."""

import dataclasses
import gzip
import lzma
import math

import jax
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.losses import LossSums, blocked_cross_entropy
from jaxlm.nn.attention import Places
from jaxlm.nn.layers import Dropout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of T tokens, int32 [B, T]; `weights` (float32) is 0 where nothing is predicted."""

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def make_batch(rows: dict[str, np.ndarray]) -> Batch:
    """A batch of rows of T + 1 tokens: each token predicts the next of its own document."""
    tokens, segments = rows["tokens"], rows["segment_ids"]
    same_document = segments[:, 1:] == segments[:, :-1]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(same_document & (segments[:, 1:] > 0)).astype(np.float32),
        segment_ids=segments[:, :-1],
        positions=rows["positions"][:, :-1],
    )


def loss_sums(
    model, params, batch: Batch, config: TrainConfig, dropout: Dropout | None
) -> tuple[LossSums, dict]:
    """The loss of a batch as sums over its targets, and its experts' sums (`nn.moe.route`)."""
    places = Places(batch.positions, batch.segment_ids)
    hidden_btd, experts, _ = model.hidden(params, batch.tokens, places, dropout)
    sums = blocked_cross_entropy(
        hidden_btd,
        lambda hidden: model.logits(params, hidden),
        batch.targets,
        batch.weights,
        config.loss_block,
    )
    return sums, experts


def validation_metrics(nats: float, targets: float, bytes_per_target: float) -> dict[str, float]:
    """What validation reports, from summed nats over a number of targets."""
    loss = nats / max(targets, 1.0)
    return {
        "valid_loss": loss,
        "valid_perplexity": math.exp(min(loss, 700.0)),
        "valid_bits_per_byte": loss / math.log(2) / bytes_per_target,
    }


def compressed_bits(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on `text`: yardsticks for a model's."""
    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / max(len(text), 1) for name, data in compressed.items()}
