"""The form of a config's task, and how its rows become a batch."""

import dataclasses
from collections.abc import Callable
from functools import partial

from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.data.files import list_files
from jaxlm.data.forms import Documents, Form
from jaxlm.data.records import JSON_LINES, PARQUET, TSV
from jaxlm.data.sources import text_column
from jaxlm.data.tokens import Row
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError
from jaxlm.tasks import classification, instruction, language_modelling, masked, translation
from jaxlm.tasks.batch import Batch, packed_batch

FORMS = {
    "language_modelling": lambda config: Documents(config.data),
    "masked_language_modelling": masked.make_form,
    "translation": translation.make_form,
    "instruction": instruction.make_form,
    "classification": classification.make_form,
}


def make_form(config: Config) -> Form:
    """What the config's task makes of its sources. Raises UserError where these do not fit it."""
    return FORMS[config.task](config)


def check_text_field(config: Config) -> None:
    """Raise UserError for a `data.text_field` where no source has fields, or one does not exist."""
    data = config.data
    if text_column(data).given is None:
        return
    # To language modelling a TSV is plain text.
    endings = (*JSON_LINES, *PARQUET, *(() if config.task == "language_modelling" else TSV))
    for spec in (*data.train, *data.valid):
        if spec.startswith("hf:") or any(
            path.name.lower().endswith(endings) for path in list_files(spec)
        ):
            return
    raise UserError(
        f"data.text_field={data.text_field!r} has no effect, because plain text has no fields: "
        f"leave it out, or name a source that has them ({', '.join(endings)}, hf:NAME)"
    )


def say_what_is_shared(data: DataConfig, say: Callable[[str], None]) -> None:
    """Say it where sources to validate on are trained on, too."""
    for spec in data.valid:
        if spec in data.train:
            say(
                f"{spec} is in data.train and in data.valid: validation is of texts that are "
                "trained on"
            )


def batch_maker(config: Config, prepared: Prepared) -> Callable[[Row], Batch]:
    """How rows of prepared data become a batch of the config's task."""
    make = packed_batch
    if config.task == "language_modelling":
        make = language_modelling.make_batch
    if config.task == "masked_language_modelling":
        make = masked.Masking.of(config, prepared.tokenizer)
    if config.task == "classification":
        weights = classification.class_weights(config, prepared)
        make = partial(classification.make_batch, weights=weights)
    files = (*prepared.train, *prepared.valid)
    most = max(prepared.form.rows(file, config.seq_len).most_segments for file in files)
    # A bound that other data is likely to share, and with it what is compiled.
    bound = 1 << (most - 1).bit_length()
    return lambda rows: dataclasses.replace(make(rows), most_segments=bound)
