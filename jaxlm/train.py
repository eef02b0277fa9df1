"""`python -m jaxlm.train`: train a language model, continuing the run that is there."""

import contextlib
import functools
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlm.api import load_params
from jaxlm.checkpoint import Checkpoints, latest_sound, restore_state, step_folder
from jaxlm.cli import EXIT_PREEMPTED, dump_config, flatten, parse_config, run_command
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared, prepare
from jaxlm.data.loader import training_batches, validation_batches
from jaxlm.decode import Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.flops import peak_flops, training_flops_per_token
from jaxlm.mesh import enable_compilation_cache, make_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.monitor import Display, Meter, MetricsLog
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.run_folder import claim, locked, with_vocabulary
from jaxlm.sharding import check_fits
from jaxlm.step import TrainState, build_program
from jaxlm.tasks.language_modelling import Batch, compressed_bits, make_batch, validation_metrics

BATCHES_ON_DEVICE = 2


def main(argv: list[str]) -> int:
    """Train what the command line asks for; returns the exit code."""
    config, _ = parse_config(
        argv,
        command="jaxlm.train",
        description="Train a language model. The same command again continues the run.",
    )
    run = Path(config.out)
    mesh = make_mesh(config.mesh, _say)
    enable_compilation_cache()
    prepared = prepare(config.data, config.tokenizer, _say)
    config = with_vocabulary(config, prepared.tokenizer)
    check_fits(config, mesh)
    with locked(run):
        claim(run, config, prepared)
        trainer = Trainer(config, mesh, prepared)
        with trainer:
            return trainer.run()


class Trainer:
    """One run: its program, its state, its folder. Use as a context manager."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, prepared: Prepared):
        self.config = config
        self.run_folder = Path(config.out)
        self.prepared = prepared
        self.model = Decoder(config.model)
        self.program = build_program(
            self.model,
            functools.partial(make_optimizer, config.optim),
            learning_rate(config.optim, config.train.steps),
            config,
            mesh,
        )
        replicated = [p for p in self.program.layout.replicated if p.startswith("params/")]
        if replicated:
            names = ", ".join(p.removeprefix("params/") for p in replicated[:3])
            more = f" and {len(replicated) - 3} more" if len(replicated) > 3 else ""
            _say(f"fsdp divides no dimension of {names}{more}: every device holds all of them")
        self.decoder = build_decode_program(self.model, mesh)
        self.prompt = self._sample_prompt()
        self.state = self._restore() or self._fresh()
        self.step = int(self.state.step)
        self.signal: int | None = None

    def __enter__(self) -> "Trainer":
        config = self.config
        self.checkpoints = Checkpoints(
            self.run_folder, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
        )
        self.log = MetricsLog(self.run_folder, self.step, config.log.wandb_project, flatten(config))
        self.display = Display(config.train.steps, self.step)
        self.meter = self._meter()
        return self

    def __exit__(self, *exception) -> None:
        self.display.close()
        self.log.close()
        if exception[0] is None:
            self.checkpoints.close()
        else:
            # What stopped the run matters more than what a last write had to say.
            with contextlib.suppress(UserError):
                self.checkpoints.close()

    def run(self) -> int:
        """Train to the last step, or until told to stop; returns the exit code."""
        total, every = self.config.train.steps, self.config.log.every_steps
        if self.step >= total:
            self.display.line(
                f"{self.run_folder} is already at step {self.step} of {total}: raise train.steps "
                "to train on"
            )
            return 0
        self._announce()
        self.last_save = time.monotonic()
        with self._signals():
            for batch in self._batches():
                self.state, metrics = self.program.train_step(self.state, batch)
                self.step += 1
                self.meter.note(self.step, metrics)
                if self.step % every == 0:
                    # The newest stays on the device, so that the next step need not wait for it.
                    self.meter.flush(keep=1)
                last = self.step == total
                valid = self._validate() if last or _due(self._eval_every, self.step) else None
                if last or self.signal or self._save_due():
                    self._save(valid)
                if last:
                    break
                if self.signal:
                    return self._leave()
        return self._finish()

    def _announce(self) -> None:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.program.layout.logical.params))
        tokens = sum(file.num_tokens for file in self.prepared.train)
        verb = f"continuing at step {self.step}" if self.step else "training"
        self.display.line(
            f"{verb}: {count:,} parameters on {tokens:,} tokens of text, run folder "
            f"{self.run_folder}"
        )

    def _finish(self) -> int:
        self.checkpoints.wait()
        self.display.line(self._yardstick())
        self.display.line(
            f"done: step {self.step} saved in {self.run_folder}; try python -m jaxlm.sample "
            f"{self.run_folder} --prompt={self.config.train.sample_prompt!r}"
        )
        return 0

    def _leave(self) -> int:
        self.checkpoints.wait()
        name = signal.Signals(self.signal).name
        self.display.line(
            f"stopped by {name}: step {self.step} is saved in {self.run_folder}; the same command "
            "continues"
        )
        return EXIT_PREEMPTED

    # -- beginning --------------------------------------------------------------------------

    def _meter(self) -> Meter:
        config, mesh = self.config, self.program.mesh
        length = config.model.max_seq_len
        peak = peak_flops(mesh.devices.flat[0].device_kind, self.model.dtype.name)
        return Meter(
            self.log,
            self.display,
            tokens_per_step=self._tokens_per_step,
            flops_per_step=self._tokens_per_step * training_flops_per_token(config.model, length),
            peak=None if peak is None else peak * mesh.size,
            max_nonfinite=config.train.max_nonfinite,
        )

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.max_seq_len

    def _restore(self) -> TrainState | None:
        step = latest_sound(self.run_folder, _say)
        if step is None:
            return None
        if step > self.config.train.steps:
            raise UserError(
                f"{self.run_folder} is at step {step}, past train.steps={self.config.train.steps}: "
                f"set train.steps to {step} or more"
            )
        layout = self.program.layout
        return layout.to_stored(restore_state(step_folder(self.run_folder, step), layout.exact))

    def _fresh(self) -> TrainState:
        source = self.config.init_from
        if source is None:
            return self.program.init()
        return self.program.init_from(load_params(source, self.config, self.program.mesh))

    def _sample_prompt(self) -> list[int] | None:
        text = self.config.train.sample_prompt
        if not text:
            return None
        tokens = [self.prepared.tokenizer.bos_id, *self.prepared.tokenizer.encode(text)]
        if len(tokens) >= self.config.model.max_seq_len:
            raise UserError(
                f"train.sample_prompt has {len(tokens)} tokens, which leaves no room in "
                f"model.max_seq_len={self.config.model.max_seq_len}: shorten it"
            )
        return tokens

    def _batches(self) -> Iterator[Batch]:
        """Batches on the devices, a few ahead of the step."""
        config = self.config
        rows = training_batches(
            self.prepared.train,
            self.prepared.weights,
            seq_len=config.model.max_seq_len,
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_step=self.step,
            prefetch=config.data.prefetch,
        )
        placed = (self.program.put(make_batch(row)) for row in rows)
        ahead = deque(itertools.islice(placed, BATCHES_ON_DEVICE))
        while True:
            yield ahead.popleft()
            ahead.append(next(placed))

    # -- along the way ----------------------------------------------------------------------

    @property
    def _eval_every(self) -> int:
        return self.config.train.eval_every

    def _save_due(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        overdue = minutes is not None and time.monotonic() - self.last_save >= 60 * minutes
        return overdue or _due(self.config.checkpoint.every_steps, self.step)

    def _save(self, valid: dict[str, float] | None) -> None:
        """A checkpoint of this step. The metrics up to it are on the disk before it is."""
        self.meter.flush()
        self.log.sync()
        self.checkpoints.save(
            self.step,
            self.program.layout.to_exact(self.state),
            config_text=dump_config(self.config),
            tokenizer=self.prepared.tokenizer,
            metrics={
                "step": self.step,
                "tokens": self.step * self._tokens_per_step,
                **(valid or {}),
            },
        )
        self.last_save = time.monotonic()
        self.meter.restart_clock()

    def _eval_params(self):
        return self.state.params if self.state.ema is None else self.state.ema

    def _validate(self) -> dict[str, float]:
        """Loss on the validation text, and a sample; written, shown and returned."""
        self.meter.flush()
        params, sums, num_bytes = self._eval_params(), [], 0
        for batch, size in self._validation_batches():
            sums.append(self.program.eval_step(params, self.program.put(batch)))
            num_bytes += size
        nats, targets = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        metrics = validation_metrics(float(nats), float(targets), num_bytes / max(targets, 1))
        self.log.write({"step": self.step, **metrics})
        self.bits_per_byte = metrics["valid_bits_per_byte"]
        self.display.line(
            f"step {self.step}: validation loss {metrics['valid_loss']:.4f} nats/token, "
            f"perplexity {metrics['valid_perplexity']:.2f}, {self.bits_per_byte:.4f} bits/byte"
        )
        if self.prompt is not None:
            self.display.line(f"  sample: {self._sample()!r}")
        self.meter.restart_clock()
        return metrics

    def _validation_batches(self) -> Iterator[tuple[Batch, int]]:
        """Batches and the bytes of text their targets stand for."""
        config, lengths = self.config, self.prepared.tokenizer.byte_lengths
        for rows in validation_batches(
            self.prepared.valid,
            seq_len=config.model.max_seq_len,
            batch_size=config.train.batch_size,
            limit=config.train.eval_batches,
        ):
            batch = make_batch(rows)
            yield batch, int(lengths[batch.targets[batch.weights > 0]].sum())

    def _sample(self) -> str:
        tokenizer = self.prepared.tokenizer
        room = self.config.model.max_seq_len - len(self.prompt)
        (texts,) = self.decoder.generate(
            self.decoder.prepare(self._eval_params()),
            [self.prompt],
            max_new_tokens=min(self.config.train.sample_tokens, room),
            sampling=Sampling(temperature=0.8),
            eos_id=tokenizer.eos_id,
            seed=self.config.seed,
        )
        return tokenizer.decode([*self.prompt, *texts[0]])

    def _yardstick(self) -> str:
        """What general compressors make of the same validation text."""
        tokenizer = self.prepared.tokenizer
        text = b"".join(
            tokenizer.decode_bytes(batch.targets[batch.weights > 0].tolist())
            for batch, _ in self._validation_batches()
        )
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressed_bits(text).items())
        return (
            f"bits/byte on {len(text):,} bytes of validation text: model "
            f"{self.bits_per_byte:.3f}, {others}"
        )

    # -- being told to stop -----------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM, SIGINT and SIGUSR1 end the run after this step, saved; Ctrl-C twice at once."""

        def stop(number, frame):
            if number == signal.SIGINT and self.signal is not None:
                self.display.close()
                os._exit(130)
            self.signal = number
            name = signal.Signals(number).name
            self.display.line(f"{name}: saving after this step; Ctrl-C again leaves at once")

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = [signal.signal(number, stop) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
