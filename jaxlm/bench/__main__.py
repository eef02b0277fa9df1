"""`python -m jaxlm.bench train|translation ...`: jaxlm beside what a user would take instead."""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

from jaxlm.bench import train, translation
from jaxlm.cli import OneSentenceParser, run_command


def main(argv: list[str]) -> None:
    """Run a benchmark, print its table and write its figures. Raises UserError."""
    arguments = vars(_parser().parse_args(argv))
    measure = {"train": _train, "translation": _translation}[arguments.pop("benchmark")]
    out = Path(arguments.pop("out")).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    results, table = measure(out=out, say=lambda line: print(line, flush=True), **arguments)
    figures = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m jaxlm.bench", *argv]),
        "results": [dataclasses.asdict(result) for result in results],
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table)


def _translation(out: Path, **arguments) -> tuple[list, str]:
    results = translation.run(out=out, **arguments)
    heads = f"{'':<8}{'parameters':>12}{'tokens':>12}{'seconds':>9}{'tok/s':>8}"
    lines = [f"{heads}  BLEU / chrF by beam"]
    for r in results:
        scores = ", ".join(f"{beam} {b:.1f} / {c:.1f}" for beam, (b, c) in r.scores.items())
        lines.append(
            f"{r.name:<8}{r.parameters:>12,}{r.tokens:>12,}{r.seconds:>9,.0f}"
            f"{r.tokens / r.seconds:>8,.0f}  {scores}"
        )
    return results, "\n".join(lines)


def _train(out: Path, on: str | None, models: str | None, quick: bool, say) -> tuple[list, str]:
    device = on or _device()
    results = train.run(device, quick, models.split(",") if models else None, say)
    heads = ("model", "", "tok/s (quartiles)", "jaxlm is", "compile", "peak")
    rows = [(*heads, "MFU", "causal", "of matmul")]
    widths = (-6, -14, 28, 10, 9, 10, 8, 8, 11)
    for r in results:
        speed = r.tokens_per_second
        percent = lambda share: "n/a" if share is None else f"{share:.1%}"  # noqa: E731
        rows.append(
            (
                r.workload,
                r.name,
                f"{speed.median:,.0f} ({speed.low:,.0f}-{speed.high:,.0f})",
                "" if r.ratio is None else f"{r.ratio:.2f}x",
                f"{r.compile_seconds:.0f} s",
                f"{r.peak_bytes / 1e9:.2f} GB",
                percent(r.mfu),
                percent(r.causal_mfu),
                percent(r.of_matmul),
            )
        )
    return results, "\n".join(
        "".join(
            f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
            for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    )


def _device() -> str:
    """`gpu` where JAX would use one; asked in a process of its own, which then lets it go."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "gpu" if "gpu" in done.stdout else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.bench",
        description="Measure jaxlm beside what a user would take instead, on the same work.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="benchmark", required=True, parser_class=OneSentenceParser)
    one = names.add_parser(
        "train",
        help="a training step beside the same model in PyTorch, eager and compiled",
        allow_abbrev=False,
    )
    one.add_argument("--on", choices=["cpu", "gpu"], help="[gpu where there is one]")
    one.add_argument("--models", help="of those of the device, such as 124M,1B [all]")
    one.add_argument("--quick", action="store_true", help="fewer turns")
    one.add_argument("--out", default="runs/bench-train", help="[%(default)s]")
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
