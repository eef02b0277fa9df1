"""`python -m jaxlm.bench translation ...`: jaxlm beside what a user would take instead."""

import argparse
import dataclasses
import json
from pathlib import Path

from jaxlm.bench import translation
from jaxlm.cli import OneSentenceParser, run_command


def main(argv: list[str]) -> None:
    """Run a benchmark, print its table and write its figures. Raises UserError."""
    arguments = vars(_parser().parse_args(argv))
    out = Path(arguments.pop("out")).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    del arguments["benchmark"]
    results = translation.run(out=out, say=lambda line: print(line, flush=True), **arguments)
    figures = [dataclasses.asdict(result) for result in results]
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{'':<8}{'parameters':>12}{'tokens':>12}{'seconds':>9}{'tok/s':>8}  BLEU / chrF by beam")
    for r in results:
        scores = ", ".join(f"{beam} {b:.1f} / {c:.1f}" for beam, (b, c) in r.scores.items())
        print(
            f"{r.name:<8}{r.parameters:>12,}{r.tokens:>12,}{r.seconds:>9,.0f}"
            f"{r.tokens / r.seconds:>8,.0f}  {scores}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.bench",
        description="Measure jaxlm beside what a user would take instead, on the same work.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="benchmark", required=True, parser_class=OneSentenceParser)
    one = names.add_parser(
        "translation",
        help="a small Transformer beside Marian of transformers, trained by PyTorch",
        allow_abbrev=False,
    )
    one.add_argument("--config", dest="config_path", default="configs/translation-small.yaml")
    one.add_argument("--train", required=True, help="pairs, source TAB target")
    one.add_argument("--valid", required=True, help="pairs to translate and compare")
    one.add_argument("--language", required=True, help="of the targets, such as de")
    one.add_argument(
        "--tokens", type=int, default=3_700_000, help="of both sides, to train on [%(default)s]"
    )
    one.add_argument("--limit", type=int, default=400, help="validation pairs [%(default)s]")
    one.add_argument("--out", default="runs/bench-translation", help="[%(default)s]")
    return parser


if __name__ == "__main__":
    run_command(main)
