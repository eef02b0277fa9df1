"""Masked language modelling (Devlin et al., 2019): tokens of a text from what is around them."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxlm.config import Config
from jaxlm.data.forms import Documents, Origin
from jaxlm.data.loader import Rows
from jaxlm.data.records import Counts
from jaxlm.data.sources import read_documents
from jaxlm.data.tokens import Row, TokenFile
from jaxlm.errors import UserError
from jaxlm.tasks.batch import Batch
from jaxlm.tokenizer import Tokenizer

MASK = "<mask>"
# What a tokenizer calls its mask: ours and RoBERTa's, BERT's.
MASKS = (MASK, "[MASK]")
# Of the tokens that are predicted, the shares that are masked, and that are another token.
MASKED, REPLACED = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class MaskedDocuments(Documents):
    """Documents as an encoder reads them, between the tokenizer's ends."""

    @property
    def controls(self) -> tuple[str, ...]:
        return (MASK,)

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        mask_id(tokenizer)
        return tokenizer  # a text that is only read need not be given back

    def items(self, origin: Origin, counts: Counts) -> Iterator[str]:
        return read_documents(origin.spec, self.data, counts, tables=True)

    def facts(self) -> dict[str, object]:
        return super().facts() | {"header": self.data.tsv_header}

    def encoding_facts(self, tokenizer: Tokenizer) -> dict[str, object]:
        return {"ends": tokenizer.ends}

    def ends(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        return tokenizer.ends

    def rows(self, file: TokenFile, seq_len: int) -> Rows:
        return Rows(file, seq_len, ahead=0)


def make_form(config: Config) -> MaskedDocuments:
    """The form of a config's data."""
    return MaskedDocuments(config.data)


def mask_id(tokenizer: Tokenizer) -> int:
    """The id that stands for a hidden token. Raises UserError for a tokenizer without one."""
    for name in MASKS:
        if name in tokenizer.special_ids:
            return tokenizer.special_ids[name]
    raise UserError(
        f"the tokenizer has none of the special pieces {' and '.join(MASKS)}, which stand for a "
        "token to predict: let the run learn its tokenizer (tokenizer.kind=bpe), or give one of an "
        "encoder"
    )


@dataclasses.dataclass(frozen=True)
class Masking:
    """Makes batches in which some tokens are hidden.

    Which ones depends on the seed and on the number of rows before theirs, so that they are others
    in every epoch.
    """

    mask_id: int
    is_ordinary: np.ndarray
    """Whether texts have an id, bool [vocabulary]: only such ids are predicted, or replace one."""
    rate: float
    """Share of a row's tokens to predict."""
    seed: int

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "Masking":
        """That of a config's task."""
        begin, end = tokenizer.ends
        is_ordinary = np.ones(tokenizer.vocab_size, bool)
        is_ordinary[[*tokenizer.special_ids.values(), *begin, *end]] = False
        return cls(mask_id(tokenizer), is_ordinary, config.train.mask_rate, config.seed)

    def __call__(self, rows: Row) -> Batch:
        """A batch of rows of T tokens [B, T], of which `rate` T can be targets [B, n]."""
        tokens = rows["tokens"]
        fields = zip(tokens, rows["segment_ids"], rows["number"], strict=True)
        made = [self._row(*row, count=num_targets(self.rate, tokens.shape[1])) for row in fields]
        read, targets, weights, reads = (np.stack(x) for x in zip(*made, strict=True))
        others = rows["segment_ids"], rows["positions"]
        return Batch(read, targets, weights, *others, reads=reads)

    def _row(self, tokens: np.ndarray, segments: np.ndarray, number: int, count: int):
        """(What is read [T], targets [n], their weights [n] and where they stand [n])."""
        random = np.random.default_rng((self.seed, int(number)))
        is_candidate = (segments > 0) & self.is_ordinary[tokens]
        order = np.argsort(np.where(is_candidate, random.random(len(tokens)), 1.0), kind="stable")
        candidates = int(is_candidate.sum())
        is_target = np.arange(count) < min(candidates, num_targets(self.rate, candidates))
        reads = order[:count]
        targets, chance = tokens[reads], random.random(count)
        hidden = np.where(chance < MASKED, self.mask_id, targets)
        others = random.choice(np.flatnonzero(self.is_ordinary), count)
        is_other = (chance >= MASKED) & (chance < MASKED + REPLACED)
        read = tokens.copy()
        read[reads] = np.where(is_target, np.where(is_other, others, hidden), targets)
        return read, targets, is_target.astype(np.float32), reads.astype(np.int32)


def num_targets(rate: float, tokens: int) -> int:
    """How many of so many tokens are predicted, at least one."""
    return max(1, round(rate * tokens))
