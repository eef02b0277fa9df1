"""Several real processes against one: the same losses, whoever is stopped, killed or wrong."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.checkpoint import complete_steps, step_folder, verify
from jaxlm.cli import EXIT_LOST, EXIT_PREEMPTED
from jaxlm.monitor import read_metrics

pytestmark = pytest.mark.slow
STEPS = 48
MESH = "dp2,fsdp2,tp2"
# The sample follows; what a signal makes a process say may come between.
SAMPLE = r"step (\d+): validation.*\n(?:.*\n){0,2}?(.*sample: .*)"


class Processes:
    """A run in several processes, each with a log of its own."""

    def __init__(self, folder: Path, count: int, arguments: list[str], own: dict | None = None):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"{count}_{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            where = [f"--num_processes={count}", f"--process_id={i}"]
            where.append(f"--coordinator=localhost:{port}")
            command = [sys.executable, "-m", "jaxlm.train", *arguments, *(where * (count > 1))]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *(own or {}).get(i, [])],
                        env=os.environ | {"JAX_PLATFORMS": "cpu"},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def wait_for_step(self, run: Path, step: int, seconds: float = 150) -> None:
        """Wait until a line of this step is in the metrics."""
        deadline, path = time.monotonic() + seconds, run / "metrics.jsonl"
        while not path.exists() or not any(m["step"] >= step for m in read_metrics(path)):
            assert time.monotonic() < deadline and None in self.codes(), self.text()
            time.sleep(0.05)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def finish(self, seconds: float = 150) -> list[int]:
        """Wait for all to end; returns their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            while None in self.codes():
                assert time.monotonic() < deadline, f"still running: {self.codes()}\n{self.text()}"
                time.sleep(0.05)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return self.codes()

    def text(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self.logs)


def numbers(run: Path) -> dict[tuple[int, str], float]:
    names = ("loss", "grad_norm", "valid_loss", "valid_bits_per_byte")
    lines = read_metrics(run / "metrics.jsonl")
    return {(m["step"], name): m[name] for m in lines for name in names if name in m}


def test_two_then_four_then_one_are_as_one(small_run, tmp_path):
    """Stopped through any one of its processes, continued by another number on another mesh."""
    settings = {"train__steps": STEPS, "checkpoint__every_steps": 5, "mesh": MESH}
    settings["train__eval_every"] = 12
    sampling = {"train__sample_prompt": "a", "train__sample_tokens": 3}
    alone = Processes(tmp_path, 1, small_run(**settings, **sampling, out=tmp_path / "alone"))
    assert alone.finish() == [0], alone.text()
    expected, samples = re.findall(SAMPLE, alone.text()), []
    run = tmp_path / "run"
    for count, step, number, victim, mesh in (
        (2, 12, signal.SIGTERM, 1, "pp2,cp2,dp2"),
        (4, 24, signal.SIGUSR1, 3, MESH),
    ):
        # A sample in two processes is enough; compiling for it takes long.
        settings["mesh"] = mesh
        arguments = small_run(**settings, **(sampling if count == 2 else {}), out=run)
        group = Processes(tmp_path, count, arguments)
        group.wait_for_step(run, step + 1)  # a step later the sample of this one is printed
        group.processes[victim].send_signal(number)
        assert group.finish() == [EXIT_PREEMPTED] * count, group.text()
        stopped = complete_steps(run)[-1]
        assert step <= stopped < STEPS
        first = group.logs[0].read_text()
        samples += re.findall(SAMPLE, first)
        assert f"stopped by {number.name}: step {stopped} is saved" in first
        assert f"in {count} processes" in first
        # One speaks.
        others = "".join(log.read_text() for log in group.logs[1:])
        assert not re.search(r"step +\d|training|continuing|stopped", others), others
    group = Processes(tmp_path, 1, arguments)
    assert group.finish() == [0], group.text()
    assert f"continuing at step {stopped}" in group.text()
    assert samples and set(samples) <= set(expected)
    ours, theirs = numbers(run), numbers(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-5), key


def test_a_killed_process_takes_the_others_with_it_and_they_say_which(small_run, tmp_path):
    run = tmp_path / "run"
    settings = {"train__steps": 10**6, "checkpoint__every_steps": 5, "mesh": "fsdp2,tp2"}
    group = Processes(tmp_path, 2, small_run(**settings, out=run))
    group.wait_for_step(run, 10)
    group.processes[1].kill()
    began = time.monotonic()
    assert group.finish(60) == [EXIT_LOST, -signal.SIGKILL], group.text()
    assert time.monotonic() - began < 60
    last = group.logs[0].read_text().splitlines()[-1]
    assert last.startswith(f"error: process 1 on {socket.gethostname()} went away"), last
    newest = complete_steps(run)[-1]
    assert newest >= 5 and verify(step_folder(run, newest)) is None


def test_a_killed_first_process_is_named_too(small_run, tmp_path):
    group = Processes(tmp_path, 2, small_run(train__steps=10**6, mesh="dp2", out=tmp_path / "run"))
    group.wait_for_step(tmp_path / "run", 1)
    group.processes[0].kill()
    assert group.finish(60) == [-signal.SIGKILL, EXIT_LOST], group.text()
    last = group.logs[1].read_text().splitlines()[-1]
    assert last.startswith("error: process 0 on localhost went away"), last


def test_what_one_process_cannot_do_ends_all(small_run, tmp_path):
    """A mistake that only one sees: nobody hangs, and it is said once."""
    from jaxlm.run_folder import locked

    run = tmp_path / "run"
    for own, taken, words in (
        ({1: ["--seed=1"]}, contextlib.nullcontext(), "has seed=1, but process 0 on "),
        ({}, locked(run), "another process is training in"),
    ):
        arguments = small_run(train__steps=5, mesh="dp2", out=run)
        with taken:
            group = Processes(tmp_path, 2, arguments, own)
            assert group.finish(60) == [2, 2], group.text()
        assert group.text().count(words) == 1, group.text()
        assert "Traceback" not in group.text()
