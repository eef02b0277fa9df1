"""A jaxlm model for EleutherAI's lm-eval (the extra `lm-eval`), which brings the tasks:

import lm_eval
from jaxlm.lm_eval import JaxLM

lm_eval.simple_evaluate(model=JaxLM("runs/default"), tasks=["hellaswag"])
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlm.api import LanguageModel, load
from jaxlm.continuing import ROWS_AT_ONCE
from jaxlm.errors import UserError
from jaxlm.sampling import Sampling
from jaxlm.texts import generate

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError(
        "jaxlm.lm_eval needs EleutherAI's lm-eval: pip install 'jaxlm[lm-eval]'"
    ) from None

MAX_NEW_TOKENS = 256  # lm-eval's own, of a task that names none


class JaxLM(LM):
    """A language model of jaxlm as lm-eval wants it.

    Texts are tokenised as in training. What is longer than the model's `max_seq_len` loses its
    beginning, or, for perplexities, is scored in windows.
    """

    def __init__(self, model: LanguageModel | str | Path, mesh: str | None = None):
        """`model` is a loaded model, or what `jaxlm.load` takes, with its `mesh`."""
        super().__init__()
        self.model = model if isinstance(model, LanguageModel) else load(model, mesh)
        if (task := self.model.config.task) not in ("language_modelling", "instruction"):
            raise UserError(f"{self.model.source} is of task={task}: lm-eval takes language models")
        self._longest = self.model.config.model.max_seq_len
        self._prefix = list(self.model.prefix) or [self.model.tokenizer.bos_id]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells cached requests apart by."""
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """log P(continuation | context), and whether greedy decoding gives the continuation."""
        pairs = [self._split(*request.args) for request in requests]
        logprobs = self._score(pairs)
        greedy = self._greedy(pairs, logprobs)
        return [
            (float(scores.sum(dtype=np.float64)), same)
            for scores, same in zip(logprobs, greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """log P(text), every token given as much before it as the model takes."""
        windows = [list(self._windows(*request.args)) for request in requests]
        scores = iter(self._score(list(itertools.chain.from_iterable(windows))))
        return [float(sum(next(scores).sum(dtype=np.float64) for _ in parts)) for parts in windows]

    def generate_until(self, requests) -> list[str]:
        """Continuations of each request's context, by its settings."""
        made = [""] * len(requests)
        settings = [_settings(dict(request.args[1])) for request in requests]
        for group in {tuple(sorted(s.items())): s for s in settings}.values():
            chosen = [i for i, s in enumerate(settings) if s == group]
            options = group | {"stop": list(group["stop"]) or None}
            room = (
                self._longest
                - len(self._prefix)
                - min(options["max_new_tokens"], self._longest // 2)
            )
            prompts = [self._last(requests[i].args[0], room) for i in chosen]
            for i, text in zip(chosen, generate(self.model, prompts, **options), strict=True):
                made[i] = text
        return made

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, as they are where the one follows the other."""
        # A space belongs to the word after it.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        encode = self.model.tokenizer.encode
        whole, first = encode(bare + continuation), len(encode(bare))
        return [*self._prefix, *whole[:first]], whole[first:]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        *given, last = self._prefix
        windows = get_rolling_token_windows(
            token_list=self.model.tokenizer.encode(text),
            prefix_token=last,
            max_seq_len=self._longest - len(given),
            context_len=1,
        )
        return ((given + context, ids) for context, ids in map(make_disjoint_window, windows))

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """log P of each token of the second of a pair."""
        rows = [(context + ids)[-self._longest - 1 :] for context, ids in pairs]
        scores: list = [np.zeros(0)] * len(rows)
        for chosen in _grouped([len(row) for row in rows]):
            found = self.model.program.score(self.model.params, [rows[i] for i in chosen])
            for i, logprobs in zip(chosen, found, strict=True):
                scores[i] = logprobs[len(logprobs) - len(pairs[i][1]) :]
        return scores

    def _greedy(self, pairs, logprobs: list[np.ndarray]) -> list[bool]:
        """Whether the likeliest tokens after the first of a pair are the second."""
        same = [bool((scores > math.log(0.5)).all()) for scores in logprobs]
        unsure = [i for i, sure in enumerate(same) if not sure]
        for group in _grouped([sum(map(len, pairs[i])) for i in unsure]):
            chosen = [unsure[place] for place in group]
            longest = max(len(pairs[i][1]) for i in chosen)
            *_, made = self.model.program.generate(
                self.model.params,
                [pairs[i][0][-(self._longest - len(pairs[i][1])) :] for i in chosen],
                max_new_tokens=longest,
                sampling=Sampling(temperature=0),
                eos_id=None,
            )
            for i, tokens in zip(chosen, made, strict=True):
                same[i] = tokens[: len(pairs[i][1])] == pairs[i][1]
        return same

    def _last(self, text: str, room: int) -> str:
        """The end of a text that has at most `room` tokens."""
        ids = self.model.tokenizer.encode(text)
        if len(ids) <= room:
            return text
        return self.model.tokenizer.decode_bytes(ids[-room:]).decode("utf-8", errors="ignore")


def _grouped(lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of texts that are computed together: those of like length, as they are padded."""
    order = np.argsort(lengths, kind="stable").tolist()
    for start in range(0, len(order), ROWS_AT_ONCE):
        yield order[start : start + ROWS_AT_ONCE]


def _settings(given: dict) -> dict:
    """What `jaxlm.generate` takes, of a task's generation settings."""
    until = given.get("until") or []
    sampled = given.get("do_sample", bool(given.get("temperature")))
    settings = {
        "stop": (until,) if isinstance(until, str) else tuple(until),
        "max_new_tokens": int(given.get("max_gen_toks", MAX_NEW_TOKENS)),
        "temperature": float(given.get("temperature") or 1.0) if sampled else 0.0,
    }
    for name in ("top_k", "top_p"):
        if sampled and given.get(name):
            settings[name] = given[name]
    return settings
