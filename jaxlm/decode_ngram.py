"""Generation and scoring on an N-gram model: the same methods as `decode.DecodeProgram`'s."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.ngram import Ngram
from jaxlm.padding import bucket
from jaxlm.sampling import Sampling, choose, row_keys


@dataclasses.dataclass(frozen=True)
class NgramProgram:
    """Generation and scoring: tables are looked up on the host, tokens drawn as elsewhere."""

    max_seq_len: int

    def generate(
        self,
        ngram: Ngram,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        eos_id: int | None,
        seed: int = 0,
        sample_ids: list[int] | None = None,
        chunk: int | None = None,
        stopped: Callable[[list[int]], bool] = lambda tokens: False,
        sources: None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield each row's tokens so far, as `DecodeProgram.generate` does."""
        count, longest = len(prompts), self.max_seq_len
        ids = np.zeros(bucket(count, smallest=1), np.int32)
        ids[:count] = 0 if sample_ids is None else sample_ids
        settings = ids, jax.random.key(seed), sampling.numbers(ngram.vocab_size)
        rows = [list(prompt) for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        running = set(range(count))
        last = min(max_new_tokens, longest - min(map(len, prompts)))
        for step in range(1, last + 1):
            chosen = _next_tokens(ngram, rows, sorted(running), sampling, settings)
            for i in sorted(running):
                rows[i].append(int(chosen[i]))
                if rows[i][-1] != eos_id:
                    made[i].append(rows[i][-1])
                if rows[i][-1] == eos_id or len(rows[i]) >= longest:
                    running.remove(i)
            if step % (chunk or last) == 0 or step == last or not running:
                yield [list(text) for text in made]
                running -= {i for i in running if stopped(made[i])}
            if not running:
                return

    def beam_search(self, ngram: Ngram, prompts: list[list[int]], **settings) -> NoReturn:
        """Raises UserError: histories are looked up on the host, a search is compiled."""
        raise UserError("an N-gram model is sampled from, not searched: leave out num_beams")

    def score(self, ngram: Ngram, texts: list[list[int]], sources: None = None) -> list[np.ndarray]:
        """log P of each token after a text's first, in nats."""
        places = np.concatenate([np.arange(len(text)) for text in texts])
        logprobs = ngram.token_logprobs(np.concatenate(texts), places)
        ends = np.cumsum([len(text) for text in texts])
        return [part[1:] for part in np.split(logprobs, ends[:-1])]


def _next_tokens(
    ngram: Ngram, rows: list[list[int]], running: list[int], sampling: Sampling, settings
) -> np.ndarray:
    """A token for each of the `running` rows; for the others, anything."""
    ids, key, numbers = settings
    logits = np.zeros((len(ids), ngram.vocab_size), np.float32)
    seen = np.zeros(logits.shape, bool) if sampling.kind[2] else None
    positions = np.zeros(len(ids), np.int32)
    for i in running:
        logits[i] = np.log(ngram.next_probabilities(rows[i]))
        positions[i] = len(rows[i])
        if seen is not None:
            seen[i, rows[i]] = True
    return np.asarray(_choose(sampling.kind, logits, key, ids, positions, numbers, seen))


@functools.partial(jax.jit, static_argnums=0)
def _choose(kind, logits, key, ids, positions, numbers, seen):
    return choose(logits, row_keys(key, ids, positions), kind, numbers, seen)
