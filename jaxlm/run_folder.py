"""The folder of a run: whose it is, and whether this is still the same run."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path

from jaxlm.checkpoint import latest_sound, step_folder
from jaxlm.cli import flatten, read_config
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer

# What a continued run may change: nothing here touches the numbers of an update.
CHANGEABLE = ("mesh", "out", "log.", "checkpoint.", "data.cache", "data.workers", "data.prefetch")
CHANGEABLE += ("train.eval_every", "train.sample_")


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with `model.vocab_size` set. Raises UserError if it is less than is needed."""
    size, given = tokenizer.vocab_size, config.model.vocab_size
    if given is not None and given < size:
        raise UserError(
            f"model.vocab_size={given} is less than the tokenizer's {size} tokens: leave it out, "
            f"or set it to {size} or more"
        )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=given or size)
    )


def check_same_run(
    run: Path, config: Config, prepared: Prepared, report: Callable[[str], None]
) -> None:
    """Make sure that a run in `run`, if there is one, is this one, and note its data.

    Raises UserError with the differences, and where `init_from` has another tokenizer.
    """
    data = {
        "tokenizer": prepared.tokenizer.fingerprint,
        "train": [file.digest for file in prepared.train],
        "valid": [file.digest for file in prepared.valid],
    }
    if (run / "config.yaml").exists():
        old, new = flatten(read_config(run / "config.yaml")), flatten(config)
        changed = [key for key in new if new[key] != old[key] and not key.startswith(CHANGEABLE)]
        if new["train.steps"] >= old["train.steps"]:
            changed = [key for key in changed if key != "train.steps"]
        if changed:
            differences = ", ".join(f"{key}={old[key]} there, {new[key]} now" for key in changed)
            raise UserError(
                f"{run} holds a run with another configuration ({differences}): give the same, or "
                "another --out"
            )
    noted = run / "data.json"
    if noted.exists():
        before = json.loads(noted.read_text())
        changed = [name for name in data if before[name] != data[name]]
        if changed:
            raise UserError(
                f"{run} was trained on other data (changed since: {', '.join(changed)}): restore "
                "that data, or give another --out"
            )
    elif config.init_from is not None:
        folder = Path(config.init_from)
        step = latest_sound(folder, report) if (folder / "checkpoints").exists() else None
        theirs = load_tokenizer(step_folder(folder, step) if step is not None else folder)
        if theirs.fingerprint != prepared.tokenizer.fingerprint:
            raise UserError(
                f"init_from={config.init_from} was trained with another tokenizer: set "
                "tokenizer.kind=file and tokenizer.path to the one in its newest step folder"
            )
    write_atomically(noted, json.dumps(data))


@contextlib.contextmanager
def locked(run: Path):
    """Make the run folder and keep other trainers out of it; the lock ends with the process."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / "lock").open("w")
    except OSError as error:
        raise UserError(f"run folder {run} cannot be made: {error}; give another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {run}: wait for it, or give another --out"
            ) from None
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole: a crash leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
