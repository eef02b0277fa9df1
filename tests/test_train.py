"""The training command, in one process: what it writes, and what it refuses."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_arguments

from jaxlm import train
from jaxlm.checkpoint import complete_steps
from jaxlm.cli import parse_config, read_config
from jaxlm.data_config import DataConfig
from jaxlm.errors import NonFiniteError, UserError
from jaxlm.monitor import read_metrics
from jaxlm.processes import ALONE, Group
from jaxlm.run_folder import check_unchanged
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.build import say_what_is_shared
from jaxlm.tasks.translation import ReferencePair
from jaxlm.validation import MaskedValidation, TranslationValidation, _short, opening


@pytest.fixture
def arguments(corpus, trained_run, tmp_path):
    """A tiny run into a folder of its own, with the trained run's token cache."""

    def build(**changes):
        places = {"data__train": corpus, "data__cache": trained_run.parent, "out": tmp_path / "run"}
        return tiny_arguments(**(places | changes))

    return build


def test_the_run_folder_holds_what_is_promised(trained_run):
    lines = read_metrics(trained_run / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 61))
    named = "step tokens loss learning_rate grad_norm tokens_per_second step_seconds"
    assert set(named.split()) <= set(updates[0])
    assert updates[-1]["tokens"] == 60 * 8 * 64
    valid = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in valid] == [30, 60]
    for line in valid:
        assert line["valid_perplexity"] == pytest.approx(np.exp(line["valid_loss"]))
    assert valid[-1]["valid_loss"] < valid[0]["valid_loss"] < updates[0]["loss"]
    assert complete_steps(trained_run) == [30, 60]
    assert any((trained_run / "tensorboard").iterdir())
    config = read_config(trained_run / "config.yaml")
    assert config.model.vocab_size == 320 and config.train.steps == 60


def opening_row(weights, segments):
    tokens = np.arange(12, dtype=np.int32)[None]
    row = np.array([weights], np.float32), np.array([segments], np.int32)
    return opening(Batch(tokens, tokens + 1, *row, positions=tokens))


def test_a_sample_begins_as_the_text_does_whose_continuation_is_known():
    everything = [1] * 12
    assert opening_row(everything, [1] * 12) == [*range(9)]
    assert opening_row(everything, [1] * 4 + [2] * 8) == [*range(4)]
    # A question of five tokens, and its answer.
    assert opening_row([0] * 4 + [1] * 8, [1] * 12) == [*range(5)]


@pytest.mark.parametrize(
    ("names", "target"), [((), ""), (("de",), ""), (("de", "fr"), "--target=fr ")]
)
def test_the_command_to_try_is_a_short_validation_text_and_its_language(names, target):
    language = names[-1] if names else None
    pairs = [
        ReferencePair(text, "", language) for text in ("a longer text", "it's short", "a text.")
    ]
    form = types.SimpleNamespace(names=names)
    validation = types.SimpleNamespace(
        _prepared=types.SimpleNamespace(form=form),
        _pairs=pairs,
        _tokenizer=types.SimpleNamespace(decode=str),
    )
    command = TranslationValidation.suggestion(validation, "runs/x")
    assert command == f"python -m jaxlm.sample runs/x {target}--prompt='a text.'"


def test_what_goes_on_and_on_is_shown_in_part():
    assert _short("a" * 200) == "a" * 200
    assert _short("a" * 201) == "a" * 200 + "..."


def test_help_names_what_a_model_is_trained_for(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "to go on with texts, to answer, to translate or to classify." in shown


def test_the_command_after_reading_has_what_fine_tuning_needs(monkeypatch, tmp_path):
    start = {"model": {"kind": "encoder", "max_seq_len": 64}, "data": {"seq_len": 64}}
    configs = []
    for folder in (Path(__file__).parents[1], tmp_path):
        monkeypatch.chdir(folder)
        command = MaskedValidation.suggestion(None, "runs/my x")
        assert ("--config=" in command) == (folder != tmp_path)
        argv = shlex.split(command.removeprefix("python -m jaxlm.train "))
        config, _ = parse_config(argv, "jaxlm.train", "Train.", read_start=lambda path: start)
        assert (config.init_from, config.out) == ("runs/my x", "runs/my x-labels")
        assert (config.task, config.seq_len) == ("classification", 64)
        configs.append(config)
    with_file, without = configs
    assert with_file.optim == without.optim and with_file.model == without.model
    often = {"eval_every": with_file.train.eval_every, "eval_batches": with_file.train.eval_batches}
    assert with_file.train == dataclasses.replace(without.train, **often)


@pytest.mark.slow
def test_without_a_prompt_the_sample_begins_as_a_validation_text(arguments, corpus, capsys):
    given = [a for a in arguments(train__steps=2) if not a.startswith("--train.sample_prompt")]
    assert train.main(given) == 0
    said = capsys.readouterr().out
    sample = re.search(r"sample: '(.*)'\n", said)[1]
    prompt = re.search(r"--prompt='?([^'\n]*)'?\n", said)[1]
    assert len(prompt) > 1 and prompt in sample
    assert any(path.read_text().strip().startswith(prompt) for path in corpus.iterdir())


def test_bits_per_byte_count_the_bytes_of_the_text(trained_run, corpus):
    # Every byte of the validation text is a target but for row ends, which overlap: so the sum of
    # nats over the bytes can be had from the public score of whole documents, too.
    import jaxlm

    line = read_metrics(trained_run / "metrics.jsonl")[-1]
    tokenizer = jaxlm.load(trained_run).tokenizer
    texts = [path.read_text() for path in corpus.iterdir()]
    bytes_per_token = np.mean([len(t.encode()) / (len(tokenizer.encode(t)) + 1) for t in texts])
    expected = line["valid_loss"] / np.log(2) / bytes_per_token
    assert line["valid_bits_per_byte"] == pytest.approx(expected, rel=0.02)


def test_a_finished_run_stays_as_it_is(arguments, trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    assert train.main(arguments()) == 0
    assert "already at step 60 of 60" in capsys.readouterr().out
    ours, theirs = (read_metrics(r / "metrics.jsonl") for r in (tmp_path / "run", trained_run))
    assert ours == theirs


def test_non_finite_updates_are_counted_and_stop_the_run_with_an_explanation(arguments, tmp_path):
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        train.main(
            arguments(
                optim__name="sgd",
                optim__learning_rate=1e30,
                optim__warmup_steps=0,
                optim__clip_norm="null",
                train__max_nonfinite=3,
            )
        )
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 3


def test_training_starts_from_another_run(arguments, trained_run, tmp_path, capsys):
    assert train.main(arguments(init_from=trained_run, train__steps=1)) == 0
    assert "optim.warmup_steps=5 is more than train.steps=1: " in capsys.readouterr().out
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    last = read_metrics(trained_run / "metrics.jsonl")[-2]["loss"]
    assert first == pytest.approx(last, abs=0.3)


def test_what_cannot_be_is_one_sentence(arguments, trained_run, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    cases = {
        "does not exist": {"init_from": tmp_path / "nowhere"},
        "another tokenizer": {"init_from": trained_run, "tokenizer__vocab_size": 310},
        "also in --config": {"init_from": trained_run, "tokenizer__vocab_size": 330},
        "less than the tokenizer's 320": {"model__vocab_size": 310},
        "num_layers=2 there, 3": {"init_from": trained_run, "model__num_layers": 3},
        "cannot be made": {"out": corpus / "000.txt" / "run"},
        "data.text_field='body' has no effect, because plain": {"data__text_field": "body"},
        "no such file or folder": {"data__train": tmp_path / "nowhere"},
        "leaves no room": {"train__sample_prompt": "a b c d e f g h i j " * 10},
        "pip install 'jaxlm[wandb]'": {"log__wandb_project": "p"},
        "rows": {"train__batch_size": 4096},
    }
    for words, changes in cases.items():
        with pytest.raises(UserError) as error:
            train.main(arguments(**changes))
        message = str(error.value)
        assert words in message, message
        assert "\n" not in message
        assert not (tmp_path / "run").exists(), words


def test_a_refused_run_leaves_nothing_behind(arguments, tmp_path):
    mistake = {"train__batch_size": 4096}  # which is found when the folder is there
    with pytest.raises(UserError, match="rows"):
        train.main(arguments(out=tmp_path / "a" / "b" / "run", **mistake))
    assert not (tmp_path / "a").exists()
    mine = tmp_path / "run" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    with pytest.raises(UserError, match="rows"):
        train.main(arguments(**mistake))
    assert [*mine.parent.iterdir()] == [mine]


def test_other_data_in_the_same_run_is_refused(arguments, trained_run, corpus, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    (text / "000.txt").write_text("something else entirely")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(corpus), str(text)))
    with pytest.raises(UserError, match="was trained on other data"):
        train.main(arguments(data__train=text, train__steps=61))


@pytest.mark.parametrize("note", [None, "{", "{}", "[]"])
def test_a_damaged_note_of_the_data_is_one_sentence(arguments, trained_run, tmp_path, note):
    shutil.copytree(trained_run, tmp_path / "run")
    file = tmp_path / "run" / "data.json"
    file.unlink() if note is None else file.write_text(note)
    with pytest.raises(UserError, match=r"data\.json, which tells what data"):
        train.main(arguments(train__steps=61))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_lost_config_of_a_run_is_one_sentence(arguments, trained_run, tmp_path, is_there):
    shutil.copytree(trained_run, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text("") if is_there else file.unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing or empty, as no run leaves it"):
        train.main(arguments(train__steps=61))


def test_a_run_that_starts_again_says_so(trained_run, tmp_path):
    for log, count in (("", 0), ((trained_run / "metrics.jsonl").read_text(), 1)):
        (tmp_path / "metrics.jsonl").write_text(log)
        said = []
        run = types.SimpleNamespace(group=ALONE, run_folder=tmp_path)
        assert train.Trainer._restore(run, said.append) is None
        line = f"{tmp_path} has no complete checkpoint: starting again at step 1"
        assert said == [line] * count


def test_two_trainers_cannot_share_a_folder(arguments, tmp_path):
    from jaxlm.run_folder import locked

    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        train.main(arguments())


def test_texts_to_validate_on_that_are_trained_on_are_said():
    said = []
    say_what_is_shared(DataConfig(train=("a", "b"), valid=("c",)), said.append)
    assert not said
    say_what_is_shared(DataConfig(train=("a", "b"), valid=("b", "c")), said.append)
    (line,) = said
    assert line.startswith("b is in data.train and in data.valid: ")


def test_the_folder_is_looked_at_before_the_data(arguments, trained_run, tmp_path, capsys):
    from jaxlm.run_folder import locked

    nowhere = tmp_path / "nowhere"
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        train.main(arguments(data__train=nowhere))
    with pytest.raises(UserError, match="cannot be made"):
        train.main(arguments(data__train=nowhere, out=trained_run / "config.yaml" / "run"))
    shutil.copytree(trained_run, tmp_path / "run", dirs_exist_ok=True)
    config = tmp_path / "run" / "config.yaml"
    train_from = next(a for a in arguments() if a.startswith("--data.train=")).partition("=")[2]
    config.write_text(config.read_text().replace(train_from, str(nowhere)))
    assert train.main(arguments(data__train=nowhere)) == 0
    assert "already at step 60 of 60" in capsys.readouterr().out


def test_a_damaged_last_step_is_said_once(arguments, trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000060" / "metrics.json").write_text("{}")
    assert train.main(arguments()) == 0
    said = capsys.readouterr().out
    assert said.count("step_00000060 is damaged") == 1 and "continuing at step 30" in said


def test_a_tokenizer_that_cannot_be_the_models_is_not_learnt(arguments, trained_run, tmp_path):
    changes = {"init_from": trained_run, "data__train": tmp_path / "nowhere"}
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        train.main(arguments(tokenizer__vocab_size=310, **changes))
    # With the same settings it might be the same.
    with pytest.raises(UserError, match="no such file or folder"):
        train.main(arguments(**changes))


def test_an_interrupted_beginning_leaves_nothing_behind(arguments, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_the_machines_do_not_share_is_one_sentence(tmp_path, monkeypatch):
    from jaxlm import run_folder

    class Second(Group):
        def from_first(self, make, seconds=None):
            return "what process 0 wrote"

    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 1)
    (tmp_path / "config.yaml").write_text("from another time")
    with pytest.raises(UserError, match="is not the one that process 0 writes to"):
        run_folder.claim_together(tmp_path, None, None, Second())
    (tmp_path / "config.yaml").write_text("what process 0 wrote")
    run_folder.claim_together(tmp_path, None, None, Second())


def test_the_exit_code_of_a_mistake_is_two():
    result = subprocess.run(
        [sys.executable, "-m", "jaxlm.train", "--optim.learning_rat=1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: unknown option '--optim.learning_rat'; did you mean '--optim.learning_rate'?"
    )


def test_the_data_note_names_tokenizer_and_token_files(trained_run):
    note = json.loads((trained_run / "data.json").read_text())
    assert set(note) == {"tokenizer", "train", "valid"}


@pytest.mark.slow
def test_averages_intervals_and_sparse_logging(arguments, tmp_path):
    import jaxlm

    code = train.main(
        arguments(
            train__steps=12,
            train__eval_every=0,
            optim__ema_decay=0.5,
            log__every_steps=5,
            checkpoint__every_steps=0,
            checkpoint__every_minutes=1e-6,
            checkpoint__keep=2,
            checkpoint__keep_best="false",
            mesh="dp1",
        )
    )
    assert code == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # Every update has its line, although the device was looked at every fifth step only.
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    # The clock was always past the interval: every step was saved, and two are kept.
    assert complete_steps(tmp_path / "run") == [11, 12]
    # Validation and loading take the average, which is not what was last updated.
    model = jaxlm.load(tmp_path / "run")
    (last,) = (line["valid_loss"] for line in lines if "valid_loss" in line)
    saved = json.loads((tmp_path / "run/checkpoints/step_00000012/metrics.json").read_text())
    assert saved["valid_loss"] == last
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "run/checkpoints/step_00000012/state")
    ours = np.asarray(model.params["embed"]["embedding"])
    assert np.array_equal(ours, arrays["ema/embed/embedding"])
    assert not np.array_equal(ours, arrays["params/embed/embedding"])


@pytest.mark.slow
def test_mixtures_are_trained_on(arguments, corpus, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": "xyz " * 100}) + "\n" for _ in range(20))
    )
    sources = f"[{corpus},{tmp_path / 'more.jsonl'}]"
    code = train.main(
        arguments(data__train=sources, data__weights="[3,1]", train__steps=2, mesh="dp1")
    )
    assert code == 0
    note = json.loads((tmp_path / "run" / "data.json").read_text())
    assert len(note["train"]) == 2


@pytest.mark.slow
def test_a_step_that_takes_too_long_prints_what_every_thread_does(small_run, tmp_path, capfd):
    """The first step, which is compiled."""
    changes = {"out": tmp_path / "run", "mesh": "dp1", "train__steps": 1}
    assert train.main(small_run(**changes, log__stall_minutes=0.2 / 60)) == 0
    text = capfd.readouterr().err
    assert "no step finished for 0.00333333 minutes; what every thread is doing" in text
    assert "in _update" in text


def test_another_configuration_is_refused_before_anything_is_prepared(
    arguments, trained_run, monkeypatch
):
    monkeypatch.setattr(train, "prepare_together", lambda *_: pytest.fail("prepared"))
    with pytest.raises(UserError, match="with another configuration"):
        train.main(arguments(out=trained_run, optim__learning_rate=0.5))


def test_a_continued_run_may_compute_the_same_otherwise(trained_run):
    config = read_config(trained_run / "config.yaml")
    fields = {
        "model": {"stack": "scan", "remat": "full"},
        "train": {"accumulation": config.train.batch_size, "loss_block": 1},
    }
    changed = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in fields.items()
    }
    check_unchanged(trained_run, dataclasses.replace(config, **changed))
    dropout = dataclasses.replace(config.model, dropout=0.5)
    with pytest.raises(UserError, match=r"configuration \(model.dropout=0.0 there, 0.5 now\)"):
        check_unchanged(trained_run, dataclasses.replace(config, model=dropout))
