"""Small models, batches and programs that several tests share."""

import functools

import jax
import numpy as np

from jaxlm.cli import build_config
from jaxlm.config import Config
from jaxlm.mesh import make_mesh
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.step import Program, build_model, build_program
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.language_modelling import make_batch

# Twelve heads for tp3 and tp4, 24 rows for dp8 and fsdp6; the vocabulary is prime, and tp3 and
# tp4 do not divide d_ff.
MODEL = {
    "vocab_size": 101,
    "max_seq_len": 24,
    "d_model": 48,
    "num_layers": 2,
    "num_heads": 12,
    "num_kv_heads": 12,
    "d_ff": 70,
    "init_std": 0.2,
}


def tiny_config(model=(), optim=(), train=(), **others) -> Config:
    """A config of the small model, with these fields over it."""
    return build_config(
        {
            "model": MODEL | dict(model),
            "optim": {"warmup_steps": 2, "learning_rate": 1e-2} | dict(optim),
            "train": {"batch_size": 24, "loss_block": 8} | dict(train),
            **others,
        }
    )


def random_batch(config: Config, seed: int = 0) -> Batch:
    """A batch of rows packed with documents of random lengths, with padding behind the last."""
    rng = np.random.default_rng(seed)
    shape = config.train.batch_size, config.model.max_seq_len + 1
    starts = rng.random(shape) < 0.2
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    begins = np.maximum.accumulate(np.where(starts, np.arange(shape[1]), 0), axis=1)
    positions = np.arange(shape[1]) - begins
    padding = np.arange(shape[1]) >= rng.integers(shape[1] // 2, shape[1] + 1, (shape[0], 1))
    return make_batch(
        {
            "tokens": rng.integers(0, config.model.vocab_size, shape).astype(np.int32),
            "segment_ids": np.where(padding, 0, segments).astype(np.int32),
            "positions": np.where(padding, 0, positions).astype(np.int32),
        }
    )


def make_program(config: Config, mesh: str = "dp1", optimizer=None) -> Program:
    """The compiled functions of a run on a mesh; `optimizer` stands in for the config's."""
    mesh = make_mesh(mesh)
    return build_program(
        build_model(config, mesh),
        optimizer or functools.partial(make_optimizer, config.optim),
        learning_rate(config.optim, config.train.steps),
        config,
        mesh,
    )


def exact(program: Program, state):
    """A state as NumPy arrays of logical shape."""
    return jax.device_get(program.layout.to_exact(state))
