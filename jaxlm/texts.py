"""What a loaded model does with texts: `generate`, `translate`, `chat`, `score`, `classify`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from jaxlm.api import LanguageModel, load
from jaxlm.beam import Beams
from jaxlm.continuing import ROWS_AT_ONCE, Row, continue_rows, make_settings, stream_row
from jaxlm.errors import UserError
from jaxlm.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Score:
    """log P(w1..wn) of a text by the chain rule."""

    logprob: float
    """Natural logarithm of the text's probability: the sum of `token_logprobs`."""
    token_logprobs: list[float]
    """log P(token | those before), one per token after the first."""
    tokens: list[int]
    """The text's token ids, the first of them beginning-of-text."""


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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
):
    """Continue texts. A string gives a string, a list a list: the continuation alone.

    `temperature=0` takes the likeliest token each time. `num_samples` above 1 gives a list for
    each prompt. `stop` ends a text before any of these strings. `stream=True` takes one prompt and
    gives an iterator of pieces of text, never half a character. A text also ends where the model
    says so, after `max_new_tokens`, and at the model's `max_seq_len`.

    `num_beams` above 1 searches for likely texts instead of sampling; `length_penalty` and
    `early_stopping` are those of `beam.Beams`, and `num_samples` is how many of the best to give.

    The same seed gives the same random numbers whatever the mesh and the other prompts. `mesh`
    goes with a path. Raises UserError for settings out of range and a prompt that leaves no room.
    """
    settings = make_settings(
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        Beams(num_beams, length_penalty, early_stopping),
        [] if stop is None else _as_list(stop, "stop")[0],
        max_new_tokens=max_new_tokens,
        seed=seed,
        num_samples=num_samples,
    )
    prompts, single = _as_list(prompts, "prompts")
    if stream and not (single and num_samples == num_beams == 1):
        raise UserError("stream=True takes one prompt (a string), num_samples=1 and num_beams=1")
    model = _as_model(model, mesh)
    rows = [_row(model, prompt) for prompt in prompts]
    if stream:
        return stream_row(model, rows[0], settings)
    out = continue_rows(model, rows, settings)
    if num_samples == 1:
        out = [texts[0] for texts in out]
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


def _row(model: LanguageModel, text: str) -> Row:
    """What a model reads of a prompt. Raises UserError where that leaves no room."""
    ids = [*model.prefix, *model.tokenizer.encode(text)] or [model.tokenizer.bos_id]
    longest = model.config.model.max_seq_len
    if len(ids) >= longest:
        raise UserError(
            f"the prompt {text[:30]!r}... has {len(ids)} tokens and leaves no room for new ones: "
            f"the model handles {longest} (model.max_seq_len) in all; shorten it"
        )
    return Row(ids)
