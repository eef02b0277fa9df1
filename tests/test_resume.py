"""Runs as users have them: real processes, killed for real, continued, compared bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import as_users_have_it

from jaxlm.checkpoint import complete_steps, step_folder
from jaxlm.monitor import read_metrics

STEPS = 30
TIMINGS = ("step_seconds", "tokens_per_second")
SETTINGS = {
    "model.d_model": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.d_ff": 64,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "tokenizer.vocab_size": 320,
    "optim.ema_decay": 0.9,
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.eval_every": 10,
    "train.eval_batches": 2,
    "train.sample_tokens": 4,
    "checkpoint.every_steps": 5,
    "data.workers": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a corpus in it, and with the caches every process here shares."""
    home = tmp_path_factory.mktemp("home")
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=5)) for _ in range(100)]
    text = home / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:03}.txt").write_text(" ".join(choose.choices(words, k=200)))
    return home


def start(home: Path, out: str, mesh: str = "dp4,tp2", **changes) -> subprocess.Popen:
    """Start training in a process group of its own."""
    settings = SETTINGS | {"data.train": home / "text", "out": home / out, "mesh": mesh} | changes
    command = [sys.executable, "-m", "jaxlm.train", *(f"--{k}={v}" for k, v in settings.items())]
    return subprocess.Popen(
        command,
        env=as_users_have_it() | {"XDG_CACHE_HOME": str(home / "cache"), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for a process to end as expected; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a line of this step is in the metrics."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


def metrics(run: Path) -> list[dict]:
    """The run's metrics without timings."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """The last checkpoint's arrays by name, parameters, optimiser state and all."""
    import orbax.checkpoint as ocp

    (*_, step) = complete_steps(run)
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(step_folder(run, step) / "state")
    return {name: np.asarray(value) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def reference(home) -> Path:
    """The run that nobody disturbed."""
    finish(start(home, "reference"))
    return home / "reference"


def assert_same_run(run: Path, reference: Path) -> None:
    assert metrics(run) == metrics(reference)
    ours, theirs = final_arrays(run), final_arrays(reference)
    assert ours.keys() == theirs.keys()
    assert any("mu" in name for name in ours) and any("ema" in name for name in ours)
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_never_was(home, reference):
    moments = random.Random(0)
    run = home / "killed"
    for step in (2, 9, 17):
        process = start(home, "killed")
        wait_for_step(run, step, process)
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert "continuing at step" in finish(start(home, "killed"))
    assert_same_run(run, reference)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_continues(home, reference):
    run = home / "stopped"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 12), (signal.SIGUSR1, 18)):
        process = start(home, "stopped")
        wait_for_step(run, step, process)
        process.send_signal(number)
        output = finish(process, code=75)
        assert f"stopped by {number.name}" in output
        assert ("Ctrl-C again" in output) == (number == signal.SIGINT)
    finish(start(home, "stopped"))
    assert_same_run(run, reference)


@pytest.mark.slow
def test_continued_on_another_mesh_it_has_the_same_losses(home, reference):
    process = start(home, "moved", mesh="dp8", **{"checkpoint.every_steps": 15})
    wait_for_step(home / "moved", 16, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert complete_steps(home / "moved")[-1] == 15
    finish(start(home, "moved", mesh="fsdp4,tp2"))
    losses = {m["step"]: m["loss"] for m in metrics(home / "moved") if "loss" in m}
    for m in metrics(reference):
        if "loss" in m and m["step"] <= 25:
            assert losses[m["step"]] == pytest.approx(m["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(home, reference):
    process = start(home, "damaged", **{"train.steps": STEPS})
    wait_for_step(home / "damaged", 12, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    newest = complete_steps(home / "damaged")[-1]
    file = max((step_folder(home / "damaged", newest) / "state").rglob("*"), key=_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output = finish(start(home, "damaged"))
    assert f"step_{newest:08} is damaged" in output
    assert_same_run(home / "damaged", reference)


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(home, reference):
    before = (reference / "config.yaml").read_text()
    output = finish(start(home, "reference", **{"optim.learning_rate": 0.5}), code=2)
    assert "optim.learning_rate=0.004 there, 0.5 now" in output
    assert "Traceback" not in output
    assert (reference / "config.yaml").read_text() == before


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(home, reference):
    import shutil

    shutil.copytree(reference, home / "longer")
    output = finish(start(home, "longer", **{"train.steps": STEPS + 2}))
    assert f"continuing at step {STEPS}" in output
    assert f"train.steps was {STEPS} and is {STEPS + 2}: " in output
    assert metrics(home / "longer")[-1]["step"] == STEPS + 2
    saved = (step_folder(home / "longer", STEPS + 2) / "metrics.json").read_text()
    assert json.loads(saved)["valid_loss"] == metrics(home / "longer")[-1]["valid_loss"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
