"""N-gram models through the commands and calls that other models have."""

import json
import math
import shutil

import numpy as np
import pytest

import jaxlm
from jaxlm import train
from jaxlm.cli import build_config
from jaxlm.errors import UserError
from jaxlm.monitor import read_metrics

STEP = "checkpoints/step_00000001"


@pytest.fixture(scope="module")
def arguments(corpus, tmp_path_factory):
    """The command line of a trigram run into a folder of its own."""
    home = tmp_path_factory.mktemp("fitted")

    def build(out="run", **changes) -> list[str]:
        settings = {
            "model.kind": "ngram",
            "model.order": 3,
            "tokenizer.vocab_size": 320,
            "train.sample_prompt": "a",
            "train.sample_tokens": 4,
            "data.train": corpus,
            "data.cache": home / "cache",
            "data.workers": 1,
            "out": home / out,
        } | {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in settings.items()]

    build.home = home
    return build


@pytest.fixture(scope="module")
def fitted_run(arguments):
    assert train.main(arguments()) == 0
    return arguments.home / "run"


def test_the_run_folder_holds_what_others_do(fitted_run):
    (line,) = read_metrics(fitted_run / "metrics.jsonl")
    assert line["step"] == 1 and line["tokens"] > 1000
    assert line["valid_perplexity"] == pytest.approx(math.exp(line["valid_loss"]))
    assert 0.5 < line["valid_bits_per_byte"] < 8
    saved = json.loads((fitted_run / STEP / "metrics.json").read_text())
    assert saved["valid_loss"] == line["valid_loss"]
    model = jaxlm.load(fitted_run)
    assert model.step == 1 and model.config.model.order == 3


def test_the_validation_loss_is_that_of_the_scores_of_its_texts(fitted_run, corpus, arguments):
    from jaxlm.cli import read_config
    from jaxlm.data.corpus import prepare

    config = read_config(fitted_run / "config.yaml")
    prepared = prepare(config.data, config.tokenizer, lambda line: None)
    model = jaxlm.load(fitted_run)
    logprobs = []
    for file in prepared.valid:
        for first, last in zip(file.offsets, file.offsets[1:], strict=False):
            logprobs += model.program.score(model.params, [file.tokens[first:last].tolist()])
    line = read_metrics(fitted_run / "metrics.jsonl")[-1]
    assert -np.concatenate(logprobs).mean() == pytest.approx(line["valid_loss"], rel=1e-6)


def test_a_fitted_run_stays_as_it_is(arguments, fitted_run, capsys):
    before = (fitted_run / "metrics.jsonl").read_text()
    assert train.main(arguments()) == 0
    assert "is fitted already" in capsys.readouterr().out
    assert (fitted_run / "metrics.jsonl").read_text() == before
    with pytest.raises(
        UserError, match=r"order=3 there, 4 now\): give the same, or another --out$"
    ):
        train.main(arguments(model__order=4))


def test_a_folder_is_looked_at_before_it_has_data(arguments, fitted_run, tmp_path):
    with pytest.raises(UserError, match=r"model\.order=3 there, 4 now"):
        train.main(arguments(model__order=4, data__cache=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_damaged_table_is_refused(fitted_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(fitted_run, copy)
    table = copy / STEP / "state" / "2-grams.probability.npy"
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    table.write_bytes(content)
    with pytest.raises(UserError, match="bytes changed in state/2-grams"):
        jaxlm.load(copy)


def test_scores_follow_the_chain_rule(fitted_run):
    model = jaxlm.load(fitted_run)
    short, long = jaxlm.score(model, ["abc", "abc abc"])
    shared = len(short.tokens)
    assert long.tokens[:shared] == short.tokens
    assert long.token_logprobs[: shared - 1] == pytest.approx(short.token_logprobs)
    for i, token in enumerate(long.tokens[1:], 1):
        following = model.params.next_probabilities(long.tokens[:i])
        assert long.token_logprobs[i - 1] == pytest.approx(math.log(following[token]), abs=1e-6)


def test_a_text_of_any_length_has_a_score(fitted_run):
    model = jaxlm.load(fitted_run)
    text = "abc " * model.config.model.max_seq_len
    scored = jaxlm.score(model, text)
    assert len(scored.tokens) > model.config.model.max_seq_len
    assert math.isfinite(scored.logprob)


def test_generation_has_the_settings_of_other_models(fitted_run):
    model = jaxlm.load(fitted_run)
    options = {"max_new_tokens": 12, "seed": 5}
    alone = jaxlm.generate(model, "ab", **options)
    assert jaxlm.generate(model, ["c d", "ab", "e"], **options)[1] == alone
    assert "".join(jaxlm.generate(model, "ab", stream=True, **options)) == alone
    assert jaxlm.generate(model, "ab", max_new_tokens=12, seed=6) != alone
    samples = jaxlm.generate(model, "ab", num_samples=3, **options)
    assert samples[0] == alone and len({*samples}) == 3
    stop = alone[2:4]
    assert jaxlm.generate(model, "ab", stop=stop, **options) == alone[: alone.index(stop)]
    greedy = jaxlm.generate(model, "ab", max_new_tokens=12, temperature=0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert jaxlm.generate(model, "ab", max_new_tokens=12, **narrow) == greedy
    ids = model.tokenizer.encode
    penalised = jaxlm.generate(
        model, "ab", max_new_tokens=12, temperature=0, repetition_penalty=1e9
    )
    made = ids("ab" + penalised)
    assert len({*made}) == len(made)


def test_greedy_tokens_are_the_likeliest(fitted_run):
    model = jaxlm.load(fitted_run)
    row = [model.tokenizer.bos_id, *model.tokenizer.encode("ab")]
    made = []
    for _ in range(6):
        made.append(int(model.params.next_probabilities(row + made).argmax()))
    text = model.tokenizer.decode_bytes(made).decode(errors="replace")
    assert jaxlm.generate(model, "ab", max_new_tokens=6, temperature=0) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"d_model": 64}}, "model.d_model=64 is not read"),
        ({"optim": {"name": "adamw"}}, "optim.name='adamw' has no effect"),
        ({"train": {"steps": 3}}, "train.steps=3 has no effect"),
        ({"parallel": {"rounds": 2}}, "parallel.rounds=2 has no effect"),
        ({"checkpoint": {"keep": 2}}, "checkpoint.keep=2 has no effect"),
        ({"data": {"weights": [1.0]}}, r"data.weights=\[1.0\] has no effect"),
        ({"mesh": "dp2"}, "mesh=dp2 has several devices"),
        ({"init_from": "runs/x"}, "init_from=runs/x has no effect"),
        ({"task": "translation"}, "cannot train model.kind=ngram"),
    ],
)
def test_settings_that_nothing_reads_are_refused(changes, words):
    settings = {"model": {}} | changes
    settings["model"] = {"kind": "ngram"} | settings["model"]
    with pytest.raises(UserError, match=words):
        build_config(settings)
    assert build_config({"model": {"kind": "ngram", "order": 7}, "mesh": "dp1"}).model.order == 7
    with pytest.raises(UserError, match=r"model\.order=7 has no effect"):
        build_config({"model": {"order": 7}})


def test_what_an_ngram_model_cannot_do_is_one_sentence(fitted_run, arguments, tmp_path):
    with pytest.raises(UserError, match="leave out mesh"):
        jaxlm.load(fitted_run, mesh="dp2")
    with pytest.raises(UserError, match="has no such models"):
        jaxlm.export_checkpoint(fitted_run, out=tmp_path / "out")
