"""Pictures and tables for the metadata of assets: plain data in, Markdown with an inlined PNG out.

About 5 x 3 inches at 90 dpi: the UI shows larger ones cut off.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, ACCENT, MUTED, WARN = "#2b3440", "#3b6fd4", "#b8c2cf", "#d4733b"


def funnel_table(funnel: Mapping[str, Any]) -> str:
    """What became of the records that were read: a table short enough for the UI to show in place."""
    rows = [[name, f"{count:,}"] for name, count, _ in _funnel_rows(funnel)]
    return table_markdown(["what became of them", "n"], [["read", f"{funnel['read']:,}"], *rows])


def funnel_plot(funnel: Mapping[str, Any]) -> str:
    """The same as bars."""
    names, counts, colors = zip(*reversed(_funnel_rows(funnel)), strict=True)

    def draw(axes: Any) -> None:
        bars = axes.barh(names, counts, color=colors)
        told = [f"{count:,} ({count / max(1, funnel['read']):.1%})" for count in counts]
        axes.bar_label(bars, told, padding=3, color=INK)
        # The bars add up to what was read.
        axes.set_title(f"what became of {funnel['read']:,} records", fontsize=10, loc="left")
        axes.margins(x=0.3)
        _count_axis(axes.xaxis)
        axes.spines[["top", "right"]].set_visible(False)

    return image(draw, height=1.2 + 0.32 * len(names))


def _funnel_rows(funnel: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    rows = [("kept", funnel["kept"], ACCENT)]
    rows += [(f"dropped: {reason}", count, WARN) for reason, count in funnel["dropped"].items()]
    return rows + [(f"quarantined: {reason}", count, MUTED) for reason, count in funnel["quarantined"].items()]


def _count_axis(axis: Any) -> None:
    """Whole numbers alone, and not so many that they run into one another."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def histogram_markdown(values: Mapping[str, Sequence[int]], x: str, limit: int) -> str:
    """Histogram of one or more named series, with a line at `limit`."""

    def draw(axes: Any) -> None:
        names = [name for name in values if values[name]]
        colors = [ACCENT, WARN][: len(names)]
        axes.hist([values[n] for n in names], bins=24, stacked=True, label=names, color=colors)
        axes.axvline(limit, color=INK, linestyle="--", linewidth=1, label=f"budget {limit:,}")
        axes.set_xlabel(f"{x}, n = {sum(len(values[n]) for n in names):,}")
        axes.set_ylabel("rows")
        _count_axis(axes.yaxis)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)

    return image(draw)


def curves_markdown(curves: Mapping[str, Sequence[tuple[float, float]]], y: str, x: str) -> str:
    """Named curves of (x, y) points: the loss of a training run."""

    def draw(axes: Any) -> None:
        for (name, points), color in zip(curves.items(), (ACCENT, WARN, INK), strict=False):
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=color, marker="o" if len(points) < 15 else None)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)

    return image(draw)


def image(draw: Callable[[Any], None], height: float = 3.0) -> str:
    """What `draw` puts on an axes, as Markdown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), dpi=90, layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return png_markdown(buffer.getvalue())


def png_markdown(png: bytes) -> str:
    """A PNG as Markdown that needs no file."""
    return f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})"


def table_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; pipes and line breaks in cells are made harmless."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
