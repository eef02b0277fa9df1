"""How far a pass over a source has come."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxlm.data.cache import Report

SECONDS_BETWEEN_LINES = 30


@contextmanager
def progress(label: str, report: Report) -> Iterator[Callable[[int], None]]:
    """Show how many bytes were passed to the function this yields: a bar, or sparse lines."""
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda num_bytes: bar.advance(task, num_bytes)
        return
    start = last = time.monotonic()
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done, last
        done += num_bytes
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            report(f"{label}: {done / 1e6:.0f} MB, {done / 1e6 / (now - start):.1f} MB/s")

    yield advance
