"""What a run writes and shows."""

import json
import math
import sys
import types

import pytest

from jaxlm.errors import NonFiniteError
from jaxlm.monitor import Countdown, Display, Meter, MetricsLog, numbers_text, read_metrics

UPDATE = {
    "loss": 2.0,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "targets": 100.0,
    "skipped": 0,
    "skipped_in_row": 0,
}


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path, 0, None, {})
    yield log
    log.close()


def meter(log, **changes) -> Meter:
    settings = {"tokens_per_step": 10, "flops_per_step": 1e6, "peak": None, "max_nonfinite": 2}
    return Meter(log, Display(total=9, step=0), **settings | changes)


def test_lines_past_the_restored_step_are_cut_and_broken_ones_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b"5",
        b'{"a": 1}',
        b"\xff\xfe",
        b'{"step": 2}',
        b'{"step": 3}',
        b'{"st',
    ]
    path.write_bytes(b"\n".join(lines))
    MetricsLog(tmp_path, 2, None, {}).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_weights_and_biases_continues_its_run(tmp_path, monkeypatch):
    # A stand-in for the service: what it was started with, and what it was told.
    started, told = [], []
    module = types.ModuleType("wandb")
    service = types.SimpleNamespace(
        log=lambda scalars, step: told.append((step, scalars)), finish=lambda: None
    )
    module.init = lambda **settings: started.append(settings) or service
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (0, 1):
        log = MetricsLog(tmp_path, step, "project", {"seed": 0})
        log.write({"step": step + 1, "loss": 2.0})
        log.close()
    assert told == [(1, {"loss": 2.0}), (2, {"loss": 2.0})]
    assert started[0] == started[1] and started[0]["project"] == "project"
    assert started[0]["id"] and started[0]["resume"] == "allow"


def test_what_json_cannot_say_is_null(log, tmp_path):
    log.write({"step": 1, "loss": math.nan})
    log.sync()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_the_newest_update_stays_on_the_device_until_the_next(log, tmp_path):
    counted = meter(log)
    for step in (1, 2, 3):
        counted.note(step, UPDATE)
        counted.flush(keep=1)
    log.sync()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    counted.flush()
    log.sync()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (last["step"], last["tokens"]) == (3, 30)
    assert last["tokens_per_second"] == pytest.approx(10 / last["step_seconds"])
    assert "mfu" not in last


def test_utilisation_is_the_share_of_the_peak(log, tmp_path):
    counted = meter(log, peak=1e9)
    counted.note(1, UPDATE)
    counted.flush()
    log.sync()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(1e6 / line["step_seconds"] / 1e9)


def test_too_many_skipped_updates_in_a_row_stop_the_run(log):
    counted = meter(log)
    counted.note(1, UPDATE | {"skipped": 1, "skipped_in_row": 1})
    counted.flush()
    counted.note(2, UPDATE | {"skipped": 2, "skipped_in_row": 2})
    with pytest.raises(NonFiniteError, match="2 updates in a row up to step 2"):
        counted.flush()


def test_the_short_line_leaves_room_in_eighty_columns():
    metrics = UPDATE | {"tokens_per_second": 123456.7}
    assert len(numbers_text(metrics, short=True)) <= 60
    assert "MFU n/a" in numbers_text(metrics)
    assert "skipped 3" in numbers_text(metrics | {"skipped": 3})
    assert "MFU 42.0%" in numbers_text(metrics | {"mfu": 0.42})


def test_the_countdown_does_not_count_compilation():
    clock = Countdown(total=100)
    assert clock.left(1, 600.0) == ""
    assert clock.left(2, 1.0) == ""
    assert clock.left(10, 1.0) == "left 1:30"
    assert clock.left(99, 1.0) == "left 0:01"
