"""Saves and restores a training state and times it, asked by lines."""

import os
import shutil
import time
from pathlib import Path

import jax

from jaxlm.bench.answering import answer
from jaxlm.bench.memory import Peak
from jaxlm.bench.train_jaxlm import Trainer
from jaxlm.checkpoint import Checkpoints, restore_state, step_folder
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

    def turn(self, folder: str) -> dict:
        """One save and one restore, with what the disk does without jaxlm; seconds each."""
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
        saved = step_folder(run, 1)
        files = [path for path in saved.rglob("*") if path.is_file()]
        forget(files)
        with timed(times, "raw_read"):
            size = sum(map(read, files))
        forget(files)
        with timed(times, "verify"):
            assert verify(saved) is None
        forget(files)
        with timed(times, "restore"):
            restored = restore_state(saved, self.trainer.program.saved.exact)
            jax.block_until_ready(restored)
        del restored
        with timed(times, "raw_write"):
            write(run / "raw", size)
        shutil.rmtree(run)
        return {"seconds": times, "bytes": size, "more_bytes": peak.bytes - peak.before}


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


def forget(files: list[Path]) -> None:
    """Let the system drop what it keeps of files in memory, where it offers to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> int:
    """Read a file; its size."""
    buffer = bytearray(CHUNK)
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def write(path: Path, size: int) -> None:
    """Write a file of random bytes and wait until they are on the disk."""
    block = memoryview(os.urandom(CHUNK))
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(block[: min(CHUNK, size - start)])
        os.fsync(file.fileno())


if __name__ == "__main__":
    answer(Side())
