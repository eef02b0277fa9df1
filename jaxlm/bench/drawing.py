"""Pictures of benchmarks, by matplotlib where it is installed."""

from collections.abc import Callable, Sequence
from pathlib import Path

OURS, THEIRS = "#2f6fb5", "#b9c2cd"


def picture(draw: Callable, results: Sequence, out: Path, say: Callable[[str], None]) -> None:
    """`draw(figure, results)` into a file; without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no picture: pip install 'jaxlm[bench]'")
        return
    figure = Figure(layout="constrained")
    draw(figure, results)
    figure.savefig(out, dpi=150)
    say(f"picture: {out}")


def bars(figure, results: Sequence, title: Callable[[object], str], ours: str) -> None:
    """Speeds in tokens/s: a panel for each `title(result)`, a bar for each competitor.

    A bar is the median, its whisker goes from quartile to quartile.
    """
    groups: dict[str, list] = {}
    for result in results:
        groups.setdefault(title(result), []).append(result)
    heights = [1 + len(rows) for rows in groups.values()]
    figure.set_size_inches(9, 0.6 + 0.3 * sum(heights) + 0.3 * len(heights))
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, groups.items(), strict=True):
        speeds = [r.tokens_per_second for r in rows]
        medians = [s.median for s in speeds]
        reach = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
        colors = [OURS if r.name == ours else THEIRS for r in rows]
        axes.barh([r.name for r in rows], medians, xerr=reach, color=colors, height=0.7)
        for place, (row, median) in enumerate(zip(rows, medians, strict=True)):
            ink = "white" if row.name == ours else "black"
            axes.text(0, place, f" {median:,.0f}", va="center", color=ink)
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("tokens per second")
