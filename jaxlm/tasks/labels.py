"""How well a classifier does: sums that add up over batches and devices, and what they come to."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses import token_nll
from jaxlm.tasks.batch import Batch

CALIBRATION_BINS = 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelSums:
    """Of a number of texts, each counted once whatever its class weighs in the loss."""

    nats: jax.Array
    """Cross-entropy, summed."""
    confusion: jax.Array
    """[C, C]: texts by their label and by what was predicted."""
    bins: jax.Array
    """[3, CALIBRATION_BINS]: by the probability of the predicted label, the number of texts, the
    sum of those probabilities, and the number that are right."""


def label_sums(model, params, batch: Batch) -> LabelSums:
    """Run a classifier on a batch."""
    hidden_btd, *_ = model.hidden(params, batch.tokens, batch.places, source=batch.source)
    logits_btc = model.logits(params, hidden_btd)
    counted_bt = (batch.weights > 0).astype(jnp.float32)
    nll_bt, log_z_bt = token_nll(logits_btc, batch.targets)
    predicted_bt = jnp.argmax(logits_btc, -1)
    confidence_bt = jnp.exp(logits_btc.max(-1) - log_z_bt)
    right_bt = (predicted_bt == batch.targets).astype(jnp.float32)
    one_hot = lambda x: jax.nn.one_hot(x, logits_btc.shape[-1], dtype=jnp.float32)  # noqa: E731
    actual_btc = one_hot(batch.targets) * counted_bt[:, :, None]
    place_bt = jnp.minimum(confidence_bt * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(jnp.int32)
    bins_btn = jax.nn.one_hot(place_bt, CALIBRATION_BINS, dtype=jnp.float32)
    facts_abt = jnp.stack([counted_bt, counted_bt * confidence_bt, counted_bt * right_bt])
    return LabelSums(
        nats=jnp.sum(nll_bt * counted_bt),
        confusion=jnp.einsum("bti,btj->ij", actual_btc, one_hot(predicted_bt)),
        bins=jnp.einsum("abt,btn->an", facts_abt, bins_btn),
    )


def label_metrics(sums: LabelSums) -> dict[str, float]:
    """Loss, accuracy, macro-F1 and calibration error of all texts.

    Macro-F1 is over all the model's labels: one that is neither there nor predicted counts as 0.
    The calibration error is the expected one of Naeini et al. (2015): how far confidence and
    accuracy are apart, over bins.
    """
    confusion = np.asarray(sums.confusion, np.float64)
    count, confidence, right = np.asarray(sums.bins, np.float64)
    total = max(confusion.sum(), 1.0)
    return {
        "valid_loss": float(sums.nats) / total,
        "valid_accuracy": float(np.trace(confusion)) / total,
        "valid_macro_f1": float(np.mean([f1 for *_, f1 in label_scores(confusion)])),
        "valid_ece": float(np.abs(confidence - right).sum() / max(count.sum(), 1.0)),
    }


def label_scores(confusion: np.ndarray) -> list[tuple[float, float, float]]:
    """(precision, recall, F1) of each label, of a confusion matrix [C, C] by label and prediction.

    What has nothing to divide by is 0.
    """
    right, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return [
        (_ratio(r, p), _ratio(r, a), _ratio(2 * r, a + p))
        for r, a, p in zip(right, actual, predicted, strict=True)
    ]


def confusion_table(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """The matrix as text, a line a label, with precision, recall and F1."""
    width = max(9, *(len(label) for label in labels))
    head = " ".join(f"{label:>{width}}" for label in labels)
    lines = [f"{'is, said:':<{width}} {head}   precision recall    F1"]
    for label, row, scores in zip(labels, confusion, label_scores(confusion), strict=True):
        counts = " ".join(f"{int(n):>{width},}" for n in row)
        lines.append(f"{label:<{width}} {counts}   " + "{:>9.3f} {:>6.3f} {:>5.3f}".format(*scores))
    return "\n".join(lines)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
