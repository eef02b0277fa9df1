"""Next-token prediction on packed documents."""

import gzip
import lzma
import math

import numpy as np

from jaxlm.tasks.batch import Batch


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


def loss_metrics(nats: float, targets: float, num_bytes: int | None = None) -> dict[str, float]:
    """What validation reports, from summed nats over a number of targets.

    `num_bytes` is that of the targets' text; None leaves bits per byte out.
    """
    loss = nats / max(targets, 1.0)
    metrics = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}
    if num_bytes is not None:
        metrics["valid_bits_per_byte"] = nats / math.log(2) / max(num_bytes, 1)
    return metrics


def compressed_bits(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on `text`: yardsticks for a model's."""
    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / max(len(text), 1) for name, data in compressed.items()}
