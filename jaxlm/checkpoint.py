"""Checkpoints: one folder per step, complete once its manifest of checksums is written.

    RUN/checkpoints/step_00000100/
        state/           the arrays, by Orbax (of an N-gram model by NumPy)
        config.yaml      the experiment that made them
        tokenizer files
        metrics.json     step, tokens, valid_loss, ...
        base.json        of a run with `lora`: the model its adapters belong to
        manifest.json    size and SHA-256 of every other file; written last

Arrays are stored flat, under their path in the tree ("params/embed"): what holds them (dicts,
named tuples, None, empty containers) is the program's business, and what is asked for at restore
decides it. Orbax restores flipped bits silently, therefore the checksums.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.errors import UserError
from jaxlm.manifest import MANIFEST, verify, write_manifest
from jaxlm.orbax_noise import late_reports_dropped
from jaxlm.processes import ALONE, Group

STATE = "state"
CONFIG = "config.yaml"
METRICS = "metrics.json"
_TRASH = "trash_"


class Checkpoints:
    """Writes the checkpoints of one run, in the background and one at a time.

    Keeps the newest `keep` and, with `keep_best`, the one whose metrics have the lowest
    `valid_loss`. Use as a context manager, or call `close`.
    """

    def __init__(self, run_folder: str | Path, *, keep: int, keep_best: bool, group: Group = ALONE):
        """All processes of `group` write the arrays; the first writes and deletes the rest."""
        self._run = Path(run_folder).absolute()
        self._group = group
        self._keep = keep
        self._keep_best = keep_best
        self._orbax = ocp.AsyncCheckpointer(_handler())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saves = 0
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(late_reports_dropped())

    def save(
        self,
        step: int,
        state: Any,
        *,
        config_text: str,
        tokenizer: Any,
        metrics: dict,
        texts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start saving `state`, a tree of jax.Arrays; returns once they are copied to the host.

        The caller may donate them right away. `tokenizer` has `save(folder)`; `metrics` are plain
        numbers by name, and `texts` are more files. Waits for the save before it, and raises
        UserError if that one failed. A step that already has a sound checkpoint is not written
        again.
        """
        self.wait()
        folder = step_folder(self._run, step)
        if self._group.from_first(lambda: verify(folder) is None):
            return
        texts = _texts(step, config_text, metrics) | texts
        try:
            self._group.from_first(lambda: _make_anew(folder))
            with jax.profiler.TraceAnnotation("checkpoint: copy to the host"):
                self._orbax.save(folder / STATE, args=ocp.args.PyTreeSave(_by_name(state)))
        except Exception as error:
            raise self._failure(folder, error) from error
        self._saves += 1
        self._pending = self._background.submit(self._finish, folder, texts, tokenizer)

    def check(self) -> None:
        """Raise UserError if the last save has failed already; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once the last save is complete; raises UserError if it failed."""
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, then release the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            self._quiet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _finish(self, folder: Path, texts: dict[str, str], tokenizer: Any) -> None:
        done = f"checkpoint/{self._saves}"
        try:
            with jax.profiler.TraceAnnotation("checkpoint: write"):
                self._orbax.wait_until_finished()
                if not self._group.is_first:
                    self._group.get(done)
                    return
                _complete(folder, texts, tokenizer)
        except Exception as error:
            raise self._failure(folder, error) from error
        self._prune(_step_of(folder))
        if self._group.count > 1:
            self._group.put(done, True)

    def _failure(self, folder: Path, error: Exception) -> Exception:
        """Remove the half-written `folder`; the error to raise in place of `error`."""
        if isinstance(error, jax.errors.JaxRuntimeError) and self._group.count > 1:
            return error  # another process went away: that is what has to be told
        shutil.rmtree(folder, ignore_errors=True)
        steps = complete_steps(self._run)
        intact = f"{_name(steps[-1])} is intact" if steps else "no earlier checkpoint exists"
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            return UserError(
                f"{folder.parent} has no space left for checkpoint {folder.name} ({intact}): "
                "free some, or lower checkpoint.keep, and resume"
            )
        reason = str(error).partition("\n")[0] or type(error).__name__
        return UserError(
            f"checkpoint {folder.name} could not be written to {folder.parent} ({intact}): {reason}"
        )

    def _prune(self, newest: int) -> None:
        """Delete what need not be kept now that `newest` is complete.

        Later steps are not of this run's making: they are left for the user to judge.
        """
        folders = [
            step_folder(self._run, step) for step in complete_steps(self._run) if step <= newest
        ]
        keep = set(folders[-self._keep :])
        losses = {folder: loss for folder in folders if (loss := valid_loss(folder)) is not None}
        if self._keep_best and losses:
            keep.add(min(losses, key=losses.__getitem__))
        for folder in folders:
            if folder not in keep:
                _discard(folder)
        for folder in _checkpoints(self._run).iterdir():
            unfinished = _step_of(folder) is not None and not (folder / MANIFEST).exists()
            if unfinished or folder.name.startswith(_TRASH):
                shutil.rmtree(folder, ignore_errors=True)


def save_arrays(
    run_folder: str | Path,
    step: int,
    arrays: dict[str, np.ndarray],
    *,
    config_text: str,
    tokenizer: Any,
    metrics: dict,
) -> None:
    """Write the checkpoint of a model that is no tree of jax.Arrays: each array is a .npy file.

    Returns when it is complete. The other arguments are those of `Checkpoints.save`.
    """
    folder = step_folder(run_folder, step)
    _make_anew(folder)
    (folder / STATE).mkdir()
    for name, values in arrays.items():
        np.save(folder / STATE / f"{name}.npy", values)
    _complete(folder, _texts(step, config_text, metrics), tokenizer)


def restore_arrays(folder: str | Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote into a step folder, memory-mapped."""
    return {
        path.stem: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        for path in (Path(folder) / STATE).glob("*.npy")
    }


def _texts(step: int, config_text: str, metrics: dict) -> dict[str, str]:
    return {CONFIG: config_text, METRICS: json.dumps({"step": step, **metrics}, indent=1)}


def _complete(folder: Path, texts: dict[str, str], tokenizer: Any) -> None:
    """Write what lies beside the arrays, the manifest last."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer.save(folder)
    write_manifest(folder)


def _make_anew(folder: Path) -> None:
    _discard(folder)
    folder.mkdir(parents=True)


def step_folder(run_folder: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is: RUN/checkpoints/step_00000100."""
    return _checkpoints(run_folder) / _name(step)


def complete_steps(run_folder: str | Path) -> list[int]:
    """Steps whose checkpoint was written to the end, ascending; their bytes are not looked at."""
    return [
        step
        for step in _all_steps(run_folder)
        if (step_folder(run_folder, step) / MANIFEST).exists()
    ]


def latest_sound(run_folder: str | Path, report: Callable[[str], None]) -> int | None:
    """The newest step whose every byte is as written, or None where none was ever completed.

    `report` gets one line for each newer one that is unfinished or damaged. Raises UserError if
    there are complete checkpoints but all are damaged.
    """
    rejected = {}
    sound = None
    for step in reversed(_all_steps(run_folder)):
        folder = step_folder(run_folder, step)
        problem = verify(folder)
        if problem is None:
            sound = step
            break
        if folder.exists():  # a run that is still writing may have pruned it meanwhile
            rejected[folder] = problem
    damaged = [folder for folder in rejected if (folder / MANIFEST).exists()]
    if sound is None and damaged:
        raise UserError(
            f"no checkpoint in {_checkpoints(run_folder)} is sound ({damaged[0].name}: "
            f"{rejected[damaged[0]]}): restore one from a copy, or start in another run folder"
        )
    using = "no checkpoint precedes it" if sound is None else f"using {_name(sound)}"
    for folder, problem in rejected.items():
        state = "damaged" if folder in damaged else "unfinished"
        report(f"checkpoint {folder.name} is {state} ({problem}); {using}")
    return sound


def restore_state(folder: str | Path, abstract_state: Any) -> Any:
    """The whole state in a step folder, as the tree `abstract_state` of jax.ShapeDtypeStruct.

    Each leaf's sharding may be of any mesh (none: the first device), whatever mesh wrote it; every
    device reads its own part. Raises UserError where names, shapes or types are not exactly those
    of the checkpoint. Checksums are not looked at: `verify` does that.
    """
    return _restore(Path(folder), abstract_state, "")


def restore_params(
    folder: str | Path, abstract_params: Any, key: str = "params", spare: tuple[str, ...] = ()
) -> Any:
    """Like `restore_state`, for the part of the state under `key` ("params", "ema") alone.

    Nothing else is read. The checkpoint may have more, under the names in `spare`.
    """
    return _restore(Path(folder), abstract_params, key, spare)


def _restore(folder: Path, abstract: Any, key: str, spare: tuple[str, ...] = ()) -> Any:
    path = folder.absolute() / STATE
    if not path.is_dir():
        raise UserError(
            f"{folder} holds no checkpoint: name a folder such as RUN/checkpoints/{_name(100)}"
        )
    wanted = _by_name(jax.tree.map(_placed, abstract), key)
    with ocp.Checkpointer(_handler()) as reader:
        stored = reader.metadata(path).item_metadata.tree
        stored = {name: stored[name] for name in stored if _is_under(name, key)}
        left = {n for n in stored for part in spare if _is_under(n, f"{key}/{part}")} - {*wanted}
        _check_same(folder, wanted, {name: stored[name] for name in stored if name not in left})
        if not wanted:
            return abstract  # Orbax refuses to restore nothing
        arrays = reader.restore(
            path,
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _check_same(folder: Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raise UserError at the first difference: Orbax would pad, truncate or cast without a word."""
    advice = f"use the settings in {folder / CONFIG}"
    for name, leaf in wanted.items():
        if name not in stored:
            raise UserError(f"checkpoint {folder} has no {name}, which is asked for: {advice}")
        for what in ("shape", "dtype"):
            there, here = getattr(stored[name], what), getattr(leaf, what)
            if there != here:
                raise UserError(
                    f"{name} has {what} {there} in checkpoint {folder}, but {here} is asked for: "
                    f"{advice}"
                )
    if extra := [name for name in stored if name not in wanted]:
        raise UserError(
            f"checkpoint {folder} has {extra[0]}, for which there is no place: {advice}"
        )


def _by_name(tree: Any, key: str = "") -> dict[str, Any]:
    """The leaves of `tree` in order, by path: {"params/embed": ...}."""
    leaves = jax.tree.leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    named = {
        "/".join(filter(None, (key, path))): leaf
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    }
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _is_under(name: str, key: str) -> bool:
    return key in ("", name) or name.startswith(f"{key}/")


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if leaf.sharding is not None:
        return leaf
    return leaf.update(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Trained weights hardly compress (8 % for float32), and trying doubles the time of a save.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _discard(folder: Path) -> None:
    """Delete a step folder, renamed first: killed half-way, what is left is no checkpoint."""
    trash = folder.with_name(_TRASH + folder.name)
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _checkpoints(run_folder: str | Path) -> Path:
    return Path(run_folder) / "checkpoints"


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(folder: Path) -> int | None:
    match = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(match[1]) if match else None


def _all_steps(run_folder: str | Path) -> list[int]:
    """Steps that have a folder, complete or not, ascending."""
    folders = _checkpoints(run_folder).glob("step_*")
    return sorted(step for folder in folders if (step := _step_of(folder)) is not None)


def valid_loss(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / METRICS).read_text(encoding="utf-8")).get("valid_loss")
    except (OSError, ValueError):
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None
