"""`python -m jaxlm.train`: train a language model, continuing the run that is there."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm import processes, profiling
from jaxlm.base import BASE, Base, find_base, read_base
from jaxlm.checkpoint import CONFIG, Checkpoints, latest_sound, restore_state, step_folder
from jaxlm.cli import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    dump_config,
    flatten,
    parse_config,
    read_config,
    run_command,
)
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared, prepare_together
from jaxlm.errors import UserError
from jaxlm.fitting import fit_run
from jaxlm.flops import peak_flops, training_flops_per_token
from jaxlm.inputs import Inputs
from jaxlm.liveness import Stall
from jaxlm.loading import find_model, start_params, starting_point
from jaxlm.mesh import batch_shards, enable_compilation_cache, make_mesh
from jaxlm.misfit import check_fits
from jaxlm.models import lora
from jaxlm.monitor import Display, Meter, MetricsLog, NoLog
from jaxlm.optim import learning_rate, make_optimizer, stretched
from jaxlm.processes import Group, find_launch, hush_gloo, joined
from jaxlm.profiling import Profile
from jaxlm.run_folder import claim_together, has_begun, held, is_done, with_found
from jaxlm.step import TrainState, build_model, build_program, micro_batches
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.build import check_text_field, make_form, say_what_is_shared
from jaxlm.validation import VALIDATIONS

# Settings of the machine, which the processes of a run need not share.
MAY_DIFFER = ("data.cache", "data.workers", "data.prefetch")


def main(argv: list[str]) -> int:
    """Train what the command line asks for; returns the exit code."""

    def add_arguments(parser):
        profiling.add_arguments(parser)
        processes.add_arguments(parser)

    config, arguments = parse_config(
        argv,
        command="jaxlm.train",
        description="Train a model for a --task: to go on with texts, to answer, to translate or "
        "to classify. The same command again continues the run.",
        add_arguments=add_arguments,
        read_start=starting_point,
    )
    steps = profiling.parse_steps(getattr(arguments, "profile", None))
    with joined(find_launch(arguments, os.environ)) as group:
        return _train(config, group, steps)


def _train(config: Config, group: Group, profiled: range) -> int:
    say = _say if group.is_first else _say_nothing
    check_text_field(config)
    say_what_is_shared(config.data, say)
    if config.model.kind == "ngram":
        return fit_run(config, group, say)
    mesh = make_mesh(config.mesh, say, group.count)
    check_fits(config, mesh)
    enable_compilation_cache()
    if group.count > 1 and mesh.devices.flat[0].platform == "cpu":
        hush_gloo()
    group.check_same({k: v for k, v in flatten(config).items() if k not in MAY_DIFFER})
    run = Path(config.out)
    # Preparing the data may take hours: what is wrong with the folder is said before.
    with held(run, config, group):
        if is_done(run, config.train.steps, group, say):
            return 0
        prepared = prepare_together(group, config.data, config.tokenizer, say, make_form(config))
        config = with_found(config, prepared)
        claim_together(run, config, prepared, group)
        trainer = Trainer(config, mesh, prepared, group, profiled, say)
        with trainer:
            return trainer.run()


class Trainer:
    """One run: its program, its state, its folder. Use as a context manager."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        prepared: Prepared,
        group: Group,
        profiled: range,
        say: Callable[[str], None],
    ):
        self.config = config
        self.run_folder = Path(config.out)
        self.prepared = prepared
        self.group = group
        self.model = build_model(config, mesh)
        self.program = build_program(
            self.model,
            functools.partial(make_optimizer, config.optim),
            learning_rate(config.optim, config.train.steps),
            config,
            mesh,
        )
        if self.model.schedule.stages > 1:
            say(self.model.schedule.describe(self._hidden_bytes(mesh)))
        parts = self.program.layout.replicated
        replicated = [p for p in parts if p.startswith(("params/", "frozen/"))]
        if replicated:
            names = ", ".join(p.partition("/")[2] for p in replicated[:3])
            more = f" and {len(replicated) - 3} more" if len(replicated) > 3 else ""
            say(f"fsdp divides no dimension of {names}{more}: every device holds all of them")
        self.inputs = Inputs(config, self.program, prepared)
        validation = VALIDATIONS[config.task]
        self.validation = validation(config, self.program, prepared, self.inputs, group)
        self.base: Base | None = None
        self.state, self.step = self._restore(say) or (self._fresh(say), 0)
        self.stop = group.stop
        self.profile = Profile(self.run_folder / "profile", self._profiled(profiled))

    def __enter__(self) -> "Trainer":
        config, first = self.config, self.group.is_first
        self.checkpoints = Checkpoints(
            self.run_folder,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            group=self.group,
        )
        self.log = (
            MetricsLog(self.run_folder, self.step, config.log.wandb_project, flatten(config))
            if first
            else NoLog()
        )
        self.display = Display(config.train.steps, self.step, quiet=not first)
        if self.group.watch is not None:
            self.group.watch.before_leaving.append(self.display.close)
        self.meter = self._meter()
        self.stall = Stall(config.log.stall_minutes, self.group.who)
        return self

    def __exit__(self, *exception) -> None:
        self.stall.close()
        self.profile.close()
        self.display.close()
        self.log.close()
        if exception[0] is None:
            self.checkpoints.close()
        elif self.group.count == 1:
            # What stopped the run matters more than what a last write had to say; and a save that
            # needs the other processes may never end.
            with contextlib.suppress(UserError):
                self.checkpoints.close()

    def run(self) -> int:
        """Train to the last step, or until told to stop; returns the exit code."""
        total, every = self.config.train.steps, self.config.log.every_steps
        self._announce()
        self.last_save = time.monotonic()
        self.stop.begin(self.step)
        with self._signals():
            for batch in self.inputs.training(self.step):
                self._update(batch)
                if self.step % every == 0:
                    # The newest stays on the device, so that the next step need not wait for it.
                    self.meter.flush(keep=1)
                last = self.step == total
                valid = self._validate() if last or _due(self._eval_every, self.step) else None
                stopped = self.stop.due(self.step) and not last
                if last or stopped or self._save_due():
                    self._save(valid)
                self.checkpoints.check()
                self.stall.step()
                if last:
                    break
                if stopped:
                    return self._leave()
        return self._finish()

    def _update(self, batch: Batch) -> None:
        self.profile.before(self.step + 1)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = self.program.train_step(self.state, batch)
        self.step += 1
        self.meter.note(self.step, metrics)
        if line := self.profile.after(self.step, metrics):
            self.display.line(line)

    def _announce(self) -> None:
        logical = self.program.layout.logical
        trained, frozen = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (logical.params, logical.frozen)
        )
        count = f"{trained:,} of {trained + frozen:,}" if frozen else f"{trained:,}"
        tokens = sum(file.num_tokens for file in self.prepared.train)
        verb = f"continuing at step {self.step}" if self.step else "training"
        group = f" in {self.group.count} processes" if self.group.count > 1 else ""
        self.display.line(
            f"{verb}: {count} parameters on {tokens:,} tokens of text{group}, run folder "
            f"{self.run_folder}"
        )
        steps, warmup = self.config.train.steps, self.config.optim.warmup_steps
        if warmup is not None and warmup > steps:
            self.display.line(
                f"optim.warmup_steps={warmup} is more than train.steps={steps}: the run ends "
                "before it reaches optim.learning_rate"
            )

    def _finish(self) -> int:
        self.checkpoints.wait()
        if self.group.is_first and (line := self.validation.closing()):
            self.display.line(line)
        self.display.line(
            f"done: step {self.step} saved in {self.run_folder}; try "
            f"{self.validation.suggestion(self.run_folder)}"
        )
        return 0

    def _leave(self) -> int:
        self.checkpoints.wait()
        name = signal.Signals(self.stop.signal).name
        self.display.line(
            f"stopped by {name}: step {self.step} is saved in {self.run_folder}; the same command "
            "continues"
        )
        return EXIT_PREEMPTED

    # -- beginning --------------------------------------------------------------------------

    def _meter(self) -> Meter:
        config, mesh = self.config, self.program.mesh
        length, frozen = config.seq_len, config.lora is not None
        per_token = training_flops_per_token(
            config.model, length, frozen, predicted=config.predicted
        )
        peak = peak_flops(mesh.devices.flat[0].device_kind, self.model.dtype.name)
        return Meter(
            self.log,
            self.display,
            tokens_per_step=self._tokens_per_step,
            flops_per_step=config.train.batch_size * length * per_token,
            peak=None if peak is None else peak * mesh.size,
            max_nonfinite=config.train.max_nonfinite,
        )

    def _hidden_bytes(self, mesh: jax.sharding.Mesh) -> int:
        """Bytes of a micro-batch's hidden states on one device of a pipeline."""
        parts = batch_shards(mesh) * mesh.shape["cp"] * mesh.shape["tp"]
        tokens = self._tokens_per_step // micro_batches(self.config, mesh)
        micro = tokens // self.model.schedule.microbatches // parts
        return micro * self.config.model.d_model * self.model.dtype.itemsize

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.tokens_per_row

    def _restore(self, say: Callable[[str], None]) -> tuple[TrainState, int] | None:
        # One process looks at the bytes, and all use what it found.
        step = self.group.from_first(lambda: latest_sound(self.run_folder, say), math.inf)
        if step is None:
            if has_begun(self.run_folder):
                say(f"{self.run_folder} has no complete checkpoint: starting again at step 1")
            return None
        saved, folder = self.program.saved, step_folder(self.run_folder, step)
        before, total = read_config(folder / CONFIG).train.steps, self.config.train.steps
        if total != before and (line := stretched(self.config.optim, before, total, step)):
            say(line)
        state = saved.to_stored(restore_state(folder, saved.exact))
        if self.config.lora is None:
            return state, step
        self.base = Base(*self.group.from_first(lambda: read_base(folder), math.inf))
        _, frozen = lora.divide(self.config, self._start_params(Path(self.base.folder)))
        return dataclasses.replace(state, frozen=frozen), step

    def _fresh(self, say: Callable[[str], None]) -> TrainState:
        source = self.config.init_from
        if source is None:
            return self.program.init()
        # The newest step of a run that goes on is another a moment later.
        folder = Path(self.group.from_first(lambda: find_model(source), math.inf))
        if self.config.lora is not None:
            self.base = Base(*self.group.from_first(lambda: find_base(folder), math.inf))
        return self.program.init_from(self._start_params(folder, say))

    def _start_params(self, folder: Path, say: Callable[[str], None] = lambda line: None):
        return start_params(folder, self.model, self.program.mesh, self.config.seed, say)

    def _profiled(self, steps: range) -> range:
        """The steps to trace here. Raises UserError where the run has none of them to come."""
        total = self.config.train.steps
        if steps and (steps[-1] <= self.step or steps[0] > total):
            raise UserError(
                f"--profile={steps[0]}:{steps[-1]} is not what this run is about to do: give "
                f"steps from {self.step + 1} to {total}"
            )
        return steps if self.group.is_first else range(0)

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
        saved = self.program.saved.to_exact(dataclasses.replace(self.state, frozen=None))
        folder = step_folder(self.run_folder, self.step)
        self.checkpoints.save(
            self.step,
            saved,
            config_text=dump_config(self.config),
            tokenizer=self.prepared.tokenizer,
            metrics={
                "step": self.step,
                "tokens": self.step * self._tokens_per_step,
                **(valid or {}),
            },
            texts={} if self.base is None else {BASE: self.base.describe(folder)},
        )
        self.last_save = time.monotonic()
        self.meter.restart_clock()

    def _validate(self) -> dict[str, float]:
        """Metrics of the validation text; written, shown and returned."""
        self.meter.flush()
        params = self.program.eval_params(self.state)
        metrics, (first, *others) = self.validation.run(params, self.stall.step)
        self.log.write({"step": self.step, **metrics})
        for line in (f"step {self.step}: {first}", *others):
            self.display.line(line)
        self.meter.restart_clock()
        return metrics

    # -- being told to stop -----------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM, SIGINT and SIGUSR1 end the run after this step, saved; Ctrl-C twice at once."""

        def stop(number, frame):
            if number == signal.SIGINT and self.stop.signal is not None:
                self.display.close()
                os._exit(EXIT_INTERRUPTED)
            self.stop.tell(number)
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ", then leaving"
            self.display.line(f"{signal.Signals(number).name}: saving after this step{again}")

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


def _say_nothing(line: str) -> None:
    pass


if __name__ == "__main__":
    run_command(main)
