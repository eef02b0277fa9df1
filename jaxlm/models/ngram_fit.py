"""Fitting an N-gram model: counting in bounded memory, and interpolated modified Kneser-Ney.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.data.tokens import TokenFile
from jaxlm.models.ngram import Ngram, Table, find, following, join, walk, windows

# Discounts of counts of 1, 2 and more where a text is too small to estimate them (KenLM's).
FALLBACK = (0.5, 1.0, 1.5)

Counted = tuple[np.ndarray, np.ndarray]


def fit(
    files: Sequence[TokenFile],
    order: int,
    vocab_size: int,
    report: Callable[[str], None] = lambda line: None,
) -> Ngram:
    """The model of the n-grams of at most `order` tokens in the documents of `files`.

    Documents begin with beginning-of-text, which is a history and never predicted; no n-gram
    reaches from one into another. The shortest history is mixed with the uniform distribution,
    so that every token has a probability. Memory is bounded by the number of distinct n-grams,
    whatever the number of tokens. `report` gets a line for each length.
    """
    keys, counts = [np.zeros(1, np.uint64)], [np.ones(1, np.int64)]
    for length in range(1, order + 1):
        found, times = _count(files, keys[1:], vocab_size, is_longest=length == order)
        report(f"{length}-grams: {len(found):,}")
        keys.append(found)
        counts.append(times)
    suffixes = [np.zeros(1, np.int64), np.zeros(len(keys[1]), np.int64)]
    for shorter, longer in itertools.pairwise(keys[1:]):
        suffixes.append(_suffixes(shorter, longer, suffixes[-1], vocab_size))
    for times, suffix in zip(counts[1:], suffixes[2:], strict=False):
        # Shorter n-grams count by how many tokens they follow, not by how often.
        times += np.bincount(suffix, minlength=len(times))
    probabilities, backoffs = [np.full(1, 1 / vocab_size)], []
    for length in range(1, order + 1):
        history = (keys[length] // np.uint64(vocab_size)).astype(np.int64)
        lower = probabilities[-1][suffixes[length]]
        probability, backoff = _smooth(counts[length], history, lower, len(keys[length - 1]))
        probabilities.append(probability)
        backoffs.append(backoff)
    backoffs.append(np.zeros(0))
    columns = zip(keys, probabilities, backoffs, strict=True)
    single = np.float32
    return Ngram(vocab_size, tuple(Table(k, single(p), single(b)) for k, p, b in columns))


def discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from n-grams that count 0, 1, 2, and 3 or more times, float64 [4].

    Those that Chen and Goodman derive from how many n-grams count 1, 2, 3 and 4 times, or
    `FALLBACK` where one of these is none or a discount comes out as none.
    """
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    taken = np.array([0.0, *FALLBACK])
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimates = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimates > 0).all():
            taken[1:] = estimates
    return taken


def _smooth(
    counts: np.ndarray, history: np.ndarray, lower: np.ndarray, num_histories: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the n-grams of one length, and what their histories leave to shorter ones.

    `history` is the index of each one's history, `lower` its probability after the shorter one.
    """
    taken = discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(history, counts, num_histories)
    left = np.ones(num_histories)
    np.divide(np.bincount(history, taken, num_histories), total, out=left, where=total > 0)
    return (counts - taken) / np.maximum(total, 1)[history] + left[history] * lower, left


def _suffixes(
    shorter: np.ndarray, longer: np.ndarray, suffix: np.ndarray, vocab_size: int
) -> np.ndarray:
    """The index in `shorter` of each of `longer` without its first token.

    `suffix` is the same for `shorter`, one table further down.
    """
    history, last = np.divmod(longer, np.uint64(vocab_size))
    return find(shorter, join(suffix[history.astype(np.int64)], last, vocab_size))


def _count(
    files: Sequence[TokenFile], keys: list[np.ndarray], vocab_size: int, is_longest: bool
) -> Counted:
    """The n-grams one token longer than the longest of `keys`, ascending, and counts of them.

    Of the longest ones these are all occurrences, of others those that begin a document. First
    tokens of documents are among the n-grams, as histories, and count nothing.
    """
    length = len(keys) + 1
    counted: list[Counted] = []
    for file in files:
        for tokens, places, fresh in windows(file, length - 1):
            history = np.zeros(len(tokens), np.int64)
            for _, found in walk(keys, tokens, places, vocab_size):
                history = following(found, places)
            numbers, places, known = (
                x[fresh:] for x in (join(history, tokens, vocab_size), places, history >= 0)
            )
            counts = (places > 0) & (is_longest | (places == length - 1))
            counted.append(_merged((numbers[known], counts[known].astype(np.int64))))
            # Each is at least twice the one after it: together they are at most twice the first.
            while len(counted) > 1 and len(counted[-2][0]) < 2 * len(counted[-1][0]):
                counted[-2:] = [_merged(*counted[-2:])]
    return _merged(*counted)


def _merged(*counted: Counted) -> Counted:
    """Each number once, ascending, its counts added up."""
    numbers, counts = (np.concatenate(parts) for parts in zip(*counted, strict=True))
    # Of several, each is sorted already: a stable sort finds and merges them.
    order = np.argsort(numbers, kind="stable" if len(counted) > 1 else None)
    numbers, counts = numbers[order], counts[order]
    first = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] + np.uint64(1)))
    return numbers[first], np.add.reduceat(counts, first) if len(first) else counts
