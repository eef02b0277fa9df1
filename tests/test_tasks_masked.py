"""Masked language modelling: what is hidden, what stands in its place, what it is good for."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from loaded import loaded, tokenizer_of
from tiny import tiny_config

import jaxlm
from jaxlm import evaluate, evaluation, sample, train
from jaxlm.cli import build_config, read_config
from jaxlm.data.corpus import prepare
from jaxlm.errors import UserError
from jaxlm.evaluation import Request
from jaxlm.loading import read_model
from jaxlm.mesh import make_mesh
from jaxlm.misfit import check_fits
from jaxlm.monitor import read_metrics
from jaxlm.tasks.build import batch_maker, make_form
from jaxlm.tasks.masked import MASK, Masking, mask_id

LENGTH, ROWS, RATE = 40, 400, 0.15
FIELDS = {"kind": "encoder", "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64}
FIELDS |= {"num_kv_heads": None, "max_seq_len": 32}


def masking(seed=0):
    config = tiny_config(task="masked_language_modelling", model={"kind": "encoder"}, seed=seed)
    return Masking.of(config, tokenizer_of((MASK,)))


def some_rows(numbers=range(ROWS)):
    """Rows of two texts and padding, the same tokens in each."""
    tokenizer = tokenizer_of((MASK,))
    ids = tokenizer.encode("the lazy dog jumps over the quick brown fox " * 4)[: LENGTH // 2 - 4]
    text = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    row = np.array([*text, *text, *[0] * (LENGTH - 2 * len(text))], np.int32)
    segments = np.repeat([1, 2, 0], [len(text), len(text), LENGTH - 2 * len(text)])
    numbers = np.array(numbers)
    tile = lambda x: np.tile(x.astype(np.int32), (len(numbers), 1))  # noqa: E731
    rows = {"tokens": tile(row), "segment_ids": tile(segments)}
    return rows | {"positions": rows["segment_ids"], "number": numbers}


def test_of_what_is_predicted_most_is_hidden_some_replaced_and_some_left():
    rows, make = some_rows(), masking()
    batch = make(rows)
    there = np.take_along_axis(rows["tokens"], batch.reads, axis=1)
    np.testing.assert_array_equal(batch.targets, there)
    assert batch.targets.shape == (ROWS, round(RATE * LENGTH))
    is_target = batch.weights > 0
    can_be = make.is_ordinary[rows["tokens"][0]] & (rows["segment_ids"][0] > 0)
    assert (is_target.sum(axis=1) == round(RATE * can_be.sum())).all()
    assert make.is_ordinary[batch.targets[is_target]].all(), "neither ends nor padding"
    assert all(len({*row}) == len(row) for row in batch.reads.tolist()), "each once"
    given = np.take_along_axis(batch.tokens, batch.reads, axis=1)[is_target]
    shares = [(given == make.mask_id).mean(), (given == there[is_target]).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)
    others = np.ones_like(rows["tokens"], bool)
    np.put_along_axis(others, batch.reads, ~is_target, axis=1)
    np.testing.assert_array_equal(batch.tokens[others], rows["tokens"][others])
    # Every place of a text is predicted about as often.
    often = np.bincount(batch.reads[is_target], minlength=LENGTH)[rows["segment_ids"][0] == 2][1:-1]
    assert often.min() > 0.5 * often.mean() and often.max() < 1.5 * often.mean()


def test_what_is_hidden_depends_on_the_seed_and_the_rows_number_alone():
    whole, part = masking()(some_rows()), masking()(some_rows([7, 3]))
    for name in ("tokens", "targets", "weights", "reads"):
        values = getattr(whole, name)[[7, 3]]
        np.testing.assert_array_equal(getattr(part, name), values, name)
    assert len({row.tobytes() for row in whole.reads}) > ROWS / 2
    assert (masking(seed=1)(some_rows()).reads != whole.reads).any()


def test_a_row_with_few_tokens_has_few_targets():
    rows = some_rows(range(3))
    rows["segment_ids"][:, 14:] = 0
    batch = masking()(rows)
    assert batch.weights.sum(axis=1).tolist() == [2.0] * 3  # of 13: the first begins the text
    assert (batch.reads[batch.weights > 0] < 14).all()
    rows["segment_ids"][:, 3:] = 0
    assert masking()(rows).weights.sum(axis=1).tolist() == [1.0] * 3
    rows["segment_ids"][:] = 0
    empty = masking()(rows)
    assert not empty.weights.any()
    np.testing.assert_array_equal(empty.tokens, rows["tokens"])


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "texts.tsv"
    words = ["good", "bad", "so-so", "awful", "fine", "好", "坏", "film", "book"]
    lines = [
        f"{('a', 'b')[n % 2]}\t{' '.join(words[n * k % 9] for k in range(9))}" for n in range(90)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_texts_of_a_table_are_its_second_column(labelled, tmp_path):
    def prepared(**data):
        data |= {"train": [str(labelled)], "cache": str(tmp_path / "cache")}
        config = build_config(
            {
                "task": "masked_language_modelling",
                "model": FIELDS,
                "data": data,
                "tokenizer": {"vocab_size": 320},
            }
        )
        return config, prepare(config.data, config.tokenizer, print, make_form(config))

    config, found = prepared()
    tokenizer, file = found.tokenizer, found.train[0]
    first = file.tokens[: file.offsets[1]].tolist()
    assert (first[0], first[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(first) in labelled.read_text()
    assert "\t" not in tokenizer.decode(file.tokens.tolist())
    rows = found.form.rows(file, 32)
    assert len(rows) == -(-file.num_tokens // 32) and rows[0]["tokens"].shape == (32,)
    stacked = {name: x[None] for name, x in rows[0].items()} | {"number": np.array([0])}
    batch = batch_maker(config, found)(stacked)
    assert mask_id(tokenizer) in batch.tokens and batch.tokens.shape == (1, 32)
    with pytest.raises(UserError, match="should be in column 3"):
        prepared(text_field="3")


@pytest.mark.slow
def test_a_classifier_starts_from_what_has_read(labelled, tmp_path, capsys):
    out = tmp_path / "read"
    shape = [f"--model.{key}={'null' if value is None else value}" for key, value in FIELDS.items()]
    data = [f"--data.train={labelled}", "--data.valid_fraction=0.2", f"--data.cache={tmp_path}/c"]
    options = ["--train.batch_size=4", "--train.eval_every=15", *data]
    options += [
        "--optim.learning_rate=0.01",
        "--optim.warmup_steps=1",
        "--tokenizer.vocab_size=320",
    ]
    masked = ["--task=masked_language_modelling", *shape, *options, f"--out={out}"]
    assert train.main([*masked, "--train.steps=30", "--mesh=dp2,tp2"]) == 0
    assert f"sentiment-finetune.yaml --init_from={out}" in capsys.readouterr().out
    *_, middle, last = [
        line for line in read_metrics(out / "metrics.jsonl") if "valid_loss" in line
    ]
    assert last["valid_loss"] < middle["valid_loss"] < np.log(320)
    # Neither mesh nor the number of rows at once says what is hidden.
    for mesh in ("dp1", "dp4"):
        evaluate.main([str(out), "--json", f"--mesh={mesh}"])
        figures = json.loads(capsys.readouterr().out)
        assert figures["valid_loss"] == pytest.approx(last["valid_loss"], rel=1e-5)
        assert figures["valid_perplexity"] == pytest.approx(np.exp(figures["valid_loss"]))
    evaluate.main([str(out)])
    assert f"{figures['tokens']:,} hidden tokens" in capsys.readouterr().out

    labels = [a for a in options if not a.startswith("--tokenizer")]
    labels = ["--task=classification", f"--init_from={out}", *labels, f"--out={tmp_path / 'label'}"]
    assert train.main([*labels, "--train.steps=1", "--mesh=dp2"]) == 0
    assert "new: classifier/out/bias" in capsys.readouterr().out
    read, label = (read_model(jaxlm.load(run).source) for run in (out, tmp_path / "label"))
    assert label.params.keys() == read.params.keys() | {"classifier"}
    near = lambda x, y: np.testing.assert_allclose(x, y, atol=0.02)  # noqa: E731
    jax.tree.map(near, read.params, {name: label.params[name] for name in read.params})
    assert jaxlm.classify(label_model := jaxlm.load(tmp_path / "label"), "good film").label in "ab"
    assert read_config(label_model.source / "config.yaml").model.labels == ("a", "b")

    with pytest.raises(UserError, match="an encoder without labels"):
        sample.main([str(out), "--prompt=good"])
    with pytest.raises(UserError, match="an encoder without labels: fine-tune it first"):
        jaxlm.generate(out, "good")


def test_an_encoder_without_labels_says_nothing():
    """As a published BERT is, whose folder is taken for something to classify with."""
    model = loaded("classification")
    bare = dataclasses.replace(model.config.model, labels=None)
    bare = dataclasses.replace(model, config=dataclasses.replace(model.config, model=bare))
    for use in (
        lambda: jaxlm.classify(bare, "good"),
        lambda: jaxlm.generate(bare, "good"),
        lambda: jaxlm.score(bare, "good"),
        lambda: sample._check_model(bare, chats=False, settings={}),
        lambda: evaluation.evaluate(bare, Request()),
    ):
        with pytest.raises(UserError, match="an encoder without labels: fine-tune it first"):
            use()


def test_what_does_not_fit_is_said():
    def built(**fields):
        return build_config({"task": "masked_language_modelling", "model": FIELDS | fields})

    assert built(pooler=True).model.pooler, "BERT's, which stays as it is"
    with pytest.raises(UserError, match=r"model\.labels=.* has no effect .* model\.labels=null"):
        built(labels=["a", "b"])
    with pytest.raises(UserError, match=r"model.kind=decoder.*model.preset=bert-tiny"):
        built(kind="decoder")
    with pytest.raises(UserError, match=r"mask_rate=0\.2 has no effect"):
        build_config({"train": {"mask_rate": 0.2}})
    with pytest.raises(UserError, match="cp=2 splits rows"):
        check_fits(built(), make_mesh("cp2"))
    with pytest.raises(UserError, match="none of the special pieces <mask>"):
        mask_id(tokenizer_of(()))
    model = loaded("classification")
    with pytest.raises(UserError, match="cannot be evaluated on task=masked"):
        evaluation.evaluate(model, Request(task="masked_language_modelling"))
