"""Rows of ids as arrays, of few sizes: each size is compiled for."""

import numpy as np


def bucket(n: int, smallest: int = 16) -> int:
    """The power of two, at least `smallest`, that holds `n`."""
    return max(smallest, 1 << (max(n, 1) - 1).bit_length())


def left_pad(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32 [B, length], padded in front, and their lengths [B]."""
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[length - len(row) :] = row
    return padded, np.array([len(row) for row in rows], np.int32)


def right_pad(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32 [B, length], padded behind, and their lengths [B]."""
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded, np.array([len(row) for row in rows], np.int32)
