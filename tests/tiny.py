"""Small models and programs, and the batches of `jaxlm.parity`, that several tests share."""

import functools

import jax

from jaxlm.cli import build_config
from jaxlm.config import KINDS, Config
from jaxlm.mesh import make_mesh
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.parity import random_batch
from jaxlm.presets import PRESETS
from jaxlm.step import Program, build_model, build_program

__all__ = ["exact", "make_program", "random_batch", "task_of", "tiny_config"]

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


def task_of(preset: str) -> str:
    """A task that a preset's kind of model is trained for."""
    if PRESETS[preset].get("encoder_layers"):
        return "translation"
    kind = PRESETS[preset].get("kind", "decoder")
    return next(task for task, kinds in KINDS.items() if kind in kinds)


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
