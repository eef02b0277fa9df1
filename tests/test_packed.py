"""The bounds of a row's documents, as cuDNN's packed layout takes them."""

import numpy as np

from jaxlm.nn.packed import segment_bounds


def test_bounds_are_those_of_the_runs():
    segments = np.array([[1, 1, 2, 3, 3, 3, 0, 0], [1] * 8, [1, 2, 3, 4, 4, 4, 4, 4]])
    sizes, starts = segment_bounds(segments, 5)
    assert sizes.tolist() == [[2, 1, 3, 2, -1], [8, -1, -1, -1, -1], [1, 1, 1, 5, -1]]
    assert starts.tolist() == [[0, 2, 3, 6, -1, -1], [0, -1, -1, -1, -1, -1], [0, 1, 2, 3, -1, -1]]


def test_as_many_runs_as_there_may_be_leave_the_last_start_open():
    sizes, starts = segment_bounds(np.array([[1, 1, 2, 0]]), 3)
    assert sizes.tolist() == [[2, 1, 1]]
    assert starts.tolist() == [[0, 2, 3, -1]]
