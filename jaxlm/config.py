"""One experiment as frozen dataclasses. Imports no JAX, so that reading a config is instant.

Every field's docstring is its line in `--help`; every default stands here and nowhere else.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from jaxlm.axes import parse_mesh
from jaxlm.errors import UserError, check_read, nearest_divisor, needs
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
    as_tuple,
)

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, config=STRICT)
class RopeScaling:
    """How rotary frequencies are stretched to contexts longer than those first trained on."""

    kind: Literal["linear", "llama3"] = "linear"
    """`linear` divides every frequency by `factor`; `llama3` only the low ones, with a ramp."""
    factor: Positive = 1.0
    """By how much low frequencies are divided."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above original_max_seq_len / this are divided in full."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below original_max_seq_len / this are left alone."""
    original_max_seq_len: Count = 8192
    """llama3: the context length before scaling."""

    def __post_init__(self):
        llama3 = needs("model.rope_scaling", self, "kind", "llama3")
        check_read(
            "model.rope_scaling",
            self,
            low_freq_factor=llama3,
            high_freq_factor=llama3,
            original_max_seq_len=llama3,
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}: raise it, or lower the other"
            )


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The decoder. One set of fields spans GPT-2, Llama, Mistral, Qwen and Gemma."""

    preset: str = "llama-tiny"
    """Where the other model fields start from; each can still be set."""
    vocab_size: Count | None = None
    """Number of tokens; left out, it is the tokenizer's."""
    max_seq_len: Count = 256
    """Tokens in a training row, and the longest text the model handles."""
    d_model: Count = 192
    """Width of the residual stream."""
    num_layers: Count = 4
    """Number of Transformer blocks."""
    num_heads: Count = 8
    """Query heads."""
    num_kv_heads: Count | None = 4
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: Count | None = None
    """Width of a head; null: d_model / num_heads."""
    d_ff: Count = 768
    """Width of the feed-forward layer."""
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Feed-forward: gated by SiLU, gated by GELU, or plain GELU (tanh approximation)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the residual stream."""
    norm_eps: Positive = 1e-5
    """Added to the variance in every normalisation."""
    norm_offset: float = 0.0
    """Added to every RMSNorm scale (Gemma stores scale - 1 and sets 1)."""
    norm_bias: bool = False
    """LayerNorm has a bias."""
    norm_placement: Literal["pre", "pre_post"] = "pre"
    """Before each sub-layer, or before and after it (Gemma 2 and 3)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen 3, Gemma 3)."""
    qkv_bias: bool = False
    """Bias on query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias in the feed-forward layer."""
    positions: Literal["rotary", "learned", "none"] = "rotary"
    """How the model knows positions."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies, except where rope_local_theta sets them."""
    rope_local_theta: Positive | None = None
    """Base of the rotary frequencies in local layers; null: rope_theta."""
    attention_scale: Positive | None = None
    """Factor on the attention scores; null: head_dim ** -0.5."""
    attention_softcap: Positive | None = None
    """Attention scores s become cap * tanh(s / cap) (Gemma 2)."""
    sliding_window: Count | None = None
    """Tokens a local layer sees, itself included."""
    layer_pattern: Annotated[
        tuple[Literal["global", "local"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("global",)
    """Repeated over the layers; local layers attend within sliding_window."""
    tie_embeddings: bool = True
    """The output head is the embedding matrix."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(d_model) (Gemma)."""
    logit_softcap: Positive | None = None
    """Logits z become cap * tanh(z / cap) (Gemma 2)."""
    dropout: Fraction = 0.0
    """Dropout after the embedding and after each sub-layer."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    init_mean: float = 0.0
    """Mean of the Gaussian that draws every matrix."""
    init_std: Positive = 0.02
    """Standard deviation of the Gaussian that draws every matrix."""
    scale_residual_init: bool = True
    """Divide that deviation by sqrt(2 num_layers) where a sub-layer ends (GPT-2)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type (parameters stay float32); auto: bfloat16 on GPU, float32 on CPU."""
    attention: Literal["auto", "plain", "xla", "cudnn"] = "auto"
    """Attention backend; auto picks the fastest that honours the mask."""
    stack: Literal["scan", "unroll"] = "scan"
    """Run layers by a scan (compiles quickly) or unrolled (runs faster)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""

    def __post_init__(self):
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"model.d_model={self.d_model} is not a multiple of model.num_heads="
                f"{self.num_heads}: change one of them, or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads="
                f"{self.kv_heads}: use {nearest_divisor(self.num_heads, self.kv_heads)}"
                " key/value heads"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(
                f"model.head_dim={self.head_size} is odd, but rotary positions turn pairs of "
                "features: use an even head_dim, or model.positions=learned"
            )
        if "local" in self.layer_pattern and self.sliding_window is None:
            raise UserError(
                "model.layer_pattern has local layers, but model.sliding_window is not set: "
                "give the number of tokens they see"
            )
        unsupported = self.attention_softcap or self.attention_dropout
        if self.attention in ("xla", "cudnn") and unsupported:
            raise UserError(
                f"model.attention={self.attention} supports neither attention_softcap nor "
                "attention_dropout: use model.attention=auto"
            )
        rotary = needs("model", self, "positions", "rotary")
        local = "local" in self.layer_pattern, "a local layer in model.layer_pattern"
        shared = "global" in self.layer_pattern or self.rope_local_theta is None
        base = shared, "a global layer in model.layer_pattern"
        has_rmsnorm = self.norm == "rmsnorm" or self.qk_norm
        check_read(
            "model",
            self,
            norm_offset=(has_rmsnorm, "model.norm=rmsnorm"),
            norm_bias=needs("model", self, "norm", "layernorm"),
            rope_theta=base if rotary[0] else rotary,
            rope_scaling=base if rotary[0] else rotary,
            rope_local_theta=local if rotary[0] else rotary,
            sliding_window=local,
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head, resolved."""
        return self.head_dim or self.d_model // self.num_heads


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    train: Names = ("stdlib",)
    """Files, folders, globs, .jsonl[.gz|.zst], .parquet, hf:NAME[@CONFIG][:SPLIT], or stdlib."""
    weights: Weights | None = None
    """Share of rows drawn from each training source; null: by their size."""
    valid: Names = ()
    """Validation text, in the same forms; empty: documents held out of the training text."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents held out (by a hash of the text) where data.valid is empty."""
    text_field: str = "text"
    """The field that holds the text in JSON lines, Parquet and datasets."""
    on_bad: Literal["skip", "error"] = "skip"
    """Invalid UTF-8: skip the document and count it, or stop."""
    cache: str | None = None
    """Folder of token files; null: the user's cache folder ($XDG_CACHE_HOME/jaxlm)."""
    workers: Natural = 0
    """Threads that tokenise; 0: one per core."""
    prefetch: Count = 4
    """Batches read ahead of the step."""

    def __post_init__(self):
        if not self.train:
            raise UserError("data.train is empty: name at least one source, such as stdlib")
        if self.weights is not None and len(self.weights) != len(self.train):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {len(self.train)} sources in "
                "data.train: give one for each"
            )
        elsewhere = {*self.train, *self.valid} != {"stdlib"}
        check_read(
            "data",
            self,
            valid_fraction=(not self.valid, "an empty data.valid"),
            text_field=(elsewhere, "a source other than stdlib"),
        )


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bpe", "unigram", "file"] = "bpe"
    """Train SentencePiece BPE (byte fallback) or unigram on the training text, or load a file."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    """Tokens to learn."""
    path: PathText | None = None
    """kind=file: a SentencePiece .model or a Hugging Face tokenizer.json."""
    training_mb: Count = 8
    """Megabytes of text, sampled evenly, that the tokenizer is trained on."""

    def __post_init__(self):
        if self.kind == "file" and self.path is None:
            raise UserError("tokenizer.kind=file needs tokenizer.path: a .model or tokenizer.json")
        file = needs("tokenizer", self, "kind", "file")
        learned = needs("tokenizer", self, "kind", "bpe", "unigram")
        check_read("tokenizer", self, path=file, vocab_size=learned, training_mb=learned)


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
class TrainConfig:
    """The loop."""

    steps: Count = 80
    """Updates in all."""
    batch_size: Count = 8
    """Global rows per update, whatever the mesh."""
    accumulation: Count = 1
    """Micro-batches an update is computed in; the update is that of the whole batch."""
    z_loss: NonNegative = 0.0
    """Weight of log(Z)^2 in the loss (PaLM: 1e-4)."""
    loss_block: Count = 64
    """Positions of each row whose logits are held at a time."""
    eval_every: Natural = 40
    """Steps between validations; 0: only at the end."""
    eval_batches: Natural = 20
    """Batches in a validation; 0: all of them."""
    sample_prompt: str = "def "
    """Prompt of the sample shown at each validation; empty: no sample."""
    sample_tokens: Count = 48
    """Tokens in that sample."""
    max_nonfinite: Count = 10
    """Updates in a row skipped for a non-finite loss or gradient before the run stops."""

    def __post_init__(self):
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size={self.batch_size} is not a multiple of train.accumulation="
                f"{self.accumulation}: use an accumulation of "
                f"{nearest_divisor(self.batch_size, self.accumulation)}"
            )
        prompted = self.sample_prompt != "", "a train.sample_prompt"
        check_read("train", self, sample_tokens=prompted)


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


@dataclass(frozen=True, config=STRICT)
class Config:
    """One experiment."""

    mesh: str = "dp"
    """Devices by axis, such as dp4,tp2; one axis may be open (dp,tp2: dp takes what is left)."""
    out: PathText | None = None
    """Run folder; null: runs/NAME of the config file, or runs/default."""
    seed: Seed = 0
    """Seed of initialisation, data order and dropout."""
    init_from: PathText | None = None
    """A run folder whose parameters training starts from; null: random."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        parse_mesh(self.mesh)
