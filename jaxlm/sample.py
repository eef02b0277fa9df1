"""`python -m jaxlm.sample RUN --prompt=...`: text from a trained model, as it comes."""

import argparse
import contextlib
import sys

from jaxlm.api import LanguageModel, load
from jaxlm.cli import OneSentenceParser, run_command
from jaxlm.errors import UserError
from jaxlm.texts import generate


def main(argv: list[str]) -> None:
    """Stream one continuation of the prompt, of standard input, or of each line typed."""
    arguments = vars(_parser().parse_args(argv))
    model = load(*(arguments.pop(name) for name in ("run", "mesh", "dtype", "average_last")))
    prompt = arguments.pop("prompt")
    if prompt is not None:
        _continue(model, _standard_input() if prompt == "-" else prompt, arguments)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    print("Type a prompt and press Enter; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line:
            return
        try:
            _continue(model, line, arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.read().encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8: convert it first") from None


def _continue(model: LanguageModel, prompt: str, settings: dict) -> None:
    pieces = generate(model, prompt, stream=True, **settings)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.sample",
        description="Continue a prompt with a trained model, printing text as it comes.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or one of its step folders")
    parser.add_argument(
        "--prompt", help="text to continue; - reads standard input; left out: ask for prompts"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="[%(default)s]")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token [%(default)s]"
    )
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--top_p", type=float, help="... among the likeliest that sum to p")
    parser.add_argument("--min_p", type=float, help="... above this share of the likeliest")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="[%(default)s]")
    parser.add_argument("--stop", action="append", help="end before this text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--mesh", help="devices by axis, such as tp2; left out: one device")
    parser.add_argument("--dtype", help="float32 or bfloat16; left out: as trained")
    parser.add_argument(
        "--average_last",
        type=int,
        metavar="N",
        help="take the mean of the parameters in the run's last N checkpoints",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
