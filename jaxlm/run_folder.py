"""The folder of a run: whose it is, and whether this is still the same run."""

import contextlib
import dataclasses
import fcntl
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jaxlm.checkpoint import (
    CONFIG,
    STATE,
    complete_steps,
    latest_sound,
    step_folder,
    valid_loss,
    verify,
)
from jaxlm.cli import dump_config, flatten, read_config
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.errors import UserError, nearest_path, show
from jaxlm.export.huggingface import is_model_folder
from jaxlm.processes import Group
from jaxlm.tokenizer import load_tokenizer
from jaxlm.yaml_file import read_yaml

DATA = "data.json"
SHARED_SECONDS = 60
# What a continued run may change: nothing here touches the numbers of an update.
CHANGEABLE = (
    "mesh",
    "parallel.",
    "out",
    "log.",
    "checkpoint.",
    "data.cache",
    "data.workers",
    "data.prefetch",
)
CHANGEABLE += ("train.eval_every", "train.sample_")
CHANGEABLE += ("model.stack", "model.remat", "train.accumulation", "train.loss_block")


def find_step(path: Path, which: str = "last") -> Path:
    """The step folder that `path` is, or one of the run that it is.

    `which` is "last", the newest sound one, "best", that of the lowest validation loss, or the
    number of a step. Raises UserError for a path that is neither and for a damaged checkpoint.
    """
    if not path.exists():
        near = nearest_path(path) or ": give a run folder such as runs/default"
        raise UserError(f"{path} does not exist{near}")
    if (path / STATE).is_dir():
        if which != "last":
            raise UserError(f"{path} is one step: leave out step={which}, or give its run")
        problem = verify(path)
        if problem:
            raise UserError(
                f"checkpoint {path} is damaged ({problem}): use another step of the run"
            )
        return path
    is_run, is_other = (path / CONFIG).exists(), (path / "config.json").exists()
    if is_run and is_other:
        raise UserError(
            f"{path} holds both {CONFIG} (a run) and config.json (an exported model): keep them in "
            "folders of their own"
        )
    if not is_run and path.name == "checkpoints":
        raise UserError(f"{path} is a run's folder of checkpoints: give its parent, {path.parent}")
    steps = complete_steps(path)
    if not is_run and steps:
        raise UserError(
            f"run {path} has no {CONFIG}: restore it, a copy is in {step_folder(path, steps[-1])}"
        )
    if not is_run:
        raise UserError(
            f"{path} is not a run folder, nor a model of transformers: it has no {CONFIG} and no "
            "config.json; give what train's --out was, such as runs/default"
        )
    if not steps:
        raise UserError(f"run {path} has no complete checkpoint yet: train it for longer")
    if which == "last":
        return step_folder(path, latest_sound(path, _warn))
    if which == "best":
        losses = {step: valid_loss(step_folder(path, step)) for step in steps}
        losses = {step: loss for step, loss in losses.items() if loss is not None}
        return find_step(step_folder(path, min(losses, key=losses.get, default=steps[-1])))
    if which not in map(str, steps):
        raise UserError(f"run {path} has no step {which!r}: it has {', '.join(map(str, steps))}")
    return find_step(step_folder(path, int(which)))


def with_found(config: Config, prepared: Prepared) -> Config:
    """The config with what its data settles: the vocabulary's size, and a classifier's labels.

    Raises UserError for a vocabulary that is less than is needed, by another tokenizer than that of
    `init_from` if that is why.
    """
    model = config.model
    if config.task == "classification":
        model = dataclasses.replace(model, labels=prepared.form.names)
    size, given = prepared.tokenizer.vocab_size, model.vocab_size
    if given is not None and given < size:
        _check_tokenizer(config, prepared)
        raise UserError(
            f"model.vocab_size={given} is less than the tokenizer's {size} tokens: leave it out, "
            f"or set it to {size} or more"
        )
    model = dataclasses.replace(model, vocab_size=given or size)
    return dataclasses.replace(config, model=model)


def claim(run: Path, config: Config, prepared: Prepared) -> None:
    """Make sure that a run in `run`, if there is one, is this one, and note its config and data.

    Raises UserError with the differences, and where `init_from` has another tokenizer.
    """
    data = {
        "tokenizer": prepared.tokenizer.fingerprint,
        "train": [file.digest for file in prepared.train],
        "valid": [file.digest for file in prepared.valid],
    }
    check_unchanged(run, config)
    if has_begun(run):
        try:
            before = json.loads((run / DATA).read_text(encoding="utf-8"))
            changed = [name for name in data if before[name] != data[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{run / DATA}, which tells what data the run was trained on, is missing or "
                f"damaged ({type(error).__name__}): restore it, or give another --out"
            ) from None
        if changed:
            raise UserError(
                f"{run} was trained on other data (changed since: {', '.join(changed)}): restore "
                "that data, or give another --out"
            )
    else:
        _check_tokenizer(config, prepared)
    write_atomically(run / DATA, json.dumps(data))
    write_atomically(run / CONFIG, dump_config(config))


def _check_tokenizer(config: Config, prepared: Prepared) -> None:
    """Raise UserError where the model to start from was trained with another tokenizer."""
    if config.init_from is None:
        return
    start = Path(config.init_from)
    theirs = load_tokenizer(start if is_model_folder(start) else find_step(start))
    if theirs.fingerprint != prepared.tokenizer.fingerprint:
        raise _another_tokenizer(config)


def _check_learnt(config: Config) -> None:
    """Raise UserError where a tokenizer would be learnt that cannot be that of `init_from`."""
    if config.init_from is None or config.tokenizer.kind == "file":
        return
    start = Path(config.init_from)
    if not is_model_folder(start):
        theirs = read_config(start / CONFIG).tokenizer
        if theirs.without_dropout() == config.tokenizer.without_dropout():
            return  # of the same texts it is the same
    raise _another_tokenizer(config)


def _another_tokenizer(config: Config) -> UserError:
    return UserError(
        f"init_from={config.init_from} was trained with another tokenizer than that of "
        f"tokenizer.kind={config.tokenizer.kind}: leave out what says which tokenizer, also "
        "in --config, to have its own"
    )


def check_unchanged(run: Path, config: Config) -> None:
    """Raise UserError where a run in `run`, if there is one, has another configuration.

    What only data settle is compared once they have.
    """
    if not has_begun(run):
        return
    if not (run / CONFIG).exists() or not read_yaml(run / CONFIG):
        raise UserError(
            f"{run / CONFIG} is missing or empty, as no run leaves it: restore it, from a step "
            "folder for one"
        )
    old, new = flatten(read_config(run / CONFIG)), flatten(config)
    new |= {key: old[key] for key in ("model.labels", "model.vocab_size") if new[key] is None}
    changed = [key for key in new if new[key] != old[key] and not key.startswith(CHANGEABLE)]
    if new["train.steps"] >= old["train.steps"]:
        changed = [key for key in changed if key != "train.steps"]
    if changed:
        differences = ", ".join(
            f"{key}={show(old[key])} there, {show(new[key])} now" for key in changed
        )
        start = f" (with --init_from={run} it starts from this run's parameters)"
        raise UserError(
            f"{run} holds a run with another configuration ({differences}): give the same, or "
            f"another --out{'' if config.model.kind == 'ngram' else start}"
        )


@contextlib.contextmanager
def held(run: Path, config: Config, group: Group):
    """The run folder, locked for a group of processes by its first, which looks at it.

    Raises UserError where there is another run.
    """
    with contextlib.ExitStack() as stack:

        def lock_and_look():
            stack.enter_context(locked(run))
            check_unchanged(run, config)
            if not has_begun(run):
                _check_learnt(config)

        group.from_first(lock_and_look)
        yield


def is_done(run: Path, total: int, group: Group, say: Callable[[str], None]) -> bool:
    """Whether a run is at its last step. Raises UserError where it is past that."""

    def newest() -> int:
        if max(complete_steps(run), default=0) < total:
            return 0
        # What is damaged is said when the run goes on from an earlier step.
        return latest_sound(run, lambda line: None) or 0

    step = group.from_first(newest, math.inf)
    if step > total:
        raise UserError(
            f"{run} is at step {step}, past train.steps={total}: set train.steps to {step} or more"
        )
    if step == total:
        say(f"{run} is already at step {step} of {total}: raise train.steps to train on")
    return step == total


def claim_together(run: Path, config: Config, prepared: Prepared, group: Group) -> None:
    """`claim` by the first of a group. Raises UserError also in a process that does not see it."""

    def claim_first():
        claim(run, config, prepared)
        return (run / CONFIG).read_text(encoding="utf-8")

    _check_shared(run, group.from_first(claim_first))


def _check_shared(run: Path, config_text: str) -> None:
    """Raise UserError where this machine does not see what the first process wrote."""
    # A network file system may take a while to show it.
    for _ in range(SHARED_SECONDS):
        with contextlib.suppress(OSError):
            if (run / CONFIG).read_text(encoding="utf-8") == config_text:
                return
        time.sleep(1)
    raise UserError(
        f"run folder {run} is not the one that process 0 writes to: give --out a folder on a file "
        "system that all machines share"
    )


@contextlib.contextmanager
def locked(run: Path):
    """Make the run folder and keep other trainers out of it; the lock ends with the process.

    A run that is refused or interrupted before it has begun leaves nothing behind.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    kept = {*run.iterdir()} if run.is_dir() else set()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / "lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"run folder {run} cannot be made: a file is there; give another --out"
        ) from None
    except OSError as error:
        raise UserError(
            f"run folder {run} cannot be written to ({error.strerror}): give another --out"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {run}: wait for it, or give another --out"
            ) from None
        try:
            yield
        except (UserError, KeyboardInterrupt):
            if not has_begun(run):
                _withdraw(run, kept, made)
            raise


def _withdraw(run: Path, kept: set[Path], made: list[Path]) -> None:
    """Remove what a run has written beside `kept`, and the folders `made` for it, inner first."""
    for path in {*run.iterdir()} - kept:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def has_begun(run: Path) -> bool:
    """Whether there is anything of the run that another one could spoil."""
    metrics = run / "metrics.jsonl"
    return bool(complete_steps(run)) or (metrics.exists() and metrics.stat().st_size > 0)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole: a crash leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
