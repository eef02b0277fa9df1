"""Example files: what a model reads and is asked for, example by example, packed into rows.

An example is a handful of named arrays of its own lengths. Those of a row stand one after the
other, so that a row is one stretch of each field, and row r, of examples `rows[r]:rows[r + 1]`, a
pure function of its index. Which examples share a row is decided while the file is written.

An example file is a folder: for each field NAME, `NAME.bin` (the values of all examples) and
`NAME.offsets.bin` (int64: where each example begins, and the end of the last), `rows.bin` (int64:
the first example of each row, and the number of examples) and `manifest.json`, written last.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.data.tokens import OFFSET, Row, map_array, open_manifest, sync, write_manifest
from jaxlm.errors import UserError

EXAMPLE_FORMAT = 1
# Examples that are placed together, the largest first, and rows that wait for the next of them.
BLOCK = 1024
OPEN_ROWS = 8
SCATTER = 2654435761  # 2**32 over the golden ratio


@dataclass(frozen=True)
class Example:
    """What is written of one item."""

    arrays: Row
    """By the names of the fields, [n] each."""
    cut: bool = False
    """Whether it was too long and is truncated."""


class ExampleFile:
    """An example file, opened for reading.

    Attributes:
        fields: for each name, memory-mapped values [n] and their offsets [num_examples + 1].
        rows: memory-mapped [number of rows + 1], int64.
        lengths: the size of a row on each side it has, by the field that fills it.
        num_examples, num_bytes, num_tokens: examples, UTF-8 bytes of their text, tokens of all
            sides.
        num_skipped, num_dropped, num_cut: records left out as bad; examples left out, or
            truncated, for their length.
        first_skipped: what is wrong with the first of those, None where nobody noted it.
        digest: a hash of all values in their order.
        manifest: all that was recorded about how the file came to be.
    """

    def __init__(self, path: str | Path):
        """Raises UserError where the file is incomplete or damaged."""
        self.path = Path(path)
        self.manifest = manifest = open_manifest(self.path, EXAMPLE_FORMAT, "example file")
        try:
            self.lengths: dict[str, int] = manifest["lengths"]
            self.num_examples: int = manifest["num_examples"]
            self.num_bytes: int = manifest["num_bytes"]
            self.num_skipped: int = manifest["num_skipped"]
            self.first_skipped: str | None = manifest.get("first_skipped")
            self.num_dropped: int = manifest["num_dropped"]
            self.num_cut: int = manifest["num_cut"]
            self.digest: str = manifest["digest"]
            sizes, num_rows = manifest["fields"], manifest["num_rows"]
            kinds = {name: np.dtype(dtype) for name, (dtype, _) in sizes.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is not a complete example file ({error}): prepare the data again"
            ) from error
        self.rows = map_array(self.path / "rows.bin", OFFSET, num_rows + 1)
        self.fields = {}
        for name, (_, size) in sizes.items():
            values = map_array(self.path / f"{name}.bin", kinds[name], size)
            offsets = map_array(self.path / f"{name}.offsets.bin", OFFSET, self.num_examples + 1)
            if offsets[-1] != size:
                raise UserError(
                    f"{self.path}/{name}.offsets.bin is damaged: prepare the data again"
                )
            self.fields[name] = values, offsets
        self.num_tokens = sum(len(self.fields[side][0]) for side in self.lengths)

    def __len__(self) -> int:
        return self.num_examples

    def first(self, count: int) -> "ExampleFile":
        """The file as if it had only so many examples; what it says of bytes stays."""
        part = copy.copy(self)
        part.num_examples = min(count, self.num_examples)
        full = int(np.searchsorted(self.rows, part.num_examples))
        part.rows = np.append(self.rows[:full], part.num_examples)
        return part

    def __repr__(self) -> str:
        return f"ExampleFile({str(self.path)!r}, {self.num_examples} examples)"

    def example(self, index: int) -> Row:
        """The fields of one example, in the order in which rows hold them."""
        return {
            name: values[offsets[index] : offsets[index + 1]]
            for name, (values, offsets) in self.fields.items()
        }

    @property
    def padding(self) -> dict[str, float]:
        """The share of each side's places that no example fills."""
        places = max(len(self.rows) - 1, 1)
        return {
            side: 1 - len(self.fields[side][0]) / (places * length)
            for side, length in self.lengths.items()
        }


class PackedRows(Sequence):
    """The rows of an example file.

    Row r holds, int32 but for the float32 `weights`:

    - `tokens`, `targets`, `weights`, `segment_ids`, `positions`, [lengths["tokens"]] each;
    - with a source, `source_tokens`, `source_segment_ids`, `source_positions`, [lengths["source"]].

    Examples are segments, numbered from 1 (0 is padding) and alike on both sides; `positions` count
    from 0 in each.
    """

    def __init__(self, file: ExampleFile):
        self.file = file

    def __len__(self) -> int:
        return len(self.file.rows) - 1

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.file.lengths["tokens"]

    @property
    def most_segments(self) -> int:
        """How many segments a row has at most, padding counted."""
        return int(np.diff(self.file.rows).max(initial=0)) + 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, end = self.file.rows[index : index + 2]
        row = {}
        for side, length in self.file.lengths.items():
            prefix = "" if side == "tokens" else f"{side}_"
            _, offsets = self.file.fields[side]
            starts = offsets[first : end + 1] - offsets[first]
            sizes = np.diff(starts)
            places = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
            segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
            row[prefix + "tokens"] = self._values(side, first, end, length)
            row[prefix + "segment_ids"] = _padded(segments, length, np.int32)
            row[prefix + "positions"] = _padded(places, length, np.int32)
        row["targets"] = self._values("targets", first, end, self.seq_len)
        row["weights"] = self._values("weights", first, end, self.seq_len, np.float32)
        return row

    def _values(self, name: str, first: int, end: int, length: int, dtype=np.int32) -> np.ndarray:
        values, offsets = self.file.fields[name]
        return _padded(values[offsets[first] : offsets[end]], length, dtype)


def _padded(values: np.ndarray, length: int, dtype) -> np.ndarray:
    row = np.zeros(length, dtype)
    row[: len(values)] = values
    return row


class ExampleWriter:
    """Writes an example file; what it holds in memory does not grow.

    `dtypes` are those of the fields; `lengths` the size of a row on each side, by the field whose
    values fill it.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, np.dtype], lengths: Mapping[str, int]):
        path.mkdir(parents=True)
        self.path = path
        self.num_examples = self.num_bytes = self.num_dropped = self.num_cut = self.num_rows = 0
        self._lengths = dict(lengths)
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._sizes = dict.fromkeys(dtypes, 0)
        self._values = {name: _create(path / f"{name}.bin") for name in dtypes}
        self._offsets = {name: _create(path / f"{name}.offsets.bin") for name in dtypes}
        self._rows = _create(path / "rows.bin")
        for file in (*self._offsets.values(), self._rows):
            file.write(OFFSET.type(0).tobytes())
        self._packer = Packer(list(lengths.values()))
        self._waiting: dict[int, Row] = {}
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, example: Example | None, num_bytes: int) -> None:
        """Take an example, none of whose sides is longer than a row, and the size of its text.

        None is one that was too long, and is left out.
        """
        if example is None:
            self.num_dropped += 1
            return
        self.num_bytes += num_bytes
        self.num_cut += example.cut
        self._waiting[self._packer.num_added] = example.arrays
        for row in self._packer.add([len(example.arrays[side]) for side in self._lengths]):
            self._write(row)

    def _write(self, row: list[int]) -> None:
        examples = [self._waiting.pop(number) for number in row]
        self.num_examples += len(row)
        self.num_rows += 1
        self._append(self._rows, np.array([self.num_examples], OFFSET))
        for name, dtype in self._dtypes.items():
            values = [np.asarray(arrays[name], dtype) for arrays in examples]
            ends = self._sizes[name] + np.cumsum([len(array) for array in values])
            self._sizes[name] = int(ends[-1])
            self._append(self._values[name], np.concatenate(values))
            self._append(self._offsets[name], ends.astype(OFFSET))

    def _append(self, file: BinaryIO, values: np.ndarray) -> None:
        content = values.tobytes()
        file.write(content)
        self._digest.update(content)

    def finish(self, **facts: Any) -> None:
        """Complete the file, with `facts` (`num_skipped` among them) in its manifest."""
        for row in self._packer.finish():
            self._write(row)
        for file in self._files():
            sync(file)
        write_manifest(
            self.path,
            {
                "format": EXAMPLE_FORMAT,
                "lengths": self._lengths,
                "num_examples": self.num_examples,
                "num_rows": self.num_rows,
                "num_bytes": self.num_bytes,
                "num_dropped": self.num_dropped,
                "num_cut": self.num_cut,
                "fields": {n: [self._dtypes[n].str, size] for n, size in self._sizes.items()},
                "digest": self._digest.hexdigest(),
                **facts,
            },
        )

    def close(self) -> None:
        """Let go of the files, whether or not they are finished."""
        for file in self._files():
            file.close()

    def _files(self) -> list[BinaryIO]:
        return [*self._values.values(), *self._offsets.values(), self._rows]


def _create(path: Path) -> BinaryIO:
    return path.open("wb", buffering=1 << 16)


class Packer:
    """Puts examples of several sizes (one for each side) into rows of fixed capacities.

    Examples are taken in blocks; the largest of a block are placed first, each in the row where it
    leaves the least room (best fit decreasing). The rows with most room stay open for the next
    block. So memory is bounded, and the same sizes always give the same rows.
    """

    def __init__(self, capacities: Sequence[int], block: int = BLOCK, open_rows: int = OPEN_ROWS):
        self.num_added = 0
        self._capacities = np.array(capacities)
        self._block = block
        self._open_rows = open_rows
        self._sizes: list[Sequence[int]] = []
        self._rows: list[list[int]] = []
        self._room = np.empty((0, len(capacities)), int)

    def add(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Take the next example; yields the rows, as numbers of examples, that are finished."""
        self._sizes.append(sizes)
        self.num_added += 1
        return self._place(self._open_rows) if len(self._sizes) == self._block else iter(())

    def finish(self) -> Iterator[list[int]]:
        """The rows that are left."""
        return self._place(0)

    def _place(self, open_rows: int) -> Iterator[list[int]]:
        sizes = np.array(self._sizes, int).reshape(-1, len(self._capacities))
        first = self.num_added - len(sizes)
        self._sizes = []
        count = len(self._rows)
        room = np.concatenate([self._room, np.tile(self._capacities, (len(sizes), 1))])
        for number in np.argsort(-(sizes / self._capacities).max(1), kind="stable"):
            # The first row that is still empty takes what fits nowhere else.
            left = room[: count + 1] - sizes[number]
            choice = int(np.where((left >= 0).all(1), left.sum(1), np.iinfo(int).max).argmin())
            if choice == count:
                self._rows.append([])
                count += 1
            room[choice] = left[choice]
            self._rows[choice].append(first + int(number))
        # A row is as full as its fuller side.
        by_room = np.argsort(-room[:count].min(1), kind="stable")
        kept = sorted(by_room[:open_rows].tolist())
        done = [self._rows[r] for r in by_room[open_rows:]]
        self._rows, self._room = [self._rows[r] for r in kept], room[kept]
        # Scattered, so that the first rows are like the others.
        return iter(sorted(done, key=lambda row: row[0] * SCATTER % 2**32))
