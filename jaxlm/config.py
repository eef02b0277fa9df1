"""One experiment as frozen dataclasses. Imports no JAX, so that reading a config is instant.

Every field's docstring is its line in `--help`; every default stands here and nowhere else.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from jaxlm.axes import parse_mesh
from jaxlm.data_config import DROPOUT, DataConfig, TokenizerConfig
from jaxlm.errors import UserError, check_read, nearest_divisor, needs, show
from jaxlm.model_config import STRICT, ModelConfig
from jaxlm.values import (
    Count,
    Fraction,
    Names,
    Natural,
    NonNegative,
    PathText,
    Positive,
    Seed,
    Weights,
)


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """The update: optimiser, learning-rate schedule, regularisation."""

    name: Literal["sgd", "adam", "adamw", "adafactor", "lion", "muon"] = "muon"
    """Optimiser."""
    learning_rate: Positive = 4e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape after warm-up: wsd holds the peak, then decays over decay_fraction of the run."""
    warmup_steps: Natural | None = None
    """Steps of linear warm-up from zero; null: 20, or a quarter of a run shorter than 80."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of all steps spent decaying."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """linear, cosine, wsd: last learning rate as a share of the peak."""
    weight_decay: NonNegative = 0.0
    """Decay of matrices, never of norms and biases: decoupled, but in the gradient (L2) for sgd
    and adam."""
    beta1: Fraction = 0.9
    """First-moment decay (adam, adamw, lion, muon's momentum)."""
    beta2: Fraction = 0.95
    """Second-moment decay (adam, adamw, lion, muon's share of Adam)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment (adam, adamw, muon)."""
    momentum: Fraction = 0.0
    """sgd: momentum."""
    nesterov: bool = False
    """sgd: Nesterov momentum."""
    clip_norm: Positive | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the parameters with this decay; null: none."""

    def __post_init__(self):
        if self.nesterov and not self.momentum:
            raise UserError("optim.nesterov=true needs optim.momentum above 0, such as 0.9")
        sgd = needs("optim", self, "name", "sgd")
        check_read(
            "optim",
            self,
            beta1=needs("optim", self, "name", "adam", "adamw", "lion", "muon"),
            beta2=needs("optim", self, "name", "adam", "adamw", "lion", "muon"),
            eps=needs("optim", self, "name", "adam", "adamw", "muon"),
            momentum=sgd,
            nesterov=sgd,
            decay_fraction=needs("optim", self, "schedule", "wsd"),
            final_fraction=needs("optim", self, "schedule", "linear", "cosine", "wsd"),
        )


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) that are trained in place of the model of init_from."""

    rank: Count = 16
    """Width of an adapter: a projection W becomes W + alpha / rank B A."""
    alpha: Positive = 32.0
    """Factor on an adapter, over rank."""
    targets: Names = ()
    """Projections that get one, such as [q,v]; empty: all of every layer but routers."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """The loop."""

    steps: Count = 80
    """Updates in all."""
    batch_size: Count = 8
    """Global rows per update, whatever the mesh."""
    accumulation: Count | None = None
    """Micro-batches an update is computed in; the update is that of the whole batch. null: one, or
    on CPUs so many that each has about 1,024 tokens."""
    z_loss: NonNegative = 0.0
    """Weight of log(Z)^2 in the loss (PaLM: 1e-4)."""
    label_smoothing: Fraction = 0.0
    """Share of each target spread over all tokens (Vaswani et al., 2017: 0.1); losses are shown
    without."""
    class_weights: Weights | Literal["balanced"] | None = None
    """classification: factor on each label's loss, or balanced: all labels' losses sum to the same;
    null: 1."""
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """masked_language_modelling: share of tokens to predict; of these 80 % are masked and 10 % are
    replaced by another (Devlin et al., 2019)."""
    loss_block: Count | None = None
    """Positions of each row whose logits are held at a time. null: 64, or on GPUs so many that a
    device's logits take 1 GiB."""
    eval_every: Natural = 40
    """Steps between validations; 0: only at the end."""
    eval_batches: Natural = 20
    """Batches in a validation; 0: all of them."""
    eval_texts: Natural = 64
    """translation: texts of each validation source that are translated, greedily, for BLEU and
    chrF; 0: none."""
    sample_prompt: str | None = None
    """Prompt of the sample shown at each validation; null: how the validation text begins; empty:
    no sample."""
    sample_tokens: Count = 48
    """Tokens in that sample."""
    max_nonfinite: Count = 10
    """Updates in a row skipped for a non-finite loss or gradient before the run stops."""

    def __post_init__(self):
        if self.batch_size % self.fewest_parts:
            raise UserError(
                f"train.batch_size={self.batch_size} is not a multiple of train.accumulation="
                f"{self.accumulation}: use an accumulation of "
                f"{nearest_divisor(self.batch_size, self.accumulation)}"
            )
        prompted = self.sample_prompt != "", "a train.sample_prompt"
        check_read("train", self, sample_tokens=prompted)

    @property
    def fewest_parts(self) -> int:
        """Micro-batches of an update, at least; `step.micro_batches` settles what is left open."""
        return self.accumulation or 1


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How work is spread over the mesh. Nothing here changes the numbers of an update."""

    microbatches: Count | None = None
    """pp: micro-batches streamed through the stages; null: two per stage where rows allow."""
    rounds: Count = 1
    """pp: stages that each device holds; above 1 the schedule is interleaved, with less bubble."""
    overlap: bool = True
    """NVIDIA: overlap collectives with compute by the XLA options listed in jaxlm/xla.py."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every_steps: Natural = 40
    """Steps between checkpoints; 0: only at the end (and when told to stop)."""
    every_minutes: Positive | None = None
    """Also save when this long has passed since the last checkpoint."""
    keep: Count = 3
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """What is written while training. metrics.jsonl and TensorBoard always are."""

    every_steps: Count = 1
    """Steps between looks at the device; every step still has its line in metrics.jsonl."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the extra jaxlm[wandb]); null: not used."""
    stall_minutes: Positive | None = 10.0
    """Print what every thread is doing when no step was finished for so long; null: never."""


# What has no meaning for an N-gram model: these fields of a section, or (none named) all but those
# of the sample.
NGRAM_UNREAD = {
    "data": ("weights", "seq_len", "prefetch"),
    "tokenizer": DROPOUT,
    "optim": (),
    "train": (),
    "parallel": (),
    "checkpoint": (),
    "log": ("every_steps", "stall_minutes"),
}

# What kinds of model a task can train.
KINDS = {
    "language_modelling": ("decoder", "rnn", "gru", "lstm", "ngram"),
    "translation": ("encoder_decoder", "rnn", "gru", "lstm"),
    "instruction": ("decoder", "rnn", "gru", "lstm"),
    "classification": ("encoder", "decoder"),
    "masked_language_modelling": ("encoder",),
}
# The settings of data that say where a source has what, and the tasks that read them.
COLUMNS = {
    "text_field": ("language_modelling", "classification", "masked_language_modelling"),
    "label_column": ("classification",),
    "source_column": ("translation", "instruction"),
    "target_column": ("translation", "instruction"),
    "language_column": ("translation",),
    "tsv_header": tuple(task for task in KINDS if task != "language_modelling"),
}


@dataclass(frozen=True, config=STRICT)
class Config:
    """One experiment."""

    task: Literal[
        "language_modelling",
        "translation",
        "instruction",
        "classification",
        "masked_language_modelling",
    ] = "language_modelling"
    """What is learnt: the next token of texts; a target text from a source text; the answers to
    prompts; a text's label; tokens of texts from what is around them."""
    mesh: str = "dp"
    """Devices by axis, such as dp4,tp2; one axis may be open (dp,tp2: dp takes what is left)."""
    out: PathText | None = None
    """Run folder; null: runs/NAME of the config file, or runs/default."""
    seed: Seed = 0
    """Seed of initialisation, data order and dropout."""
    init_from: PathText | None = None
    """A run or Hugging Face folder that training starts from: its parameters, and its model and
    tokenizer settings where no others are given; null: random parameters."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters alone; null: all parameters."""
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        parse_mesh(self.mesh)
        kinds = KINDS[self.task]
        if self.model.kind not in kinds:
            tasks = ", ".join(task for task in KINDS if self.model.kind in KINDS[task])
            presets = {"translation": "transformer-tiny", "masked_language_modelling": "bert-tiny"}
            preset = presets.get(self.task, "llama-tiny")
            raise UserError(
                f"task={self.task} cannot train model.kind={self.model.kind}: use one of the kinds "
                f"{', '.join(kinds)}, such as model.preset={preset}, or a task of that kind "
                f"({tasks})"
            )
        if self.lora is not None and (self.init_from is None or self.model.is_recurrent):
            raise UserError(
                f"lora adapts a Transformer that is there (init_from={show(self.init_from)}, "
                f"model.kind={self.model.kind}): set init_from to the run or the Hugging Face "
                "folder of one, or leave lora out"
            )
        if self.model.kind == "ngram":
            self._check_ngram()
        self._check_source()
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"data.seq_len={self.seq_len} is more than the model handles (model.max_seq_len="
                f"{self.model.max_seq_len}): lower it, or raise model.max_seq_len"
            )
        self._check_task()

    def _check_task(self) -> None:
        """Raise UserError for settings of data and loss that the task does not read."""

        def task(*tasks: str) -> tuple[bool, str]:
            return self.task in tasks, f"task={' or '.join(tasks)}"

        translation, classification = task("translation"), task("classification")
        check_read(
            "data",
            self.data,
            **{name: task(*tasks) for name, tasks in COLUMNS.items()},
            languages=translation,
            valid_languages=translation,
            source_len=translation,
        )
        masked = task("masked_language_modelling")
        check_read("train", self.train, class_weights=classification, mask_rate=masked)
        if masked[0]:
            words = False, f"a task other than {self.task}, which predicts tokens"
            check_read("model", self.model, labels=words)

    def _check_ngram(self):
        """N-grams are counted once, each as often as it occurs, by one process on its host."""
        other = False, "a model.kind other than ngram"
        if self.init_from is not None:
            raise UserError(
                f"init_from={self.init_from} has no effect with model.kind=ngram, which is counted "
                "afresh: leave it out"
            )
        for section, names in NGRAM_UNREAD.items():
            part = getattr(self, section)
            names = names or part.__dataclass_fields__.keys() - {"sample_prompt", "sample_tokens"}
            check_read(section, part, **dict.fromkeys(sorted(names), other))
        if any(size > 1 for size in parse_mesh(self.mesh).values()):
            raise UserError(
                f"mesh={self.mesh} has several devices, but n-grams are counted on the host: leave "
                "mesh out"
            )

    def _check_source(self):
        has_encoder, layers = self.model.reads_source, self.model.encoder_layers
        if has_encoder != (self.task == "translation"):
            right = "leave it out" if has_encoder else f"set it to {self.model.num_layers}"
            raise UserError(
                f"model.encoder_layers={show(layers)} does not fit task={self.task}, as an encoder "
                f"reads the source of a translation: {right}"
            )

    @property
    def seq_len(self) -> int:
        """Tokens in a training row, resolved."""
        return self.data.seq_len or self.model.max_seq_len

    @property
    def predicted(self) -> float:
        """Share of a row's tokens for which logits are computed."""
        return self.train.mask_rate if self.task == "masked_language_modelling" else 1.0

    @property
    def source_len(self) -> int:
        """translation: tokens on the source side of a row, resolved."""
        return self.data.source_len or self.seq_len

    @property
    def tokens_per_row(self) -> int:
        """Tokens in a training row, on both sides where there are two."""
        return self.seq_len + (self.source_len if self.task == "translation" else 0)
