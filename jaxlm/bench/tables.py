"""How results look in a terminal."""

from collections.abc import Sequence


def table(widths: Sequence[int], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells; those of a negative width are flush left."""
    return "\n".join(
        "".join(
            f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
            for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    )


def percent(share: float | None) -> str:
    """A share, or n/a."""
    return "n/a" if share is None else f"{share:.1%}"


def ratio(value: float | None) -> str:
    """How many times as fast jaxlm is; nothing beside jaxlm itself."""
    return "" if value is None else f"{value:.2f}x"


def speeds(result) -> tuple[str, ...]:
    """The cells of a competitor's speed, jaxlm's ratio to it, its compile time and memory."""
    speed = result.tokens_per_second
    return (
        f"{speed.median:,.0f} ({speed.low:,.0f}-{speed.high:,.0f})",
        ratio(result.ratio),
        f"{result.compile_seconds:.0f} s",
        f"{result.peak_bytes / 1e9:.2f} GB",
    )


SPEED_HEADS = ("tok/s (quartiles)", "jaxlm is", "compile", "peak")
SPEED_WIDTHS = (28, 10, 9, 10)
