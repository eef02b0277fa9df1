"""`--profile`: which steps, where the trace is, and what can be read in it."""

import gzip
import json

import pytest

from jaxlm import train
from jaxlm.errors import UserError
from jaxlm.profiling import parse_steps


def test_steps():
    assert list(parse_steps(None)) == []
    assert list(parse_steps("7")) == [7]
    assert list(parse_steps("10:12")) == list(parse_steps("10-12")) == [10, 11, 12]
    for text in ("", "a", "1:2:3", "-1", "1.5", "10:x"):
        with pytest.raises(UserError, match="is not FIRST:LAST"):
            parse_steps(text)
    for text in ("0", "0:3", "5:4"):
        with pytest.raises(UserError, match="names no step"):
            parse_steps(text)


@pytest.mark.slow
def test_a_trace_shows_input_compute_and_checkpoints(small_run, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = small_run(out=run, mesh="dp2", train__steps=6, checkpoint__every_steps=2)
    assert train.main([*arguments, "--profile=2:5"]) == 0
    assert f"profile: {run / 'profile'}" in capsys.readouterr().out
    assert list(run.glob("profile/**/*.xplane.pb"))
    (trace,) = run.glob("profile/**/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    threads = {}
    for event in events:
        threads.setdefault(event.get("name"), set()).add(event.get("tid"))
    names = ["data: read", "data: to the devices", "train", "checkpoint: write"]
    assert set(names) <= threads.keys()
    # Writing goes on in a thread of its own.
    assert not threads["checkpoint: write"] & threads["train"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert [int(step) for step in steps] == [2, 3, 4, 5]


def test_steps_that_are_not_to_come_are_one_sentence(small_run, tmp_path):
    arguments = small_run(out=tmp_path / "run", mesh="dp1", train__steps=3)
    with pytest.raises(UserError, match=r"--profile=4:5 is not what .* from 1 to 3"):
        train.main([*arguments, "--profile=4:5"])
