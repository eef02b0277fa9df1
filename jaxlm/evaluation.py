"""How good a model is on a task's texts: the figures of validation on all of them, and more."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxlm.api import LanguageModel
from jaxlm.beam import Beams
from jaxlm.config import COLUMNS, KINDS, Config
from jaxlm.continuing import Row, Settings, continue_rows
from jaxlm.data.corpus import Prepared, prepare
from jaxlm.data.loader import validation_batches
from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.export.huggingface import is_model_folder
from jaxlm.loading import MOST_TOKENS
from jaxlm.mesh import batch_shards
from jaxlm.models.ngram import Ngram
from jaxlm.models.ngram_fit import fit
from jaxlm.placement import place
from jaxlm.sampling import Sampling
from jaxlm.sharding import batch_sharding
from jaxlm.step import eval_step, on_mesh
from jaxlm.tasks.build import batch_maker, check_text_field, make_form
from jaxlm.tasks.labels import label_metrics, label_scores
from jaxlm.tasks.language_modelling import compressed_bits, loss_metrics
from jaxlm.tasks.metrics import translation_metrics
from jaxlm.tasks.translation import languages_of, reference_pairs, unknown_language

ROWS_PER_SHARD = 8
BEAMS = Beams(num_beams=4, length_penalty=0.6)
BASELINE = re.compile(r"ngram([1-9]\d*)")

Figures = dict[str, object]
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate a model on."""

    data: tuple[str, ...] = ()
    """Sources, as in `data.train`; empty: the validation texts of the model's run."""
    columns: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Settings by the names of COLUMNS; left out: as in the model's run."""
    languages: tuple[str, ...] = ()
    """Translation: the target language of each source; empty: as in the model's run."""
    task: str | None = None
    """None: the model's."""
    baseline: str | None = None
    """Language modelling: `ngramN`, fitted on the training texts of the model's run."""
    limit: int | None = None
    """Take only so many of the first documents or examples of each source."""
    beams: Beams | None = None
    """Translation: how it searches; None: as BEAMS."""


def evaluate(model: LanguageModel, request: Request, report: Report = lambda line: None) -> Figures:
    """The figures of a model by name: numbers, or lists and mappings of them for tables.

    They depend on neither the mesh nor how many texts are computed at once, but for rounding.
    `report` gets lines of progress. Raises UserError for texts, tasks and baselines that do not
    fit the model.
    """
    task = request.task or model.config.task
    _check(model, task, request)
    config = dataclasses.replace(model.config, task=task)
    if is_model_folder(model.source):
        data = dataclasses.replace(config.data, seq_len=min(config.seq_len, MOST_TOKENS))
        config = dataclasses.replace(config, data=data)
    prepared = _prepare(model, config, request, report)
    if request.limit is not None:
        few = tuple(file.first(request.limit) for file in prepared.valid)
        prepared = dataclasses.replace(prepared, valid=few)
    return {"task": config.task} | TASKS[config.task](model, config, prepared, request, report)


def _check(model: LanguageModel, task: str, request: Request) -> None:
    """Raise UserError for a task that the model cannot do, and for what the task does not read."""
    if task == "classification":
        model.check_says_something()
    kind, labels = model.config.model.kind, model.config.model.labels
    fits = kind in KINDS[task] and (task == "translation") == model.config.model.reads_source
    # A published model's head for hidden tokens is not read.
    fits &= task != "masked_language_modelling" or model.config.task == task
    if not fits or (task == "classification") != (labels is not None):
        raise UserError(
            f"{model.source} is a model of task={model.config.task} and cannot be evaluated on "
            f"task={task}: leave --task out, or give another model"
        )
    for name in request.columns:
        if not request.data:
            raise UserError(f"--data.{name} is for texts in --data: give them")
        if task not in COLUMNS[name]:
            readers = " or ".join(COLUMNS[name])
            raise UserError(f"--data.{name} is for task={readers}, not {task}: leave it out")
    reads = {
        "--baseline": (request.baseline, "language_modelling"),
        "--languages": (request.languages, "translation"),
        "a beam search (--num_beams, --length_penalty)": (request.beams, "translation"),
    }
    if request.baseline is not None and BASELINE.fullmatch(request.baseline) is None:
        raise UserError(
            f"--baseline={request.baseline} is not known: use ngramN, N from 1 on, such as ngram5"
        )
    for option, (value, reader) in reads.items():
        if value and task != reader:
            raise UserError(f"{option} is for task={reader}, not {task}: leave it out")


def _prepare(model: LanguageModel, config: Config, request: Request, report: Report) -> Prepared:
    """The texts, in `valid`."""
    if not request.data:
        return _prepare_run(model, config, report)
    data = dataclasses.replace(
        config.data,
        train=request.data,
        valid=request.data,
        valid_fraction=type(config.data).__dataclass_fields__["valid_fraction"].default,
        weights=None,
        **_languages(model, config, request) | request.columns,
    )
    config = dataclasses.replace(config, data=data)
    if "text_field" in request.columns:  # else it is of the texts of the model's run
        check_text_field(config)
    form = make_form(config)
    if config.task == "classification":
        form = dataclasses.replace(form, ends=(model.prefix, model.suffix))
    return prepare(data, TokenizerConfig(kind="file", path=str(model.source)), report, form)


def _languages(model: LanguageModel, config: Config, request: Request) -> dict[str, object]:
    """The settings that tell the language of each source.

    Raises UserError where they are not one for each, or not the model's.
    """
    languages, column = request.languages, None
    if not languages and "language_column" not in request.columns:
        languages, column = config.data.languages, config.data.language_column
    if len(languages) > 1 and len(languages) != len(request.data):
        given = "--languages gives" if request.languages else "the model's run has"
        raise UserError(
            f"{given} {len(languages)} languages ({', '.join(languages)}) for {len(request.data)} "
            "sources in --data: give --languages, one for each"
        )
    known = languages_of(model.tokenizer)
    if unknown := sorted({*languages} - {*known}):
        raise unknown_language(unknown[0], known, "--languages: ")
    return {"languages": languages, "valid_languages": (), "language_column": column}


def _prepare_run(model: LanguageModel, config: Config, report: Report) -> Prepared:
    """The texts that the model's run trains and validates on. Raises UserError for other texts."""
    if is_model_folder(model.source):
        raise UserError(
            f"{model.source} is not a run, whose texts would be known: give --data (and no "
            "--baseline)"
        )
    prepared = prepare(config.data, config.tokenizer, report, make_form(config))
    if prepared.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise UserError(
            f"the texts of {model.source} give another tokenizer than it has, so they have "
            "changed: restore them, or give --data (and no --baseline)"
        )
    return prepared


def _sums(model: LanguageModel, config: Config, prepared: Prepared):
    """The evaluation step's sums over all rows, float64, and the bytes of what is predicted."""
    program, lengths, num_bytes, sums = model.program, model.tokenizer.byte_lengths, 0, []

    def step(params, batch):
        params = program.layout.unpad(params)
        return eval_step(params, batch, model=program.model, config=config)

    compiled, make_batch = jax.jit(on_mesh(step, program.mesh)), batch_maker(config, prepared)
    rows = [prepared.form.rows(file, config.seq_len) for file in prepared.valid]
    for batch in validation_batches(rows, batch_size=ROWS_PER_SHARD * batch_shards(program.mesh)):
        batch = make_batch(batch)
        if config.model.labels is None:  # else targets are labels
            num_bytes += int(lengths[batch.targets[batch.weights > 0]].sum())
        placed = place(batch, batch_sharding(program.mesh))
        sums.append(jax.device_get(compiled(model.params, placed)))
    add = lambda *parts: np.sum(parts, axis=0, dtype=np.float64)  # noqa: E731
    return jax.tree.map(add, *sums), num_bytes


def _losses(
    model: LanguageModel, config: Config, prepared: Prepared, request: Request, report: Report
) -> Figures:
    """Figures of what is predicted token by token; an N-gram model reads documents, not rows."""
    if isinstance(model.params, Ngram):
        nats, targets = model.params.nats(prepared.valid)
        num_bytes = len(_text(model, prepared))
    else:
        sums, num_bytes = _sums(model, config, prepared)
        nats, targets = float(sums.nats), float(sums.weight)
    return loss_metrics(nats, targets, num_bytes) | {"tokens": int(targets), "bytes": num_bytes}


def _language_modelling(
    model: LanguageModel, config: Config, prepared: Prepared, request: Request, report: Report
) -> Figures:
    figures = _losses(model, config, prepared, request, report)
    for name, bits in compressed_bits(_text(model, prepared)).items():
        figures[f"{name.split()[0]}_bits_per_byte"] = bits
    if request.baseline is not None:
        ngram = _baseline(model, config, request.baseline, report)
        metrics = loss_metrics(*ngram.nats(prepared.valid), figures["bytes"])
        for name, value in metrics.items():
            figures[f"{request.baseline}_{name.removeprefix('valid_')}"] = value
    return figures | _skipped(prepared, request)


def _text(model: LanguageModel, prepared: Prepared) -> bytes:
    return b"".join(model.tokenizer.decode_bytes(file.tokens.tolist()) for file in prepared.valid)


def _baseline(model: LanguageModel, config: Config, name: str, report: Report) -> Ngram:
    """The N-gram model that is called `name`, of the training texts of the model's run."""
    match = BASELINE.fullmatch(name)
    whole = dataclasses.replace(config, tokenizer=config.tokenizer.without_dropout())
    prepared = _prepare_run(model, whole, report)
    report(f"fitting {name}")
    return fit(prepared.train, int(match[1]), model.config.model.vocab_size)


def _translation(
    model: LanguageModel, config: Config, prepared: Prepared, request: Request, report: Report
) -> Figures:
    pairs = reference_pairs(prepared)
    report(f"translating {len(pairs):,} texts")
    beams = request.beams or BEAMS
    searches = beams if beams.num_beams > 1 else None
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    length, greedily = model.config.model.max_seq_len, Sampling(temperature=0.0)
    settings = Settings(length, greedily, searches, [], 0, 1, eos, True)
    rows = [Row([bos], pair.source) for pair in pairs]
    texts = [text for (text,) in continue_rows(model, rows, settings)]
    metrics, signatures = translation_metrics(texts, pairs)
    figures = _losses(model, config, prepared, request, report)
    counts = {"texts": len(pairs)}
    if request.limit is None:  # else it is not known of so many
        counts["left_out"] = sum(file.num_dropped for file in prepared.valid)
    return figures | metrics | {"signatures": signatures} | counts | _skipped(prepared, request)


def _skipped(prepared: Prepared, request: Request) -> Figures:
    """How many records are left out as bad, where that is known."""
    if request.limit is not None:
        return {}
    return {"skipped": sum(file.num_skipped for file in prepared.valid)}


def _classification(
    model: LanguageModel, config: Config, prepared: Prepared, request: Request, report: Report
) -> Figures:
    sums, _ = _sums(model, config, prepared)
    names = ("precision", "recall", "f1")
    scores = zip(prepared.form.names, label_scores(sums.confusion), strict=True)
    return label_metrics(sums) | {
        "texts": int(sums.confusion.sum()),
        "labels": {label: dict(zip(names, row, strict=True)) for label, row in scores},
        "confusion": sums.confusion.astype(int).tolist(),
        **_skipped(prepared, request),
    }


def _masked(
    model: LanguageModel, config: Config, prepared: Prepared, request: Request, report: Report
) -> Figures:
    sums, _ = _sums(model, config, prepared)
    return loss_metrics(float(sums.nats), float(sums.weight)) | {"tokens": int(sums.weight)}


TASKS = {
    "language_modelling": _language_modelling,
    "translation": _translation,
    "instruction": _losses,
    "classification": _classification,
    "masked_language_modelling": _masked,
}
