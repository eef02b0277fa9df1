"""Rows against a token-by-token reference; batches as a pure function of seed and step."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Config
from jaxlm.data.loader import Rows, training_batches, validation_batches
from jaxlm.data.tokens import TokenFile, TokenWriter, token_dtype
from jaxlm.errors import UserError
from jaxlm.tasks.build import batch_maker


def token_file(folder, lengths, first=1):
    """Documents of these lengths; every token of the file is a different number."""
    writer = TokenWriter(folder, token_dtype(1 << 17))
    for length in lengths:
        writer.add(np.arange(first, first + length), num_bytes=length)
        first += length
    writer.finish(num_skipped=0)
    return TokenFile(folder)


def reference_rows(lengths, seq_len, ahead):
    """(token, segment, position) of every place of every row, one token at a time."""
    stream = [(d, 1) for d, length in enumerate(lengths) for _ in range(length)]
    for start in range(0, len(stream) - ahead, seq_len):
        row, segment, position, previous = [], 0, 0, None
        for place in range(start, start + seq_len + ahead):
            if place >= len(stream):
                row.append((0, 0, 0))
                continue
            document = stream[place][0]
            if document != previous:
                segment, position, previous = segment + 1, 0, document
            row.append((place + 1, segment, position))
            position += 1
        yield row


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda n: sum(n) > 1),
    seq_len=st.integers(1, 9),
    ahead=st.integers(0, 1),
)
def test_rows_match_the_reference(tmp_path_factory, lengths, seq_len, ahead):
    rows = Rows(token_file(tmp_path_factory.mktemp("t") / "f", lengths), seq_len, ahead)
    found = [
        list(zip(*(row[k].tolist() for k in ("tokens", "segment_ids", "positions")), strict=True))
        for row in rows
    ]
    assert found == list(reference_rows(lengths, seq_len, ahead))
    targets = [token for row in found for token, _, _ in row[ahead:] if token]
    assert targets == list(range(1 + ahead, sum(lengths) + 1)), (
        "every token but those ahead of the first row, once"
    )
    assert rows.most_segments == max(len({segment for _, segment, _ in row}) for row in found)
    assert {a.dtype for a in rows[0].values()} == {np.dtype(np.int32)}
    most = max(len(set(row["segment_ids"][:-1].tolist())) for row in rows)
    assert most <= rows.most_segments <= most + 1, "the token behind a row may begin one more"


@pytest.fixture
def files(tmp_path):
    """Two sources with 23 and 10 rows of 8; the second one's tokens are above 1000."""
    return (
        token_file(tmp_path / "a", [5, 60, 1, 40, 77]),
        token_file(tmp_path / "b", [30, 50], first=1001),
    )


def first_tokens(batches, steps):
    """First tokens, which tell the rows apart: [steps, rows of a batch]."""
    return np.array([batch["tokens"][:, 0] for batch in islice(batches, steps)])


def rows_of(files):
    return [Rows(file, 8) for file in files]


def arguments(files, **changes):
    defaults = {"weights": None, "batch_size": 6, "seed": 3}
    return {"sources": rows_of(files)} | defaults | changes


def test_every_row_once_an_epoch_in_a_new_order(files):
    assert sum(len(Rows(file, 8)) for file in files) == 33
    epochs = first_tokens(training_batches(**arguments(files)), 22).reshape(4, 33)
    assert all(len(set(epoch)) == 33 for epoch in epochs.tolist())
    assert len(set(map(tuple, epochs))) == 4


def test_batches_have_the_shape_and_the_content_of_rows(files):
    rows = {int(row["tokens"][0]): row for file in files for row in Rows(file, 8)}
    for step, batch in enumerate(islice(training_batches(**arguments(files)), 5)):
        assert batch.pop("number").tolist() == [*range(6 * step, 6 * step + 6)]
        for name, array in batch.items():
            assert (array.shape, array.dtype) == ((6, 9), np.int32)
            expected = [rows[int(first)][name] for first in batch["tokens"][:, 0]]
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_batches_depend_on_seed_and_step_only(files, weights):
    whole = first_tokens(training_batches(**arguments(files, weights=weights)), 40)
    again = training_batches(**arguments(files, weights=weights, prefetch=1, start_step=29))
    np.testing.assert_array_equal(first_tokens(again, 11), whole[29:])
    other = training_batches(**arguments(files, weights=weights, seed=4))
    assert (first_tokens(other, 40) != whole).any()
    for wanted in ([0, 1, 2], [1, 4], [5]):
        part = training_batches(**arguments(files, weights=weights, rows=np.array(wanted)))
        np.testing.assert_array_equal(first_tokens(part, 40), whole[:, wanted])
        later = training_batches(**arguments(files, rows=np.array(wanted), start_step=7))
        assert next(later)["number"].tolist() == [7 * 6 + row for row in wanted]


def test_a_later_epoch_is_not_another_seeds_first(files):
    one = first_tokens(training_batches(**arguments(files, batch_size=33)), 2)
    two = first_tokens(training_batches(**arguments(files, batch_size=33, seed=4)), 1)
    assert (one[1] != two[0]).any()


def test_far_steps_are_reached_at_once(files):
    far = training_batches(**arguments(files, weights=(1.0, 1.0), start_step=10**9))
    assert first_tokens(far, 2).shape == (2, 6)


def test_weights_are_kept_and_no_source_runs_dry(files):
    batches = training_batches(**arguments(files, weights=(0.25, 0.75)))
    seen = first_tokens(batches, 50)
    large = seen[seen > 1000].tolist()
    assert len(large) == 225
    counts = Counter(large)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 1, "an epoch of the source was cut"


def test_too_few_rows_for_a_batch(files):
    message = r"33 rows of 8 tokens .*, fewer than train\.batch_size=34.* to 33 or less"
    with pytest.raises(UserError, match=message):
        training_batches(**arguments(files, batch_size=34))


def test_validation_has_every_row_once_in_order(files):
    batches = list(validation_batches(rows_of(files), batch_size=8))
    assert {batch["tokens"].shape for batch in batches} == {(8, 9)}
    rows = [row for file in files for row in Rows(file, 8)]
    for name in rows[0]:
        joined = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(joined[:33], [row[name] for row in rows])
        assert not joined[33:].any()
    assert len(joined) == 40


def test_validation_parts_and_limit(files):
    whole = list(validation_batches(rows_of(files), batch_size=8, limit=3))
    assert len(whole) == 3
    wanted = [0, 1, 5]
    part = validation_batches(rows_of(files), batch_size=8, limit=3, rows=wanted)
    for batch, piece in zip(whole, part, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array[wanted], piece[name])


def test_a_batch_says_how_many_documents_a_row_of_any_source_has(tmp_path):
    few, many = token_file(tmp_path / "few", [90]), token_file(tmp_path / "many", [2] * 30)
    form = SimpleNamespace(rows=Rows)
    for train, valid, bound in (((few,), (few,), 2), ((few, many), (few,), 32)):
        make = batch_maker(Config(), SimpleNamespace(train=train, valid=valid, form=form))
        row = Rows(train[0], Config().seq_len)[0]
        batch = make({name: array[None] for name, array in row.items()})
        assert batch.places.most_segments == bound
