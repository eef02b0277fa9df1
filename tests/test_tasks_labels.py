"""A classifier's metrics, against values worked out by hand and by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.tasks.batch import Batch
from jaxlm.tasks.labels import (
    CALIBRATION_BINS,
    LabelSums,
    confusion_table,
    label_metrics,
    label_scores,
    label_sums,
)

CONFUSION = np.array([[5, 1, 0], [2, 7, 1], [0, 0, 9]], np.float64)


class Fixed:
    """A model whose hidden states are its logits."""

    def __init__(self, logits):
        self.fixed = logits

    def hidden(self, params, tokens, places, source=None):
        return self.fixed, {}, None

    def logits(self, params, hidden):
        return hidden


def test_sums_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 4)).astype(np.float32) * 3
    targets = rng.integers(0, 4, (3, 7)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 2.0], (3, 7)).astype(np.float32)
    zeros = np.zeros((3, 7), np.int32)
    batch = Batch(zeros, targets, weights, zeros, zeros)
    sums = jax.jit(lambda batch: label_sums(Fixed(jnp.asarray(logits)), None, batch))(batch)
    confusion, bins, nats = np.zeros((4, 4)), np.zeros((3, CALIBRATION_BINS)), 0.0
    for b, t in zip(*np.nonzero(weights), strict=True):
        p = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
        said, label = p.argmax(), targets[b, t]
        confusion[label, said] += 1
        place = min(int(p[said] * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins[:, place] += 1, p[said], said == label
        nats -= np.log(p[label])
    np.testing.assert_array_equal(sums.confusion, confusion)
    np.testing.assert_allclose(sums.bins, bins, rtol=1e-5)
    np.testing.assert_allclose(sums.nats, nats, rtol=1e-5)


def test_scores_are_those_worked_out_by_hand():
    (p, r, f1), *_ = label_scores(CONFUSION)
    assert (p, r) == pytest.approx((5 / 7, 5 / 6))
    assert f1 == pytest.approx(2 * p * r / (p + r))
    bins = np.zeros((3, CALIBRATION_BINS))
    bins[:, 9] = 10, 6.2, 8  # says 0.62, is right 0.8 of the time
    bins[:, 14] = 15, 14.5, 13
    metrics = label_metrics(LabelSums(np.float64(50.0), CONFUSION, bins))
    assert metrics["valid_loss"] == pytest.approx(2.0)
    assert metrics["valid_accuracy"] == pytest.approx(21 / 25)
    assert metrics["valid_macro_f1"] == pytest.approx((f1 + 14 / 18 + 18 / 19) / 3)
    assert metrics["valid_ece"] == pytest.approx((1.8 + 1.5) / 25)


def test_a_label_that_is_nowhere_scores_nothing():
    confusion = np.array([[3.0, 0], [0, 0]])
    assert label_scores(confusion) == [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)]


def test_the_table_has_a_line_a_label():
    lines = confusion_table(CONFUSION, ["negative", "neutral", "positive"]).splitlines()
    assert lines[2].split() == ["neutral", "2", "7", "1", "0.875", "0.700", "0.778"]
