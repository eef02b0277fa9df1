"""What compiles a training step for many devices that are not there, asked by lines."""

import dataclasses
import functools
import math
import time

import jax
import numpy as np

from jaxlm.bench.answering import answer
from jaxlm.bench.train_jaxlm import synthetic_batch
from jaxlm.cli import build_config
from jaxlm.collectives import collectives, summarise
from jaxlm.mesh import make_mesh
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.sharding import batch_sharding
from jaxlm.step import build_model, build_program


class Side:
    """What answers."""

    def compile(self, settings: dict) -> dict:
        """Compile a step; what it took, holds and sends. Nothing runs, and no state is made."""
        config = build_config(settings)
        mesh = make_mesh(config.mesh)
        program = build_program(
            build_model(config, mesh),
            functools.partial(make_optimizer, config.optim),
            learning_rate(config.optim, config.train.steps),
            config,
            mesh,
        )
        state = program.layout.stored
        rows = batch_sharding(mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=rows),
            synthetic_batch(config),
        )
        started = time.monotonic()
        lowered = program.train_step.lower(state, batch)
        traced = time.monotonic()
        compiled = lowered.compile()
        done = time.monotonic()
        sent = summarise(collectives(compiled.as_text(), mesh))
        held, logical = (state.params, state.opt_state), program.layout.logical
        return {
            "trace_seconds": traced - started,
            "compile_seconds": done - traced,
            "device_bytes": sum(map(_on_a_device, jax.tree.leaves(held))),
            "total_bytes": sum(map(_bytes, jax.tree.leaves((logical.params, logical.opt_state)))),
            "parameter_bytes": sum(map(_bytes, jax.tree.leaves(logical.params))),
            "sent": [dataclasses.asdict(traffic) for traffic in sent],
            "versions": {"jax": jax.__version__},
        }


def _bytes(x) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _on_a_device(x) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


if __name__ == "__main__":
    answer(Side())
