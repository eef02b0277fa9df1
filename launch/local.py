#!/usr/bin/env python3
"""Several processes on this machine, as one run.

    python launch/local.py --processes=2 -- python -m jaxlm.train --mesh=dp8 --data.train=books/

starts the command behind `--` once for each process and tells each which one it is, by JAX's
environment variables. Every line of output begins with its process's number. The machine's GPUs
are divided among the processes; without GPUs the mesh's virtual CPU devices are.

The first process to fail ends the others, and its exit code is the launcher's. Ctrl-C, SIGTERM
and SIGUSR1 are passed on, so that the run saves; the launcher then leaves with its exit code, 75.

For debugging, rehearsals, and several GPUs of one machine that shall not share a process (one
process can drive all of them as well). On a cluster use launch/slurm.sbatch or
launch/kubernetes.yaml.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# Processes that lost one of theirs need this long to notice and say so.
GRACE_SECONDS = 40
LOOK_SECONDS = 0.1


def main(argv: list[str]) -> int:
    """Run the command in every process; returns the exit code of the first that failed."""
    options, command = parse(argv)
    address = f"localhost:{options.port or free_port()}"
    gpus = local_gpus()
    share = len(gpus) // options.processes
    children, printers = [], []
    with forwarded_signals(children):
        for index in range(options.processes):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(options.processes),
                "JAX_PROCESS_ID": str(index),
                "PYTHONUNBUFFERED": "1",
            }
            if share:
                mine = gpus[index * share : (index + 1) * share]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            try:
                child = start(command, environment)
            except OSError as error:
                print(f"error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
                end(children)
                return 2
            children.append(child)
            printers.append(threading.Thread(target=prefix, args=(index, child.stdout)))
            printers[-1].start()
        code = wait(children)
    for printer in printers:
        printer.join()
    return code


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the command behind `--`."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py",
        description=__doc__,
        usage="%(prog)s --processes=N [--port=PORT] -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    parser.add_argument("--port", type=int, help="port of process 0; by default a free one")
    own, command = argv, []
    if "--" in argv:
        place = argv.index("--")
        own, command = argv[:place], argv[place + 1 :]
    options = parser.parse_args(own)
    if options.processes < 1:
        parser.error(f"--processes={options.processes} starts nothing: give 1 or more")
    if not command:
        parser.error("no command: write it behind --, such as -- python -m jaxlm.train --mesh=dp8")
    return options, command


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start a process in a session of its own: Ctrl-C reaches it through the launcher only."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def prefix(index: int, stream) -> None:
    """Print a process's lines with its number before them."""
    mark = f"[{index}] ".encode()
    for line in stream:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(mark + line.rstrip(b"\r\n") + b"\n")
            sys.stdout.buffer.flush()


@contextlib.contextmanager
def forwarded_signals(children: list[subprocess.Popen]):
    """Pass what would end the launcher on to the processes."""

    def forward(number, frame):
        for child in children:
            send(child, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.signal(number, forward) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def wait(children: list[subprocess.Popen]) -> int:
    """Wait for all; once one has failed, the others have some time to end by themselves."""
    code, deadline = 0, None
    while running := [child for child in children if child.poll() is None]:
        failed = next((child for child in children if child.returncode), None)
        if failed is not None and deadline is None:
            code = exit_code(failed)
            number = children.index(failed)
            print(f"process {number} ended with exit code {code}", file=sys.stderr, flush=True)
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            print(f"ending the other {len(running)}", file=sys.stderr, flush=True)
            end(running)
        time.sleep(LOOK_SECONDS)
    return code or next((exit_code(child) for child in children if child.returncode), 0)


def end(children: list[subprocess.Popen]) -> None:
    """End processes without asking."""
    for child in children:
        send(child, signal.SIGKILL)
    for child in children:
        child.wait()


def send(child: subprocess.Popen, number: int) -> None:
    """Send a signal to a process, unless it is gone."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


def exit_code(child: subprocess.Popen) -> int:
    """As a shell has it: 128 and the signal for a process that a signal ended."""
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def local_gpus() -> list[str]:
    """The GPUs that this machine has for us."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
