"""Classification: the label of a text, where the model's head reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.data.examples import Example
from jaxlm.data.forms import Encoded, NamedExamples, Origin
from jaxlm.data.records import TSV, Column, Record
from jaxlm.data.sources import text_column
from jaxlm.data.tokens import Row, token_dtype
from jaxlm.errors import UserError, nearest
from jaxlm.tasks.batch import Batch, packed_batch
from jaxlm.tokenizer import Tokenizer

Ends = tuple[Sequence[int], Sequence[int]]
# More labels than this are refused where most texts have one of their own.
MANY_LABELS = 10
# Labels that have an order of their own.
SCALE = ("negative", "neutral", "positive")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Classification(NamedExamples):
    """Labelled texts between the tokenizer's `ends`, truncated to a row; `names` are the labels.

    Of a text, the position that the model's head reads has the label's number as its target and
    weight 1; the others have weight 0.
    """

    name = "label"

    at_last: bool
    """Whether the head reads the last token, not the first."""
    learns_names: bool = False
    """Whether the labels are those of the training texts, not a model's."""
    ends: Ends | None = None
    """What stands before and behind each text, where that is not for the tokenizer to say."""

    @property
    def columns(self) -> tuple[Column, ...]:
        label = Column("label", "data.label_column", self.data.label_column, 1)
        return label, text_column(self.data)

    def read(self, record: Record, origin: Origin) -> Labelled:
        label, text = self.columns
        value = record.value(label)
        if isinstance(value, float):
            raise UserError(
                f"{record.where}: the label {value} is a number with a point, but labels are texts "
                "or whole numbers: write it as a string or an integer"
            )
        name = str(value) if isinstance(value, int) else record.text(label).strip()
        if self.names is not None and name not in self.names:
            raise self._unknown(name, record.where)
        return Labelled(name, record.text(text))

    def _unknown(self, name: str, where: str) -> UserError:
        whose, remedy = "the model's", "to learn others, train with model.labels=null"
        if self.learns_names:
            whose, remedy = "data.train's", "give data.train texts that have it"
        return UserError(
            f"{where}: the label {name[:40]!r} is none of {whose} "
            f"({', '.join(map(repr, self.names))}): {remedy}{nearest(name, self.names)}"
        )

    def key(self, item: Labelled) -> str:
        return item.text

    def texts(self, item: Labelled) -> Sequence[str]:
        return [item.text]

    def name_of(self, item: Labelled) -> str:
        return item.label

    def with_names(self, found: Mapping[str, int]) -> "Classification":
        labels, texts = in_order({*found}), sum(found.values())
        if len(labels) == 1:
            raise UserError(
                f"every training text has the label {labels[0]!r}: classification needs two labels "
                "or more; does data.label_column name the right column?"
            )
        if len(labels) > max(MANY_LABELS, texts / 2):
            raise UserError(
                f"{', '.join(self.data.train)} has {len(labels):,} different labels for "
                f"{texts:,} texts in {self._label_place}, which looks like text: set "
                "data.label_column to the labels' column and data.text_field to the texts'"
            )
        return dataclasses.replace(self, names=labels, learns_names=True)

    @property
    def _label_place(self) -> str:
        """The column of the labels, as a user sees it."""
        column = self.columns[0]
        name = column.field
        is_number = column.given is None or column.given.isdecimal()
        if self.data.train[0].lower().endswith(TSV) and not self.data.tsv_header and is_number:
            return f"column {column.given or column.number}"
        return f"the field {name!r}"

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer  # a text that is only read need not be given back

    def dtypes(self, tokenizer: Tokenizer) -> dict[str, Any]:
        ids = token_dtype(tokenizer.vocab_size)
        return {"tokens": ids, "targets": np.uint32, "weights": np.uint8}

    def encoding_facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        facts = {"at_last": self.at_last, "ends": self.ends or tokenizer.ends}
        return super().encoding_facts(tokenizer) | facts

    def encode(self, tokenizer: Tokenizer, items: Sequence[Labelled]) -> list[Encoded]:
        numbers = {name: number for number, name in enumerate(self.names)}
        texts = [item.text for item in items]
        encoded = encode_texts(tokenizer, texts, self.seq_len, self.ends or tokenizer.ends)
        return [
            self._encoded(ids, cut, numbers[item.label], len(item.text.encode()))
            for item, (ids, cut) in zip(items, encoded, strict=True)
        ]

    def _encoded(self, ids: list[int], cut: bool, label: int, num_bytes: int) -> Encoded:
        arrays = {
            "tokens": np.array(ids),
            "targets": np.zeros(len(ids), np.uint32),
            "weights": np.zeros(len(ids), np.uint8),
        }
        place = -1 if self.at_last else 0
        arrays["targets"][place], arrays["weights"][place] = label, 1
        return Encoded(Example(arrays, cut), num_bytes)


def make_form(config: Config) -> Classification:
    """The form of a config's data."""
    model = config.model
    at_last = model.pools == "last"
    return Classification(config.data, seq_len=config.seq_len, names=model.labels, at_last=at_last)


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Labels in the order of a known scale, of their numbers, or of the alphabet."""
    if labels <= set(SCALE):
        return tuple(name for name in SCALE if name in labels)
    if all(map(str.isdecimal, labels)):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_len: int, ends: Ends
) -> list[tuple[list[int], bool]]:
    """What the model reads of each text, between `ends`, and whether that is truncated.

    There is at least one token.
    """
    begin, end = ends
    room = max_len - len(begin) - len(end)
    return [
        ([*begin, *ids[:room], *end] or [tokenizer.bos_id], len(ids) > room)
        for ids in tokenizer.encode_batch(texts)
    ]


def label_counts(prepared: Prepared) -> np.ndarray:
    """How many training texts have each label, int64 [number of labels]."""
    counts = np.zeros(len(prepared.form.names), np.int64)
    for file in prepared.train:
        targets, weights = file.fields["targets"][0], file.fields["weights"][0]
        counts += np.bincount(targets[weights > 0], minlength=len(counts))
    return counts


def class_weights(config: Config, prepared: Prepared) -> np.ndarray:
    """What each label's loss is multiplied by, float32 [number of labels].

    `balanced` gives all labels the same sum: texts / (labels * texts of the label). Raises
    UserError for another number of weights than labels.
    """
    weights, labels = config.train.class_weights, prepared.form.names
    if weights is None:
        return np.ones(len(labels), np.float32)
    if weights == "balanced":
        counts = label_counts(prepared)
        return (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)
    if len(weights) != len(labels):
        raise UserError(
            f"train.class_weights has {len(weights)} numbers for {len(labels)} labels: give one "
            f"for each of {', '.join(labels)}"
        )
    return np.array(weights, np.float32)


def make_batch(rows: Row, weights: np.ndarray) -> Batch:
    """A batch of rows, in which a text counts by its label's weight (`class_weights`)."""
    return packed_batch(rows | {"weights": rows["weights"] * weights[rows["targets"]]})
