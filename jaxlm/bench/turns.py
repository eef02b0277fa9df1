"""Competitors that stay alive in processes of their own and take turns on the same machine."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from jaxlm.bench.answering import MARK
from jaxlm.errors import UserError
from jaxlm.huge_pages import without_huge_pages


class Competitor:
    """A process that answers requests, one JSON object a line, by JSON objects.

    A request names what to `do`. An answer that has `error` is raised as UserError.
    """

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None):
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            # Ctrl-C is for who asks, and ends it.
            start_new_session=True,
        )

    def ask(self, do: str, **request) -> dict:
        """Send a request and wait for its answer."""
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer, or the lack of one, says more
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "error" in answer:
                    raise UserError(f"{self.name} failed at {do!r}: {answer['error']}")
                return answer
        raise UserError(f"{self.name} ended at {do!r} with exit code {self._process.wait()}")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@dataclasses.dataclass(frozen=True)
class Speed:
    """Quartiles of a rate over turns."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> "Speed":
        """The quartiles of some turns' rates."""
        return cls(*np.quantile(rates, [0.25, 0.5, 0.75]).tolist())


def take_turns(
    competitors: Sequence[Competitor],
    rounds: int,
    asked: Mapping[str, dict] | None = None,
    *,
    count: int,
    untimed: int = 0,
) -> dict[str, list[float]]:
    """Ask each for `count` steps, `rounds` times, in an order that rotates; `asked` is what else to
    tell them, by name. Returns seconds a step, by name.

    A turn begins with `untimed` steps more: while others run, a virtual machine's host takes back
    memory that is given up between two steps, and the first step then waits for it.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in competitors}
    for turn in range(rounds):
        first = turn % len(competitors)
        for competitor in (*competitors[first:], *competitors[:first]):
            request = {} if asked is None else asked[competitor.name]
            if untimed:
                competitor.ask("steps", count=untimed, **request)
            answer = competitor.ask("steps", count=count, **request)
            seconds[competitor.name].append(answer["seconds"] / count)
    return seconds


def chosen(models: str | None, known: Mapping[str, object]) -> list[str]:
    """The names in `--models=a,b`, or all. Raises UserError for one that there is not."""
    names = models.split(",") if models else list(known)
    if unknown := set(names) - known.keys():
        raise UserError(f"--models={','.join(sorted(unknown))}: use {', '.join(known)}")
    return names


def jax_on(device: str, alone: bool = False) -> dict[str, str]:
    """The environment of a side that runs JAX on `cpu` or `gpu`.

    If it is not alone it leaves others their memory, and takes its own bit by bit, of which no bit
    may be large enough for what a big model asks for at once.
    """
    platform, allocate = "cuda" if device == "gpu" else "cpu", "true" if alone else "false"
    return os.environ | {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": allocate}


def peer_on(device: str) -> dict[str, str]:
    """The environment of a side that is not jaxlm on `cpu` or `gpu`, as its users start it."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return without_huge_pages(os.environ) | hidden
