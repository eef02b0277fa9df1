"""The adapter for EleutherAI's lm-eval, on tasks that are defined here."""

import json
import math

import pytest
from loaded import loaded

import jaxlm
from jaxlm.errors import UserError

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'jaxlm[lm-eval]'")


class Request:
    """What lm-eval asks: only its arguments matter here."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(trained_run):
    return jaxlm.load(trained_run)


@pytest.fixture(scope="module")
def adapter(model):
    from jaxlm.lm_eval import JaxLM

    return JaxLM(model)


def test_likelihoods_are_those_of_score(adapter, model):
    (logprob, _), (empty, _) = adapter.loglikelihood([Request("ab cd", " ef"), Request("", "ab")])
    whole, context = jaxlm.score(model, ["ab cd ef", "ab cd"])
    assert logprob == pytest.approx(whole.logprob - context.logprob, abs=1e-4)
    assert empty == pytest.approx(jaxlm.score(model, "ab").logprob, abs=1e-4)


def test_greedy_continuations_are_known(adapter, model):
    ids = model.tokenizer.encode
    made = jaxlm.generate(model, "ab cd", max_new_tokens=5, temperature=0)
    assert ids("ab cd" + made)[: len(ids("ab cd"))] == ids("ab cd")
    (_, same), (_, other) = adapter.loglikelihood([Request("ab cd", made), Request("ab cd", "zzz")])
    assert same and not other


def test_long_texts_are_scored_in_windows_and_short_ones_whole(adapter, model):
    short, long = "ab cd ef", "ab cd ef gh " * 30
    found = adapter.loglikelihood_rolling([Request(short), Request(long)])
    assert found[0] == pytest.approx(jaxlm.score(model, short).logprob, abs=1e-4)
    tokens = len(model.tokenizer.encode(long))
    assert tokens > model.config.model.max_seq_len and math.isfinite(found[1])
    assert -10 * tokens < found[1] < -0.1 * tokens


def test_what_writes_no_texts_is_refused():
    from jaxlm.lm_eval import JaxLM

    with pytest.raises(UserError, match="task=classification: lm-eval takes language models"):
        JaxLM(loaded("classification"))


def test_generation_stops_where_the_task_says(adapter, model):
    settings = {"until": ["zzzz"], "max_gen_toks": 8, "do_sample": False}
    long = "ab cd ef gh " * 30
    whole, cut = adapter.generate_until([Request("ab", settings), Request(long, settings)])
    assert whole == jaxlm.generate(model, "ab", max_new_tokens=8, temperature=0)
    assert cut
    stop = whole[1:3]
    (stopped,) = adapter.generate_until([Request("ab", settings | {"until": [stop]})])
    assert stopped == whole[: whole.index(stop)]


@pytest.mark.slow
def test_a_local_task_runs_from_end_to_end(adapter, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": "ab cd", "choices": [" ef", " gh ij"], "answer": 0},
        {"question": "k l", "choices": [" m", " n o p"], "answer": 1},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(model=adapter, tasks=[task], bootstrap_iters=0)
    best = []
    for row in rows:
        scores = [jaxlm.score(model, row["question"] + choice).logprob for choice in row["choices"]]
        best.append(scores.index(max(scores)) == row["answer"])
    assert found["results"]["local"]["acc,none"] == pytest.approx(sum(best) / 2)
