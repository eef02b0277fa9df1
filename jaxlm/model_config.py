"""What a model is: the fields that span the families. Imports no JAX.

Every field's docstring is its line in `--help`; every default stands here and nowhere else.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from jaxlm.errors import UserError, check_read, nearest_divisor, needs, show
from jaxlm.model_parts import STRICT, ExpertsConfig, RopeScaling
from jaxlm.presets import PRESETS
from jaxlm.values import Count, Fraction, Natural, Positive, as_tuple

RECURRENT = "rnn", "gru", "lstm"


def _norm_name(value):
    """Runs of before OLMo 2 was known have true or false."""
    return ("none", "head")[value] if isinstance(value, bool) else value


# The only fields that have a meaning where nothing is learnt by gradients.
NGRAM_READS = ("preset", "kind", "vocab_size", "max_seq_len", "order")
# What a recurrent model reads; the rest is of Transformers.
RECURRENT_READS = {*NGRAM_READS, "d_model", "num_layers", "encoder_layers", "reverse_source"}
RECURRENT_READS |= {"source_attention", "tie_embeddings", "scale_logits", "logits_bias"}
RECURRENT_READS |= {"logit_softcap", "dropout", "recurrent_dropout", "word_dropout", "init_mean"}
RECURRENT_READS |= {"init_std", "dtype", "stack", "remat"}


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The model. One set of fields spans GPT-2, Llama, Qwen and Gemma, BERT, Marian and T5."""

    preset: str = "llama-tiny"
    """Where the other model fields start from; each can still be set."""
    kind: Literal["decoder", "encoder", "encoder_decoder", "rnn", "gru", "lstm", "ngram"] = (
        "decoder"
    )
    """A Transformer's decoder, encoder or both; a recurrent network; n-gram counts."""
    vocab_size: Count | None = None
    """Number of tokens; left out, it is the tokenizer's."""
    max_seq_len: Count = 256
    """The longest text the model handles, and, without data.seq_len, tokens in a training row."""
    order: Count = 5
    """ngram: tokens in the longest n-grams, the one predicted included."""
    d_model: Count = 192
    """Width of the residual stream."""
    num_layers: Count = 4
    """Number of Transformer blocks, in an encoder-decoder of its decoder."""
    encoder_layers: Count | None = None
    """Layers of the encoder; null: of an encoder_decoder as many as num_layers, and a recurrent
    model has no encoder."""
    reverse_source: bool = True
    """A recurrent encoder reads each source from its last token to its first (Sutskever et al.)."""
    source_attention: bool = False
    """A recurrent decoder attends to the encoder's outputs by dot products (Luong et al., 2015)."""
    num_heads: Count = 8
    """Query heads."""
    num_kv_heads: Count | None = 4
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: Count | None = None
    """Width of a head; null: d_model / num_heads."""
    d_ff: Count = 768
    """Width of the feed-forward layer."""
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu", "silu"] = "swiglu"
    """Feed-forward: gated by SiLU or GELU, or plain GELU (by a tanh, or exact), ReLU or SiLU."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in place of every feed-forward layer; null: dense layers."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the residual stream."""
    norm_eps: Positive = 1e-5
    """Added to the variance in every normalisation."""
    norm_offset: float = 0.0
    """Added to every RMSNorm scale (Gemma stores scale - 1 and sets 1)."""
    norm_bias: bool = False
    """LayerNorm has a bias."""
    norm_placement: Literal["pre", "post", "pre_post", "post_sum"] = "pre"
    """Before each sub-layer, after it (OLMo 2), before and after it (Gemma 2 and 3), or after its
    sum with the residual stream (Vaswani et al., BERT), which leaves no final norm to do."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the layer's input, and are added together (GPT-NeoX)."""
    qk_norm: Annotated[Literal["none", "head", "all"], BeforeValidator(_norm_name)] = "none"
    """RMSNorm on queries and keys: per head (Qwen 3, Gemma 3), or over all heads (OLMo 2)."""
    qkv_bias: bool = False
    """Bias on query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias in the feed-forward layer."""
    positions: Literal["rotary", "learned", "sinusoidal", "relative", "none"] = "rotary"
    """How the model knows positions; sinusoidal as in Vaswani et al., relative as in T5."""
    position_offset: Natural = 0
    """Rows of the table of learned positions before that of the first position (RoBERTa: 2)."""
    relative_buckets: Count = 32
    """Buckets of distances that have a bias each per head."""
    relative_max_distance: Count = 128
    """Distance from which on all share the last bucket."""
    rotary_fraction: Annotated[Positive, Field(le=1)] = 1.0
    """Share of a head's features that rotary positions turn, the first ones (GPT-NeoX, Phi-4)."""
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
    """Multiply embeddings by sqrt(d_model) (Gemma, Marian)."""
    embedding_norm: bool = False
    """Normalise the sum of embeddings (BERT)."""
    token_types: Natural = 0
    """Rows of a table of token types, of which the first is added to every embedding (BERT: 2)."""
    scale_logits: bool = False
    """Divide what a tied output head reads by sqrt(d_model) (T5)."""
    logits_bias: bool = False
    """Bias on the logits of the vocabulary (Marian)."""
    logit_softcap: Positive | None = None
    """Logits z become cap * tanh(z / cap) (Gemma 2)."""
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = None
    """Names of a classifier's labels: its head is theirs instead of the vocabulary's."""
    pooling: Literal["mean", "first", "last"] | None = None
    """What a classifier's head reads: the mean over a text's tokens, its first token's output, or,
    of a decoder, its last; null: mean of an encoder, last of a decoder."""
    pooler: bool = False
    """A layer with tanh between an encoder and its classifier's head (BERT, RoBERTa)."""
    dropout: Fraction = 0.0
    """Dropout after the embedding and after each sub-layer; in a recurrent model, on what each
    layer and the head read, with one mask for a whole text (Gal and Ghahramani, 2016)."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    recurrent_dropout: Fraction = 0.0
    """Dropout on what a recurrent layer's product reads of its state, as `dropout` is."""
    word_dropout: Fraction = 0.0
    """Dropout on words, on all that a text has of one at once (Gal and Ghahramani, 2016)."""
    init_mean: float = 0.0
    """Mean of the Gaussian that draws every matrix."""
    init_std: Positive = 0.02
    """Standard deviation of the Gaussian that draws every matrix."""
    scale_residual_init: bool = True
    """Divide that deviation by sqrt(2 num_layers) where a sub-layer ends (GPT-2)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type (parameters stay float32); auto: bfloat16 on GPU, float32 on CPU."""
    float8: bool = False
    """Multiply matrices of layers in float8 in training (NVIDIA Hopper, Ada and newer)."""
    attention: Literal["auto", "plain", "stored", "blocked", "xla", "cudnn"] = "auto"
    """Attention backend; auto picks the fastest that can do what is asked for."""
    stack: Literal["auto", "scan", "unroll"] = "auto"
    """Run layers by a scan (compiles quickly) or unrolled (runs faster); auto: few are unrolled."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""

    def __post_init__(self):
        self._check_read_by_kind()
        self._check_recurrent()
        if not self.is_recurrent:
            self._check_heads()
        self._check_attention()
        self._check_kind()
        rotary = needs("model", self, "positions", "rotary")
        relative = needs("model", self, "positions", "relative")
        local = "local" in self.layer_pattern, "a local layer in model.layer_pattern"
        shared = "global" in self.layer_pattern or self.rope_local_theta is None
        base = shared, "a global layer in model.layer_pattern"
        has_rmsnorm = self.norm == "rmsnorm" or self.qk_norm != "none"
        check_read(
            "model",
            self,
            norm_offset=(has_rmsnorm, "model.norm=rmsnorm"),
            norm_bias=needs("model", self, "norm", "layernorm"),
            rotary_fraction=rotary,
            rope_theta=base if rotary[0] else rotary,
            rope_scaling=base if rotary[0] else rotary,
            rope_local_theta=local if rotary[0] else rotary,
            sliding_window=local,
            position_offset=needs("model", self, "positions", "learned"),
            relative_buckets=relative,
            relative_max_distance=relative,
        )

    def _check_read_by_kind(self):
        """Raise UserError for a field of other kinds, where the model's reads few."""
        if self.is_transformer:
            return
        reads = RECURRENT_READS if self.is_recurrent else NGRAM_READS
        for key in sorted(self.__dataclass_fields__.keys() - {*reads}):
            value = getattr(self, key)
            if value == self.__dataclass_fields__[key].default:
                continue
            what, remedy = f"model.{key}={show(value)}", "leave it out"
            if PRESETS.get(self.preset, {}).get(key) == value:
                what += f", of model.preset={self.preset},"
                remedy = "leave the preset out"
            raise UserError(
                f"{what} is not read by model.kind={self.kind}: {remedy}, or use a Transformer "
                "such as model.kind=decoder"
            )

    def _check_recurrent(self):
        """What recurrent models alone read."""
        recurrent = needs("model", self, "kind", *RECURRENT)
        has_encoder = self.is_recurrent and self.reads_source
        encoder = has_encoder, "model.encoder_layers of a recurrent model"
        check_read(
            "model",
            self,
            recurrent_dropout=recurrent,
            reverse_source=encoder,
            source_attention=encoder,
        )
        if has_encoder and self.encoder_layers != self.num_layers:
            raise UserError(
                f"model.encoder_layers={self.encoder_layers} is not model.num_layers="
                f"{self.num_layers}, but the encoder's layers of model.kind={self.kind} hand their "
                "states to the decoder's: use the same number of both"
            )

    def _check_heads(self):
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
        if self.positions == "rotary" and (self.rotary_size % 2 or not self.rotary_size):
            raise UserError(
                f"model.head_dim={self.head_size} and model.rotary_fraction={self.rotary_fraction} "
                f"give {self.rotary_size} features to turn, but rotary positions turn pairs: make "
                "it an even number above 0, or use model.positions=learned"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise UserError(
                f"model.d_model={self.d_model} is odd, but sinusoidal positions are pairs of sines "
                "and cosines: make it even"
            )

    def _check_attention(self):
        if "local" in self.layer_pattern and self.sliding_window is None:
            raise UserError(
                "model.layer_pattern has local layers, but model.sliding_window is not set: "
                "give the number of tokens they see"
            )
        unsupported = self.attention_softcap or self.attention_dropout
        if self.attention in ("xla", "cudnn", "stored") and unsupported:
            raise UserError(
                f"model.attention={self.attention} supports neither attention_softcap nor "
                "attention_dropout: use model.attention=auto"
            )
        if self.attention == "blocked" and self.attention_dropout:
            raise UserError(
                "model.attention=blocked does not support attention_dropout: use "
                "model.attention=auto"
            )
        if self.attention in ("blocked", "stored", "cudnn") and self.positions == "relative":
            raise UserError(
                f"model.attention={self.attention} has no place for the biases of "
                "model.positions=relative: use model.attention=auto"
            )

    def _check_kind(self):
        """What only some kinds of model read."""
        logits = self.kind != "encoder", "a model.kind with a head over the vocabulary"
        tied = self.tie_embeddings, "model.tie_embeddings=true"
        both = needs("model", self, "kind", "encoder_decoder")
        alone = needs("model", self, "kind", "decoder")
        encoder = needs("model", self, "kind", "encoder")
        has_stack = needs("model", self, "kind", "decoder", "encoder")
        check_read(
            "model",
            self,
            encoder_layers=needs("model", self, "kind", "encoder_decoder", *RECURRENT),
            layer_pattern=alone,
            experts=has_stack,
            float8=(self.experts is None, "dense layers (model.experts=null)"),
            parallel_residual=has_stack,
            labels=has_stack,
            pooling=has_stack,
            pooler=encoder,
            token_types=encoder,
            tie_embeddings=logits,
            logits_bias=logits,
            logit_softcap=logits,
            scale_logits=tied if logits[0] else logits,
            order=needs("model", self, "kind", "ngram"),
        )
        if self.labels is not None and len({*self.labels}) < max(2, len(self.labels)):
            raise UserError(
                f"model.labels={show(self.labels)} does not name two different labels: give "
                "each label once"
            )
        if self.positions == "relative" and not both[0]:
            raise UserError(
                f"model.positions=relative has no effect without {both[1]}: use rotary or learned"
            )
        if self.norm_placement == "post_sum" and self.parallel_residual:
            raise UserError(
                "model.parallel_residual=true has no sum to normalise after each sub-layer, as "
                "model.norm_placement=post_sum asks: set norm_placement=pre"
            )
        fitting = ("last",) if self.kind == "decoder" else ("mean", "first")
        if self.pooling is not None and self.pooling not in fitting:
            raise UserError(
                f"model.pooling={self.pooling} does not fit model.kind={self.kind}: use "
                f"{' or '.join(fitting)}"
            )

    @property
    def pools(self) -> str:
        """What a classifier's head reads, resolved: mean, first or last."""
        return self.pooling or ("last" if self.kind == "decoder" else "mean")

    @property
    def source_layers(self) -> int:
        """Layers of an encoder_decoder's encoder, resolved."""
        return self.encoder_layers or self.num_layers

    @property
    def is_recurrent(self) -> bool:
        """Whether layers step through a text with a state, instead of attending to it."""
        return self.kind in RECURRENT

    @property
    def is_transformer(self) -> bool:
        """Whether layers attend to a text, of which they can then read `max_seq_len` tokens."""
        return not self.is_recurrent and self.kind != "ngram"

    @property
    def reads_source(self) -> bool:
        """Whether the model is of a target text from a source text."""
        has_encoder = self.is_recurrent and self.encoder_layers is not None
        return has_encoder or self.kind == "encoder_decoder"

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        rates = self.dropout, self.attention_dropout, self.recurrent_dropout, self.word_dropout
        return any(rates)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head, resolved."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Features of a head that rotary positions turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer's hidden units are multiplied by a gate."""
        return self.mlp in ("swiglu", "geglu")
