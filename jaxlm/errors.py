"""The errors a user can cause. A command prints the sentence and exits; the library raises."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what would be right."""


class NonFiniteError(RuntimeError):
    """Training met non-finite losses or gradients too often in a row."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the choice closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
