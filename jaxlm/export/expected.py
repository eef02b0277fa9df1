"""What a model itself computes, for another stack to be compared with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.beam import Beams, Hypothesis
from jaxlm.decode import build_decode_program
from jaxlm.errors import UserError
from jaxlm.export.model import Model, Use
from jaxlm.mesh import make_mesh
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.models.head import head_logits
from jaxlm.nn.attention import Places, Source
from jaxlm.sampling import Sampling

NEW_TOKENS = 12
NUM_BEAMS = 3
PROMPT_TOKENS = 40
LONGEST_WINDOW = 512
TEXTS = (
    "Once upon a time there was a model, and it had to be the same everywhere.",
    "def f(x):\n\tif x <= 0:\n\t    return None  # nothing\n\treturn {'a': [x ** 2, 1e-5]}\n",
    "大型语言模型与并行计算。今天天气很好！",
    "emoji 😀👩‍👩‍👧‍👦 and accents: naïve façade, e\u0301, Ünïcödé",
    "  two spaces, \t a tab,\r\n\r\na line of Windows   and   gaps  ",
    "<s> not a token </s> <|endoftext|> [INST] \u2581 0123456789 3.14159",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते",
    "",
)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the model itself computes."""

    prompts: list[list[int]]
    """What is read: texts, or, where there are sources, beginnings of targets."""
    greedy: list[list[int]]
    """Continuations; none of a model that only reads."""
    logits: list[np.ndarray]
    """[tokens of prompt and continuation, V] float32; of a classifier [1, labels], of an encoder
    [tokens, D], its output."""
    ids: list[list[int]]
    """Of each of TEXTS."""
    use: Use = "language_model"
    sources: list[list[int]] = dataclasses.field(default_factory=list)
    beams: list[Hypothesis] = dataclasses.field(default_factory=list)
    """The best text that a beam search finds for each source."""
    end: int | None = None
    """The id that ends such a text."""

    @property
    def what(self) -> str:
        """What `logits` are called."""
        return "outputs" if self.use == "encoder" else "logits"


def expected_of(model: Model, dtype: str | None) -> Expected:
    """Run the model on prompts of its own, in float32, its weights rounded to `dtype` first.

    Raises UserError where its logits are not finite.
    """
    config = dataclasses.replace(
        model.config, dtype="float32", attention="plain", dropout=0.0, attention_dropout=0.0
    )
    params = model.params
    if dtype is not None:
        # By NumPy, as they are written.
        round_ = lambda x: jnp.asarray(np.asarray(x).astype(dtype).astype(x.dtype))  # noqa: E731
        params = jax.tree.map(round_, params)
    ids = [[*model.prefix, *model.tokenizer.source.encode(text), *model.suffix] for text in TEXTS]
    run = _read if model.use in ("classifier", "encoder") else _continue
    with jax.default_matmul_precision("highest"):
        expected = run(model, config, params, ids)
    if not all(np.isfinite(values).all() for values in expected.logits):
        rounded = "" if dtype is None else f" once its weights are rounded to {dtype}"
        raise UserError(
            f"the model computes numbers that are not finite{rounded}, so that nothing can be "
            "compared: export another step, or another dtype"
        )
    return expected


def _read(model: Model, config: ModelConfig, params, ids: list[list[int]]) -> Expected:
    """Of a model that only reads: label logits where its head reads, or an encoder's output."""
    built = make_model(config)
    rows = _prompts(config, ids, config.max_seq_len)
    if config.labels is None:
        outputs = _outputs(built, params, rows, lambda hidden, read: hidden)
        return Expected(rows, [], outputs, ids, "encoder")

    def label_logits(hidden_btd, read):
        logits = head_logits(config, built.dtype, params, hidden_btd)
        return jax.lax.dynamic_slice_in_dim(logits, read, 1, axis=1)

    at_last = config.pools == "last"
    logits = _outputs(built, params, rows, label_logits, at_last)
    return Expected(rows, [], logits, ids, "classifier")


def _continue(model: Model, config: ModelConfig, params, ids: list[list[int]]) -> Expected:
    """Of a model that writes: logits and continuations of texts, or of targets of sources."""
    built, tokenizer = make_model(config), model.tokenizer
    program = build_decode_program(built, make_mesh("dp1"))
    prepared = program.prepare(params)
    start, sources = model.prefix or [tokenizer.bos_id], None
    if config.kind == "encoder_decoder":
        start = [tokenizer.bos_id]
        sources = _prompts(config, ids, config.max_seq_len)
    texts = [start + tokenizer.encode(text) for text in TEXTS]
    prompts = _prompts(config, texts, max(config.max_seq_len - NEW_TOKENS, 1))
    if sources is not None:  # transformers starts every target alike
        prompts = [start + prompt[1:] for prompt in prompts]
    (greedy,) = program.generate(
        prepared,
        prompts,
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=0.0),
        eos_id=None,
        sources=sources,
    )
    rows = [prompt + new for prompt, new in zip(prompts, greedy, strict=True)]
    logits = _outputs(
        built, params, rows, lambda hidden, read: built.logits(params, hidden), sources=sources
    )
    if sources is None:
        return Expected(prompts, greedy, logits, ids)
    found = program.beam_search(
        prepared,
        [start] * len(sources),
        max_new_tokens=NEW_TOKENS,
        beams=Beams(NUM_BEAMS),
        eos_id=tokenizer.eos_id,
        sources=sources,
    )
    best = [row[0] for row in found]
    return Expected(prompts, greedy, logits, ids, "translator", sources, best, tokenizer.eos_id)


def _outputs(model, params, rows, finish, at_last=False, sources=None) -> list[np.ndarray]:
    """What `finish` makes of the hidden states of each row and the place that a head reads.

    One row at a time: a vocabulary is large.
    """

    @jax.jit
    def run(params, tokens, length, source):
        columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        places = Places(columns, (columns < length).astype(jnp.int32))
        hidden, *_ = model.hidden(params, tokens, places, source=source)
        return finish(hidden, length - 1 if at_last else 0)[0]

    longest = max(map(len, rows))
    results = []
    for i, row in enumerate(rows):
        source = None if sources is None else _source(sources[i], max(map(len, sources)))
        values = run(params, _padded(row, longest), np.int32(len(row)), source)
        results.append(np.asarray(values)[: len(row)])
    return results


def _source(ids: list[int], longest: int) -> Source:
    columns = np.arange(longest, dtype=np.int32)[None]
    return Source(_padded(ids, longest), Places(columns, (columns < len(ids)).astype(np.int32)))


def _padded(row: list[int], longest: int) -> np.ndarray:
    return np.array([row + [0] * (longest - len(row))], np.int32)


def _prompts(config: ModelConfig, encoded: list[list[int]], room: int) -> list[list[int]]:
    """Beginnings of texts, and random tokens past a window or to where context ends."""
    prompts = [ids[: min(PROMPT_TOKENS, room)] for ids in encoded[:4]]
    window = config.sliding_window or 0
    longer = window + 16 if window <= LONGEST_WINDOW else 0
    draw = np.random.default_rng(0).integers(0, config.vocab_size, max(64, longer))
    return [*prompts, draw[:room].tolist()]
