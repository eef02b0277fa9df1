"""A picture of a confusion matrix."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

CELL, HEAD, CHARACTER = 84, 56, 8
DARK, LIGHT, LINE, TEXT, FAINT = "#2f6fb5", "#ffffff", "#c3cad4", "#1d2733", "#5d6b7a"


def confusion_picture(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Counts [L, L] as an SVG: a row for each true label, a column for each predicted one.

    A cell is as dark as its share of its row's texts.
    """
    confusion = np.asarray(confusion)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    left = max(90, CHARACTER * max(map(len, names)) + 24)
    side = CELL * len(names)
    parts = [
        _text(left + side / 2, 18, "predicted", FAINT),
        _text(left - 12, HEAD - 12, "true", FAINT, anchor="end"),
        *(
            _text(left + CELL * (i + 0.5), HEAD - 12, name, TEXT, CELL - 8)
            for i, name in enumerate(names)
        ),
    ]
    for row, name in enumerate(names):
        top = HEAD + CELL * row
        parts.append(_text(left - 12, top + CELL / 2 + 5, name, TEXT, anchor="end"))
        for column in range(len(names)):
            share = float(shares[row, column])
            x, ink = left + CELL * column, LIGHT if share > 0.5 else TEXT
            parts.append(
                f'<rect x="{x}" y="{top}" width="{CELL}" height="{CELL}" fill="{DARK}" '
                f'fill-opacity="{share:.3f}" stroke="{LINE}"/>'
            )
            parts.append(_text(x + CELL / 2, top + CELL / 2, f"{confusion[row, column]:,}", ink))
            parts.append(_text(x + CELL / 2, top + CELL / 2 + 18, f"{share:.0%}", ink, size=12))
    size = f'width="{left + side + 12}" height="{HEAD + side + 12}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="{LIGHT}"/>{"".join(parts)}</svg>\n'
    )


def _text(
    x: float, y: float, text: str, colour: str, room: float = 0, anchor="middle", size: int = 15
) -> str:
    """Text at a point; with `room`, squeezed into so many pixels."""
    squeezed = f' textLength="{room}" lengthAdjust="spacingAndGlyphs"'
    fits = not room or CHARACTER * len(text) <= room
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
        f"{'' if fits else squeezed}>{escape(text)}</text>"
    )
