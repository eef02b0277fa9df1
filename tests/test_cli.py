"""Command lines and YAML to one experiment, and back."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import task_of

from jaxlm.cli import build_config, dump_config, flatten, parse_config, read_config
from jaxlm.config import Config
from jaxlm.errors import NonFiniteError, UserError
from jaxlm.mistakes import leaves
from jaxlm.presets import PRESETS


def parse(*argv):
    return parse_config(list(argv), "jaxlm.train", "Train.")[0]


def refused(*argv):
    """The one sentence that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def values_for(hint):
    """Values that a field of this type may take, most of them valid."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return values_for(arguments[0])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_for(arguments[0]), min_size=1, max_size=3)
    if type(None) in arguments:
        return st.none() | st.one_of(*map(values_for, arguments[:-1]))
    if dataclasses.is_dataclass(hint):
        return st.just({"kind": "llama3", "factor": 2.0})
    return {
        bool: st.booleans(),
        int: st.sampled_from([1, 2, 4, 8, 64, 400, 1000]),
        float: st.floats(1e-6, 0.9) | st.sampled_from([1e-4, 3e-4, 0.5, 1.0, 1e6]),
        str: st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    }[hint]


HINTS = dict(leaves(Config))
SPECIAL = {"model.preset": st.sampled_from(list(PRESETS)), "mesh": st.sampled_from(["dp", "tp2"])}


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_writing_and_reading_a_config_is_the_identity(data, tmp_path_factory):
    keys = data.draw(st.lists(st.sampled_from(sorted(HINTS)), max_size=4, unique=True))
    tree = {}
    for key in keys:
        value = data.draw(SPECIAL.get(key, values_for(HINTS[key])), label=key)
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            assume(isinstance(place, dict))
        place[name] = value
    try:
        config = build_config(tree)
    except UserError:
        assume(False)
    path = tmp_path_factory.getbasetemp() / "identity.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert read_config(path) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_print_config_prints_what_reads_back(preset, yaml_file, capsys):
    argv = f"--task={task_of(preset)}", f"--model.preset={preset}", "--data.train=a.txt"
    config = parse(*argv)
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, "--print_config")
    assert not stopped.value.code
    assert read_config(yaml_file(capsys.readouterr().out)) == config


def test_the_command_line_is_over_the_file_is_over_the_preset(yaml_file):
    path = yaml_file("model: {preset: gpt2-tiny, d_ff: 100, dropout: 0.5}\nseed: 7\n")
    config = parse(f"--config={path}", "--model.dropout=0.25", "--train.steps=3")
    assert config.model.positions == "learned"
    assert (config.model.d_ff, config.model.dropout) == (100, 0.25)
    assert (config.seed, config.train.steps) == (7, 3)
    assert config.out == "runs/run"
    assert parse().out == "runs/default"


def test_a_preset_on_the_command_line_replaces_the_files(yaml_file):
    path = yaml_file("model: {preset: gpt2-tiny, d_ff: 100}\n")
    model = parse(f"--config={path}", "--model.preset=llama-tiny").model
    assert (model.positions, model.d_ff) == ("rotary", 100)


def test_a_preset_that_would_change_nothing_is_an_error(yaml_file, capsys):
    path = yaml_file(dump_config(Config()))
    sentence = refused(f"--config={path}", "--model.preset=gpt2-tiny")
    assert "model.preset='gpt2-tiny' would have no effect" in sentence
    assert str(path) in sentence


VALUES = [
    ("--optim.learning_rate=3e-4", "optim.learning_rate", 3e-4),
    ("--optim.learning_rate=1", "optim.learning_rate", 1.0),
    ("--optim.clip_norm=null", "optim.clip_norm", None),
    ("--optim.schedule=wsd", "optim.schedule", "wsd"),
    ("--model.norm_eps=1e-6", "model.norm_eps", 1e-6),
    ("--model.tie_embeddings=false", "model.tie_embeddings", False),
    ("--model.rope_scaling={factor: 2}", "model.rope_scaling.factor", 2.0),
    ("--model.rope_scaling.factor=2", "model.rope_scaling.factor", 2.0),
    ("--model.rope_scaling=null", "model.rope_scaling", None),
    ("--data.train=a.txt", "data.train", ("a.txt",)),
    ("--data.weights=3", "data.weights", (3.0,)),
    ("--data.train=[a.txt, b.txt]", "data.train", ("a.txt", "b.txt")),
    ("--train.sample_prompt=123", "train.sample_prompt", "123"),
    ("--train.sample_prompt=a: b", "train.sample_prompt", "a: b"),
    ("--data.cache=null", "data.cache", None),
    ("--mesh=dp2,tp2", "mesh", "dp2,tp2"),
]


@pytest.mark.parametrize(("argument", "key", "value"), VALUES, ids=lambda x: str(x))
def test_values_on_the_command_line(argument, key, value):
    assert flatten(parse(argument))[key] == value


MISTAKES = [
    ("--optim.learning_rat=1", ["'--optim.learning_rat'", "did you mean '--optim.learning_rate'"]),
    ("--optim.lr=1", ["did you mean '--optim.learning_rate'"]),
    ("--train.bs=1", ["did you mean '--train.batch_size'"]),
    ("--model.vs=1", ["did you mean '--model.vocab_size'"]),
    ("--steps=1", ["'--steps'", "did you mean '--train.steps'"]),
    ("--train.step=1", ["did you mean '--train.steps'"]),
    ("--train.steps", ["--train.steps", "expected one argument"]),
    ("train.steps=1", ["'train.steps=1'", "--KEY=VALUE"]),
    ("--train.steps=ten", ["train.steps='ten'", "integer"]),
    ("--train.steps=[1", ["--train.steps='[1'", "not valid YAML"]),
    ("--seed=4294967296", ["seed=4294967296", "4294967295"]),
    ("--out=", ["out=''", "leave it out"]),
    ("--init_from=", ["init_from=''", "leave it out"]),
    ("--tokenizer.path=", ["tokenizer.path=''", "leave it out"]),
    ("--config=", ["--config= is empty", "leave it out"]),
    ("--data.train=", ["data.train='' is wrong: it should be names"]),
    ("--data.weights=1,2", ["data.weights='1,2' is wrong: it should be a number, or several such"]),
    ("--data.valid=[a.txt,'']", ["data.valid=", "it should be names"]),
    ("--optim.name=adm", ["optim.name='adm'", "did you mean 'adam'"]),
    ("--optim.schedule=null", ["optim.schedule=null"]),
    ("--train.class_weights=balance", ["such as [3,1] or 'balanced'; did you mean 'balanced'"]),
    ("--train.class_weights=[-1]", ["=-1 is wrong", "greater than 0 or 'balanced'"]),
    ("--model.preset=gpt2-124", ["model.preset='gpt2-124'", "did you mean 'gpt2-124m'"]),
]


@pytest.mark.parametrize(("argument", "fragments"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_on_the_command_line_is_one_sentence(argument, fragments):
    sentence = refused(argument)
    assert [fragment for fragment in fragments if fragment not in sentence] == []


def test_an_option_given_twice_is_an_error():
    assert "--train.steps is given twice" in refused("--train.steps=1", "--train.steps=2")


def test_a_tilde_is_the_home_folder(yaml_file, monkeypatch):
    monkeypatch.setenv("HOME", str(yaml_file("seed: 7\n").parent))
    config = parse("--config=~/run.yaml", "--out=~/a", "--init_from=~/b")
    home = os.environ["HOME"]
    assert (config.seed, config.out, config.init_from) == (7, f"{home}/a", f"{home}/b")


BAD_FILES = {
    "train: {steps: 3}\ntrain: {steps: 4}\n": ["key 'train' is given twice", "line 2"],
    "train:\n  steps: 3\n  steps: 4\n": ["key 'steps' is given twice", "line 3"],
    "train: [": ["is not valid YAML"],
    "- 1\n- 2\n": ["[1, 2]", "sections and keys"],
    "modl: {dropout: 3}\n": ["'modl'", "did you mean 'model'", "run.yaml"],
    "train: {stepps: 3}\n": ["'train.stepps'", "did you mean 'train.steps'", "run.yaml"],
    "train: {steps: -3}\n": ["train.steps=-3", "run.yaml"],
    "train:\n": ["train=null", "run.yaml"],
    "model:\nd_model: 64\n": ["model=null (in ", "run.yaml", "one a line, indented"],
    "model.d_model: 64\n": ["'model.d_model': in a file d_model stands below model:", "run.yaml"],
    "modl.d_model: 64\n": ["unknown key 'modl.d_model'; did you mean 'model.d_model'"],
    "model:\n\td_model: 64\n": ["run.yaml", "in line 2", "indent by spaces"],
    "model:\n  d_model: 64\n   d_ff: 2\n": ["in line 3", "have the same indentation"],
    "seed: 1\n---\nseed: 2\n": ["in line 2", "leave out the line ---"],
    "optim: {name: sgd, beta1: 0.5}\n": ["optim.beta1=0.5 has no effect", "run.yaml"],
    "model: {? [a]: 1}\n": ["run.yaml"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_mistake_in_a_file_names_the_file(text, yaml_file):
    sentence = refused(f"--config={yaml_file(text)}")
    assert [fragment for fragment in BAD_FILES[text] if fragment not in sentence] == []


def test_a_missing_file_names_the_nearest(yaml_file):
    path = yaml_file("seed: 1\n", "small.yaml")
    for name in ("smal.yaml", "small.yml"):
        assert f"did you mean '{path}'" in refused(f"--config={path.with_name(name)}")
    assert "cannot be read" in refused(f"--config={path.parent}")


def test_what_is_wrong_in_a_file_is_said_to_be_there(yaml_file):
    path = yaml_file("model:\n  dropout: -1\n")
    wrong = "model.dropout=-1 is wrong: it should be at least 0 and less than 1"
    assert refused(f"--config={path}") == f"{wrong} (in {path})"
    # An option's name may be a part of the wrong key's.
    for other in ("--seed=3", "--out=runs/dropout"):
        assert refused(f"--config={path}", other) == f"{wrong} (in {path})"
    assert refused(f"--config={path}", "--model.dropout=2").endswith("less than 1")


def test_what_is_wrong_between_layers_is_said_to_be_where_it_is(yaml_file):
    path = yaml_file("task: masked_language_modelling\ntrain: {steps: 600}\nmodel: {preset: x}\n")
    assert refused(f"--config={path}").endswith(f"(in {path})")
    path = yaml_file("train: {steps: 600}\n")
    sentence = refused(f"--config={path}", "--model.kind=ngram")
    assert sentence.startswith("train.steps=600 has no effect")
    assert sentence.endswith(f"(train.steps in {path})")
    file = {"task": "masked_language_modelling", "init_from": "runs/a"}
    start = {"model": {"kind": "encoder", "labels": ["a", "b"]}, "task": "classification"}
    with pytest.raises(UserError) as caught:
        build_config(file, {}, "masked.yaml", start)
    assert str(caught.value).endswith("set that, or model.labels=null (of init_from=runs/a)")


def test_an_empty_file_is_the_defaults(yaml_file):
    assert read_config(yaml_file("")) == Config()


def test_numbers_in_exponent_notation_are_numbers(yaml_file):
    config = read_config(yaml_file("optim: {learning_rate: 3e-4, eps: 1E-9}\n"))
    assert (config.optim.learning_rate, config.optim.eps) == (3e-4, 1e-9)


def test_help_has_every_leaf_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "section [" not in text
    entries = {
        entry.split()[0].split("=")[0]: " ".join(entry.split()) for entry in text.split("\n  --")
    }
    plain = yaml.safe_load(dump_config(Config()))
    for key in HINTS:
        assert key in entries, f"--help lacks {key}"
        assert "[" in entries[key], f"--help gives no default for {key}"
    assert entries["train.steps"].endswith(f"[{plain['train']['steps']}]")
    assert entries["optim.eps"].endswith("[1e-08]")
    assert entries["data.train"].endswith("[[stdlib]]")
    assert "{sgd,adam,adamw,adafactor,lion,muon}" in entries["optim.name"]


RUNNER = "from jaxlm import cli, errors\ndef main(argv): {}\ncli.run_command(main)"
AT_EXIT = "import atexit; atexit.register(print, 'an interpreter ended')"
EXITS = [
    ("raise errors.UserError('bad')", 2, "error: bad\n"),
    ("raise errors.NonFiniteError('bad')", 3, "stopped: bad\n"),
    (
        "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.')",
        2,
        "error: out of device memory (1.0 GiB were asked for): lower train.batch_size or raise "
        "train.accumulation, set model.remat=full, or shard by fsdp\n",
    ),
    ("return 75", 75, ""),
    ("return None", 0, ""),
    # At once: an interpreter that ends while XLA works crashes.
    (f"{AT_EXIT}; raise errors.UserError('bad')", 2, "error: bad\n"),
    (f"{AT_EXIT}; raise KeyboardInterrupt", 130, ""),
]


@pytest.mark.parametrize(("body", "code", "stderr"), EXITS)
def test_exit_codes(body, code, stderr):
    command = [sys.executable, "-c", RUNNER.format(body)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", stderr)


@pytest.mark.parametrize("seconds", [0, 0.4, 1.0])
def test_interrupted_while_it_starts_a_command_says_nothing(seconds, tmp_path):
    arguments = [f"--out={tmp_path / 'run'}", f"--data.cache={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "jaxlm.train", *arguments],
        # A shell's background job, which these tests may be, ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Before jaxlm is imported it is Python that answers.
    maps = Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors


def test_train_refuses_an_unknown_key_with_exit_code_2():
    command = [sys.executable, "-m", "jaxlm.train", "--optim.learning_rat=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown option '--optim.learning_rat'; did you mean '--optim.learning_rate'?\n"
    )


def test_non_finite_is_no_user_error():
    assert not issubclass(NonFiniteError, UserError)


def test_yaml_merges_and_says_no_to_what_a_config_cannot_hold(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("train: &a {steps: 7}\nlog: {every_steps: 3}\n")
    assert read_config(file).train.steps == 7
    file.write_text("optim: {<<: {beta1: 0.5}, name: adam}\n")
    assert (read_config(file).optim.beta1, read_config(file).optim.name) == (0.5, "adam")
    for text in ("train: &a {x: *a}\n", "2024-01-01: 3\n", "a: [1\nb: 2\n", "a: 1\na: 2\n"):
        file.write_text(text)
        with pytest.raises(UserError) as error:
            read_config(file)
        assert "\n" not in str(error.value) and "unicode string" not in str(error.value)
