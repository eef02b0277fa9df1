"""The N-gram model: what comes next by tables of the n-grams that a text had. NumPy, no gradients.

`models.ngram_fit` makes the tables. An n-gram is known by a number: the index of its history (the
n-gram without its last token) in the table one shorter, times V, plus its last token. So a table
of any length is one sorted array of integers, and a token costs one search in each.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from jaxlm.data.tokens import TokenFile

WINDOW = 1 << 20
UNKNOWN = np.uint64(2**64 - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The n-grams of one length that were seen, and what they tell."""

    keys: np.ndarray
    """uint64 [n], ascending; of length 0 there is one n-gram, the empty one."""
    probability: np.ndarray
    """float32 [n]: P(last token | history), all shorter histories mixed in."""
    backoff: np.ndarray
    """float32 [n]: of what follows this n-gram, the share that is left to the history one token
    shorter; 1 where nothing was seen to follow. Empty for the longest, which are no histories."""

    @classmethod
    def names(cls) -> list[str]:
        """The arrays of a table."""
        return [field.name for field in dataclasses.fields(cls)]


@dataclasses.dataclass(frozen=True, eq=False)
class Ngram:
    """A fitted model: tables of the n-grams of 0, 1, ..., `order` tokens."""

    vocab_size: int
    tables: tuple[Table, ...]

    @property
    def order(self) -> int:
        """Tokens in the longest n-grams, the one predicted included."""
        return len(self.tables) - 1

    def next_probabilities(self, history: Sequence[int]) -> np.ndarray:
        """P(token | history) of every token, float64 [V], summing to one.

        `history` is any text from its beginning on, or nothing; its last order - 1 tokens count.
        """
        tail = np.array(history[-(self.order - 1) :] if self.order > 1 else [], np.int64)
        keys = [table.keys for table in self.tables[1:-1]]
        steps = walk(keys, tail, np.arange(len(tail)), self.vocab_size)
        ends = [0, *(int(found[-1]) for _, found in steps)] if len(tail) else [0]
        probabilities = np.full(self.vocab_size, float(self.tables[0].probability[0]))
        for end, shorter, table in zip(ends, self.tables, self.tables[1:], strict=False):
            if end < 0:  # then no longer history was seen either
                break
            bounds = np.array([end * self.vocab_size, (end + 1) * self.vocab_size], np.uint64)
            first, last = np.searchsorted(table.keys, bounds)
            probabilities *= shorter.backoff[end]
            followers = table.keys[first:last] - bounds[0]
            probabilities[followers.astype(np.int64)] = table.probability[first:last]
        return probabilities

    def token_logprobs(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """log P of each token given those before it in its text, in nats, float64 [T].

        `places` [T] are the tokens' positions in their texts: what comes before a 0 is not seen.
        """
        logprobs = np.full(len(tokens), np.log(float(self.tables[0].probability[0])))
        steps = walk([t.keys for t in self.tables[1:]], tokens, places, self.vocab_size)
        for (history, found), shorter, table in zip(
            steps, self.tables, self.tables[1:], strict=False
        ):
            left = _log_at(shorter.backoff, history, otherwise=0.0)
            logprobs = _log_at(table.probability, found, otherwise=logprobs + left)
        return logprobs

    def nats(self, files: Sequence[TokenFile]) -> tuple[float, int]:
        """Summed -log P of the files' documents, each but for its first token, and how many tokens
        these are."""
        total, count = 0.0, 0
        for file in files:
            for tokens, places, fresh in windows(file, self.order - 1):
                logprobs = self.token_logprobs(tokens, places)[fresh:][places[fresh:] > 0]
                total -= float(logprobs.sum())
                count += len(logprobs)
        return total, count

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the model by name, which `from_arrays` takes back."""
        return {
            f"{length}-grams.{name}": getattr(table, name)
            for length, table in enumerate(self.tables)
            for name in Table.names()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], order: int, vocab_size: int) -> Self:
        """The model whose `arrays` these are. Raises KeyError where one is missing."""
        return cls(
            vocab_size,
            tuple(
                Table(**{name: arrays[f"{length}-grams.{name}"] for name in Table.names()})
                for length in range(order + 1)
            ),
        )


def walk(
    keys: Sequence[np.ndarray], tokens: np.ndarray, places: np.ndarray, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n-grams of 1, 2, ..., len(keys) tokens that end at each of `tokens` [T]: the index of
    the history and that of the n-gram itself, -1 where unknown. None reaches over a place 0."""
    history = np.zeros(len(tokens), np.int64)
    for table in keys:
        found = find(table, join(history, tokens, vocab_size))
        yield history, found
        history = following(found, places)


def join(history: np.ndarray, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Numbers of n-grams, uint64 [T]; `UNKNOWN` where the history is."""
    # 64 bits hold them as long as there are fewer than 2**64 / V histories.
    numbers = history.astype(np.uint64) * np.uint64(vocab_size) + tokens.astype(np.uint64)
    return np.where(history < 0, UNKNOWN, numbers)


def following(found: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of n-grams that end at each token, the histories of the tokens one further."""
    history = np.concatenate([np.full(min(len(found), 1), -1), found[:-1]])
    history[places == 0] = -1
    return history


def find(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of each of `wanted` in a sorted table, -1 where it is not there."""
    if not len(table):
        return np.full(len(wanted), -1)
    # In order, so that neighbouring searches read the same part of the table: three times faster.
    order = np.argsort(wanted)
    at = np.empty(len(wanted), np.int64)
    at[order] = np.searchsorted(table, wanted[order])
    at = np.minimum(at, len(table) - 1)
    return np.where(table[at] == wanted, at, -1)


def windows(file: TokenFile, overlap: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """A token file in parts: tokens, their places in their documents, and how many of the first
    ones, at most `overlap`, are there as history and were in the part before."""
    for start in range(0, file.num_tokens, WINDOW):
        begin, end = max(start - overlap, 0), min(start + WINDOW, file.num_tokens)
        index = np.arange(begin, end)
        document = np.searchsorted(file.offsets, index, side="right") - 1
        yield np.asarray(file.tokens[begin:end]), index - file.offsets[document], start - begin


def _log_at(values: np.ndarray, index: np.ndarray, otherwise) -> np.ndarray:
    """The logarithm of `values[index]`, and `otherwise` where the index is -1."""
    known = index >= 0
    result = np.broadcast_to(otherwise, index.shape).astype(np.float64)
    result[known] = np.log(values[index[known]], dtype=np.float64)
    return result
