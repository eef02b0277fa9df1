"""jaxlm's side of the training benchmark: `python -m jaxlm.bench.train_jaxlm`, asked by lines."""

import functools
import resource
import time

import jax
import numpy as np

from jaxlm.bench.answering import answer
from jaxlm.cli import build_config
from jaxlm.config import Config
from jaxlm.flops import training_flops_per_token
from jaxlm.mesh import make_mesh
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.sharding import path_name
from jaxlm.step import Program, build_model, build_program
from jaxlm.tasks.batch import Batch

STEPS = 1000  # of the schedule, which is constant


class Trainer:
    """A program, its state and a batch."""

    def __init__(self, settings: dict):
        self.config = build_config(settings)
        self.program = make_program(self.config)
        self.state = self.program.init()
        self.batch = self.program.put(synthetic_batch(self.config))

    def step(self, count: int) -> float:
        """Take steps; the loss before the last of them."""
        for _ in range(count):
            self.state, metrics = self.program.train_step(self.state, self.batch)
        return float(metrics["loss"])


def make_program(config: Config) -> Program:
    """What trains a configuration's model."""
    mesh = make_mesh(config.mesh)
    return build_program(
        build_model(config, mesh),
        functools.partial(make_optimizer, config.optim),
        learning_rate(config.optim, STEPS),
        config,
        mesh,
    )


def synthetic_batch(config: Config) -> Batch:
    """Random tokens, one document a row: what `train_torch.py` draws, too."""
    shape = config.train.batch_size, config.seq_len
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones(shape, np.float32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        most_segments=1,
    )


class Side:
    """What answers."""

    def __init__(self):
        self.trainer = None

    def check(self, settings: dict, weights: str, count: int) -> dict:
        """Write initial weights, then the losses of the first steps."""
        trainer = Trainer(settings)
        leaves = jax.tree_util.tree_leaves_with_path(trainer.state.params)
        np.savez(weights, **{path_name(path): np.asarray(leaf) for path, leaf in leaves})
        return {"losses": [trainer.step(1) for _ in range(count)]}

    def setup(self, settings: dict) -> dict:
        """Build and compile; what the model is, and how long that took."""
        started = time.monotonic()
        self.trainer = Trainer(settings)
        self.trainer.step(1)
        config = self.trainer.config
        flops = functools.partial(training_flops_per_token, config.model, config.seq_len)
        return {
            "compile_seconds": time.monotonic() - started,
            "parameters": sum(x.size for x in jax.tree.leaves(self.trainer.state.params)),
            "flops_per_token": flops(),
            "causal_flops_per_token": flops(causal=True),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
        }

    def steps(self, count: int) -> dict:
        """Take steps and time them."""
        started = time.monotonic()
        self.trainer.step(count)
        return {"seconds": time.monotonic() - started}

    def dispatch(self) -> dict:
        """How long a step's call takes to return, its work not begun before: the least of five."""
        best = float("inf")
        for _ in range(5):
            started = time.monotonic()
            result = self.trainer.program.train_step(self.trainer.state, self.trainer.batch)
            best = min(best, time.monotonic() - started)
            self.trainer.state, _ = jax.block_until_ready(result)
        return {"seconds": best}

    def memory(self) -> dict:
        """Peak bytes: of the device or, on a CPU, resident."""
        return {"peak_bytes": peak_bytes()}

    def ceiling(self, size: int) -> dict:
        """FLOP/s of a large product of random matrices in the compute type."""
        dtype = self.trainer.config.model.dtype
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        multiply = jax.jit(lambda x: x @ x)
        multiply(x).block_until_ready()
        best = float("inf")
        for _ in range(5):
            started = time.monotonic()
            multiply(x).block_until_ready()
            best = min(best, time.monotonic() - started)
        return {"flops_per_second": 2 * size**3 / best}


def peak_bytes() -> int:
    """Of the first device or, where it does not say, of what was resident of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    answer(Side())
