"""`python -m jaxlm.evaluate PATH --data=...`: how good a model is on a task's texts."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from jaxlm.api import load
from jaxlm.beam import Beams
from jaxlm.cli import OneSentenceParser, run_command
from jaxlm.config import COLUMNS, KINDS
from jaxlm.errors import UserError
from jaxlm.evaluation import BEAMS, Figures, Request, evaluate
from jaxlm.tasks.confusion import confusion_picture
from jaxlm.tasks.labels import confusion_table
from jaxlm.values import as_tuple

COMPRESSORS = {"gzip": "gzip -9", "xz": "xz -9"}


def main(argv: list[str]) -> None:
    """Evaluate a model and print its figures. Raises UserError."""
    arguments = _parser().parse_args(argv)
    request = Request(
        data=_list(arguments.data),
        columns=_columns(arguments),
        languages=_list(arguments.languages),
        task=arguments.task,
        baseline=arguments.baseline,
        limit=arguments.limit,
        beams=_beams(arguments.num_beams, arguments.length_penalty),
    )
    if arguments.picture is not None:
        _check_picture(Path(arguments.picture).expanduser())
    model = load(
        arguments.path, arguments.mesh, average_last=arguments.average_last, step=arguments.step
    )
    figures = evaluate(model, request, lambda line: print(line, file=sys.stderr))
    if arguments.picture is not None:
        _draw(figures, arguments.picture)
    if arguments.json:
        print(json.dumps({"model": str(model.source), **figures}))
    else:
        print(report(str(model.source), figures, arguments.baseline))


def report(name: str, figures: Figures, baseline: str | None = None) -> str:
    """The figures of `evaluate` as tables, for people."""
    return {
        "language_modelling": _texts,
        "instruction": _texts,
        "translation": _translations,
        "classification": _labels,
        "masked_language_modelling": _masked,
    }[figures["task"]](name, figures, baseline)


def _losses(name: str, figures: Figures, baseline: str | None) -> str:
    columns = ("loss", "perplexity", "bits_per_byte")
    rows = [["", "nats/token", "perplexity", "bits/byte"]]
    for label, prefix in ((name, "valid"), (baseline, baseline)):
        if label is not None:
            loss, perplexity, bits = (figures[f"{prefix}_{column}"] for column in columns)
            rows.append([label, f"{loss:.4f}", f"{perplexity:.2f}", f"{bits:.4f}"])
    for key, label in COMPRESSORS.items():
        if (bits := figures.get(f"{key}_bits_per_byte")) is not None:
            rows.append([label, "", "", f"{bits:.4f}"])
    read = f"{figures['tokens']:,} tokens, {figures['bytes']:,} bytes"
    return f"{_table(rows)}\n{read}"


def _texts(name: str, figures: Figures, baseline: str | None) -> str:
    return _losses(name, figures, baseline) + _skipped(figures)


def _translations(name: str, figures: Figures, baseline: str | None) -> str:
    languages = [key.removeprefix("valid_bleu_") for key in figures if "valid_bleu_" in key]
    rows = [["", "BLEU", "chrF"]]
    for label, suffix in ((name, ""), *((language, f"_{language}") for language in languages)):
        scores = (figures[f"valid_{score}{suffix}"] for score in ("bleu", "chrf"))
        rows.append([label, *(f"{score:.2f}" for score in scores)])
    signatures = figures["signatures"].items()
    lines = [f"{language}: {text}".removeprefix(": ") for language, text in signatures]
    count = f"{figures['texts']:,} texts"
    if figures.get("left_out"):
        count += f"; {figures['left_out']:,} left out as longer than the run's rows"
    count += _skipped(figures)
    return "\n".join([_table(rows), count, *lines, "", _losses(name, figures, None)])


def _labels(name: str, figures: Figures, baseline: str | None) -> str:
    shown = {"accuracy": "accuracy", "macro_f1": "macro-F1", "ece": "calibration error"}
    parts = [f"{text} {figures[f'valid_{key}']:.4f}" for key, text in shown.items()]
    line = ", ".join([*parts, f"loss {figures['valid_loss']:.4f} nats/text"])
    table = confusion_table(np.array(figures["confusion"]), list(figures["labels"]))
    return f"{name}: {line}\n{figures['texts']:,} texts{_skipped(figures)}\n\n{table}"


def _skipped(figures: Figures) -> str:
    skipped = figures.get("skipped")
    return f"; {skipped:,} skipped as empty, null or invalid UTF-8" if skipped else ""


def _masked(name: str, figures: Figures, baseline: str | None) -> str:
    loss, perplexity = figures["valid_loss"], figures["valid_perplexity"]
    return (
        f"{name}: loss {loss:.4f} nats/hidden token, perplexity {perplexity:.2f}\n"
        f"{figures['tokens']:,} hidden tokens"
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()
        for first, *rest in rows
    )


def _draw(figures: Figures, path: str) -> None:
    if "confusion" not in figures:
        raise UserError(f"--picture={path} is for task=classification, not {figures['task']}")
    drawn = confusion_picture(figures["confusion"], list(figures["labels"]))
    try:
        Path(path).expanduser().write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --picture={path}: {error.strerror}") from error


def _check_picture(path: Path) -> None:
    if path.suffix != ".svg" or not path.parent.is_dir():
        raise UserError(f"--picture={path} should name an SVG file in a folder that exists")


def _beams(num_beams: int | None, length_penalty: float | None) -> Beams | None:
    """How to search, where anything was said about it."""
    given = {"num_beams": num_beams, "length_penalty": length_penalty}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(BEAMS, **given) if given else None


def _columns(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings that say where records have what, of those given."""
    given = {name: getattr(arguments, name) for name in COLUMNS}
    given = {name: value for name, value in given.items() if value is not None}
    if "tsv_header" in given:
        given["tsv_header"] = given["tsv_header"] == "true"
    return given


def _list(text: str | None) -> tuple[str, ...]:
    """`a` or `[a,b]`, as configs have them."""
    if text is None:
        return ()
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else None
    names = as_tuple(text) if inner is None else tuple(x.strip() for x in inner.split(","))
    if "" in names:
        raise UserError("--data and --languages take names: leave them out for none")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.evaluate",
        description="Evaluate a model on texts: all that fit its rows.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", metavar="PATH", help="a run, one of its step folders, or a Hugging Face folder"
    )
    parser.add_argument(
        "--data", help="sources, as data.train has them; left out: the run's validation texts"
    )
    for name, tasks in COLUMNS.items():
        choices = ("true", "false") if name == "tsv_header" else None
        parser.add_argument(
            f"--data.{name}",
            dest=name,
            metavar=None if choices else "NAME",
            choices=choices,
            help=f"{', '.join(tasks)}: of --data, as in training; left out: the run's",
        )
    parser.add_argument("--task", choices=KINDS, help="left out: the model's")
    parser.add_argument(
        "--baseline", help="ngramN, such as ngram5: fitted on the run's training texts"
    )
    parser.add_argument(
        "--languages", help="translation: target language of each source; left out: the run's"
    )
    parser.add_argument("--num_beams", type=_count, help=f"translation [{BEAMS.num_beams}]")
    parser.add_argument(
        "--length_penalty", type=float, help=f"translation [{BEAMS.length_penalty}]"
    )
    parser.add_argument(
        "--limit", type=_count, help="only so many of each source's documents or records"
    )
    parser.add_argument(
        "--step", default="last", help="of a run: last, best (validation) or a number [%(default)s]"
    )
    parser.add_argument(
        "--average_last", type=_count, help="take the mean of the run's last N checkpoints"
    )
    parser.add_argument("--mesh", help="devices by axis, such as dp4; left out: one device")
    parser.add_argument(
        "--picture", metavar="FILE.svg", help="classification: draw the confusion matrix"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    run_command(main)
