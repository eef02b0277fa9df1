"""What a run tells: the progress line, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import math
import os
import sys
import time
import uuid
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from jaxlm.errors import NonFiniteError, UserError

PLAIN_SECONDS = 5.0


class MetricsLog:
    """`metrics.jsonl`, one object a line, and the same numbers for TensorBoard and W&B.

    Opened at the step a run continues from; lines of later steps, which that run never came to,
    are cut off.
    """

    def __init__(self, run: Path, step: int, wandb_project: str | None, config: dict):
        self._path = run / "metrics.jsonl"
        _cut(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _summary_writer()(str(run / "tensorboard"), purge_step=step + 1)
        self._wandb = _start_wandb(run, wandb_project, config) if wandb_project else None

    def write(self, metrics: dict[str, float]) -> None:
        """Add a line; `metrics` has `step`."""
        line = {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        scalars = {name: value for name, value in metrics.items() if name != "step"}
        for name, value in scalars.items():
            if not math.isfinite(value):
                continue
            self._board.add_scalar(name, value, metrics["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=metrics["step"])

    def sync(self) -> None:
        """Bring all lines onto the disk, as a checkpoint that follows them needs."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLog:
    """What the processes write that do not write the log."""

    def write(self, metrics: dict[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Display:
    """A live progress line on a terminal, plain lines now and then elsewhere."""

    def __init__(self, total: int, step: int, quiet: bool = False):
        """`quiet`, of several processes those that leave the talking to another, shows nothing."""
        self._quiet = quiet
        self._total = total
        self._clock = Countdown(total)
        self._last_line = 0.0
        self._progress = None
        if sys.stdout.isatty() and not quiet:
            columns = ("step {task.completed}/{task.total}", "{task.fields[numbers]}")
            self._progress = Progress(
                *(TextColumn(text, table_column=Column(no_wrap=True)) for text in columns),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                console=Console(),
                expand=True,
            )
            fields = {"numbers": "compiling", "left": ""}
            self._task = self._progress.add_task("", total=total, completed=step, **fields)
            self._progress.start()

    def update(self, metrics: dict[str, float]) -> None:
        """Show an update's metrics."""
        step = int(metrics["step"])
        left = self._clock.left(step, metrics["step_seconds"])
        if self._progress is not None:
            self._progress.update(
                self._task, completed=step, numbers=numbers_text(metrics, short=True), left=left
            )
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_SECONDS and step != self._total:
            return
        self._last_line = now
        width = len(str(self._total))
        self.line(f"step {step:>{width}}/{self._total}  {numbers_text(metrics)}  {left}".rstrip())

    def line(self, text: str) -> None:
        """Print a line, above the live one if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the last state of the line on the screen, and the cursor as it was."""
        if self._progress is not None:
            self._progress.stop()


class Countdown:
    """Time left, by a moving average of the steps after the first, which is compilation."""

    def __init__(self, total: int):
        self._total = total
        self._seen = 0
        self._seconds = 0.0

    def left(self, step: int, seconds: float) -> str:
        """`left 1:30` after a step that took `seconds`; nothing while that is unknown."""
        self._seen += 1
        if self._seen < 3:
            self._seconds = seconds
            return ""
        self._seconds += (seconds - self._seconds) / min(self._seen - 2, 20)
        return f"left {_clock(self._seconds * (self._total - step))}"


_FIRST = ("loss", "learning_rate", "grad_norm")
# What an update tells beside its metrics.
_COUNTS = ("targets", "skipped", "skipped_in_row")


class Meter:
    """Metrics on their way from the device to log and display, with the clock beside them."""

    def __init__(
        self,
        log: MetricsLog | NoLog,
        display: Display,
        *,
        tokens_per_step: int,
        flops_per_step: float,
        peak: float | None,
        max_nonfinite: int,
    ):
        """`peak` is the FLOP/s of all devices together; None leaves out the utilisation."""
        self._log = log
        self._display = display
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._peak = peak
        self._max_nonfinite = max_nonfinite
        self._pending: list[tuple[int, dict]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the next step's time what was not the step."""
        self._clock = time.monotonic()

    def note(self, step: int, metrics: dict) -> None:
        """Take an update's metrics, still on the device."""
        self._pending.append((step, metrics))

    def flush(self, keep: int = 0) -> None:
        """Wait for all but the newest `keep` updates and write their lines.

        Raises NonFiniteError after too many skipped updates in a row.
        """
        count = len(self._pending) - keep
        ready, self._pending = self._pending[:count], self._pending[count:]
        if not ready:
            return
        values = jax.device_get([metrics for _, metrics in ready])
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9) / len(ready)
        self._clock = now
        for (step, _), row in zip(ready, values, strict=True):
            line = self._line(step, row, seconds)
            self._log.write(line)
            self._display.update(line)
            self._check(step, int(row["skipped_in_row"]))

    def _line(self, step: int, row: dict, seconds: float) -> dict[str, float]:
        others = set(row) - {*_FIRST, *_COUNTS}
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            **{name: float(row[name]) for name in _FIRST + tuple(sorted(others))},
            "tokens_per_second": self._tokens_per_step / seconds,
            "step_seconds": seconds,
        }
        if row["skipped"]:
            line["skipped"] = int(row["skipped"])
        if self._peak is not None:
            line["mfu"] = self._flops_per_step / seconds / self._peak
        return line

    def _check(self, step: int, skipped_in_row: int) -> None:
        if skipped_in_row >= self._max_nonfinite:
            raise NonFiniteError(
                f"{skipped_in_row} updates in a row up to step {step} had a non-finite loss or "
                "gradient and were skipped; the parameters are those before them and the last "
                "checkpoint is kept: lower optim.learning_rate, lengthen optim.warmup_steps or "
                "set optim.clip_norm"
            )


def numbers_text(metrics: dict[str, float], short: bool = False) -> str:
    """An update's metrics on one line; `short` fits beside the rest into 80 columns.

    An unknown utilisation is n/a.
    """
    mfu = metrics.get("mfu")
    gap = " " if short else "  "
    parts = [
        f"loss {metrics['loss']:.4f}",
        f"lr {metrics['learning_rate']:.1e}" if short else f"lr {metrics['learning_rate']:.2e}",
        f"grad {metrics['grad_norm']:.2f}" if short else f"grad {metrics['grad_norm']:.3f}",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
        f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}",
    ]
    if metrics.get("skipped"):
        parts.append(f"skipped {metrics['skipped']}")
    return gap.join(parts)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; what a crash left of one is passed over."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def _cut(path: Path, step: int) -> None:
    """Leave only the lines up to `step`, by way of a new file that replaces the old."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    new.replace(path)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: null."""
    return value if math.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _summary_writer() -> type:
    """The writer of tensorboardX, which would take seconds to import PyTorch where that is."""
    blocked = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if blocked:
            del sys.modules["torch"]
    return SummaryWriter


def _start_wandb(run: Path, project: str, config: dict):
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb_project={project!r} needs Weights & Biases: pip install 'jaxlm[wandb]'"
        ) from None
    id_file = run / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        name=run.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run),
        config=config,
    )
