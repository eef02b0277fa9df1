"""From rows to batches, each a pure function of the seed and the step.

A row is addressed by its index, so Grain can permute, mix and prefetch rows by arithmetic alone:
nothing has to be replayed to resume at a step, and every process reads only its own rows of the
same global batch.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxlm.data.tokens import Row, TokenFile
from jaxlm.errors import UserError

READER_THREADS = 2


class Rows(Sequence):
    """The stream of a token file, cut into rows that overlap by `ahead` tokens.

    Row r has seq_len + ahead tokens from r * seq_len on. With one ahead, each token but the
    stream's first is the target of exactly one row. The last row is padded.
    """

    def __init__(self, token_file: TokenFile, seq_len: int, ahead: int = 1):
        self._file = token_file
        self.seq_len = seq_len
        self._ahead = ahead
        self._size = seq_len + ahead

    def __len__(self) -> int:
        return -(-(self._file.num_tokens - self._ahead) // self.seq_len)

    @property
    def most_segments(self) -> int:
        """How many segments a row has at most, padding counted."""
        # The end of the stream, where padding begins, is an offset as well.
        begins = np.arange(len(self)) * self.seq_len
        first, last = (np.searchsorted(self._file.offsets, begins + n) for n in (1, self._size))
        return int((last - first).max(initial=0)) + 1

    def __getitem__(self, index: int) -> Row:
        """Row `index` as int32 [seq_len + ahead] arrays.

        `segment_ids` number the documents in the row from 1 (0 is padding); `positions` count from
        0 in each, also where the row begins inside a document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.seq_len
        stream = self._file.tokens[start : start + self._size]
        names = ("tokens", "segment_ids", "positions")
        row = {name: np.zeros(self._size, np.int32) for name in names}
        size = len(stream)
        offsets = self._file.offsets
        first, last = np.searchsorted(offsets, [start + 1, start + size])
        starts = np.concatenate([[0], offsets[first:last] - start])
        places = np.arange(size)
        segments = np.searchsorted(starts, places, side="right")
        row["tokens"][:size] = stream
        row["segment_ids"][:size] = segments
        row["positions"][:size] = places - starts[segments - 1]
        return row


def training_batches(
    sources: Sequence[Sequence[Row]],
    weights: Sequence[float] | None,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    prefetch: int = 4,
) -> Iterator[Row]:
    """Endless batches: the arrays of rows with a dimension of `batch_size` before theirs, and
    `number`, int64 [batch_size], which says how many rows were before each.

    `sources` are sequences of rows, such as `Rows`, with a `seq_len` for messages. In every epoch
    each row comes once, in a new order. With `weights`, each source has its own epochs, and rows
    are drawn from the sources in these proportions (Grain keeps them to 1 %).
    `batch_size` is global; `rows` are those of each batch that are wanted, the others are not read.

    Raises UserError for fewer rows than a batch has.
    """
    num_rows = sum(map(len, sources))
    if num_rows < batch_size:
        raise UserError(
            f"the training text has {num_rows} rows of {sources[0].seq_len} tokens (data.seq_len "
            f"or model.max_seq_len), fewer than train.batch_size={batch_size}: give it more text, "
            f"or set train.batch_size to {num_rows} or less"
        )
    # Neighbouring seeds would share orders: Grain's shuffle adds the epoch to the seed.
    seeds = map(int, np.random.SeedSequence(seed).generate_state(len(sources)))
    datasets = [grain.MapDataset.source(rows) for rows in sources]
    if weights is None:
        stream = grain.MapDataset.concatenate(datasets).shuffle(seed=next(seeds)).repeat()
    else:
        endless = [d.shuffle(seed=s).repeat() for d, s in zip(datasets, seeds, strict=True)]
        stream = grain.MapDataset.mix(endless, list(weights))
    wanted = range(batch_size) if rows is None else rows
    mine = grain.MapDataset.source(_Part(stream, batch_size, wanted))
    options = grain.ReadOptions(
        num_threads=min(READER_THREADS, prefetch), prefetch_buffer_size=prefetch
    )
    batches = mine.batch(len(wanted)).slice(slice(start_step, None))
    return iter(batches.to_iter_dataset(options))


def validation_batches(
    sources: Sequence[Sequence[Row]],
    *,
    batch_size: int,
    limit: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Every row once, in order, in batches as `training_batches` has them.

    `limit` is the largest number of batches, 0 for all. The last batch is filled up with rows of
    padding (all zero), so that all have the same shape.
    """
    stream = grain.MapDataset.concatenate([grain.MapDataset.source(rows) for rows in sources])
    padding = {name: np.zeros_like(array) for name, array in stream[0].items()}
    num_batches = -(-len(stream) // batch_size)
    wanted = range(batch_size) if rows is None else rows
    for batch in range(min(num_batches, limit or num_batches)):
        places = (batch * batch_size + row for row in wanted)
        chosen = [stream[r] if r < len(stream) else padding for r in places]
        arrays = {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}
        yield arrays | {"number": batch * batch_size + np.array(wanted)}


class _Part(Sequence):
    """The wanted rows of each batch of a stream, one batch after the other."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, wanted: Sequence[int]):
        self._stream = stream
        self._batch_size = batch_size
        self._wanted = [int(row) for row in wanted]

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._wanted)

    def __getitem__(self, index: int) -> Row:
        batch, place = divmod(index, len(self._wanted))
        number = batch * self._batch_size + self._wanted[place]
        return self._stream[number] | {"number": np.int64(number)}
