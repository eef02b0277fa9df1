"""From rows of ids to the texts that continue them: batches, stop strings, streams of text."""

import codecs
import dataclasses
import math
import numbers
from collections.abc import Iterator

from jaxlm.api import LanguageModel
from jaxlm.beam import Beams
from jaxlm.errors import UserError
from jaxlm.sampling import Sampling
from jaxlm.values import MAX_SEED

ROWS_AT_ONCE = 64
STOP_CHECK_TOKENS = 16
MOST_BEAMS = 1024
MOST_PENALTY = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows are continued."""

    max_new_tokens: int
    sampling: Sampling
    beams: Beams | None
    """Beam search in the place of sampling."""
    stops: list[str]
    seed: int
    num_samples: int
    """Texts for each row; of a beam search, that many of its best."""
    eos_id: int | None
    """What ends a text."""
    starts_text: bool
    """What is made is a text of its own, a translation or an answer: it does not begin with the
    space that some tokenizers put before a text's first word, as the rest of a text would."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The ids a text starts with, and those it is a translation of, if of any."""

    prompt: list[int]
    source: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.source or ())


def make_settings(
    sampling: Sampling, beams: Beams, stops: list[str], *, max_new_tokens, seed, num_samples
) -> Settings:
    """Settings of a user; what ends a text is the caller's to add.

    Raises UserError for one of the wrong type, out of range or of no use.
    """
    counts = {"max_new_tokens": max_new_tokens, "num_samples": num_samples, "seed": seed}
    number, whole = numbers.Real, numbers.Integral
    limits = (
        ("temperature", sampling.temperature, number, 0, math.inf, "a number, 0 or more"),
        ("top_k", sampling.top_k, whole, 1, math.inf, "a whole number above 0"),
        ("top_p", sampling.top_p, number, 1e-9, 1, "above 0 and at most 1"),
        ("min_p", sampling.min_p, number, 0, 1, "from 0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, number, 1e-9, 1e9, "above 0"),
        ("length_penalty", beams.length_penalty, number, -MOST_PENALTY, MOST_PENALTY, "a number"),
        ("num_beams", beams.num_beams, whole, 1, MOST_BEAMS, "a whole number"),
        *(
            (name, n, whole, int(name != "seed"), MAX_SEED, "a whole number")
            for name, n in counts.items()
        ),
    )
    optional = ("top_k", "top_p", "min_p")
    for name, value, kind, low, high, wanted in limits:
        if value is None and name in optional:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == math.inf:
            above = f" from {low} to {high}" if wanted in ("a whole number", "a number") else ""
            raise UserError(f"{name}={value!r} is out of range: it should be {wanted}{above}")
    if sampling.temperature == 0:
        chooses = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        for name, value in chooses.items():
            if value is not None:
                raise UserError(
                    f"{name}={value} has no effect with temperature=0, which takes the likeliest "
                    "token: leave one of them out"
                )
        if num_samples > 1 and beams.num_beams == 1:
            raise UserError(
                f"num_samples={num_samples} would give the same text each time with temperature=0: "
                "leave one of them out"
            )
    if "" in stops:
        raise UserError("stop holds an empty string, which would end every text at once: drop it")
    _check_beams(sampling, beams, num_samples)
    searches = beams if beams.num_beams > 1 else None
    return Settings(max_new_tokens, sampling, searches, stops, seed, num_samples, None, False)


def _check_beams(sampling: Sampling, beams: Beams, num_samples: int) -> None:
    if not isinstance(beams.early_stopping, bool) and beams.early_stopping != "never":
        raise UserError(
            f"early_stopping={beams.early_stopping!r} is not known: use True, False or 'never'"
        )
    if beams.num_beams == 1:
        if beams != Beams(1):
            raise UserError(
                "length_penalty and early_stopping are those of a beam search: give num_beams too"
            )
        return
    if sampling not in (Sampling(), Sampling(temperature=0)):
        raise UserError(
            "a beam search does not sample: leave out temperature, top_k, top_p, min_p and "
            "repetition_penalty, or num_beams"
        )
    if num_samples > beams.num_beams:
        raise UserError(
            f"num_samples={num_samples} asks for more texts than num_beams={beams.num_beams} "
            "finds: raise num_beams"
        )


def continue_rows(model: LanguageModel, rows: list[Row], settings: Settings) -> list[list[str]]:
    """`num_samples` texts for each row. Rows of like length go together: they are padded."""
    jobs = [(i, sample) for i in range(len(rows)) for sample in range(settings.num_samples)]
    run, at_once = _sample, ROWS_AT_ONCE
    if settings.beams is not None:
        jobs = [(i, 0) for i in range(len(rows))]
        run, at_once = _search, max(1, ROWS_AT_ONCE // settings.beams.num_beams)
    jobs.sort(key=lambda job: len(rows[job[0]]))
    texts: list[list[str]] = [[] for _ in rows]
    for start in range(0, len(jobs), at_once):
        part = jobs[start : start + at_once]
        made = run(model, [rows[i] for i, _ in part], [sample for _, sample in part], settings)
        for (i, _), new in zip(part, made, strict=True):
            texts[i] += new
    return texts


def stream_row(model: LanguageModel, row: Row, settings: Settings) -> Iterator[str]:
    """Pieces of the continuation. What may be half a character or half a stop string waits."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    made, given, read, stops = "", 0, 0, settings.stops
    for (tokens,) in _generate(model, [row], [0], settings, chunk=1):
        made += decoder.decode(model.tokenizer.decode_bytes(tokens[read:]))
        read = len(tokens)
        text = _trimmed(model, made, settings)
        whole, ended = _cut(text, stops)
        sure = len(whole) if ended else len(text) - _possible_stop(text, stops)
        if sure > given:
            yield text[given:sure]
            given = sure
        if ended:
            return
    text, _ = _cut(_trimmed(model, made + decoder.decode(b"", final=True), settings), stops)
    if len(text) > given:
        yield text[given:]


def _generate(model, rows: list[Row], samples: list[int], settings: Settings, **options):
    return model.program.generate(
        model.params,
        [row.prompt for row in rows],
        sources=_sources(rows),
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        eos_id=settings.eos_id,
        seed=settings.seed,
        sample_ids=samples,
        **_never(model),
        **options,
    )


def _sample(model, rows: list[Row], samples: list[int], settings: Settings) -> list[list[str]]:
    options = {}
    if settings.stops:
        stopped = lambda tokens: _text(model, tokens, settings)[1]  # noqa: E731
        options = {"chunk": STOP_CHECK_TOKENS, "stopped": stopped}
    *_, made = _generate(model, rows, samples, settings, **options)
    return [[_text(model, tokens, settings)[0]] for tokens in made]


def _search(model, rows: list[Row], _, settings: Settings) -> list[list[str]]:
    found = model.program.beam_search(
        model.params,
        [row.prompt for row in rows],
        sources=_sources(rows),
        max_new_tokens=settings.max_new_tokens,
        beams=settings.beams,
        eos_id=settings.eos_id,
        **_never(model),
    )
    count = settings.num_samples
    return [[_text(model, h.tokens, settings)[0] for h in row[:count]] for row in found]


def _sources(rows: list[Row]) -> list[list[int]] | None:
    return None if rows[0].source is None else [row.source for row in rows]


def _never(model: LanguageModel) -> dict[str, int]:
    """The id that no text has, where there is one; a program need not know of it otherwise."""
    never = model.tokenizer.never_id
    return {} if never is None else {"never_id": never}


def _text(model: LanguageModel, tokens: list[int], settings: Settings) -> tuple[str, bool]:
    """The text of tokens before the first stop string, and whether there was one."""
    text = model.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
    return _cut(_trimmed(model, text, settings), settings.stops)


def _trimmed(model: LanguageModel, text: str, settings: Settings) -> str:
    return text.removeprefix(" ") if settings.starts_text and model.tokenizer.adds_space else text


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _possible_stop(text: str, stops: list[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
