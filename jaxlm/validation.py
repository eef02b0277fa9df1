"""What a run says of itself now and then: metrics of held-out text, a sample, a yardstick."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxlm.chat import Message, encode_prompt
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.decode import Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.inputs import Inputs
from jaxlm.processes import Group
from jaxlm.step import Program, build_model
from jaxlm.tasks.batch import Batch
from jaxlm.tasks.labels import confusion_table, label_metrics
from jaxlm.tasks.language_modelling import compressed_bits, loss_metrics
from jaxlm.tasks.metrics import translation_metrics
from jaxlm.tasks.translation import reference_pairs

GREEDY = Sampling(temperature=0.0)
TEXTS_AT_ONCE = 64
OPENING = 9  # tokens of a text, with the one that begins it
SHOWN = 200  # characters of a text
# What configs/sentiment-finetune.yaml has, for where it is not at hand.
FINE_TUNING = (
    "--task=classification --model.dropout=0.3 --optim.name=muon --optim.learning_rate=2e-3 "
    "--optim.schedule=linear --optim.final_fraction=0.0 --optim.warmup_steps=50 "
    "--optim.weight_decay=0.05 --train.steps=400 --train.batch_size=16 "
    "--train.class_weights=balanced"
)


class Validation(ABC):
    """Validation of one run. Every process calls the same methods with the same parameters."""

    def __init__(
        self, config: Config, program: Program, prepared: Prepared, inputs: Inputs, group: Group
    ):
        """Raises UserError for a prompt of the sample that is too long."""
        self._config = config
        self._program = program
        self._prepared = prepared
        self._tokenizer = prepared.tokenizer
        self._inputs = inputs
        self._group = group

    @abstractmethod
    def run(self, params, moved: Callable[[], None]) -> tuple[dict[str, float], list[str]]:
        """(metrics of the validation text by name, lines that show them, and perhaps a sample).

        `moved` is called after each batch.
        """

    @abstractmethod
    def suggestion(self, run_folder: Path) -> str:
        """A command that does something with the trained model."""

    def closing(self) -> str | None:
        """A line for the end of the run: what the last metrics can be compared with."""
        return None

    def _sums(self, params, moved: Callable[[], None], look: Callable = lambda batch: None):
        """The evaluation step's sums over all batches, float64; `look` sees each host batch."""
        sums = []
        for batch in self._inputs.validation():
            sums.append(self._program.eval_step(params, self._inputs.put(batch)))
            look(batch)
            moved()
        add = lambda *parts: np.sum(parts, axis=0, dtype=np.float64)  # noqa: E731
        return jax.tree.map(add, *jax.device_get(sums))


class TextValidation(Validation):
    """Of language models: loss, bits per byte and a sample."""

    def __init__(self, config: Config, program: Program, *others):
        super().__init__(config, program, *others)
        self._decoder = build_decode_program(build_model(config, program.mesh), program.mesh)
        self._prompt = self._sample_prompt()
        self._bits_per_byte = 0.0

    def suggestion(self, run_folder):
        if self._config.task == "instruction":
            return sample_command(run_folder, "--chat")
        prompt = self._tokenizer.decode(self._prompt or [])
        return sample_command(run_folder, prompt_option(prompt))

    def run(self, params, moved):
        num_bytes, lengths = 0, self._tokenizer.byte_lengths

        def look(batch):
            # Rows that several processes hold count once.
            nonlocal num_bytes
            mine = self._inputs.owned
            num_bytes += int(lengths[batch.targets[mine][batch.weights[mine] > 0]].sum())

        sums = self._sums(params, moved, look)
        num_bytes = sum(self._group.gather(num_bytes))
        metrics = loss_metrics(float(sums.nats), float(sums.weight), num_bytes)
        self._bits_per_byte = metrics["valid_bits_per_byte"]
        lines = [
            f"validation loss {metrics['valid_loss']:.4f} nats/token, perplexity "
            f"{metrics['valid_perplexity']:.2f}, {self._bits_per_byte:.4f} bits/byte"
        ]
        if self._prompt is not None:
            lines.append(f"  sample: {self._sample(params)!r}")
        return metrics, lines

    def closing(self):
        if self._config.task != "language_modelling":
            return None
        text = b"".join(
            self._tokenizer.decode_bytes(batch.targets[batch.weights > 0].tolist())
            for batch in self._inputs.validation(whole=True)
        )
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressed_bits(text).items())
        return (
            f"bits/byte on {len(text):,} bytes of validation text: model "
            f"{self._bits_per_byte:.3f}, {others}"
        )

    def _sample(self, params) -> str:
        """A continuation of the config's prompt."""
        room = self._config.model.max_seq_len - len(self._prompt)
        (texts,) = self._decoder.generate(
            self._decoder.prepare(params),
            [self._prompt],
            max_new_tokens=min(self._config.train.sample_tokens, room),
            sampling=Sampling(temperature=0.8),
            eos_id=self._tokenizer.eos_id,
            seed=self._config.seed,
        )
        return self._tokenizer.decode([*self._prompt, *texts[0]])

    def _sample_prompt(self) -> list[int] | None:
        text = self._config.train.sample_prompt
        if text == "":
            return None
        if text is None:
            tokens = opening(next(iter(self._inputs.validation(whole=True))))
            return tokens if len(tokens) < self._config.model.max_seq_len else None
        if self._config.task == "instruction":
            tokens = encode_prompt(self._tokenizer, [Message("user", text)])
        else:
            tokens = [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        if len(tokens) >= self._config.model.max_seq_len:
            raise UserError(
                f"train.sample_prompt has {len(tokens)} tokens, which leaves no room in "
                f"model.max_seq_len={self._config.model.max_seq_len}: shorten it"
            )
        return tokens


def sample_command(run_folder: Path, options: str) -> str:
    """The command that asks a trained model."""
    return f"python -m jaxlm.sample {shlex.quote(str(run_folder))} {options}"


def prompt_option(text: str) -> str:
    """What to give `python -m jaxlm.sample` for a prompt: the first line of a text."""
    return f"--prompt={shlex.quote((text.strip() or 'The').splitlines()[0])}"


def _short(text: str) -> str:
    """A text that fits a few lines: what is not yet learnt may go on and on."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def opening(batch: Batch) -> list[int]:
    """How a batch's first text begins: what is before its first target or, of a text whose every
    token is one, a few tokens.
    """
    targets = batch.weights[0] > 0
    asked = int(np.argmax(targets))
    own = int(np.sum(batch.segment_ids[0] == batch.segment_ids[0, 0]))
    return batch.tokens[0, : asked + 1 if asked else min(OPENING, own)].tolist()


class TranslationValidation(Validation):
    """Of translation: loss, and BLEU and chrF of some pairs, translated greedily."""

    def __init__(self, config: Config, program: Program, *others):
        super().__init__(config, program, *others)
        self._decoder = build_decode_program(build_model(config, program.mesh), program.mesh)
        some = config.train.eval_texts
        self._pairs = reference_pairs(self._prepared, some) if some else []

    def suggestion(self, run_folder):
        # A short text of those that the model is for.
        pairs = self._pairs[:TEXTS_AT_ONCE] or reference_pairs(self._prepared, 1)
        pair = min(pairs, key=lambda pair: len(pair.source))
        several = len(self._prepared.form.names) > 1
        prompt = prompt_option(self._tokenizer.decode(pair.source))
        return sample_command(
            run_folder, f"--target={pair.language} {prompt}" if several else prompt
        )

    def run(self, params, moved):
        sums = self._sums(params, moved)
        metrics = loss_metrics(float(sums.nats), float(sums.weight))
        line = f"validation loss {metrics['valid_loss']:.4f} nats/token"
        if not self._pairs:
            return metrics, [line]
        texts = self._translate(params, moved)
        scores, _ = translation_metrics(texts, self._pairs)
        metrics |= scores
        line += (
            f", BLEU {metrics['valid_bleu']:.2f}, chrF {metrics['valid_chrf']:.2f} of "
            f"{len(texts)} texts translated greedily"
        )
        source = self._tokenizer.decode(self._pairs[0].source)
        return metrics, [line, f"  sample: {_short(source)!r} -> {_short(texts[0])!r}"]

    def _translate(self, params, moved) -> list[str]:
        params, texts = self._decoder.prepare(params), []
        for start in range(0, len(self._pairs), TEXTS_AT_ONCE):
            part = self._pairs[start : start + TEXTS_AT_ONCE]
            (made,) = self._decoder.generate(
                params,
                [[self._tokenizer.bos_id]] * len(part),
                max_new_tokens=self._config.model.max_seq_len,
                sampling=GREEDY,
                eos_id=self._tokenizer.eos_id,
                sources=[pair.source for pair in part],
            )
            texts += map(self._tokenizer.decode, made)
            moved()
        return texts


class LabelValidation(Validation):
    """Of classification: accuracy, macro-F1, calibration, and what is taken for what."""

    def suggestion(self, run_folder):
        return sample_command(run_folder, "--prompt='What a lovely day'")

    def run(self, params, moved):
        sums = self._sums(params, moved)
        metrics = label_metrics(sums)
        line = (
            f"validation loss {metrics['valid_loss']:.4f} nats/text, accuracy "
            f"{metrics['valid_accuracy']:.4f}, macro-F1 {metrics['valid_macro_f1']:.4f}, "
            f"calibration error {metrics['valid_ece']:.4f}"
        )
        table = confusion_table(sums.confusion, self._config.model.labels)
        return metrics, [line, *(f"  {row}" for row in table.splitlines())]


class MaskedValidation(Validation):
    """Of masked language modelling: the loss of hidden tokens."""

    def run(self, params, moved):
        sums = self._sums(params, moved)
        metrics = loss_metrics(float(sums.nats), float(sums.weight))
        line = (
            f"validation loss {metrics['valid_loss']:.4f} nats/hidden token, perplexity "
            f"{metrics['valid_perplexity']:.2f}"
        )
        return metrics, [line]

    def suggestion(self, run_folder):
        config = Path("configs/sentiment-finetune.yaml")
        settings = f"--config={config}" if config.exists() else FINE_TUNING
        return (
            f"python -m jaxlm.train {settings} "
            f"--init_from={shlex.quote(str(run_folder))} "
            f"--out={shlex.quote(f'{run_folder}-labels')} --data.train=LABELLED.tsv"
        )


VALIDATIONS = {
    "language_modelling": TextValidation,
    "instruction": TextValidation,
    "translation": TranslationValidation,
    "classification": LabelValidation,
    "masked_language_modelling": MaskedValidation,
}
