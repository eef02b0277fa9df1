"""`python -m jaxlm`: which commands there are."""

import importlib.metadata
import platform

from jaxlm.cli import run_command
from jaxlm.errors import UserError

COMMANDS = {
    "train": "train a model, or continue its run",
    "prepare": "tokenise the data now, so that training starts at once",
    "sample": "what a trained model makes of texts: continue, answer, translate, classify",
    "evaluate": "how good a model is on a task's texts",
    "export": "write a model for another stack, and verify it there",
    "check": "prove that a mesh computes what one device does",
    "bench": "measure jaxlm beside what a user would take instead",
}


def main(argv: list[str]) -> None:
    """Print a line for each command, or the version. Raises UserError for other arguments."""
    if argv == ["--version"]:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jaxlm", "jax")]
        print(", ".join([*versions, f"Python {platform.python_version()}"]))
        return
    others = [word for word in argv if word not in ("--help", "-h")]
    if others:
        raise UserError(
            f"python -m jaxlm takes no {others[0]!r}: a command is written with a dot, such as "
            "python -m jaxlm.train"
        )
    for name, what in COMMANDS.items():
        print(f"python -m jaxlm.{name:<9} {what}")
    print("Each has --help. python -m jaxlm --version names what runs here.")


if __name__ == "__main__":
    run_command(main)
