"""Batches on the devices: each process reads its rows, and the next batches are there early."""

from collections import deque
from collections.abc import Iterator, Sequence

from jax.profiler import TraceAnnotation

from jaxlm.config import Config
from jaxlm.data.corpus import File, Prepared
from jaxlm.data.loader import training_batches, validation_batches
from jaxlm.data.tokens import Row
from jaxlm.placement import rows_held
from jaxlm.sharding import batch_sharding
from jaxlm.step import Program
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.build import batch_maker

BATCHES_ON_DEVICE = 2


class Inputs:
    """The batches of a run."""

    def __init__(self, config: Config, program: Program, prepared: Prepared):
        self._config = config
        self._program = program
        self._prepared = prepared
        self._make_batch = batch_maker(config, prepared)
        shape = config.train.batch_size, config.seq_len
        self._rows, owned = rows_held(batch_sharding(program.mesh), shape)
        self.owned = [i for i, row in enumerate(self._rows) if row in set(owned.tolist())]
        """Places, in what this process reads of a batch, of the rows that it answers for."""

    def training(self, start_step: int) -> Iterator[Batch]:
        """Endless batches on the devices, a few ahead of the step."""
        config = self._config
        rows = training_batches(
            self._row_sources(self._prepared.train),
            self._prepared.weights,
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=self._rows,
            prefetch=config.data.prefetch,
        )

        def placed():
            with TraceAnnotation("data: read"):
                row = next(rows)
            return self.put(self._make_batch(row))

        ahead = deque(placed() for _ in range(BATCHES_ON_DEVICE))
        while True:
            yield ahead.popleft()
            ahead.append(placed())

    def put(self, batch: Batch) -> Batch:
        """This process's rows of a batch, on its devices, as part of the global batch."""
        with TraceAnnotation("data: to the devices"):
            return self._program.put(batch, self._rows, self._config.train.batch_size)

    def validation(self, whole: bool = False) -> Iterator[Batch]:
        """Host batches: this process's rows, or with `whole` all."""
        config = self._config
        for rows in validation_batches(
            self._row_sources(self._prepared.valid),
            batch_size=config.train.batch_size,
            limit=config.train.eval_batches,
            rows=None if whole else self._rows,
        ):
            yield self._make_batch(rows)

    def _row_sources(self, files: Sequence[File]) -> list[Sequence[Row]]:
        return [self._prepared.form.rows(file, self._config.seq_len) for file in files]
