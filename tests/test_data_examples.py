"""Example files and packing: every example once, within its row, aligned on both sides."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.examples import Example, ExampleFile, ExampleWriter, PackedRows, Packer
from jaxlm.data.loader import training_batches, validation_batches
from jaxlm.errors import UserError

DTYPES = {"source": "<u2", "tokens": "<u2", "targets": "<u2", "weights": "<u1"}
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), max_size=40)


def example(number, source, target):
    """One whose values tell which it is, and which of its places they stand at."""
    return Example(
        {
            "source": 1000 + 10 * number + np.arange(source),
            "tokens": 1000 + 10 * number + np.arange(target),
            "targets": 2000 + 10 * number + np.arange(target),
            "weights": np.arange(target) % 2,
        }
    )


def write(folder, sizes, lengths=(9, 7)):
    writer = ExampleWriter(folder, DTYPES, dict(zip(("source", "tokens"), lengths, strict=True)))
    for number, (source, target) in enumerate(sizes):
        writer.add(example(number, source, target), num_bytes=target)
    writer.add(None, num_bytes=99)
    writer.finish(num_skipped=3, source="here")
    return ExampleFile(folder)


@given(sizes=SIZES, block=st.integers(1, 12), open_rows=st.integers(0, 5), room=st.integers(0, 12))
def test_packing_takes_every_example_once_and_overfills_no_row(sizes, block, open_rows, room):
    def pack():
        packer = Packer([9 + room, 7 + room], block, open_rows)
        rows = [row for pair in sizes for row in packer.add(pair)]
        return rows + list(packer.finish())

    rows = pack()
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    for row in rows:
        assert row, "an empty row"
        source, target = np.sum([sizes[number] for number in row], axis=0)
        assert source <= 9 + room
        assert target <= 7 + room
    assert rows == pack()


def test_little_is_padding():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.geometric(0.04, 5000), 128)
    packer = Packer([128])
    rows = [row for size in sizes for row in packer.add([size])] + list(packer.finish())
    assert sizes.sum() / (128 * len(rows)) > 0.99
    # The first rows are like the others, though the largest examples are placed first.
    largest = [max(sizes[row]) for row in rows]
    assert abs(np.mean(largest[:200]) - np.mean(largest)) < 0.15 * np.mean(largest)


@settings(max_examples=30)
@given(sizes=SIZES)
def test_rows_hold_whole_examples_with_the_same_segment_on_both_sides(tmp_path_factory, sizes):
    file = write(tmp_path_factory.mktemp("f") / "file", sizes)
    seen, rows = [], PackedRows(file)
    assert rows.most_segments == 1 + max((row["segment_ids"].max() for row in rows), default=0)
    for row in rows:
        assert {n: (a.shape, a.dtype.name) for n, a in row.items()} == {
            **dict.fromkeys(["source_tokens", "source_segment_ids"], ((9,), "int32")),
            **dict.fromkeys(["source_positions"], ((9,), "int32")),
            **dict.fromkeys(["tokens", "targets", "segment_ids", "positions"], ((7,), "int32")),
            "weights": ((7,), "float32"),
        }
        segments = np.unique(row["segment_ids"][row["segment_ids"] > 0])
        assert segments.tolist() == list(range(1, len(segments) + 1))
        for segment in segments:
            target = row["segment_ids"] == segment
            source = row["source_segment_ids"] == segment
            number = int(row["tokens"][target][0] - 1000) // 10
            seen.append(number)
            assert (source.sum(), target.sum()) == sizes[number]
            expected = example(number, *sizes[number]).arrays
            np.testing.assert_array_equal(row["source_tokens"][source], expected["source"])
            np.testing.assert_array_equal(row["source_positions"][source], np.arange(source.sum()))
            for name in ("tokens", "targets", "weights"):
                np.testing.assert_array_equal(row[name][target], expected[name])
            np.testing.assert_array_equal(row["positions"][target], np.arange(target.sum()))
        for prefix in ("", "source_"):
            padding = row[f"{prefix}segment_ids"] == 0
            assert not row[f"{prefix}tokens"][padding].any()
        assert not row["weights"][row["segment_ids"] == 0].any()
    assert sorted(seen) == list(range(len(sizes)))


def test_what_is_written_is_said(tmp_path):
    sizes = [(4, 3), (9, 7), (1, 1), (5, 4)]
    file = write(tmp_path / "file", sizes)
    assert (len(file), file.num_bytes, file.num_tokens) == (4, 15, 34)
    assert (file.num_skipped, file.num_dropped, file.num_cut) == (3, 1, 0)
    assert file.manifest["source"] == "here"
    assert file.padding == {"source": 1 - 19 / 27, "tokens": 1 - 15 / 21}
    stored = [file.example(index)["tokens"][0] for index in range(4)]
    assert sorted(stored) == [1000, 1010, 1020, 1030]
    assert isinstance(file.fields["tokens"][0], np.memmap)


def test_the_digest_is_of_values_and_order(tmp_path):
    sizes = [(4, 3), (5, 3), (2, 2)]
    digests = [write(tmp_path / str(n), sizes).digest for n in range(2)]
    other = write(tmp_path / "other", sizes[::-1]).digest
    assert digests[0] == digests[1] != other


def test_no_examples(tmp_path):
    file = write(tmp_path / "file", [])
    assert (len(file), len(PackedRows(file)), file.padding["tokens"]) == (0, 0, 1)


def test_batches_of_packed_rows_depend_on_seed_and_step_only(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, 10)), int(rng.integers(1, 8))) for _ in range(60)]
    rows = PackedRows(write(tmp_path / "file", sizes))
    whole = training_batches([rows], None, batch_size=4, seed=1)
    batches = [next(whole) for _ in range(12)]
    later = training_batches([rows], None, batch_size=4, seed=1, start_step=9, rows=[1, 3])
    for expected, found in zip(batches[9:], later, strict=False):
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name][[1, 3]])
    held_out = list(validation_batches([rows], batch_size=7))
    assert {batch["source_tokens"].shape for batch in held_out} == {(7, 9)}
    assert sum(batch["weights"].sum() for batch in held_out) == sum(t // 2 for _, t in sizes)
    with pytest.raises(UserError, match=rf"has {len(rows)} rows of 7 tokens .* train\.batch_size"):
        training_batches([rows], None, batch_size=1000, seed=1)


def damage(folder, what):
    if what == "format":
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    elif what == "offsets":
        content = bytearray((folder / "source.offsets.bin").read_bytes())
        content[-8] ^= 1
        (folder / "source.offsets.bin").write_bytes(content)
    elif what == "fields":
        manifest = json.loads((folder / "manifest.json").read_bytes())
        del manifest["fields"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        content = (folder / what).read_bytes()
        (folder / what).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("format", "has format 0, but this version reads 1"),
        ("offsets", r"source\.offsets\.bin is damaged"),
        ("fields", r"not a complete example file \('fields'\)"),
        ("manifest.json", "not a complete example file"),
        ("targets.bin", r"targets\.bin has 3 bytes instead of 6"),
        ("rows.bin", r"rows\.bin has 8 bytes instead of 16"),
    ],
)
def test_damage_is_named(tmp_path, what, message):
    write(tmp_path / "file", [(2, 3)])
    damage(tmp_path / "file", what)
    with pytest.raises(UserError, match=message):
        ExampleFile(tmp_path / "file")
