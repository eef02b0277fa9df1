"""The sample command."""

import io
import json
import types

import pytest
from loaded import loaded

import jaxlm
from jaxlm import sample, texts
from jaxlm.errors import UserError

SETTINGS = ["--max_new_tokens=8", "--temperature=0"]


def test_it_prints_prompt_and_continuation(trained_run, capsys):
    sample.main([str(trained_run), "--prompt=ab", *SETTINGS])
    expected = jaxlm.generate(trained_run, "ab", max_new_tokens=8, temperature=0)
    assert capsys.readouterr().out == f"ab{expected}\n"


def test_a_dash_reads_standard_input(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    sample.main([str(trained_run), "--prompt=-", *SETTINGS])
    assert capsys.readouterr().out.startswith("ab")


def test_without_a_prompt_it_asks_until_an_empty_line(trained_run, capsys, monkeypatch):
    lines = iter(["ab", "x " * 200, "c", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    sample.main([str(trained_run), *SETTINGS])
    captured = capsys.readouterr()
    assert captured.out.startswith("ab") and "\nc" in captured.out
    assert "leaves no room" in captured.err


def test_a_file_for_standard_input_is_not_told_what_to_type(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nc"))
    sample.main([str(trained_run), *SETTINGS])
    captured = capsys.readouterr()
    assert captured.out.startswith("ab") and "\nc" in captured.out and captured.err == ""


def test_mistakes_are_one_sentence(trained_run):
    for arguments in ([str(trained_run), "--promt=a"], [], ["/nowhere", "--prompt=a"]):
        with pytest.raises(UserError):
            sample.main(arguments)


@pytest.fixture
def run_of(monkeypatch, capsys):
    """Runs the command on a random model of a task; gives what it printed."""

    def run(task: str, *arguments: str, typed: tuple[str, ...] | None = None) -> str:
        monkeypatch.setattr(sample, "load", lambda *_, **__: loaded(task))
        if typed is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        sample.main(["run", *arguments])
        return capsys.readouterr().out

    return run


def test_beams_are_those_of_the_api(run_of):
    made = run_of("language_modelling", "--prompt=fox", "--num_beams=3", "--max_new_tokens=8")
    model = loaded("language_modelling")
    assert made == f"fox{jaxlm.generate(model, 'fox', num_beams=3, max_new_tokens=8)}\n"


@pytest.mark.slow
def test_a_translation_is_printed_alone(run_of):
    model, settings = loaded("translation"), ["--target=fr", "--max_new_tokens=8"]
    made = run_of("translation", "--prompt=the fox", *settings)
    assert made == jaxlm.translate(model, "the fox", "fr", max_new_tokens=8) + "\n"
    sampled = {"temperature": 0.9, "seed": 3, "max_new_tokens": 8, "target": "fr"}
    made = run_of("translation", "--prompt=fox", "--temperature=0.9", "--seed=3", *settings)
    assert made == jaxlm.generate(model, "fox", **sampled) + "\n"


def test_a_classifier_prints_label_and_probabilities(run_of):
    found = jaxlm.classify(loaded("classification"), "the fox")
    made = run_of("classification", "--prompt=the fox").split()
    assert made[0] == made[1] == found.label
    assert float(made[2]) == pytest.approx(found.probabilities[found.label], abs=1e-4)


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        (
            "language_modelling",
            ["--prompt=fox", "--max_new_tokens=500"],
            ["max_new_tokens=500 is more than fits"],
        ),
        ("language_modelling", ["--prompt=fox"], []),
        ("instruction", ["--prompt=fox"], ["this continues the text, --chat answers it"]),
        ("instruction", ["--prompt=fox", "--chat"], []),
        ("classification", [f"--prompt={'fox ' * 99}"], ["1 of 1 text cut to 64 tokens"]),
    ],
)
def test_what_is_cut_short_is_said_beside_the_answer(monkeypatch, capsys, task, arguments, said):
    monkeypatch.setattr(sample, "load", lambda *_, **__: loaded(task))
    sample.main(["run", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert [words in line for words, line in zip(said, lines, strict=True)] == [True] * len(said)


def test_a_chat_remembers_what_was_said(run_of):
    model, settings = loaded("instruction"), {"max_new_tokens": 6, "temperature": 0}
    talk = [{"role": "system", "content": "dog"}, {"role": "user", "content": "a"}]
    first = jaxlm.generate(model, talk, **settings)
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "b"}]
    second = jaxlm.generate(model, talk, **settings)
    options = ["--chat", "--system=dog", "--max_new_tokens=6", "--temperature=0"]
    assert run_of("instruction", *options, typed=("a", "b")) == f"{first}\n{second}\n"


def test_a_chat_that_is_too_long_forgets_its_oldest_messages(run_of):
    model, settings = loaded("instruction"), {"max_new_tokens": 4, "temperature": 0}
    system = {"role": "system", "content": "dog"}
    longest = {"role": "user", "content": "the fox " * 4}
    answered = jaxlm.generate(model, [system, longest], **settings)
    both = [system, longest, {"role": "assistant", "content": answered}, longest]
    with pytest.raises(UserError, match="leaves no room"):
        jaxlm.generate(model, both, **settings)
    options = ["--chat", "--system=dog", "--max_new_tokens=4", "--temperature=0"]
    made = run_of("instruction", *options, typed=(longest["content"],) * 2)
    assert made == f"{answered}\n{answered}\n"
    with pytest.raises(UserError, match=r"the conversation has .* leaves no room"):
        run_of("instruction", *options, typed=(longest["content"] * 9,))


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[]], "prompts[0] has no messages: give at least one to answer"),
        ([{"role": "user", "content": None}], "'content' is null, not a string: give it text"),
        ([["a"]], "prompts[0] is ['a']: give strings"),
    ],
)
def test_talks_of_another_form_are_one_sentence(prompts, words):
    with pytest.raises(UserError) as error:
        jaxlm.generate(loaded("instruction"), prompts)
    assert words in str(error.value) and "data.on_bad" not in str(error.value)


def test_lines_that_are_piped_are_answered_to_the_last_and_mistakes_end_it(run_of):
    settings = ["--max_new_tokens=4", "--temperature=0"]
    one, two = (run_of("language_modelling", f"--prompt={text}", *settings) for text in "ab")
    assert run_of("language_modelling", *settings, typed=("a", "", "b")) == one + two
    with pytest.raises(UserError, match="leaves no room"):
        run_of("language_modelling", *settings, typed=("ab " * 200, "b"))


def test_a_file_of_prompts_gives_json_lines(run_of, tmp_path):
    settings = {"max_new_tokens": 6, "temperature": 0}
    options = ["--max_new_tokens=6", "--temperature=0"]
    plain, mixed, out = (tmp_path / name for name in ("a.txt", "b.jsonl", "out.jsonl"))
    plain.write_text("the fox\na\u2028b\n\n", encoding="utf-8")  # blank lines may end it
    model = loaded("instruction")
    lines = run_of("instruction", f"--prompts={plain}", *options).split("\n")
    made = [json.loads(line) for line in lines[:-1]]
    texts = ["the fox", "a\u2028b"]
    wanted = jaxlm.generate(model, texts, **settings)
    assert made == [{"prompt": p, "text": t} for p, t in zip(texts, wanted, strict=True)]
    talk = [{"role": "user", "content": "fox"}]
    requests = [{"messages": talk}, {"prompt": "the fox", "id": 7}]
    mixed.write_text("".join(json.dumps(r) + "\n" for r in requests))
    assert run_of("instruction", f"--prompts={mixed}", f"--out={out}", *options) == ""
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        requests[0] | {"text": jaxlm.generate(model, talk, **settings)},
        requests[1] | {"text": wanted[0]},
    ]
    (found,) = run_of("classification", f"--prompts={plain}").splitlines()[:1]
    assert json.loads(found).keys() == {"prompt", "label", "probabilities"}
    mixed.write_text('{"text": "the fox"}\n{"prompt": "dog"}\n')
    for line, key in zip(
        run_of("classification", f"--prompts={mixed}").splitlines(), ("text", "prompt"), strict=True
    ):
        assert json.loads(line).keys() == {key, "label", "probabilities"}


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("language_modelling", ["--out=a", "--prompt=b"], "--out has no effect without --prompts"),
        ("language_modelling", ["--system=a"], "without --chat"),
        ("language_modelling", ["--chat"], "no chat template"),
        ("translation", ["--chat"], "no chat template"),
        ("language_modelling", ["--prompts=a", "--prompt=b"], "leave out --prompt"),
        ("language_modelling", ["--prompts=nowhere"], "No such file"),
        ("language_modelling", ["--prompts=BAD"], "line 2 of"),
        ("language_modelling", ["--prompts=BAD", "--out=BAD"], "is the file of --prompts"),
        ("language_modelling", ["--prompt=b", "--target=de"], "--target=de is for a translation"),
        ("language_modelling", ["--prompt=b", "--length_penalty=2"], "num_beams too"),
        ("translation", ["--prompt=b"], "de, fr: choose one by --target="),
        ("classification", ["--prompt=b", "--top_k=2"], "--top_k has no effect on a classifier"),
        ("classification", ["--chat"], "--chat has no effect"),
    ],
)
def test_what_does_not_apply_is_one_sentence(run_of, task, arguments, words, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    with pytest.raises(UserError) as error:
        run_of(task, *(argument.replace("BAD", str(bad)) for argument in arguments))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_a_prompt_is_refused(tmp_path):
    for name, content in (("none.txt", ""), ("none.jsonl", ""), ("blank.txt", "\n\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} has no prompts: write one"):
            list(sample._requests(tmp_path / name, ("prompt",)))
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    with pytest.raises(UserError, match=r"line 2 of .*prompts\.txt is empty"):
        list(sample._requests(tmp_path / "prompts.txt", ("prompt",)))


def test_translations_have_one_limit_however_they_are_asked_for(monkeypatch):
    model, seen = loaded("translation"), []
    monkeypatch.setattr(
        texts, "continue_rows", lambda m, rows, settings: seen.append(settings) or [["x"]]
    )
    jaxlm.translate(model, "the fox", target="de", num_beams=1)
    sample._answers(model, ["the fox"], {"target": "de", "num_beams": 1})
    sample._answers(model, ["the fox"], {"target": "de", "num_beams": 1, "temperature": 0})
    assert {s.max_new_tokens for s in seen} == {model.config.model.max_seq_len} != {128}
