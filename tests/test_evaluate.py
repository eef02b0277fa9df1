"""The evaluate command: figures that do not depend on how they are computed, and tables of them."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
from conftest import tiny_arguments
from loaded import loaded

import jaxlm
from jaxlm import evaluate, evaluation, texts, train
from jaxlm.beam import Beams
from jaxlm.cli import explain, read_config
from jaxlm.data.corpus import prepare
from jaxlm.data.loader import Rows
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError
from jaxlm.evaluation import Request
from jaxlm.models.ngram_fit import fit
from jaxlm.monitor import read_metrics
from jaxlm.tasks.confusion import confusion_picture


@pytest.fixture(scope="module")
def model(trained_run):
    return jaxlm.load(trained_run)


@pytest.fixture(scope="module")
def prepared(trained_run):
    config = read_config(trained_run / "config.yaml")
    return prepare(config.data, config.tokenizer, lambda line: None)


@pytest.fixture(scope="module")
def figures(model):
    return evaluation.evaluate(model, Request(baseline="ngram3"))


def test_the_loss_is_that_of_every_token_of_the_rows_that_training_makes(model, prepared, figures):
    pieces = []
    for file in prepared.valid:
        for row in Rows(file, model.config.seq_len):
            segments = range(1, row["segment_ids"].max() + 1)
            pieces += [row["tokens"][row["segment_ids"] == s].tolist() for s in segments]
    scores = model.program.score(model.params, [piece for piece in pieces if len(piece) > 1])
    logprobs = np.concatenate(scores)
    targets = sum(file.num_tokens - len(file) for file in prepared.valid)
    assert figures["tokens"] == len(logprobs) == targets
    assert figures["bytes"] == sum(file.num_bytes for file in prepared.valid)
    assert figures["valid_loss"] == pytest.approx(-logprobs.mean(dtype=np.float64), rel=1e-5)
    bits = -logprobs.sum(dtype=np.float64) / np.log(2) / figures["bytes"]
    assert figures["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert figures["valid_perplexity"] == pytest.approx(np.exp(figures["valid_loss"]))
    assert min(figures["xz_bits_per_byte"], figures["gzip_bits_per_byte"]) > 0


def test_neither_mesh_nor_batch_changes_the_figures(trained_run, figures, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_PER_SHARD", 3)
    other = evaluation.evaluate(jaxlm.load(trained_run, mesh="dp2,tp2"), Request())
    for name, value in other.items():
        expected = figures[name] if isinstance(value, str) else pytest.approx(figures[name], 1e-5)
        assert value == expected


def test_the_baseline_learns_from_the_texts_of_the_run(prepared, figures):
    nats, targets = fit(prepared.train, 3, 320).nats(prepared.valid)
    assert figures["ngram3_loss"] == pytest.approx(nats / targets, rel=1e-9)
    ratio = figures["ngram3_bits_per_byte"] / figures["valid_bits_per_byte"]
    assert ratio == pytest.approx(figures["ngram3_loss"] / figures["valid_loss"])


def test_a_limit_takes_the_first_documents(model, prepared):
    assert len(prepared.train[0]) > 2
    (part,) = prepared.train
    few = part.first(2)
    assert len(few) == 2 and few.num_tokens == part.offsets[2] == len(few.tokens)
    found = evaluation.evaluate(model, Request(limit=1))
    one = prepared.valid[0].first(1)
    assert found["tokens"] == one.num_tokens - 1
    everything = evaluation.evaluate(model, Request(limit=10**6))
    assert everything["tokens"] == sum(f.num_tokens - len(f) for f in prepared.valid)


def test_other_texts_are_read_with_the_models_tokenizer(trained_run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("ab cd é\n" * 50)
    evaluate.main([str(trained_run), f"--data={text}", "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err.count(f"{text}: ") == 1
    assert found["task"] == "language_modelling" and found["bytes"] == len(text.read_bytes())
    assert found["model"].endswith("step_00000060")
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "ab cd"}\n{"text": null}\n')
    evaluate.main([str(trained_run), f"--data={lines}"])
    assert "5 bytes; 1 skipped as empty, null" in capsys.readouterr().out
    evaluate.main([str(trained_run), f"--data=[{text},{text}]"])
    table = capsys.readouterr().out
    loss = -np.mean(jaxlm.score(trained_run, text.read_text()[:20]).token_logprobs)
    assert np.isfinite(loss) and "gzip -9" in table and f"{2 * found['bytes']:,} bytes" in table


def test_the_table_has_the_figures(model, figures):
    lines = evaluate.report("run", figures, "ngram3").splitlines()
    assert lines[0].split() == ["nats/token", "perplexity", "bits/byte"]
    assert lines[1].split()[:2] == ["run", f"{figures['valid_loss']:.4f}"]
    assert lines[2].split()[:2] == ["ngram3", f"{figures['ngram3_loss']:.4f}"]
    assert [line.split()[0] for line in lines[3:5]] == ["gzip", "xz"]


CONFUSION = np.array([[50, 2, 0], [7, 0, 1], [0, 0, 12]])


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "x.svg").mkdir()
    figures = {"confusion": CONFUSION, "labels": dict.fromkeys("abc")}
    with pytest.raises(UserError, match=r"cannot write --picture=.*x\.svg: Is a directory"):
        evaluate._draw(figures, str(tmp_path / "x.svg"))


def test_a_confusion_matrix_is_drawn():
    names = ["bad", "so <so>", "good"]
    picture = confusion_picture(CONFUSION, names)
    assert picture.count("<rect") == 10 and "so &lt;so&gt;" in picture
    assert 'fill-opacity="0.875"' in picture and ">88%<" in picture


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    """Trains a tiny model of a task on lines of a TSV; gives its run folder."""

    def run(task: str, kind: str, lines: list[str], **changes):
        home = tmp_path_factory.mktemp(task)
        data = home / "data.tsv"
        data.write_text("".join(f"{line}\n" for line in lines))
        arguments = small_arguments(
            task=task,
            model__kind=kind,
            data__train=data,
            data__cache=home / "cache",
            out=home / "run",
            train__steps=20,
            train__eval_every=0,
            train__eval_batches=0,
            mesh="dp1",
            **changes,
        )
        assert train.main(arguments) == 0
        return home / "run"

    return run


def small_arguments(**changes) -> list[str]:
    dropped = ("--train.sample_tokens", "--train.sample_prompt")
    return [a for a in tiny_arguments(**changes) if not a.startswith(dropped)]


@pytest.mark.slow
def test_a_classifier_is_evaluated_as_it_was_validated(task_run, capsys, tmp_path):
    draw = random.Random(0)
    words = {"bad": "awful poor sad", "fine": "so plain usual", "good": "great joy happy"}
    lines = []
    for _ in range(300):
        label = draw.choice([*words])
        lines.append(f"{label}\t{' '.join(draw.choices(words[label].split(), k=8))}")
    run = task_run("classification", "encoder", lines, data__valid_fraction=0.2)
    line = read_metrics(run / "metrics.jsonl")[-1]
    found = evaluation.evaluate(jaxlm.load(run, mesh="dp2"), Request())
    for name in ("valid_loss", "valid_accuracy", "valid_macro_f1", "valid_ece"):
        assert found[name] == pytest.approx(line[name], rel=1e-4)
    assert list(found["labels"]) == ["bad", "fine", "good"]
    assert np.sum(found["confusion"]) == found["texts"] > 30
    few = evaluation.evaluate(jaxlm.load(run), Request(limit=7))
    assert few["texts"] == 7
    picture = tmp_path / "confusion.svg"
    evaluate.main([str(run), f"--picture={picture}"])
    table = capsys.readouterr().out
    assert f"accuracy {line['valid_accuracy']:.4f}" in table and "precision" in table
    assert picture.read_text().startswith("<svg")


@pytest.mark.slow
def test_translations_are_evaluated_as_they_were_validated(task_run, capsys):
    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(40)]
    lines = []
    for _ in range(200):
        words = draw.choices(known, k=5)
        lines.append(f"{' '.join(words)}\t{' '.join(words).upper()}")
    run = task_run("translation", "encoder_decoder", lines, data__valid_fraction=0.2)
    line = read_metrics(run / "metrics.jsonl")[-1]
    greedy = Request(beams=Beams(num_beams=1))
    found = evaluation.evaluate(jaxlm.load(run, mesh="dp2"), greedy)
    for name in ("valid_loss", "valid_bleu", "valid_chrf"):
        assert found[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6)
    capsys.readouterr()  # what training printed
    evaluate.main([str(run), "--json", "--limit=5"])
    searched = json.loads(capsys.readouterr().out)
    assert (
        searched["texts"] == 5
        and "left_out" not in searched
        and "tok:13a" in searched["signatures"][""]
    )
    evaluate.main([str(run), "--limit=5", "--num_beams=1"])
    assert capsys.readouterr().out.split()[:2] == ["BLEU", "chrF"]


def test_columns_are_named_as_in_training(monkeypatch, tmp_path, capsys):
    stars = tmp_path / "stars.tsv"
    stars.write_text(
        "id\tstars\treview\n" + "1\tpositive\tfine\n2\tnegative\tawful\n" * 2 + "3\t\tso\n"
    )
    model = loaded("classification")
    model.tokenizer.save(tmp_path)
    data = DataConfig(cache=str(tmp_path), label_column="sentiment")
    config = dataclasses.replace(model.config, data=data)
    model = dataclasses.replace(model, config=config, source=tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: model)
    names = {"tsv_header": "true", "label_column": "stars", "text_field": "review"}
    options = [f"--data.{name}={value}" for name, value in names.items()]
    evaluate.main(["run", f"--data={stars}", "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert np.sum(found["confusion"], axis=1).tolist() == [2, 0, 2]
    assert (found["texts"], found["skipped"]) == (4, 1)
    assert "4 texts; 1 skipped as empty" in evaluate.report("run", found)
    with pytest.raises(UserError, match="'sentiment'"):
        evaluate.main(["run", f"--data={stars}", "--data.tsv_header=true"])


def test_a_column_of_languages_stands_for_the_runs(monkeypatch):
    model = loaded("translation")
    data = DataConfig(languages=("de", "fr"))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))
    request = Request(data=("a.tsv",), columns={"language_column": "3"})
    settings = evaluation._languages(model, model.config, request) | request.columns
    told = dataclasses.replace(data, train=request.data, **settings)
    assert (told.languages, told.language_column) == ((), "3")


def test_settings_that_do_not_go_together_are_one_sentence(model):
    request = Request(data=("stdlib",), columns={"text_field": "x"})
    with pytest.raises(ValueError) as found:
        evaluation.evaluate(model, request)
    sentence, code = explain(found.value)
    assert sentence.startswith("error: data.text_field='x' has no effect") and code == 2


@pytest.mark.parametrize("beams", [1, 3])
def test_translations_are_evaluated_as_translate_makes_them(monkeypatch, tmp_path, beams):
    data = tmp_path / "a.tsv"
    data.write_text("the fox\tder fuchs\nthe dog\tder hund\n")
    model, seen = loaded("translation", controls=()), []
    config = dataclasses.replace(model.config, data=DataConfig(cache=str(tmp_path)))
    model.tokenizer.save(tmp_path)
    model = dataclasses.replace(model, config=config, source=tmp_path)

    def remember(model, rows, settings):
        seen.append((settings, sorted(row.source for row in rows)))
        return [[""] for _ in rows]

    for module in (evaluation, texts):
        monkeypatch.setattr(module, "continue_rows", remember)
    request = Request(data=(str(data),), beams=Beams(num_beams=beams, length_penalty=0.6))
    found = evaluation.evaluate(model, request)
    assert found["left_out"] == 0
    length = model.config.seq_len
    jaxlm.translate(model, ["the fox", "the dog"], num_beams=beams, max_new_tokens=length)
    assert seen[0] == seen[1] and seen[0][0].eos_id is not None


def test_languages_are_told_by_their_option(monkeypatch, tmp_path):
    data = tmp_path / "a.tsv"
    data.write_text("the fox\tder fuchs\n" * 3)
    model = loaded("translation")
    config = dataclasses.replace(model.config, data=DataConfig(languages=("de", "fr")))
    monkeypatch.setattr(
        evaluate, "load", lambda *_, **__: dataclasses.replace(model, config=config)
    )
    for options, words in (
        ([], "the model's run has 2 languages (de, fr) for 1 sources in --data: give --languages"),
        (["--languages=[de,fr,de]"], "--languages gives 3 languages"),
        (["--languages=fx"], "--languages: 'fx' is not a target language"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            evaluate.main(["run", f"--data={data}", *options])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline=bigram"], "use ngramN"),
        (["--baseline=ngram0"], "N from 1 on"),
        (["--task=classification"], "cannot be evaluated on task=classification"),
        (["--task=translation"], "cannot be evaluated on task=translation"),
        (["--num_beams=4"], r"\(--num_beams, --length_penalty\) is for task=translation"),
        (["--languages=de"], "is for task=translation"),
        (["--picture=nowhere/x.svg"], "a folder that exists"),
        (["--picture=x.png"], "an SVG file"),
        (["--task=instruction", "--baseline=ngram2"], "is for task=language_modelling"),
        (["--data=nowhere.txt"], "no such file"),
        (["--data="], "--data and --languages take names"),
        (["--data.text_field=x"], "--data.text_field is for texts in --data"),
        (["--data=stdlib", "--data.target_column=x"], "is for task=translation or instruction"),
        (["--limit=0"], "above 0"),
        (["--picture=x.svg"], "is for task=classification"),
        (["--tsk=x"], "did you mean '--task'"),
        (["--label_column=x"], "did you mean '--data.label_column'"),
        (["--zzz=x"], "unknown option '--zzz': --help lists them"),
    ],
)
def test_mistakes_are_one_sentence(trained_run, arguments, words):
    with pytest.raises(UserError, match=words):
        evaluate.main([str(trained_run), *arguments])
