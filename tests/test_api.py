"""`jaxlm.load`, `generate` and `score` on a trained run."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import sample
from jaxlm.checkpoint import complete_steps, step_folder
from jaxlm.data.loader import Rows
from jaxlm.loading import load_params, read_model
from jaxlm.mesh import make_mesh
from jaxlm.models.build import make_model
from jaxlm.monitor import read_metrics


@pytest.fixture(scope="module")
def model(trained_run):
    return jaxlm.load(trained_run)


def test_a_string_gives_a_string_and_a_list_a_list(model):
    one = jaxlm.generate(model, "ab", max_new_tokens=5, temperature=0)
    assert isinstance(one, str) and one
    assert jaxlm.generate(model, ["ab", "c"], max_new_tokens=5, temperature=0)[0] == one
    assert jaxlm.generate(model, [], max_new_tokens=5) == []
    several = jaxlm.generate(model, ["ab", "c"], max_new_tokens=5, num_samples=3)
    assert [len(samples) for samples in several] == [3, 3]
    assert len(set(several[0])) > 1


def test_a_text_does_not_depend_on_its_neighbours_or_the_mesh(model, trained_run):
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 5}
    alone = jaxlm.generate(model, "abc", **settings)
    assert jaxlm.generate(model, ["a much longer text", "abc"], **settings)[1] == alone
    assert jaxlm.generate(trained_run, "abc", mesh="dp2,tp2", **settings) == alone
    assert jaxlm.generate(model, "abc", **settings | {"seed": 6}) != alone


def test_the_stream_is_the_text(model):
    for prompt in ("a", "é你", "😀b"):
        settings = {"max_new_tokens": 24, "temperature": 1.0, "seed": 1}
        pieces = list(jaxlm.generate(model, prompt, stream=True, **settings))
        assert "".join(pieces) == jaxlm.generate(model, prompt, **settings)
        assert all(pieces) and len(pieces) > 1
        assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_a_stop_string_ends_the_text_before_it(model):
    whole = jaxlm.generate(model, "ab", max_new_tokens=40, temperature=0)
    stop = whole[8:10]
    settings = {"max_new_tokens": 40, "temperature": 0, "stop": ["never there", stop]}
    cut = jaxlm.generate(model, "ab", **settings)
    assert cut == whole[: whole.index(stop)]
    assert "".join(jaxlm.generate(model, "ab", stream=True, **settings)) == cut


def test_the_score_is_the_chain_rule_and_agrees_with_generation(model):
    text = "abc de"
    score = jaxlm.score(model, text)
    assert score.tokens == [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    assert len(score.token_logprobs) == len(score.tokens) - 1
    assert score.logprob == pytest.approx(sum(score.token_logprobs), rel=1e-6)
    longer = jaxlm.score(model, text + " f")
    shared = len(score.tokens) - 2
    np.testing.assert_allclose(
        longer.token_logprobs[:shared], score.token_logprobs[:shared], rtol=1e-4
    )
    scores = jaxlm.score(model, [text, "", text * 3])
    assert scores[0].logprob == pytest.approx(score.logprob, rel=1e-5)
    assert scores[1].logprob == 0 and scores[1].token_logprobs == []


def test_the_score_agrees_with_the_validation_loss(model, trained_run):
    from jaxlm.data.corpus import prepare

    config = model.config
    prepared = prepare(config.data, config.tokenizer, lambda line: None)
    rows = Rows(prepared.valid[0], config.model.max_seq_len)
    nats = targets = 0.0
    for row in (rows[i] for i in range(min(len(rows), 16))):
        # The documents of a row, each from its own beginning: what the model may see of them.
        for segment in range(1, row["segment_ids"].max() + 1):
            tokens = row["tokens"][row["segment_ids"] == segment].tolist()
            if len(tokens) > 1:
                nats -= model.program.score(model.params, [tokens])[0].sum()
                targets += len(tokens) - 1
    expected = read_metrics(trained_run / "metrics.jsonl")[-1]["valid_loss"]
    assert nats / targets == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_close(model, trained_run):
    half = jaxlm.load(trained_run, dtype="bfloat16")
    ours, theirs = (jaxlm.score(m, "abc de fgh").logprob for m in (half, model))
    assert ours == pytest.approx(theirs, rel=0.03) and ours != theirs


def test_a_step_folder_is_loaded_as_it_is(trained_run):
    first = jaxlm.load(trained_run / "checkpoints" / "step_00000030")
    assert (first.step, jaxlm.load(trained_run).step) == (30, 60)
    assert jaxlm.load(trained_run, step=30).step == 30


@pytest.mark.slow
def test_the_last_checkpoints_are_averaged(model, trained_run, tmp_path, capsys):
    config = make_model(model.config.model)
    mesh, last = make_mesh("dp1"), trained_run / "checkpoints" / "step_00000060"
    first, second = (
        load_params(last.with_name(f"step_000000{step}"), config, mesh) for step in (30, 60)
    )
    mean = load_params(trained_run, config, mesh, average_last=2)
    jax.tree.map(
        lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6, atol=1e-8),
        mean,
        first,
        second,
    )
    averaged = jaxlm.load(trained_run, average_last=2)
    assert jaxlm.score(averaged, "abc").logprob != jaxlm.score(model, "abc").logprob
    jaxlm.export_checkpoint(averaged, out=tmp_path / "out", skip_verification=True)
    jax.tree.map(np.testing.assert_array_equal, read_model(tmp_path / "out").params, mean)
    command = [str(trained_run), "--prompt=ab", "--max_new_tokens=8", "--temperature=0"]
    sample.main([*command, "--average_last=2"])
    said = capsys.readouterr().out
    assert said == f"ab{jaxlm.generate(averaged, 'ab', max_new_tokens=8, temperature=0)}\n"


def test_checkpoints_that_cannot_be_averaged_are_one_sentence(trained_run, tmp_path):
    run, foreign = tmp_path / "run", tmp_path / "foreign"
    shutil.copytree(trained_run, run)
    early = run / "checkpoints" / "step_00000030"
    with pytest.raises(jaxlm.UserError, match="is more checkpoints than the 2 that"):
        jaxlm.load(run, average_last=3)
    with pytest.raises(jaxlm.UserError, match="up to step_00000030: use at most that"):
        jaxlm.load(early, average_last=2)
    for wrong in (0, 1.5):
        with pytest.raises(jaxlm.UserError, match="whole number above 0"):
            jaxlm.load(run, average_last=wrong)
    file = max((early / "state").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert jaxlm.load(run).step == 60
    with pytest.raises(jaxlm.UserError, match="step_00000030 is damaged"):
        jaxlm.load(run, average_last=2)
    jaxlm.export_checkpoint(run, out=foreign, skip_verification=True)
    with pytest.raises(jaxlm.UserError, match="without steps: leave out average_last"):
        jaxlm.load(foreign, average_last=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is out of range"),
        ({"temperature": 0, "top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
        ({"temperature": "0.5"}, "temperature='0.5'"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"num_samples": 2.0}, "num_samples=2.0"),
        ({"seed": 2**64}, "from 0 to 4294967295"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": [5]}, "stop[0] is 5"),
        ({"prompts": None}, "prompts is None"),
        ({"prompts": b"abc"}, "prompts is b'abc': give a string"),
        ({"prompts": [b"abc"]}, "prompts[0] is b'abc': give strings"),
        ({"prompts": [["a"]]}, "prompts[0] is ['a']: give strings"),
        ({"num_samples": 2, "temperature": 0}, "the same text each time"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"stop": ""}, "empty string"),
        ({"prompts": "ab " * 200}, "leaves no room"),
        ({"prompts": ["a", 3]}, "prompts[1] is 3"),
        ({"prompts": ["a"], "stream": True}, "stream=True takes one prompt"),
        ({"mesh": "dp2"}, "give it to jaxlm.load"),
    ],
)
def test_settings_out_of_range_are_one_sentence(model, settings, words):
    with pytest.raises(jaxlm.UserError) as error:
        jaxlm.generate(model, **{"prompts": "a"} | settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_paths_that_hold_no_run_are_one_sentence(trained_run, tmp_path):
    both, neither, other, early, bare = (
        tmp_path / name for name in ("both", "neither", "other", "early", "bare")
    )
    for folder in (both, neither, other, early):
        folder.mkdir()
    for folder in (both, other):
        (folder / "config.json").write_text("{}")
    for folder in (both, early):
        shutil.copy(trained_run / "config.yaml", folder)
    step = complete_steps(trained_run)[-1]
    shutil.copytree(step_folder(trained_run, step), step_folder(bare, step))
    for path, words in {
        both: "keep them in folders of their own",
        neither: "is not a run folder",
        other: "model_type=None, for which jaxlm has no table",
        early: "no complete checkpoint yet",
        bare: f"has no config.yaml: restore it, a copy is in {step_folder(bare, step)}",
        tmp_path / "nowhere": "does not exist",
    }.items():
        with pytest.raises(jaxlm.UserError, match=words):
            jaxlm.load(path)
    (tmp_path / ".git").mkdir()
    with pytest.raises(jaxlm.UserError, match="does not exist: give a run folder"):
        jaxlm.load(tmp_path / "gpt2")
    with pytest.raises(jaxlm.UserError, match="num_kv_heads=2 does not divide over tp=4"):
        jaxlm.load(trained_run, mesh="tp4")
    with pytest.raises(jaxlm.UserError, match="float16"):
        jaxlm.load(trained_run, dtype="float16")
    with pytest.raises(jaxlm.UserError, match="out=None is no folder"):
        jaxlm.export_checkpoint(trained_run, out=None)


def test_a_tiny_temperature_is_greedy_and_a_huge_limit_ends_at_the_longest_text(model):
    greedy = jaxlm.generate(model, "ab", temperature=0, max_new_tokens=10**9)
    assert jaxlm.generate(model, "ab", temperature=1e-60, max_new_tokens=63) == greedy
    with pytest.raises(jaxlm.UserError, match="give a path"):
        jaxlm.load(None)
    with pytest.raises(jaxlm.UserError, match="texts is None"):
        jaxlm.score(model, None)


def test_a_text_longer_than_the_model_is_an_error(model):
    with pytest.raises(jaxlm.UserError, match="built for 64"):
        jaxlm.score(model, "ab " * 200)


def test_importing_is_quick_to_do_and_starts_nothing(tmp_path):
    program = (
        "import sys, jaxlm; assert 'jax' not in sys.modules; "
        "import jaxlm.sample, jaxlm.train, jaxlm.api, jaxlm.decode; "
        "assert callable(jaxlm.generate) and callable(jaxlm.score) and callable(jaxlm.load); "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); "
        "from pathlib import Path; from jaxlm.monitor import MetricsLog; "
        f"MetricsLog(Path({str(tmp_path)!r}), 0, None, {{}}).close(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
