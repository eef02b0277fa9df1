"""The errors a user can cause. A command prints the sentence and exits; the library raises."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what would be right."""


class NonFiniteError(RuntimeError):
    """Training met non-finite losses or gradients too often in a row."""


def show(value) -> str:
    """A config's value as it is written in YAML, on one line."""
    if isinstance(value, str):
        return repr(value)
    return json.dumps(
        dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value,
        ensure_ascii=False,
        default=str,
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the choice closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_path(path: Path, pattern: str = "*") -> str:
    """`nearest` for a path that is not there, of what matches `pattern` in its folder."""
    hidden = path.name.startswith(".")
    others = (other for other in path.parent.glob(pattern) if other.name.startswith(".") == hidden)
    beside = {other.stem: str(other) for other in others}
    match = difflib.get_close_matches(path.stem, beside, n=1, cutoff=0.5)
    return f"; did you mean {beside[match[0]]!r}?" if match else ""


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of `total` closest to `wanted`."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


def needs(section: str, config, key: str, *kinds: str) -> tuple[bool, str]:
    """A rule for `check_read`: the field is read if `config.key` is one of `kinds`."""
    return getattr(config, key) in kinds, f"{section}.{key}={' or '.join(kinds)}"


def check_read(section: str, config, **rules: tuple[bool, str]) -> None:
    """Raise UserError for a field that was set although nothing reads it.

    A field's rule is whether it is read, and what it would take.
    """
    for key, (is_read, condition) in rules.items():
        value, default = getattr(config, key), config.__dataclass_fields__[key].default
        if value != default and not is_read:
            usual = show(default)
            raise UserError(
                f"{section}.{key}={show(value)} has no effect without {condition}: "
                f"set that, or {section}.{key}={usual}"
            )
