"""`python -m jaxlm.export RUN --to=hf --out=DIR`: a model for another stack, verified there."""

import argparse
from pathlib import Path

from jaxlm.api import check_import, export_checkpoint
from jaxlm.cli import OneSentenceParser, run_command
from jaxlm.errors import UserError
from jaxlm.export.exporter import STACKS
from jaxlm.export.verify import Verification


def main(argv: list[str]) -> int:
    """Export, or check a folder of another stack; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    source, to, out = arguments.pop("model"), arguments.pop("to"), arguments.pop("out")
    if arguments.pop("check"):
        given = {name for name, value in (("--to", to), ("--out", out)) if value is not None}
        if given:
            raise UserError(f"--check writes nothing: leave out {' and '.join(sorted(given))}")
        return _report(check_import(Path(source).expanduser(), say), source)
    if to is None or out is None:
        raise UserError(
            f"give --to ({', '.join(STACKS)}) and --out, a folder that does not exist yet"
        )
    report = export_checkpoint(source, to, out, say=say, **arguments)
    return _report(report, out)


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)


def _report(report: Verification, what: str) -> int:
    if report.verified:
        versions = report.versions
        say(f"verified: {what} in {report.stack} {versions[report.stack]}: {report.reason}")
    else:
        say(f"unverified: {what}: {report.reason}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.export",
        description="Write a model for another stack, and verify there that it is the same model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, one of its step folders, or Hugging Face folder"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: check that the Hugging Face folder MODEL computes the same here as in "
        "transformers, and comes back byte for byte",
    )
    parser.add_argument(
        "--to",
        choices=STACKS,
        help="hf: transformers, vLLM, SGLang; gguf: llama.cpp; stablehlo: JAX and its runtimes",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write, which must not exist yet")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="type of the weights: float32, bfloat16, float16, or q8_0 for gguf [%(default)s]",
    )
    parser.add_argument(
        "--step", default="last", help="of a run: last, best (validation) or a number [%(default)s]"
    )
    parser.add_argument(
        "--no_average",
        dest="average",
        action="store_false",
        help="of a run with optim.ema_decay: the parameters themselves, not their moving average",
    )
    parser.add_argument(
        "--average_last",
        type=int,
        metavar="N",
        help="of a run: the mean of the parameters in its last N checkpoints, up to --step",
    )
    parser.add_argument(
        "--family", help="model type of transformers, where several can express the model"
    )
    parser.add_argument(
        "--shard_gb", type=float, help="of hf: largest file of weights, in gigabytes [5]"
    )
    parser.add_argument(
        "--skip_verification", action="store_true", help="and say so in verification.json"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
