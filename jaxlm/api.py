"""jaxlm from one's own code: `load`, `generate`, `score`, `export_checkpoint`."""

import codecs
import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.decode import DecodeProgram, Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.export import family_of
from jaxlm.export.exporter import check_target, export_model
from jaxlm.export.huggingface import is_model_folder, read_settings
from jaxlm.export.safetensors import read_tensors
from jaxlm.export.verify import TRANSFORMERS, Verification, expected_of, verify
from jaxlm.loading import find_model, load_params, read_description, read_model
from jaxlm.mesh import folded_mesh, make_mesh
from jaxlm.models.build import make_model
from jaxlm.sharding import check_fits
from jaxlm.tokenizer import Tokenizer
from jaxlm.values import MAX_SEED

ROWS_AT_ONCE = 64
STOP_CHECK_TOKENS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A trained model on a mesh, ready to generate and score. Made by `load`."""

    config: Config
    tokenizer: Tokenizer
    program: DecodeProgram
    params: object
    """In the form `program` takes."""
    prefix: tuple[int, ...]
    """Ids that a text starts with: beginning-of-text, unless the model was trained without."""
    source: Path
    """The folder the parameters are from: a run's step or a Hugging Face folder."""

    @property
    def step(self) -> int:
        """The update the parameters are from; 0 for a Hugging Face folder."""
        return 0 if is_model_folder(self.source) else int(self.source.name.rpartition("_")[2])


@dataclasses.dataclass(frozen=True)
class Score:
    """log P(w1..wn) of a text by the chain rule."""

    logprob: float
    """Natural logarithm of the text's probability: the sum of `token_logprobs`."""
    token_logprobs: list[float]
    """log P(token | those before), one per token after the first."""
    tokens: list[int]
    """The text's token ids, the first of them beginning-of-text."""


def load(path: str | Path, mesh: str | Mesh | None = None, dtype: str | None = None):
    """Load a run folder (its newest sound checkpoint), one of its step folders, or a folder of
    Hugging Face transformers (config.json, safetensors, tokenizer).

    `mesh` is a text such as `"dp2,tp2"` or a Mesh; None is one device. `dtype` ("float32" or
    "bfloat16") is the compute type; None is the run's. Where the run kept an exponential moving
    average of its parameters, that is what is loaded. Raises UserError for a path that holds no
    model, and for a damaged checkpoint.
    """
    if not isinstance(path, str | Path) or not isinstance(mesh, str | Mesh | None):
        raise UserError(f"load({path!r}, mesh={mesh!r}): give a path, and a mesh such as 'dp2,tp2'")
    folder = find_model(path)
    config, tokenizer, prefix = read_description(folder)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype!r} is not known: use 'float32' or 'bfloat16'")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    mesh = folded_mesh(mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "dp1"))
    check_fits(config, mesh, training=False)
    program = build_decode_program(make_model(config.model), mesh)
    params = program.prepare(load_params(folder, make_model(config.model), mesh))
    return LanguageModel(config, tokenizer, program, params, tuple(prefix), folder)


def export_checkpoint(
    model: LanguageModel | str | Path,
    to: str = "hf",
    out: str | Path = "exported",
    *,
    dtype: str = "float32",
    family: str | None = None,
    step: str | int = "last",
    average: bool = True,
    shard_gb: float | None = None,
    skip_verification: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Write a model into the new folder `out` for another stack, and verify it there.

    `model` is a run folder, one of its steps, a Hugging Face folder, or a loaded model, whose
    folder is read again. `to` is "hf" (transformers, vLLM, ...), "gguf" (llama.cpp) or
    "stablehlo". `dtype` is that of the weights: "float32", "bfloat16", "float16" or, for GGUF,
    "q8_0". `family` names one of transformers' model types where several can express the model.
    `step` is "last", "best" or a number, `average` takes the moving average of the parameters where
    the run kept one, and a file of "hf" weights has at most `shard_gb` gigabytes (5). `say` gets
    lines of progress.

    Returns how the written model compares; `verified` is false only where the other stack is not
    installed or `skip_verification` is set. Raises UserError where it cannot be written, and,
    leaving nothing behind, where it computes something else there.
    """
    out = Path(out).expanduser()
    check_target(to, dtype, out, family, shard_gb)
    folder = model.source if isinstance(model, LanguageModel) else model
    source = read_model(find_model(folder, str(step)), average)
    return export_model(
        source,
        to,
        out,
        dtype=dtype,
        family=family,
        shard_gb=shard_gb,
        skip=skip_verification,
        say=say,
    )


def check_import(folder: Path, say: Callable[[str], None]) -> Verification:
    """Verify that a Hugging Face folder computes the same here, and comes back byte for byte.

    Raises UserError where it does not.
    """
    settings = read_settings(folder)
    family = family_of(settings)
    say(f"reading {folder} ({settings['model_type']})")
    model = read_model(folder)
    tensors = family.canonical(read_tensors(folder), model.config)
    for name, values in family.to_theirs(model.params, model.config):
        if values.astype(tensors[name].dtype).tobytes() != tensors[name].tobytes():
            raise UserError(f"tensor {name} of {folder} does not come back as it was")
    say(f"all {len(tensors)} tensors come back byte for byte; comparing with transformers")
    # What spells a special token is text here, and there only if asked.
    plain = {"split_special_tokens": True}
    report = verify(TRANSFORMERS, model, folder, "float32", expected_of(model, None), plain)
    if not report.verified and report.prompts:
        raise UserError(f"{folder} computes something else here: {report.reason}")
    return report


def generate(
    model: LanguageModel | str | Path,
    prompts: str | Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    num_samples: int = 1,
    stream: bool = False,
    mesh: str | Mesh | None = None,
):
    """Continue texts. A string gives a string, a list a list: the continuation alone.

    `temperature=0` takes the likeliest token each time. `num_samples` above 1 gives a list for
    each prompt. `stop` ends a text before any of these strings. `stream=True` takes one prompt and
    gives an iterator of pieces of text, never half a character. A text also ends where the model
    says so, after `max_new_tokens`, and at the model's `max_seq_len`.

    The same seed gives the same random numbers whatever the mesh and the other prompts. `mesh`
    goes with a path. Raises UserError for settings out of range and a prompt that leaves no room.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_settings(sampling, max_new_tokens=max_new_tokens, num_samples=num_samples, seed=seed)
    stops = [] if stop is None else _as_list(stop, "stop")[0]
    if "" in stops:
        raise UserError("stop holds an empty string, which would end every text at once: drop it")
    texts, single = _as_list(prompts, "prompts")
    if stream and (not single or num_samples != 1):
        raise UserError("stream=True takes one prompt (a string) and num_samples=1")
    model = _as_model(model, mesh)
    encoded = [_encode_prompt(model, text) for text in texts]
    options = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "eos_id": model.tokenizer.eos_id,
        "seed": seed,
    }
    if stream:
        return _stream(model, encoded[0], stops, options)
    rows = [row for row in encoded for _ in range(num_samples)]
    sample_ids = [i for _ in encoded for i in range(num_samples)]
    out: list[str] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        out += _continue(model, rows[part], sample_ids[part], stops, options)
    if num_samples > 1:
        out = [out[i : i + num_samples] for i in range(0, len(out), num_samples)]
    return out[0] if single else out


def score(model: LanguageModel | str | Path, texts: str | Sequence[str], mesh=None):
    """log P(w1..wn) of each text; a string gives a `Score`, a list a list of them.

    Texts are tokenised as in training, beginning-of-text first. Raises UserError for a text
    longer than the model's `max_seq_len`.
    """
    texts, single = _as_list(texts, "texts")
    model = _as_model(model, mesh)
    longest = model.config.model.max_seq_len
    rows = [[model.tokenizer.bos_id, *ids] for ids in model.tokenizer.encode_batch(texts)]
    for i, row in enumerate(rows):
        if len(row) > longest + 1:
            raise UserError(
                f"text {i} has {len(row)} tokens, but the model was built for {longest} "
                "(model.max_seq_len): split it"
            )
    scores: list[Score] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        for row, logprobs in zip(part, model.program.score(model.params, part), strict=True):
            total = float(np.sum(logprobs, dtype=np.float64))
            scores.append(Score(total, [float(x) for x in logprobs], row))
    return scores[0] if single else scores


def _as_model(model, mesh) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        return load(model, mesh=mesh)
    if mesh is not None:
        raise UserError("mesh is for a path: a loaded model has its mesh, give it to jaxlm.load")
    return model


def _as_list(texts, name: str) -> tuple[list[str], bool]:
    single = isinstance(texts, str)
    if not single and not isinstance(texts, Sequence):
        raise UserError(f"{name} is {texts!r}: give a string or a list of strings")
    texts = [texts] if single else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{i}] is {text!r}: give strings")
    return texts, single


def _check_settings(sampling: Sampling, **counts: int) -> None:
    """Raise UserError for a setting of the wrong type or out of range."""
    limits = (
        ("temperature", sampling.temperature, numbers.Real, 0, math.inf, "0 or more"),
        ("top_k", sampling.top_k, numbers.Integral, 1, math.inf, "a whole number above 0"),
        ("top_p", sampling.top_p, numbers.Real, 1e-9, 1, "above 0 and at most 1"),
        ("min_p", sampling.min_p, numbers.Real, 0, 1, "from 0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, numbers.Real, 1e-9, 1e9, "above 0"),
        *(
            (name, n, numbers.Integral, int(name != "seed"), MAX_SEED, "a whole number")
            for name, n in counts.items()
        ),
    )
    optional = ("top_k", "top_p", "min_p")
    for name, value, kind, low, high, wanted in limits:
        if value is None and name in optional:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == math.inf:
            above = f" from {low} to {high}" if name in counts else ""
            raise UserError(f"{name}={value!r} is out of range: it should be {wanted}{above}")


def _encode_prompt(model: LanguageModel, text: str) -> list[int]:
    ids = [*model.prefix, *model.tokenizer.encode(text)] or [model.tokenizer.bos_id]
    longest = model.config.model.max_seq_len
    if len(ids) >= longest:
        raise UserError(
            f"the prompt {text[:30]!r}... has {len(ids)} tokens and leaves no room for new ones: "
            f"the model handles {longest} (model.max_seq_len) in all; shorten it"
        )
    return ids


def _continue(model, rows, sample_ids, stops, options) -> list[str]:
    def stopped(tokens):
        return _cut(_text(model, tokens), stops)[1]

    chunks = model.program.generate(
        model.params,
        rows,
        sample_ids=sample_ids,
        chunk=STOP_CHECK_TOKENS if stops else None,
        stopped=stopped if stops else lambda tokens: False,
        **options,
    )
    *_, tokens = chunks
    return [_cut(_text(model, row), stops)[0] for row in tokens]


def _stream(model, row, stops, options) -> Iterator[str]:
    """Pieces of the continuation. What may be half a character or half a stop string waits."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, given, read = "", 0, 0
    for (tokens,) in model.program.generate(model.params, [row], chunk=1, **options):
        text += decoder.decode(model.tokenizer.decode_bytes(tokens[read:]))
        read = len(tokens)
        whole, ended = _cut(text, stops)
        sure = len(whole) if ended else len(text) - _possible_stop(text, stops)
        if sure > given:
            yield text[given:sure]
            given = sure
        if ended:
            return
    text, _ = _cut(text + decoder.decode(b"", final=True), stops)
    if len(text) > given:
        yield text[given:]


def _text(model: LanguageModel, tokens: list[int]) -> str:
    # Not `decode`, which takes away the space some tokenizers put before a text's first word.
    return model.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _possible_stop(text: str, stops: list[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
