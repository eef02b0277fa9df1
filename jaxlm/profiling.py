"""`--profile=FIRST:LAST`: a JAX profiler trace of these steps, under RUN/profile."""

import argparse
import dataclasses
import re
from pathlib import Path

import jax

from jaxlm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--profile`."""
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="write a profiler trace of these steps under the run folder, such as 10:12",
    )


def parse_steps(text: str | None) -> range:
    """The steps that `10:12`, `10-12` or `10` names; none for None. Raises UserError."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"\s*(\d{1,12})(?:\s*[:-]\s*(\d{1,12}))?\s*", text)
    if match is None:
        raise UserError(f"--profile={text!r} is not FIRST:LAST: give two steps, such as 10:12")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise UserError(
            f"--profile={text!r} names no step: they count from 1, the first before the last"
        )
    return range(first, last + 1)


@dataclasses.dataclass
class Profile:
    """Traces the steps asked for as the loop comes to them.

    In the trace, a step is `train` with its number (what the host hands to the devices); `data:
    ...` is the input, `checkpoint: ...` what saving does, each in its own thread's row.
    """

    folder: Path
    steps: range
    _tracing: bool = False

    def before(self, step: int) -> None:
        """The loop is about to do `step`."""
        # A run that is continued within the steps traces what is left of them.
        if step in self.steps and not self._tracing:
            self._tracing = True
            jax.profiler.start_trace(self.folder)

    def after(self, step: int, wait_for) -> str | None:
        """The loop did `step`, whose results are in `wait_for`; a line to show at the end."""
        if not self._tracing or step < self.steps[-1]:
            return None
        jax.block_until_ready(wait_for)
        return self.close()

    def close(self) -> str | None:
        """End a trace that is under way; a line to show."""
        if not self._tracing:
            return None
        self._tracing = False
        self.steps = range(0)
        jax.profiler.stop_trace()
        return f"profile: {self.folder}; open it with xprof or TensorBoard's profile plug-in"
