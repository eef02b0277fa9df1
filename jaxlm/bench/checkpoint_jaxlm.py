"""Saves a training state, or restores one in another process, and times it: asked by lines."""

import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm.bench.answering import answer
from jaxlm.bench.memory import Peak
from jaxlm.bench.train_jaxlm import Trainer, make_program
from jaxlm.checkpoint import Checkpoints, restore_state, step_folder
from jaxlm.cli import build_config
from jaxlm.manifest import verify

CHUNK = 2**24


class Side:
    """What answers."""

    def setup(self, settings: dict) -> dict:
        """Make a state; what it is."""
        self.trainer = Trainer(settings)
        self.trainer.step(1)
        leaves = jax.tree.leaves(self.trainer.state)
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(self.trainer.state.params)),
            "state_bytes": sum(x.nbytes for x in leaves),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
        }

    def save(self, folder: str) -> dict:
        """One save into a folder made anew, with what else its bytes would take; seconds each."""
        run, times = Path(folder), {}
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        state = self.trainer.state
        with timed(times, "copy"):
            # What `copy_to_host` keeps would make the next copy free.
            jax.device_get(jax.tree.map(lambda x: x + 0, state))
        checkpoints = Checkpoints(run, keep=1, keep_best=False)
        with Peak() as peak, timed(times, "total"):
            with timed(times, "blocked"):
                texts = {"config_text": "", "metrics": {"step": 1}}
                checkpoints.save(1, state, tokenizer=NoTokenizer(), **texts)
            checkpoints.wait()
        checkpoints.close()
        size = sum(path.stat().st_size for path in files_of(run))
        with timed(times, "raw_write"):
            write(run / "raw", size)
        (run / "raw").unlink()
        return {"seconds": times, "bytes": size, "more_bytes": peak.bytes - peak.before}

    def restore(self, settings: dict, folder: str) -> dict:
        """What `save` of another process wrote, by one that has no state yet; seconds each."""
        saved, times = step_folder(folder, 1), {}
        wanted = make_program(build_config(settings)).saved.exact
        forget(files_of(saved))
        with timed(times, "raw_read"):
            for path in files_of(saved):
                read(path)
        forget(files_of(saved))
        with timed(times, "verify"):
            assert verify(saved) is None
        forget(files_of(saved))
        # Of what it reads, it holds some twice.
        get_memory(2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted)))
        with timed(times, "restore"):
            jax.block_until_ready(restore_state(saved, wanted))
        return {"seconds": times}


class NoTokenizer:
    """Stands where a run's tokenizer would."""

    def save(self, folder: Path) -> None:
        """Write nothing."""


class timed:
    """`with timed(times, name):` puts the seconds it took there."""

    def __init__(self, times: dict[str, float], name: str):
        self.times, self.name = times, name

    def __enter__(self):
        self.started = time.monotonic()

    def __exit__(self, *exception):
        self.times[self.name] = time.monotonic() - self.started


def files_of(folder: Path) -> list[Path]:
    """Every file in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def forget(files: list[Path]) -> None:
    """Let the system drop what it keeps of files in memory, where it offers to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def get_memory(size: int) -> None:
    """Have the system have so much at hand.

    What a virtual machine has not used lately it gets from its host, slower than from a disk.
    """
    np.ones(size, np.uint8)


def read(path: Path) -> None:
    """Read a file, and keep nothing."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write(path: Path, size: int) -> None:
    """Write a file of random bytes and wait until they are on the disk."""
    block = memoryview(os.urandom(CHUNK))
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(block[: min(CHUNK, size - start)])
        os.fsync(file.fileno())


if __name__ == "__main__":
    answer(Side())
