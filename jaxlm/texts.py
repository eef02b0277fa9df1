"""What a loaded model does with texts: `generate`, `translate`, `chat`, `score`, `classify`."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from jaxlm.api import LanguageModel, load
from jaxlm.beam import Beams
from jaxlm.chat import Message, encode_prompt, turn_end
from jaxlm.continuing import ROWS_AT_ONCE, Row, Settings, continue_rows, make_settings, stream_row
from jaxlm.data.forms import counted
from jaxlm.data.records import BadRecord
from jaxlm.errors import UserError
from jaxlm.sampling import Sampling
from jaxlm.tasks.classification import encode_texts
from jaxlm.tasks.instruction import read_messages
from jaxlm.tasks.translation import encode_sources, languages_of, unknown_language

Conversation = Sequence[Mapping[str, str]]
"""Messages: `{"role": "system", "user" or "assistant", "content": ...}` each."""


NEW_TOKENS = 128
"""That a text is continued by, unless it is told."""


@dataclasses.dataclass(frozen=True)
class Score:
    """log P(w1..wn) of a text by the chain rule; of a translation, log P(target | source)."""

    logprob: float
    """Natural logarithm of the text's probability: the sum of `token_logprobs`."""
    token_logprobs: list[float]
    """log P(token | those before), one per token after the first."""
    tokens: list[int]
    """The text's token ids, one more than `token_logprobs`: the first of them is what every text
    starts with. Of a translation the last is end-of-text."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """What a classifier says of a text."""

    label: str
    """The likeliest label."""
    probabilities: dict[str, float]
    """Of every label; they sum to one."""


class NoRoom(UserError):
    """A prompt or conversation is so long that the model has no room for new tokens."""


def _warn(line: str) -> None:
    """Warn who calls from outside jaxlm, at their line."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("jaxlm."):
        level, frame = level + 1, frame.f_back
    warnings.warn(line, stacklevel=level)


def _say_nothing(line: str) -> None:
    """Where a text that ends early is no surprise."""


def generate(
    model: LanguageModel | str | Path,
    prompts: str | Conversation | Sequence[str] | Sequence[Conversation],
    max_new_tokens: int | None = None,
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
    target: str | None = None,
    say: Callable[[str], None] = _warn,
):
    """Continue texts. A string gives a string, a list a list: the continuation alone.

    A prompt may be a conversation, a list of messages such as `{"role": "user", "content": "Hi"}`:
    a model with a chat template gives the assistant's next message. Of a translation model a
    prompt is the source text, and `target` the language as in `translate`.

    `temperature=0` takes the likeliest token each time. `num_samples` above 1 gives a list for
    each prompt. `stop` ends a text before any of these strings. `stream=True` takes one prompt and
    gives an iterator of pieces of text, never half a character. A text also ends where the model
    says so, after `max_new_tokens`, and at the model's `max_seq_len`; where that leaves fewer than
    are asked for, `say` gets a line, a UserWarning by default. None is 128, or as many as fit.

    `num_beams` above 1 searches for likely texts instead of sampling; `length_penalty` and
    `early_stopping` are those of `beam.Beams`, and `num_samples` is how many of the best to give.

    The same seed gives the same random numbers whatever the mesh and the other prompts. `mesh`
    goes with a path. Raises UserError for settings out of range and a prompt that leaves no room.
    """
    settings = make_settings(
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        Beams(num_beams, length_penalty, early_stopping),
        [] if stop is None else _as_list(stop, "stop")[0],
        max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        seed=seed,
        num_samples=num_samples,
    )
    prompts, single = _as_prompts(prompts)
    if stream and not (single and num_samples == num_beams == 1):
        raise UserError("stream=True takes one prompt (a string), num_samples=1 and num_beams=1")
    model = _as_model(model, mesh)
    rows, settings = _read(model, prompts, target, settings)
    if max_new_tokens is not None:
        _say_room(model, rows, max_new_tokens, say)
    if stream:
        return stream_row(model, rows[0], settings)
    out = continue_rows(model, rows, settings)
    if num_samples == 1:
        out = [texts[0] for texts in out]
    return out[0] if single else out


def translate(
    model: LanguageModel | str | Path,
    texts: str | Sequence[str],
    target: str | None = None,
    num_beams: int | None = None,
    length_penalty: float = 0.6,
    max_new_tokens: int | None = None,
    early_stopping: bool | Literal["never"] = False,
    mesh: str | Mesh | None = None,
    say: Callable[[str], None] = _warn,
    **settings,
):
    """Translate texts by a search with four beams; a string gives a string, a list a list.

    `target` is the language to translate into, such as "de", for a model that was trained with
    several. `num_beams=1` is greedy, and reads neither of the other settings of `beam.Beams`.
    `settings` are others of `generate`: beside `temperature`, `stream` and whatever else a search
    does not take, there is one beam, and `temperature` is 0 unless it is given.
    `max_new_tokens` None is as many as fit the model's `max_seq_len`; `say` gets a line where more
    are asked for, a UserWarning by default. Raises UserError for a language the model was not told
    of and for a model of another task.
    """
    model = _as_model(model, mesh)
    _check_task(model, "translate", "translation")
    if num_beams is None:
        num_beams = 4 if settings.keys() <= {"stop", "num_samples"} else 1
    search = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    return generate(
        model,
        _as_list(texts, "texts")[0] if not isinstance(texts, str) else texts,
        max_new_tokens=model.config.model.max_seq_len if max_new_tokens is None else max_new_tokens,
        target=target,
        num_beams=num_beams,
        **({} if num_beams == 1 else search),
        say=_say_nothing if max_new_tokens is None else say,
        **{"temperature": 0} | settings,
    )


def score(
    model: LanguageModel | str | Path,
    texts: str | Sequence[str],
    sources: str | Sequence[str] | None = None,
    target: str | None = None,
    mesh: str | Mesh | None = None,
):
    """log P(w1..wn) of each text; a string gives a `Score`, a list a list of them.

    Texts are tokenised as in training, beginning-of-text first. A translation model scores
    translations, each to its end, of `sources` into the language `target`. Raises UserError for a
    text longer than a Transformer's `max_seq_len`.
    """
    texts, single = _as_list(texts, "texts")
    model = _as_model(model, mesh)
    _check_task(model, "score", "language_modelling", "instruction", "translation")
    encoded, read = model.tokenizer.encode_batch(texts), None
    if model.config.task == "translation":
        given = [] if sources is None else _as_list(sources, "sources")[0]
        if len(given) != len(texts):
            raise UserError(
                f"there are {len(given)} sources for {len(texts)} translations: give sources=, one "
                "for each"
            )
        read = _sources(model, given, target)
        rows = [[*model.prefix, *ids, model.tokenizer.eos_id] for ids in encoded]
    else:
        if sources is not None or target is not None:
            raise UserError("sources and target are for a translation model: leave them out")
        rows = [[model.tokenizer.bos_id, *ids] for ids in encoded]
    if model.config.model.is_transformer:
        for i, row in enumerate(rows):
            _check_length(model, f"text {i}", len(row) - 1, "split it")
    scores: dict[int, Score] = {}
    for part in _alike(rows):
        sources = None if read is None else [read[i] for i in part]
        found = model.program.score(model.params, [rows[i] for i in part], sources)
        for i, logprobs in zip(part, found, strict=True):
            total = float(np.sum(logprobs, dtype=np.float64))
            scores[i] = Score(total, [float(x) for x in logprobs], rows[i])
    out = [scores[i] for i in range(len(rows))]
    return out[0] if single else out


def classify(
    model: LanguageModel | str | Path,
    texts: str | Sequence[str],
    mesh: str | Mesh | None = None,
    say: Callable[[str], None] = _warn,
):
    """The label of each text; a string gives a `Classification`, a list a list of them.

    A text longer than the rows the model was trained on is truncated, as it was in training; `say`
    gets a line that counts them, a UserWarning by default.
    """
    texts, single = _as_list(texts, "texts")
    model = _as_model(model, mesh)
    _check_task(model, "classify", "classification")
    ends, longest = (model.prefix, model.suffix), model.config.seq_len
    encoded = encode_texts(model.tokenizer, texts, longest, ends)
    rows = [row for row, _ in encoded]
    if num_cut := sum(is_cut for _, is_cut in encoded):
        say(f"{num_cut:,} of {counted(len(texts), 'text')} cut to {longest} tokens, as in training")
    labels = model.config.model.labels
    found: dict[int, Classification] = {}
    for part in _alike(rows):
        chances = model.program.classify(model.params, [rows[i] for i in part])
        for i, row in zip(part, chances, strict=True):
            by_name = dict(zip(labels, row.tolist(), strict=True))
            found[i] = Classification(max(by_name, key=by_name.get), by_name)
    out = [found[i] for i in range(len(rows))]
    return out[0] if single else out


def _alike(rows: list[list[int]]) -> Iterator[list[int]]:
    """The numbers of rows to compute at once: of like length, as they are padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), ROWS_AT_ONCE):
        yield order[start : start + ROWS_AT_ONCE]


def _as_model(model, mesh) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        return load(model, mesh=mesh)
    if mesh is not None:
        raise UserError("mesh is for a path: a loaded model has its mesh, give it to jaxlm.load")
    return model


def _as_list(texts, name: str) -> tuple[list[str], bool]:
    single = isinstance(texts, str)
    if not single and (isinstance(texts, bytes) or not isinstance(texts, Sequence)):
        raise UserError(f"{name} is {texts!r}: give a string or a list of strings")
    texts = [texts] if single else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{i}] is {text!r}: give strings")
    return texts, single


def _as_prompts(prompts) -> tuple[list[str] | list[Conversation], bool]:
    """The prompts as a list, all texts or all conversations, and whether there was just one."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        return _as_list(prompts, "prompts")
    if isinstance(prompts[0], Mapping):
        return [prompts], True
    if all(_is_talk(prompt) for prompt in prompts):
        return list(prompts), False
    return _as_list(prompts, "prompts")


def _is_talk(prompt) -> bool:
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    return is_list and (not prompt or isinstance(prompt[0], Mapping))


def _asked(prompt: Conversation, where: str) -> Sequence[Message]:
    """The messages of a talk that an assistant can answer. Raises UserError for others."""
    try:
        talk = read_messages(prompt, where)
    except BadRecord as error:
        raise UserError(error.problem) from None
    if not talk:
        raise UserError(f"{where} has no messages: give at least one to answer")
    if talk[-1].role == "assistant":
        raise UserError(f"{where} ends with the assistant's turn: leave that out to have it made")
    return talk


def _read(
    model: LanguageModel, prompts, target: str | None, settings: Settings
) -> tuple[list[Row], Settings]:
    """What a model reads of prompts, and the settings with what follows from their kind.

    Raises UserError for prompts that leave no room.
    """
    _check_task(model, "generate", "language_modelling", "instruction", "translation")
    tokenizer, chats = model.tokenizer, bool(prompts) and not isinstance(prompts[0], str)
    translates = model.config.task == "translation"
    if translates and chats:
        raise UserError("a translation model takes texts, not messages")
    end = turn_end(tokenizer) if chats else tokenizer.eos_id
    settings = dataclasses.replace(settings, eos_id=end, starts_text=chats or translates)
    if translates:
        sources = _sources(model, prompts, target)
        return [Row([*model.prefix], source) for source in sources], settings
    if target is not None:
        raise UserError(f"target={target!r} is for a translation model: leave it out")
    if chats:
        talks = [_asked(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        rows = [encode_prompt(tokenizer, talk) for talk in talks]
    else:
        start = [*model.prefix]
        rows = [start + ids or [tokenizer.bos_id] for ids in tokenizer.encode_batch(prompts)]
    longest = model.config.model.max_seq_len
    for prompt, ids in zip(prompts, rows, strict=True):
        if len(ids) >= longest:
            what = "the conversation" if chats else f"the prompt {prompt[:30]!r}..."
            remedy = "begin another, or leave out its oldest messages" if chats else "shorten it"
            raise NoRoom(
                f"{what} has {len(ids)} tokens and leaves no room for new ones: the model handles "
                f"{longest} (model.max_seq_len) in all; {remedy}"
            )
    return list(map(Row, rows)), settings


def _say_room(
    model: LanguageModel, rows: list[Row], wanted: int, say: Callable[[str], None]
) -> None:
    """Say it where the model has room for fewer new tokens than are wanted."""
    longest = model.config.model.max_seq_len
    room = min((longest - len(row.prompt) for row in rows), default=wanted)
    if wanted > room:
        few = room if len(rows) == 1 else f"as few as {room}"
        say(
            f"max_new_tokens={wanted} is more than fits: the model handles {longest} tokens "
            f"(model.max_seq_len), which leaves {few} for new ones"
        )


def _sources(model: LanguageModel, texts: list[str], target: str | None) -> list[list[int]]:
    """What the encoder reads to translate texts into a language."""
    known = languages_of(model.tokenizer)
    if target is None and len(known) > 1:
        raise UserError(f"the model translates into {', '.join(known)}: choose one by target=")
    if target is None and known:
        (target,) = known
    if target is not None and target not in known:
        raise unknown_language(target, known)
    sources = encode_sources(model.tokenizer, texts, [target] * len(texts))
    for i, source in enumerate(sources):
        _check_length(model, f"source text {i}", len(source), "shorten it")
    return sources


def _check_length(model: LanguageModel, what: str, length: int, remedy: str) -> None:
    if length > (longest := model.config.model.max_seq_len):
        raise UserError(
            f"{what} has {length} tokens, but the model was built for {longest} "
            f"(model.max_seq_len): {remedy}"
        )


def _check_task(model: LanguageModel, function: str, *tasks: str) -> None:
    """Raise UserError where a function is of no use with a model."""
    model.check_says_something()
    if (task := model.config.task) not in tasks:
        better = {"classification": "classify", "translation": "translate"}.get(task, "generate")
        raise UserError(f"jaxlm.{function} takes no model of task={task}: use jaxlm.{better}")
