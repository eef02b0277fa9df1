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
