"""Where text comes from and how it becomes tokens: the fields of data and tokenizer.

Every field's docstring is its line in `--help`; every default stands here and nowhere else.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from jaxlm.errors import UserError, check_read, needs
from jaxlm.model_parts import STRICT
from jaxlm.values import Count, Fraction, Names, Natural, PathText, Text, Weights

# Fields of a tokenizer that do not say which one it is.
DROPOUT = "dropout", "dropout_cuts"
LEAST_VOCABULARY = 300


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    train: Names = ("stdlib",)
    """Files, folders, globs, .jsonl[.gz|.zst], .parquet, hf:NAME[@CONFIG][:SPLIT], or stdlib."""
    weights: Weights | None = None
    """Share of rows drawn from each training source; null: by their size."""
    valid: Names = ()
    """Validation text, in the same forms; empty: documents held out of the training text."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents held out (by a hash of the text) where data.valid is empty."""
    text_field: str = "text"
    """The field that holds the text in JSON lines, Parquet and datasets (classification and masked
    language modelling: also in TSV, there a number from 1, if it is not column 2)."""
    source_column: Text | None = None
    """translation, instruction: the source's field, or its number in TSV; null: source (prompt) and
    column 1."""
    target_column: Text | None = None
    """translation, instruction: the target's field, or its number in TSV; null: target (completion)
    and column 2."""
    label_column: Text | None = None
    """classification: the label's field, or its number in TSV; null: label and column 1."""
    tsv_header: bool = False
    """The first line of every .tsv names its columns."""
    languages: Names = ()
    """translation: target language of each source in data.train, or one for all; the model is told
    by a tag such as >>de<<. Empty: no tags."""
    valid_languages: Names = ()
    """The same for data.valid; empty: as data.languages."""
    language_column: Text | None = None
    """translation: the field, or number in TSV, that names each record's target language."""
    seq_len: Count | None = None
    """Tokens in a training row; null: model.max_seq_len (with init_from, 1024 at most)."""
    source_len: Count | None = None
    """translation: tokens on the source side of a row; null: data.seq_len."""
    on_bad: Literal["skip", "error"] = "skip"
    """Invalid UTF-8 or null, or an empty field of a pair: skip and count it, or stop."""
    cache: str | None = None
    """Folder of token files; null: the user's cache folder ($XDG_CACHE_HOME/jaxlm)."""
    workers: Natural = 0
    """Threads that tokenise; 0: one per core."""
    prefetch: Count = 4
    """Batches read ahead of the step."""

    def __post_init__(self):
        if not self.train:
            raise UserError("data.train is empty: name at least one source, such as stdlib")
        if self.weights is not None and len(self.weights) != len(self.train):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {len(self.train)} sources in "
                "data.train: give one for each"
            )
        elsewhere = {*self.train, *self.valid} != {"stdlib"}
        check_read(
            "data",
            self,
            valid_fraction=(not self.valid, "an empty data.valid"),
            text_field=(elsewhere, "a source other than stdlib"),
            valid_languages=(bool(self.valid), "a data.valid"),
        )


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bpe", "unigram", "file"] = "bpe"
    """Train SentencePiece BPE (byte fallback) or unigram on the training text, or load a file."""
    vocab_size: Annotated[int, Field(ge=LEAST_VOCABULARY)] = 4096
    """Tokens to learn, 300 at least: 256 of them are bytes."""
    path: PathText | None = None
    """kind=file: a SentencePiece .model, a Hugging Face tokenizer.json, or a folder with one."""
    training_mb: Count = 8
    """Megabytes of text, sampled evenly, that the tokenizer is trained on."""
    dropout: Fraction = 0.0
    """BPE: leave out each merge with this probability where a training text is cut into pieces, so
    that no two cuts are the same (BPE-dropout: Provilkov et al., 2020)."""
    dropout_cuts: Count = 4
    """How often each training text is cut with tokenizer.dropout; an epoch has them all."""

    def __post_init__(self):
        if self.kind == "file" and self.path is None:
            raise UserError("tokenizer.kind=file needs tokenizer.path: a .model or tokenizer.json")
        file = needs("tokenizer", self, "kind", "file")
        learned = needs("tokenizer", self, "kind", "bpe", "unigram")
        check_read(
            "tokenizer",
            self,
            path=file,
            vocab_size=learned,
            training_mb=learned,
            dropout=needs("tokenizer", self, "kind", "bpe", "file"),
            dropout_cuts=(self.dropout > 0, "tokenizer.dropout"),
        )

    def without_dropout(self) -> "TokenizerConfig":
        """The same, cutting every text in one way."""
        usual = {key: self.__dataclass_fields__[key].default for key in DROPOUT}
        return dataclasses.replace(self, **usual)
