"""Instruction tuning: rows of prompts and of messages become talks, of which answers count."""

import json

import numpy as np
import pytest

from jaxlm.cli import build_config
from jaxlm.data.corpus import prepare
from jaxlm.errors import UserError
from jaxlm.tasks.build import batch_maker, make_form


def rows(count):
    names = [
        "alpha",
        "bravo",
        "charlie",
        "delta",
        "echo",
        "foxtrot",
        "golf",
        "hotel",
        "india",
        "juliet",
        "kilo",
    ]
    questions = [f"What is {n} plus {n % 7}, dear {names[n % 8]}?" for n in range(count)]
    return [{"prompt": q, "completion": f"It is {n}."} for n, q in enumerate(questions)]


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


LONG = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(tmp_path):
    def run(train, **settings):
        run.lines = []
        data = {"train": [train], "cache": str(tmp_path / "cache"), **settings}
        run.config = build_config(
            {
                "task": "instruction",
                "model": {"max_seq_len": 96},
                "data": data,
                "tokenizer": {"vocab_size": 300},
            }
        )
        form = make_form(run.config)
        return prepare(run.config.data, run.config.tokenizer, run.lines.append, form)

    return run


def test_prompts_and_messages_become_talks(run, tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(50), LONG])
    prepared = run(path, valid=path)
    tokenizer, (file,) = prepared.tokenizer, prepared.train
    assert {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_ids.keys()
    answers = []
    for index in range(len(file)):
        arrays = file.example(index)
        np.testing.assert_array_equal(arrays["tokens"][1:], arrays["targets"][:-1])
        answers.append(tokenizer.decode(arrays["targets"][arrays["weights"] > 0]))
    assert sorted(answers) == sorted([*(row["completion"] for row in rows(50)), "bd"])
    every = prepared.form.rows(file, 96)
    batch = batch_maker(run.config, prepared)({k: v[None] for k, v in every[0].items()})
    assert batch.source is None
    assert 0 < batch.weights.sum() < (batch.segment_ids > 0).sum() / 2


def test_the_same_prompt_is_on_one_side(run, tmp_path):
    once = rows(60)
    twice = [row | {"completion": f"{row['completion']} Yes."} for row in once]
    lines = [*once, *twice]
    prepared = run(write(tmp_path / "a.jsonl", lines), valid_fraction=0.2)

    def prompts(file):
        decode = prepared.tokenizer.decode
        texts = (decode(file.example(index)["tokens"]) for index in range(len(file)))
        return [text.split("?")[0] for text in texts]

    kept, held_out = prompts(prepared.train[0]), prompts(prepared.valid[0])
    assert len(kept) + len(held_out) == 120
    assert len(held_out) % 2 == 0
    assert not set(kept) & set(held_out)


def test_columns_of_tsv_and_other_names(run, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{row['prompt']}\t{row['completion']}\n" for row in rows(40)))
    digests = [run(str(path), valid=str(path)).train[0].digest]
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in rows(40)]
    other = write(tmp_path / "b.jsonl", renamed)
    prepared = run(other, valid=other, source_column="q", target_column="a")
    assert [prepared.train[0].digest] == digests


def test_talks_that_cannot_be_used_are_counted(run, tmp_path):
    bad = [
        messages(("user", "no answer")),
        messages(("user", "a"), ("assistant", " ")),
        messages(("user", None), ("assistant", "b")),
        {"prompt": "a", "completion": None},
        {"messages": None},
    ]
    long = messages(("user", "word " * 90), ("assistant", "b"))
    path = write(tmp_path / "a.jsonl", [*rows(30), *bad, long])
    valid = write(tmp_path / "v.jsonl", rows(3))
    (train,) = run(path, valid=valid).train
    assert (len(train), train.num_skipped, train.num_dropped) == (30, 5, 1)
    for line in bad:
        with pytest.raises(UserError, match=r"b\.jsonl, line 1.*on_bad=skip"):
            run(write(tmp_path / "b.jsonl", [line]), valid=valid, on_bad="error")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "line 1 has neither messages nor prompt and completion but 'text'"),
        ({"messages": "a"}, "messages holds 'a': write a list of objects with role and content"),
        (messages(("tool", "a"), ("assistant", "b")), "turn 1: the role 'tool' is none of system"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no 'content' but 'role': a message has"),
        (messages(("user", 7), ("assistant", "b")), "turn 1: field 'content' holds '7'"),
    ],
)
def test_rows_of_another_shape_are_errors(run, tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "a.jsonl", [line]))


def test_the_template_is_part_of_what_was_prepared(run, tmp_path):
    path = write(tmp_path / "a.jsonl", rows(40))
    prepared = run(path, valid=path)
    again = run(path, valid=path)
    assert again.train[0].path == prepared.train[0].path
    assert prepared.tokenizer.chat_template
    other = prepared.tokenizer.with_chat_template("{{ messages }}")
    facts = map(prepared.form.encoding_facts, (prepared.tokenizer, other))
    assert len({json.dumps(fact) for fact in facts}) == 2
