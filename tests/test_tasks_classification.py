"""Classification: labels, where they stand, truncation, class weights."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxlm.cli import build_config
from jaxlm.data.corpus import prepare
from jaxlm.errors import UserError
from jaxlm.tasks.build import batch_maker, make_form
from jaxlm.tasks.classification import class_weights, encode_texts, in_order, label_counts

LABELS = ("positive", "negative", "neutral", "negative")


def rows(count):
    words = ["good", "bad", "so-so", "awful", "fine", "好", "坏", "film", "book"]
    return [
        (LABELS[n % 4], f"{words[n % 9]} {words[n * 7 % 9]} {words[n * 5 % 8]} {n}")
        for n in range(count)
    ]


def write(path, lines):
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(tmp_path):
    def run(train, model=(), weights=None, **settings):
        run.lines = []
        model = {"kind": "encoder", "max_seq_len": 48} | dict(model)
        data = {"train": [train], "cache": str(tmp_path / "cache"), **settings}
        run.config = build_config(
            {
                "task": "classification",
                "model": model,
                "data": data,
                "tokenizer": {"vocab_size": 320},
                "train": {"class_weights": weights},
            }
        )
        form = make_form(run.config)
        return prepare(run.config.data, run.config.tokenizer, run.lines.append, form)

    return run


def batch_of(run, prepared):
    every = prepared.form.rows(prepared.train[0], 48)
    stacked = {name: np.stack([row[name] for row in every]) for name in every[0]}
    return batch_maker(run.config, prepared)(stacked)


@pytest.mark.parametrize(
    ("model", "at_last"), [({"pooling": "first"}, False), ({}, False), ({"kind": "decoder"}, True)]
)
def test_the_label_stands_where_the_head_reads(run, tmp_path, model, at_last):
    lines = rows(80)
    prepared = run(write(tmp_path / "a.tsv", lines), model, valid=write(tmp_path / "v.tsv", lines))
    assert prepared.form.names == ("negative", "neutral", "positive")
    batch, tokenizer = batch_of(run, prepared), prepared.tokenizer
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            places = np.flatnonzero(batch.segment_ids[row] == segment)
            ids = batch.tokens[row, places].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            (place,) = places[batch.weights[row, places] > 0]
            assert place == (places[-1] if at_last else places[0])
            label = prepared.form.names[batch.targets[row, place]]
            found.append((label, tokenizer.decode(ids)))
    assert sorted(found) == sorted(lines)
    assert batch.weights.sum() == 80
    assert batch.source is None


def test_long_texts_are_cut_and_said(run, tmp_path):
    lines = [*rows(20), ("neutral", "7" * 60)]
    found = Counter(label for label, _ in lines)
    prepared = run(write(tmp_path / "a.tsv", lines), valid=write(tmp_path / "v.tsv", lines[:4]))
    assert (len(prepared.train[0]), prepared.train[0].num_cut) == (21, 1)
    names = ", ".join(f"{name} {found[name]}" for name in in_order({*found}))
    assert run.lines[0] == f"{len(found)} labels: {names}"
    assert ", 1 cut to 48 tokens, " in run.lines[2]
    ((ids, cut), (short, whole)) = encode_texts(
        prepared.tokenizer, ["a" * 99, "a"], 10, prepared.tokenizer.ends
    )
    assert (len(ids), ids[-1], cut, whole) == (10, prepared.tokenizer.eos_id, True, False)
    assert len(short) < 10


def test_utf_16_is_one_sentence(run, tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        file = tmp_path / f"{encoding}.tsv"
        file.write_bytes(("\ufeff" + "positive\tgood\n" * 9).encode(encoding))
        with pytest.raises(UserError, match=r"\.tsv begins as UTF-16 does: convert it to UTF-8"):
            run(str(file))


def test_labels_have_an_order():
    assert in_order({"positive", "negative", "neutral"}) == ("negative", "neutral", "positive")
    assert in_order({"positive", "negative"}) == ("negative", "positive")
    assert in_order({"10", "9", "1"}) == ("1", "9", "10")
    assert in_order({"b", "a", "neutral"}) == ("a", "b", "neutral")


def test_labels_are_numbers_names_or_classes_of_json(run, tmp_path):
    lines = [{"stars": n % 5, "body": text} for n, (_, text) in enumerate(rows(60))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepared = run(str(path), label_column="stars", text_field="body")
    assert prepared.form.names == ("0", "1", "2", "3", "4")
    held_out = len(prepared.valid[0])
    assert label_counts(prepared).sum() == 60 - held_out


def test_unknown_labels_are_errors(run, tmp_path):
    train = write(tmp_path / "a.tsv", rows(40))
    valid = write(tmp_path / "v.tsv", [*rows(4), ("positiv", "fine")])
    message = r"v\.tsv, line 5: the label 'positiv' is none of .*; did you mean 'positive'\?"
    with pytest.raises(UserError, match=message):
        run(train, valid=valid)
    valid = write(tmp_path / "w.tsv", [("mixed", "fine")])
    with pytest.raises(UserError, match=r"none of data\.train's .*: give data\.train texts that"):
        run(train, valid=valid)
    message = r"v\.tsv, line 2: the label 'negative' is none of the model's .* model\.labels=null"
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "v.tsv"), {"labels": ["positive", "neutral"]})
    (tmp_path / "f.jsonl").write_text('{"label": 1.0, "text": "a"}\n')
    with pytest.raises(UserError, match=r"f\.jsonl, line 1: the label 1\.0 .*: write it as a str"):
        run(str(tmp_path / "f.jsonl"))
    with pytest.raises(UserError, match=r"every training text has the label 'x'.*label_column"):
        run(write(tmp_path / "b.tsv", [("x", "one"), ("x", "two")]))


def test_a_source_without_a_usable_record_says_why(run, tmp_path):
    path = tmp_path / "latin1.tsv"
    path.write_bytes("positive\tschön\nnegative\tübel\n".encode("latin-1"))
    message = r"no record .*\(2 skipped as .*\): .*latin1\.tsv, line 1: byte .* of field"
    with pytest.raises(UserError, match=message):
        run(str(path))
    with pytest.raises(UserError, match=r"'stdlib', .* has no label and text: give \.tsv"):
        run("stdlib")


def test_texts_in_the_place_of_labels_are_an_error(run, tmp_path):
    lines = [{"stars": label, "body": text} for label, text in rows(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"a\.jsonl has 40 .* for 40 texts in the field 'body'"):
        run(str(path), label_column="body", text_field="stars")
    swapped = write(tmp_path / "b.tsv", [(text, label) for label, text in rows(40)])
    with pytest.raises(UserError, match=r"b\.tsv has 40 different labels .* in column 1, which"):
        run(swapped)
    assert run(swapped, label_column="2", text_field="1").form.names == tuple(sorted({*LABELS}))
    few = [(f"label {n % 21}", text) for n, (_, text) in enumerate(rows(42))]
    assert len(run(write(tmp_path / "c.tsv", few)).form.names) == 21


def test_labels_of_the_config_keep_their_order(run, tmp_path):
    labels = ["positive", "neutral", "negative", "unseen"]
    prepared = run(write(tmp_path / "a.tsv", rows(40)), {"labels": labels})
    assert prepared.form.names == tuple(labels)
    assert label_counts(prepared)[3] == 0


def test_class_weights(run, tmp_path):
    path = write(tmp_path / "a.tsv", rows(80))
    valid = write(tmp_path / "v.tsv", rows(4))
    prepared = run(path, weights="balanced", valid=valid)
    weights = class_weights(run.config, prepared)
    counts = label_counts(prepared)
    assert counts.tolist() == [40, 20, 20]
    np.testing.assert_allclose(weights * counts, 80 / 3, rtol=1e-6)
    batch = batch_of(run, prepared)
    assert batch.weights.dtype == np.float32
    for label in range(3):
        chosen = (batch.targets == label) & (batch.weights > 0)
        np.testing.assert_allclose(batch.weights[chosen].sum(), 80 / 3, rtol=1e-5)
    prepared = run(path, weights=[1.0, 2.0, 0.5], valid=valid)
    assert class_weights(run.config, prepared).tolist() == [1, 2, 0.5]
    prepared = run(path, weights=[1.0, 2.0], valid=valid)
    with pytest.raises(UserError, match=r"has 2 numbers for 3 labels: .* negative, neutral"):
        class_weights(run.config, prepared)


def test_settings_that_another_task_reads(tmp_path):
    with pytest.raises(UserError, match=r"data\.label_column=.* without task=classification"):
        build_config({"data": {"label_column": "2"}})
    with pytest.raises(UserError, match=r"train\.class_weights=.* without task=classification"):
        build_config({"train": {"class_weights": "balanced"}})
    with pytest.raises(UserError, match=r"data\.languages=.* without task=translation"):
        build_config({"data": {"languages": "de"}})
