"""Several processes as one run: how they find each other, agree, and fail together.

Where a process was started tells it which one it is: flags, JAX's own environment variables, a
Kubernetes Indexed Job, Slurm or Open MPI. The latter two JAX detects itself.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.cli import explain
from jaxlm.errors import UserError
from jaxlm.liveness import (
    BEAT_SECONDS,
    LOOK_SECONDS,
    LOST_SECONDS,
    Stop,
    Watch,
    is_reachable,
    name_abort,
)

CONNECT_SECONDS = 300
ANSWER_SECONDS = 3600
HEARTBEAT_SECONDS = 45
POLL_SECONDS = 10
FLAGS = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Where each scheduler says how many processes there are and which one this is.
SCHEDULERS = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Which process of how many this is, and where process 0 can be met."""

    index: int
    count: int
    coordinator: str | None
    """HOST:PORT; None where JAX finds it (Slurm, Open MPI)."""
    local_devices: tuple[int, ...] | None = None
    """The machine's GPUs that are this process's; None: all, or as JAX decides."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a process is told which one it is."""
    group = parser.add_argument_group(
        "processes", "Several processes train one run; Slurm, Open MPI and launch/ set these."
    )
    texts = ("HOST:PORT of process 0", "how many processes there are", "which one this is, from 0")
    for flag, variable, text in zip(FLAGS, VARIABLES, texts, strict=True):
        group.add_argument(f"--{flag}", metavar="TEXT", help=f"{text} [{variable}]")


def find_launch(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Launch | None:
    """What flags (over variables, over the scheduler) say; None for a process on its own.

    Raises UserError for what is missing or out of range.
    """
    pairs = zip(FLAGS, VARIABLES, strict=True)
    coordinator, count, index = (
        getattr(arguments, flag, None) or environment.get(variable) or None
        for flag, variable in pairs
    )
    scheduler = _scheduler(environment)
    told = [value is not None for value in (coordinator, count, index)]
    if not any(told) and (scheduler is None or scheduler == "Kubernetes"):
        return None
    if scheduler is not None:
        size, rank = SCHEDULERS[scheduler]
        count, index = count or environment.get(size), index or environment.get(rank)
    for value, flag, variable in zip((count, index), FLAGS[1:], VARIABLES[1:], strict=True):
        if value is None:
            raise UserError(
                f"--{flag} is missing: with several processes give each --coordinator, "
                f"--num_processes and --process_id (or set {variable})"
            )
    count, index = _whole("num_processes", count), _whole("process_id", index)
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"process_id={index} is out of range: with num_processes={count} it is from 0 to "
            f"{max(count, 1) - 1}"
        )
    if count == 1:
        return None
    detected = scheduler == "Slurm" or "OMPI_MCA_orte_hnp_uri" in environment
    if coordinator is None and (any(told) or not detected):
        raise UserError(
            f"--coordinator is missing: give the address of process 0, such as node1:1234, to all "
            f"{count} processes (or set {VARIABLES[0]})"
        )
    if coordinator is not None:
        _check_address(coordinator)
    return Launch(index, count, coordinator, local_devices(environment))


def _scheduler(environment: Mapping[str, str]) -> str | None:
    """The one that started this process as one of several tasks."""
    if {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"} <= environment.keys():
        return "Slurm"
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "Open MPI"
    return "Kubernetes" if "JOB_COMPLETION_INDEX" in environment else None


def local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this machine that a scheduler's task takes; None: not for us to say.

    JAX alone would give each task one GPU, also the only task of a machine with eight.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or per_node.partition(",")[0]
    mine = environment.get("OMPI_COMM_WORLD_LOCAL_RANK") or environment.get("SLURM_LOCALID")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        len(list(Path("/dev").glob("nvidia[0-9]*")))
        if visible is None
        else len([device for device in visible.split(",") if device])
    )
    if not tasks or mine is None or not gpus:
        return None
    # A task that was given GPUs of its own sees fewer of them than there are tasks.
    share = gpus // int(tasks) or gpus
    first = int(mine) * share if share < gpus else 0
    return tuple(range(first, first + share))


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a whole number") from None


def _check_address(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator={text!r} is not HOST:PORT, such as node1:1234")


class Group:
    """The processes of a run, seen from one of them. Calls come in the same order in all."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        self.index, self.count = index, count
        self.hosts = ["a machine that never said its name"] * count
        self.stop = Stop(alone=count == 1)
        self._client = client
        self._numbers = itertools.count()
        self.watch = Watch(client, index, self.hosts, self.stop) if count > 1 else None
        self.hosts[:] = self.gather(socket.gethostname())

    @property
    def is_first(self) -> bool:
        """Whether this process writes what one alone writes, and speaks."""
        return self.index == 0

    @property
    def who(self) -> str:
        """` in process 1 on HOST` for one of several; empty for one alone."""
        return f" in process {self.index} on {self.hosts[self.index]}" if self.count > 1 else ""

    def gather(self, value: Any, seconds: float | None = None) -> list:
        """Every process's value, in their order; anything JSON can hold."""
        if self.count == 1:
            return [value]
        name = f"gather/{next(self._numbers)}"
        self.put(f"{name}/{self.index}", value)
        return [self.get(f"{name}/{i}", seconds) for i in range(self.count)]

    def barrier(self, seconds: float | None = None) -> None:
        """Wait until every process is here, an hour unless told otherwise."""
        self.gather(None, seconds)

    def from_first(self, make: Callable[[], Any], seconds: float | None = None) -> Any:
        """What `make` returns in process 0, the only one to call it; anything JSON can hold.

        The others wait `seconds` for it, an hour unless told otherwise.
        """
        if self.count == 1:
            return make()
        name = f"first/{next(self._numbers)}"
        if self.is_first:
            self.put(name, make())
        return self.get(name, seconds)

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise UserError where a process's `values` are not those of process 0."""
        texts = {name: json.dumps(value, default=str) for name, value in values.items()}
        first = self.from_first(lambda: texts)
        for name, text in texts.items():
            if text != first[name]:
                raise UserError(
                    f"process {self.index} on {self.hosts[self.index]} has {name}={text}, but "
                    f"process 0 on {self.hosts[0]} has {first[name]}: give all the same"
                )

    def put(self, name: str, value: Any) -> None:
        """Tell the others, under a name of its own."""
        self._client.key_value_set(f"jaxlm/{name}", json.dumps(value, default=str))

    def get(self, name: str, seconds: float | None = None) -> Any:
        """What somebody put under this name, once it is there. Raises TimeoutError."""
        deadline = time.monotonic() + (ANSWER_SECONDS if seconds is None else seconds)
        while time.monotonic() < deadline:
            try:
                value = self._client.blocking_key_value_get(f"jaxlm/{name}", 1000 * POLL_SECONDS)
                return json.loads(value)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise TimeoutError(f"the other processes did not come as far as {name} in time")


ALONE = Group()


@contextlib.contextmanager
def joined(launch: Launch | None) -> Iterator[Group]:
    """The group of a run's processes, connected; what ends one of them ends all.

    To be entered before JAX starts. Of several processes those left by an error go at once,
    with its exit code; the first to meet it says it. Raises UserError where they cannot connect.
    """
    if launch is None:
        yield ALONE
        return
    with name_abort(lambda: _not_met(launch)):
        client = _connect(launch)
    with name_abort(lambda: _lost(launch)):
        group = Group(launch.index, launch.count, client)
        try:
            yield group
        except BaseException as error:
            _fail(group, error)
        group.barrier()
        group.watch.close()
        jax.distributed.shutdown()


def _connect(launch: Launch) -> Any:
    """Start jax.distributed; returns its client."""
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would take SIGTERM for itself, and for no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = {} if launch.coordinator is None else {"cluster_detection_method": "deactivate"}
    if launch.coordinator is not None:
        if launch.index:
            wait_for(launch.coordinator, CONNECT_SECONDS)
        else:
            check_free(launch.coordinator)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.count,
            launch.index,
            local_device_ids=launch.local_devices,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            **explicit,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"process {launch.index} of {launch.count} cannot start at {_where(launch)}: {reason}"
        ) from error
    # Only the client knows what JAX has no function for yet: the key-value store.
    from jax._src.distributed import global_state

    return global_state.client


def hush_gloo() -> None:
    """Keep stdout for Python: Gloo prints a line there for each group of devices it connects."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def check_free(address: str) -> None:
    """Raise UserError where process 0 cannot listen at its port: JAX would crash there."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at port {port} ({error.strerror}): choose a free one for "
                "--coordinator"
            ) from None


def wait_for(address: str, seconds: float) -> None:
    """Return once somebody listens at HOST:PORT. Raises UserError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_reachable(address, min(5.0, seconds)):
        if time.monotonic() > deadline:
            raise UserError(
                f"the coordinator {address} could not be reached for {seconds:g} s: is process 0 "
                "running on that machine, and is the port open?"
            )
        time.sleep(0.2)


def _not_met(launch: Launch) -> str:
    return (
        f"not all {launch.count} processes met at {_where(launch)} within {CONNECT_SECONDS} s: "
        "see whether each was started, with a process_id of its own"
    )


def _lost(launch: Launch) -> str | None:
    from jax._src.distributed import global_state

    address = global_state.coordinator_address
    if launch.index == 0 or is_reachable(address, 2.0):
        return None
    return (
        f"process 0 on {address.rpartition(':')[0]} went away: its coordination service cannot be "
        "reached; see its own log for why; what was saved is intact"
    )


def _where(launch: Launch) -> str:
    return launch.coordinator or "the address that the scheduler tells"


def _fail(group: Group, error: BaseException) -> None:
    """Tell the others, say it unless somebody else did, and leave."""
    known = explain(error)
    sentence, code = ("", 1) if known is None else known
    if known is None and isinstance(error, jax.errors.JaxRuntimeError):
        # A collective that broke because another process died: time to notice which.
        time.sleep(LOST_SECONDS + 2 * BEAT_SECONDS)
    elif not group.is_first:
        # What all of them meet, process 0 says.
        time.sleep(3 * LOOK_SECONDS)
    here = f"process {group.index} on {group.hosts[group.index]}"
    text = sentence.removeprefix("error: ") or f"{here} stopped: {type(error).__name__}"
    failure = {"process": group.index, "text": text, "code": code, "loud": known is None}
    if group.watch.publish(failure):
        if known is None:
            traceback.print_exception(error)
        elif sentence:
            print(sentence if group.is_first else f"{sentence} ({here})", file=sys.stderr)
        group.watch.wait_for_others()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
