"""Masked language modelling (Devlin et al., 2019): tokens of a text from what is around them."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.config import Config
from jaxlm.data.forms import Documents, Encoded, Origin
from jaxlm.data.loader import Rows
from jaxlm.data.records import Counts
from jaxlm.data.sources import read_documents
from jaxlm.data.tokens import Row, TokenFile, token_dtype
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

    def encode(self, tokenizer: Tokenizer, items: Sequence[str]) -> list[Encoded]:
        begin, end = tokenizer.ends
        dtype = token_dtype(tokenizer.vocab_size)
        return [
            Encoded(np.array([*begin, *ids, *end], dtype), len(text.encode()))
            for text, ids in zip(items, tokenizer.encode_batch(items), strict=True)
        ]

    def rows(self, file: TokenFile, seq_len: int) -> Rows:
        return Rows(file, seq_len, ahead=0)


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
    """Makes batches in which some tokens are hidden; which, depends on the seed and the row alone.

    In every epoch a row has others.
    """

    mask_id: int
    ordinary: np.ndarray
    """The ids that texts have: what is predicted, and what replaces it."""
    rate: float
    """Share of a row's tokens to predict."""
    seed: int

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "Masking":
        """That of a config's task."""
        begin, end = tokenizer.ends
        special = [*tokenizer.special_ids.values(), *begin, *end]
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
        return cls(mask_id(tokenizer), ordinary, config.train.mask_rate, config.seed)

    def __call__(self, rows: Row) -> Batch:
        """A batch of rows of T tokens [B, T] with targets [B, n], at least one of a row's."""
        tokens = rows["tokens"]
        count = max(1, round(self.rate * tokens.shape[1]))
        fields = zip(tokens, rows["segment_ids"], rows["number"], strict=True)
        made = [self._row(*row, count) for row in fields]
        read, targets, weights, reads = (np.stack(x) for x in zip(*made, strict=True))
        others = rows["segment_ids"], rows["positions"]
        return Batch(read, targets, weights, *others, reads=reads)

    def _row(self, tokens: np.ndarray, segments: np.ndarray, number: int, count: int):
        """(What is read [T], targets [n], their weights [n] and where they stand [n])."""
        random = np.random.default_rng((self.seed, int(number)))
        can_be = (segments > 0) & np.isin(tokens, self.ordinary)
        order = np.argsort(np.where(can_be, random.random(len(tokens)), 1.0), kind="stable")
        reads = np.sort(order[:count])
        targets, weights = tokens[reads], can_be[reads]
        chance = random.random(count)
        others = random.choice(self.ordinary, count)
        hidden = np.where(chance < MASKED + REPLACED, others, targets)
        hidden = np.where(chance < MASKED, self.mask_id, hidden)
        read = tokens.copy()
        read[reads] = np.where(weights, hidden, targets)
        return read, targets, weights.astype(np.float32), reads.astype(np.int32)
