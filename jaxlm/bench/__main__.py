"""`python -m jaxlm.bench NAME`: jaxlm beside what a user would take instead."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

from jaxlm.bench import checkpoint, data, decode, scale, train, translation
from jaxlm.bench.drawing import picture
from jaxlm.bench.turns import jax_on
from jaxlm.cli import OneSentenceParser, run_command
from jaxlm.errors import UserError

BENCHMARKS = {
    "train": (train, "a training step beside the same model in PyTorch, eager and compiled"),
    "decode": (decode, "generation beside transformers: growing, fixed and compiled caches"),
    "data": (data, "preparing beside datasets and a fast tokenizer, the loader beside training"),
    "checkpoint": (checkpoint, "what a save holds up; save and restore beside the bare disk"),
    "scale": (scale, "steps for many devices and layers: compile time, bytes held and sent"),
    "translation": (translation, "a small Transformer beside Marian, trained by PyTorch"),
}
ALL = ("train", "decode", "data", "checkpoint", "scale")


def main(argv: list[str]) -> None:
    """Run a benchmark, print its table and write its figures. Raises UserError."""
    arguments = vars(_parser().parse_args(argv))
    name, out = arguments.pop("benchmark"), Path(arguments.pop("out")).expanduser()
    command = " ".join(["python -m jaxlm.bench", *argv])
    if name != "all":
        _run(name, out, command, arguments)
        return
    for each in ALL:
        takes = vars(_parser().parse_args([each]))
        given = {key: value for key, value in arguments.items() if key in takes}
        takes = {key: value for key, value in takes.items() if key not in ("benchmark", "out")}
        print(f"\n{each}: {BENCHMARKS[each][1]}", flush=True)
        _run(each, out / each, command, takes | given)


def _run(name: str, out: Path, command: str, arguments: dict) -> None:
    benchmark = BENCHMARKS[name][0]
    if "on" in arguments:
        arguments["device"] = _device(arguments.pop("on"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        results = benchmark.run(out=out, say=_say, **arguments)
    except UserError:
        with contextlib.suppress(OSError):  # it holds what was measured before
            out.rmdir()
        raise
    figures = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if hasattr(benchmark, "draw"):
        picture(benchmark.draw, results, out / f"{name}.png", _say)
    print(benchmark.table(results))


def _say(line: str) -> None:
    print(line, flush=True)


def _device(given: str | None) -> str:
    """The device that is given or, if none is, `gpu` where JAX would use one."""
    if given == "gpu" and not _finds_gpu(jax_on("gpu")):
        raise UserError(
            "--on=gpu: JAX finds no GPU here; use --on=cpu, or install JAX for it: "
            "pip install 'jaxlm[cuda12]' or 'jaxlm[cuda13]'"
        )
    return given or ("gpu" if _finds_gpu() else "cpu")


def _finds_gpu(environment: dict[str, str] | None = None) -> bool:
    """Whether JAX uses a GPU; asked in a process of its own, which then lets it go."""
    code = "import jax; print(jax.default_backend())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "gpu" in done.stdout


def _sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",") if size.strip().isdecimal()]
    if len(sizes) < text.count(",") + 1 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers from 1 on, such as 1,8"
        )
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.bench",
        description="Measure jaxlm beside what a user would take instead, on the same work.",
        allow_abbrev=False,
    )
    helps = {name: text for name, (_, text) in BENCHMARKS.items()} | {
        "all": f"{', '.join(ALL)}: what needs no pairs of texts"
    }
    names = parser.add_subparsers(
        dest="benchmark",
        metavar="|".join(helps),
        required=True,
        parser_class=OneSentenceParser,
    )
    for name, text in helps.items():
        one = names.add_parser(name, help=text, allow_abbrev=False)
        if name in ("train", "decode", "checkpoint", "all"):
            one.add_argument("--on", choices=["cpu", "gpu"], help="[gpu where there is one]")
        if name in ("train", "decode"):
            one.add_argument("--models", help="of those of the device, such as 1B [all]")
        if name == "decode":
            one.add_argument(
                "--batches", type=_sizes, help="prompts at once, such as 1,8 [several]"
            )
        if name == "data":
            one.add_argument("--train", default="stdlib", help="as in data.train [%(default)s]")
        if name == "translation":
            _add_translation(one)
        else:
            one.add_argument("--quick", action="store_true", help="less of it, and fewer turns")
        out = "runs/bench" if name == "all" else f"runs/bench-{name}"
        one.add_argument("--out", default=out, help="[%(default)s]")
    return parser


def _add_translation(one: argparse.ArgumentParser) -> None:
    one.add_argument("--config", dest="config_path", default="configs/translation-small.yaml")
    one.add_argument("--train", required=True, help="pairs, source TAB target")
    one.add_argument("--valid", required=True, help="pairs to translate and compare")
    one.add_argument("--language", required=True, help="of the targets, such as de")
    one.add_argument(
        "--tokens", type=int, default=3_700_000, help="of both sides, to train on [%(default)s]"
    )
    one.add_argument("--limit", type=int, default=400, help="validation pairs [%(default)s]")


if __name__ == "__main__":
    run_command(main)
