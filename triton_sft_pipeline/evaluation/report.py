"""Drawing a report: as Markdown, as one self-contained HTML page, as a small plot, and as files.

Knows nothing of models or judges: it reads the plain data that `evaluate` returns, and adds no number of its own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from triton_sft_pipeline.evaluation.scores import VERDICT_KINDS, verdict_kind
from triton_sft_pipeline.files import atomic_write_text, write_json

MODELS = ("base", "tuned")
SPLITS = {
    "seen": ("Seen problems", "From the train split: a memorisation check."),
    "test": ("Test split", "Kept apart when the dataset was split; never trained on."),
    "held_out": ("Held-out problems", "Never part of the traces."),
}
LONGEST_SHOWN = 20_000
"""Characters of one answer on the page; the rest is in generations.jsonl. A model that repeats itself must not make a
page that no browser opens.
"""

# What neither HTML nor a terminal can show: control characters other than tab and newline, and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def write_report(report: Mapping[str, Any], directory: Path) -> None:
    """Write report.json, report.md and report.html into `directory`, each whole or not at all."""
    directory = Path(directory)
    write_json(directory / "report.json", report)
    atomic_write_text(directory / "report.md", render_markdown(report))
    atomic_write_text(directory / "report.html", render_html(report))


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: headline, notes, scores, verdicts, problems and provenance. Kernels are left to the HTML
    page.
    """
    models, splits = _models(report), _splits(report)
    lines = ["# Evaluation report", "", f"**{report['headline']}**", ""]
    lines += [f"- {_cell(note)}" for note in report["notes"]]
    lines += ["", "## Scores", "", "In brackets: 95 % Wilson interval. Splits are never added up.", ""]
    lines += _table(
        ["split", "model", "verified (fast_0)", "compiles", "fast_1", "fast_2"],
        [
            [
                SPLITS[split][0],
                model,
                *(_share(report[model][split][kind]) for kind in ("fast_0", "compiled", "fast_1", "fast_2")),
            ]
            for split in splits
            for model in models
        ],
    )
    if report["comparison"]:
        lines += ["", "## Base against tuned, paired by problem", ""]
        lines += _table(
            ["split", "n", "both", "tuned alone", "base alone", "neither", "exact McNemar p"],
            [
                [SPLITS[s][0], c["n"], c["both"], c["wins"], c["losses"], c["neither"], _p_value(c["p_value"])]
                for s, c in ((split, report["comparison"][split]) for split in splits)
            ],
        )
    lines += ["", "## Verdicts", ""]
    lines += _table(
        ["split", "model", "verdicts"],
        [
            [
                SPLITS[split][0],
                model,
                ", ".join(f"{verdict} {count}" for verdict, count in report[model][split]["verdicts"].items()),
            ]
            for split in splits
            for model in models
        ],
    )
    lines += ["", "## Problems", ""]
    lines += _table(
        ["problem", "split", *models, "why"],
        [
            [f"`{p['key']}`", SPLITS[p["split"]][0], *(p[m]["verdict"] for m in models), p[models[-1]]["detail"]]
            for p in report["problems"]
        ],
    )
    for title, rows in _provenance(report):
        lines += ["", f"## {title}", "", *_table(["what", "value"], [[name, f"`{value}`"] for name, value in rows])]
    return "\n".join(lines) + "\n"


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page for phone and desktop, light and dark, that loads nothing from anywhere and runs no
    script.
    """
    return _template().render(
        report=report,
        models=_models(report),
        splits=[{"key": key, "title": SPLITS[key][0], "meaning": SPLITS[key][1]} for key in _splits(report)],
        provenance=list(_provenance(report)),
        kind=verdict_kind,
    )


def score_plot_png(report: Mapping[str, Any]) -> bytes:
    """Verified share by split and model with its 95 % interval, as a PNG of about 450 x 250 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models, splits = _models(report), _splits(report)
    figure = Figure(figsize=(5, 2.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(models)
    for offset, (model, colour) in enumerate(zip(models, ("#8a94a6", "#3556d8"), strict=False)):
        cells = [report[model][split] for split in splits]
        rates = [cell["verified_rate"] for cell in cells]
        low = [rate - cell["verified_interval"][0] for rate, cell in zip(rates, cells, strict=True)]
        high = [cell["verified_interval"][1] - rate for rate, cell in zip(rates, cells, strict=True)]
        places = [i + (offset - (len(models) - 1) / 2) * width for i in range(len(splits))]
        # Rounding can put an end of the interval a hair inside the share, and matplotlib refuses negative lengths.
        errors = [[max(0.0, x) for x in low], [max(0.0, x) for x in high]]
        axes.bar(
            places,
            rates,
            width * 0.92,
            color=colour,
            label=model,
            yerr=errors,
            capsize=3,
            error_kw={"lw": 1, "ecolor": "#333"},
        )
    labels = [f"{SPLITS[split][0]}\n(n = {report['base'][split]['n']})" for split in splits]
    axes.set_xticks(range(len(splits)), labels, fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    axes.set_title("Verified kernels, 95 % intervals", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if len(models) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from triton_sft_pipeline.evaluation.highlight import highlight_python

    loader = PackageLoader("triton_sft_pipeline.evaluation")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        rate=_rate,
        percent=lambda share: f"{100 * share:.2f}",
        paired=_paired,
        facts=_answer_facts,
        by_kind=lambda verdicts: sorted(verdicts.items(), key=lambda item: VERDICT_KINDS.index(verdict_kind(item[0]))),
        capitalise=lambda text: text[:1].upper() + text[1:],
        words=lambda verdict: verdict.replace("_", " "),
        clip=_clip,
        python=lambda source: highlight_python(_clip(source)),
    )
    return environment.get_template("report.html.j2")


def _models(report: Mapping[str, Any]) -> list[str]:
    return [model for model in MODELS if model in report]


def _splits(report: Mapping[str, Any]) -> list[str]:
    """The splits that hold a problem: an empty one has nothing to show."""
    return [split for split in SPLITS if report["base"][split]["n"]]


def _rate(share: Mapping[str, Any]) -> str:
    """`93 % [77, 98]`, or a dash for no answers."""
    if share["rate"] is None:
        return "–"
    low, high = share["interval"]
    return f"{100 * share['rate']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _share(share: Mapping[str, Any] | None) -> str:
    return "not measured" if share is None else f"{share['count']}/{share['n']}, {_rate(share)}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _paired(comparison: Mapping[str, Any]) -> str:
    p = _p_value(comparison["p_value"])
    return (
        f"Tuned alone solves {comparison['wins']}, base alone {comparison['losses']} "
        f"(exact McNemar p{'' if p.startswith('<') else ' ='} {p})."
    )


def _answer_facts(answer: Mapping[str, Any]) -> str:
    facts = [f"{answer['tokens']} tokens" + (", cut at the limit" if answer["stopped"] == "length" else "")]
    if answer["speedup"] is not None:
        facts.append(_speed(answer))
    if answer["kernel_time_ms"] is not None and answer["reference_time_ms"] is not None:
        facts.append(f"{answer['kernel_time_ms']:.4g} ms against {answer['reference_time_ms']:.4g} ms")
    if answer["torch_share"]:
        facts.append(f"{answer['torch_share']:.2f} of the work by PyTorch")
    if len(answer["all_verdicts"]) > 1:
        facts.append(f"{answer['correct_answers']} of {len(answer['all_verdicts'])} answers verified")
    return " · ".join(facts)


def _speed(answer: Mapping[str, Any]) -> str:
    """The speedup with its interval, and beside it what it has to be read with."""
    parts = [f"{answer['speedup']:.2f}x"]
    if answer["speedup_low"] is not None and answer["speedup_high"] is not None:
        parts[0] += f" [{answer['speedup_low']:.2f}, {answer['speedup_high']:.2f}]"
    if answer["launch_bound"]:
        parts.append("bound by launches")
    if answer["graph_speedup"] is not None:
        parts.append(f"{answer['graph_speedup']:.2f}x as CUDA graphs")
    if answer["compile_speedup"] is not None:
        parts.append(f"{answer['compile_speedup']:.2f}x against torch.compile")
    return ", ".join(parts)


def _clip(text: str) -> str:
    """What fits on the page and can be shown there."""
    shown = _UNPRINTABLE.sub("\ufffd", text)
    if len(shown) <= LONGEST_SHOWN:
        return shown
    return f"{shown[:LONGEST_SHOWN]}\n[... {len(shown) - LONGEST_SHOWN} more characters: see generations.jsonl]"


def _provenance(report: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of (name, value), nested data flattened to dotted names."""
    given = {name: value for name, value in report["provenance"].items() if name != "notes"}
    for title, data in (
        ("What was evaluated", given),
        ("Settings", report["settings"]),
        ("Judge", report["judge"]),
        ("Generation", report["generation"]),
    ):
        if rows := list(_flat(data)):
            yield title, rows


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: Any) -> str:
    """One line that cannot break out of its table cell."""
    return " ".join(_clip(str(value)).split()).replace("|", "\\|")
