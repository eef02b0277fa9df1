"""jaxlm's side of the data benchmark: `python -m jaxlm.bench.data_jaxlm`, asked by lines."""

import functools
import itertools
import time

import jax

from jaxlm.bench.answering import answer
from jaxlm.cli import build_config
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared, prepare
from jaxlm.inputs import Inputs
from jaxlm.mesh import make_mesh
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.run_folder import with_found
from jaxlm.step import build_model, build_program
from jaxlm.tasks.build import make_form

AHEAD = 16
"""Batches that the loader may have read before it is timed, and more."""


class Side:
    """What answers."""

    def prepare(self, settings: dict) -> dict:
        """Prepare the data, and time it; the tokens in it."""
        started = time.monotonic()
        _, prepared = prepared_for(settings)
        seconds = time.monotonic() - started
        files = (*prepared.train, *prepared.valid)
        return {"tokens": sum(file.num_tokens for file in files), "seconds": seconds}

    def setup(self, settings: dict) -> dict:
        """Get ready to train on what was prepared."""
        config, prepared = prepared_for(settings)
        config = with_found(config, prepared)
        mesh = make_mesh(config.mesh)
        self.program = build_program(
            build_model(config, mesh),
            functools.partial(make_optimizer, config.optim),
            learning_rate(config.optim, config.train.steps),
            config,
            mesh,
        )
        self.batches = Inputs(config, self.program, prepared).training(0)
        self.batch = next(self.batches)
        self.state = self.program.init()
        self._train([self.batch, next(self.batches)])
        return {"tokens": config.train.batch_size * config.seq_len}

    def load(self, count: int) -> dict:
        """Take batches and do nothing with them, after those that are read ahead."""
        for batch in itertools.islice(self.batches, AHEAD):
            jax.block_until_ready(batch)
        started = time.monotonic()
        for batch in itertools.islice(self.batches, count):
            jax.block_until_ready(batch)
        return {"seconds": time.monotonic() - started}

    def steps(self, real: bool, count: int) -> dict:
        """Train on the data's batches or, not `real`, on one of them again and again."""
        started = time.monotonic()
        self._train(itertools.islice(self.batches, count) if real else [self.batch] * count)
        return {"seconds": time.monotonic() - started}

    def _train(self, batches) -> None:
        for batch in batches:
            self.state, metrics = self.program.train_step(self.state, batch)
        float(metrics["loss"])


def prepared_for(settings: dict) -> tuple[Config, Prepared]:
    """The config of some settings, and its data."""
    config = build_config(settings)
    form = make_form(config)
    return config, prepare(config.data, config.tokenizer, lambda line: None, form)


if __name__ == "__main__":
    answer(Side())
