"""Plots of a report as small PNGs, for a place that shows pictures and no page: the Dagster UI."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from triton_sft_pipeline.evaluation.report_text import SPLITS, models_of, splits_of

COLOURS = {"base": "#7c8698", "tuned": "#2f52d6"}


def score_plot_png(report: Mapping[str, Any]) -> bytes:
    """Verified share by split and model with its 95 % interval, as a PNG of about 450 x 250 pixels."""
    models, splits = models_of(report), splits_of(report)
    figure, axes = _figure(1)
    width = 0.8 / len(models)
    for offset, model in enumerate(models):
        cells = [report[model][split]["fast_0"] for split in splits]
        rates = [cell["rate"] for cell in cells]
        # Rounding can put an end of the interval a hair inside the share, and matplotlib refuses negative lengths.
        low = [max(0.0, cell["rate"] - cell["interval"][0]) for cell in cells]
        high = [max(0.0, cell["interval"][1] - cell["rate"]) for cell in cells]
        places = [i + (offset - (len(models) - 1) / 2) * width for i in range(len(splits))]
        axes[0].bar(places, rates, width * 0.92, color=COLOURS[model], alpha=0.3)
        # A share of 0 has no bar: its dot and interval say which model it is of.
        axes[0].errorbar(
            places, rates, [low, high], fmt="o", ms=5, capsize=4, color=COLOURS[model], label=model, clip_on=False
        )
    labels = [f"{SPLITS[split][0].split()[0]}\n(n = {report['base'][split]['n']})" for split in splits]
    axes[0].set_xticks(range(len(splits)), labels, fontsize=8)
    axes[0].set_ylim(0, 1.02)
    _percent_axis(axes[0])
    axes[0].set_title("Verified (fast_0), 95 % intervals", fontsize=9, loc="left")
    if len(models) > 1:
        axes[0].legend(
            fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1
        )
    return _png(figure)


def fast_p_plot_png(report: Mapping[str, Any]) -> bytes | None:
    """fast_p curves with 95 % bands, a panel a split, as a PNG of about 450 x 250 pixels; None without timing."""
    models = models_of(report)
    splits = [s for s in splits_of(report) if s != "touched" and report["base"][s]["fast_p"]]
    if not splits:
        return None
    figure, axes = _figure(len(splits))
    for place, split in zip(axes, splits, strict=True):
        for model in models:
            curve = report[model][split]["fast_p"]
            style = "--" if model == "base" else "-"
            place.plot(curve["p"], curve["rate"], style, color=COLOURS[model], lw=1.6, label=model)
            place.fill_between(curve["p"], curve["low"], curve["high"], color=COLOURS[model], alpha=0.14, lw=0)
        for mark in (1, 2):
            place.axvline(mark, color="#9aa4b2", lw=0.8, ls=":")
        place.set_title(f"{SPLITS[split][0].split()[0]}, n = {report['base'][split]['n']}", fontsize=9, loc="left")
        place.set_xlim(0, 4)
        place.set_xticks(range(5), [str(p) for p in range(5)], fontsize=8)
        place.set_ylim(0, 1.02)
    figure.supxlabel("p, times PyTorch's speed", fontsize=8)
    _percent_axis(axes[0])
    axes[-1].legend(fontsize=8, frameon=False, loc="upper right")
    return _png(figure)


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _percent_axis(axes: Any) -> None:
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=8)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
