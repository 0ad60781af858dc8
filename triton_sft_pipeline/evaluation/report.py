"""Drawing a report: as Markdown, as one self-contained HTML page, and as files.

Knows nothing of models or judges: it reads the plain data that `evaluate` returns, and adds no number of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from triton_sft_pipeline.evaluation import figures, report_text
from triton_sft_pipeline.evaluation.plots import fast_p_plot_png, score_plot_png
from triton_sft_pipeline.evaluation.report_text import (
    LONGEST_SHOWN,
    SPLITS,
    best_answer,
    clip,
    difference_text,
    markdown_table,
    mean_speedup,
    models_of,
    p_value,
    provenance_rows,
    share_text,
    splits_of,
    tally,
    tokens_text,
)
from triton_sft_pipeline.evaluation.scores import verdict_kind
from triton_sft_pipeline.files import atomic_write_text, write_json

__all__ = [
    "LONGEST_SHOWN",
    "fast_p_plot_png",
    "page_template",
    "render_html",
    "render_markdown",
    "score_plot_png",
    "write_report",
]

_ABOUT = {
    "base_model": "Base",
    "adapter": "Adapter",
    "adapter_version": "Adapter version",
    "problems": "Problems",
    "preset": "Preset",
    "device": "Device",
}
"""Entries of the provenance that stand under the headline, where they are short texts."""

_CONTENTS = (
    *(("reading", "How to read it"), ("scores", "Scores"), ("paired", "Paired"), ("speed", "Speed")),
    *(("groups", "Families and levels"), ("passes", "pass@k"), ("cheats", "Refused"), ("tokens", "Tokens")),
    *(("verdicts", "Verdicts"), ("problems", "Problems"), ("touched", "Touched"), ("unusable", "Not asked")),
    ("provenance", "Provenance"),
)


def write_report(report: Mapping[str, Any], directory: Path) -> None:
    """Write report.json, report.md and report.html into `directory`, each whole or not at all."""
    directory = Path(directory)
    write_json(directory / "report.json", report)
    atomic_write_text(directory / "report.md", render_markdown(report))
    atomic_write_text(directory / "report.html", render_html(report))


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page for phone and desktop, light and dark, that loads nothing from anywhere and runs no
    script. Of long answers the page shows the beginning: no more than `report_text.BUDGET` characters of code and
    answers in all.
    """
    models, keys = models_of(report), splits_of(report)
    splits = [{"key": key, "title": SPLITS[key][0], "meaning": SPLITS[key][1]} for key in keys]
    timed = any(report[model][key]["fast_p"] for model in models for key in keys)
    ks = report_text.shown_k([report[model][key] for model in models for key in keys])
    several = any(len(row["base"]) > 1 for row in report["problems"])
    page = page_template("report.html.j2").render(
        report=report,
        models=models,
        splits=splits,
        main_splits=[split for split in splits if split["key"] != "touched"] or splits,
        timed=timed,
        several=several,
        speed=_speed_figures(report, models, splits) if timed else [],
        reach=figures.difference_reach(
            [c[name] for c in report["comparison"].values() for name in ("fast_0", "fast_1", "fast_2")]
        ),
        ks=ks,
        cheats=report_text.cheats_of([report[model][key] for model in models for key in keys]),
        kinds=report_text.kinds_of(report["problems"], models),
        about=_about(report),
        contents=_contents(report, bool(keys), len(ks) > 1),
        limit=report_text.longest_shown(_texts(report, models)),
        command=report["provenance"].get("repeat_with"),
        provenance=list(provenance_rows(report)),
    )
    return report_text.printable(page)


@cache
def page_template(name: str) -> Any:
    """A template of this package, with the filters that the pages share."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from triton_sft_pipeline.evaluation.highlight import highlight_python

    environment = Environment(
        loader=PackageLoader("triton_sft_pipeline.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=report_text.percent,
        interval=report_text.interval,
        rate=report_text.rate,
        rate_alone=lambda share: "–" if share["rate"] is None else f"{report_text.percent(share['rate'])}\u00a0%",
        counted=report_text.counted,
        points=report_text.points,
        point_interval=lambda ends: report_text.interval(ends, report_text.points),
        token_interval=lambda ends: report_text.interval(ends, lambda end: f"{end:,.0f}"),
        difference=difference_text,
        width=lambda share: f"{100 * share:.2f}",
        times=lambda speedup: f"{speedup:.2f}x",
        times_interval=lambda ends: report_text.interval(ends, lambda end: f"{end:.2f}"),
        mean_speedup=mean_speedup,
        kernels=report_text.kernels_text,
        p_value=p_value,
        paired=report_text.paired,
        facts=report_text.answer_facts,
        tally=tally,
        best=best_answer,
        which=report_text.which,
        by_kind=report_text.by_kind,
        reach_text=figures.reach_text,
        capitalise=lambda text: text[:1].upper() + text[1:],
        arrows=lambda text: _unbroken(text.replace("->", "→")),
        unbroken=_unbroken,
        words=lambda verdict: verdict.replace("_", " "),
        clip=clip,
        python=lambda source, most=LONGEST_SHOWN: highlight_python(clip(source, most)),
    )
    environment.globals.update(
        kind=verdict_kind,
        is_zero=figures.is_zero,
        fast_p_figure=figures.fast_p_figure,
        speedup_figure=figures.speedup_figure,
        difference_figure=figures.difference_figure,
    )
    return environment.get_template(name)


def _unbroken(text: str) -> str:
    """With numbers and their percent signs on one line."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text)


def _speed_figures(
    report: Mapping[str, Any], models: Sequence[str], splits: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What the figures of each split are drawn from. All curves of a report share one vertical axis, and all
    speedups one horizontal axis.
    """
    found = []
    for split in splits:
        rows = [row for row in report["problems"] if row["split"] == split["key"]]
        curves = [figures.Curve(m, m, report[m][split["key"]]["fast_p"]) for m in models]
        lanes = [figures.Lane(m, m, kernel_speeds(rows, m), report[m][split["key"]]["speedup"]) for m in models]
        found.append({**split, "curves": [curve for curve in curves if curve.points], "lanes": lanes})
    top = figures.curve_top([curve for split in found for curve in split["curves"]])
    speeds = figures.speed_reach([lane for split in found for lane in split["lanes"]])
    return [{**split, "top": top, "speeds": speeds} for split in found if split["curves"]]


def kernel_speeds(problems: Sequence[Mapping[str, Any]], model: str) -> list[tuple[str, float]]:
    """Name and speedup of every verified and timed kernel of a model."""
    return [
        (row["key"] if len(row[model]) == 1 else f"{row['key']}, answer {answer['sample'] + 1}", answer["speedup"])
        for row in problems
        for answer in row[model]
        if answer["correctness"] and answer["speedup"]
    ]


def _about(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = report["provenance"]
    facts = [(title, given[name]) for name, title in _ABOUT.items() if isinstance(given.get(name), str) and given[name]]
    settings = report["settings"]
    if samples := settings.get("samples"):
        facts.append(("Answers a problem", str(samples)))
    return [(title, clip(value if len(value) < 60 else f"{value[:12]}…", 60)) for title, value in facts]


def _contents(report: Mapping[str, Any], asked: bool, passes: bool) -> list[tuple[str, str]]:
    there = {
        "paired": bool(report["comparison"]) and asked,
        "passes": passes,
        "touched": any(row["split"] == "touched" for row in report["problems"]),
        "unusable": bool(report["unusable"]),
        "reading": True,
        "provenance": True,
    }
    return [(place, title) for place, title in _CONTENTS if there.get(place, asked)]


def _texts(report: Mapping[str, Any], models: Sequence[str]) -> Iterator[str | None]:
    for row in report["problems"]:
        yield row["pytorch_code"]
        for model in models:
            if best := best_answer(row[model]):
                yield from (best["code"], best["answer"])


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: headline, notes, every table, problems and provenance. Kernels are left to the HTML
    page.
    """
    models = models_of(report)
    rows = [(SPLITS[split][0], model, report[model][split]) for split in splits_of(report) for model in models]
    lines = ["# Evaluation report", "", f"**{report['headline']}**", ""]
    lines += [f"- {report_text.markdown_cell(note)}" for note in report["notes"]]
    for title, text, table in _markdown_sections(report, models, rows):
        lines += ["", f"## {title}", "", *([text, ""] if text else []), *table]
    if command := report["provenance"].get("repeat_with"):
        lines += ["", "## The command that repeats it", "", *(f"    {line}" for line in clip(command).splitlines())]
    for title, facts in provenance_rows(report):
        lines += ["", f"## {title}", "", *markdown_table(["what", "value"], [[n, f"`{v}`"] for n, v in facts])]
    return report_text.printable("\n".join(lines)) + "\n"


def _markdown_sections(
    report: Mapping[str, Any], models: Sequence[str], rows: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> Iterator[tuple[str, str, list[str]]]:
    """(title, text, table) of each section that has something to show."""
    cells = [score for _, _, score in rows]
    kinds = ("compiled", "fast_0", "fast_1", "fast_2")
    yield (
        "Scores",
        "Shares of answers, mean over the n problems; in brackets 95 % Wilson intervals. Splits are never added up.",
        markdown_table(
            ["split", "model", "compiles", "verified (fast_0)", "fast_1", "fast_2", "mean speedup"],
            [[s, m, *(share_text(score[k]) for k in kinds), mean_speedup(score["speedup"])] for s, m, score in rows],
        ),
    )
    if report["comparison"]:
        yield from _markdown_comparison(report)
    if any(score["fast_p"] for score in cells):
        yield "fast_p", "Correct and more than p times as fast as PyTorch.", _markdown_curve(rows)
    for split, groups in report["groups"].items():
        for name in ("family", "level"):
            if list(groups[name]) == ["unknown"]:
                continue
            table = [
                [group, model, share_text(of[model]["fast_0"]), share_text(of[model]["fast_1"])]
                for group, of in groups[name].items()
                for model in models
            ]
            yield f"{SPLITS[split][0]} by {name}", "", markdown_table([name, "model", "verified", "fast_1"], table)
    if len(ks := report_text.shown_k(cells)) > 1:
        # A count of verified answers beside it would be that of k = 1.
        table = [[s, m, score["n"], *(_chance(score["pass_at_k"].get(k)) for k in ks)] for s, m, score in rows]
        about = "Chance that at least one of k answers is verified, mean over the n problems."
        yield "pass@k", about, markdown_table(["split", "model", "n", *(f"k = {k}" for k in ks)], table)
    cheats = report_text.cheats_of(cells)
    table = [
        [
            s,
            m,
            share_text(score["refused"]),
            *(share_text(score["cheats"][k]) if k in score["cheats"] else "0" for k in cheats),
        ]
        for s, m, score in rows
    ]
    yield "Refused kernels", "", markdown_table(["split", "model", "refused in all", *cheats], table)
    table = [[s, m, tokens_text(score["tokens"])] for s, m, score in rows]
    yield "Tokens", "", markdown_table(["split", "model", "tokens"], table)
    table = [[s, m, ", ".join(f"{v} {n}" for v, n in score["verdicts"].items())] for s, m, score in rows]
    yield "Verdicts", "", markdown_table(["split", "model", "verdicts"], table)
    if report["unusable"]:
        table = [[f"`{row['key']}`", row["kind"], row["reason"]] for row in report["unusable"]]
        yield "Problems that could not be asked", "", markdown_table(["problem", "kind", "why"], table)
    touched = [row for row in report["problems"] if row["touched"]]
    if touched:
        table = [[f"`{row['key']}`", row["touched"]] for row in touched]
        yield "Touched problems", SPLITS["touched"][1], markdown_table(["problem", "what it touches"], table)
    table = [
        [
            f"`{p['key']}`",
            SPLITS[p["split"]][0],
            *(tally(p[m]) for m in models),
            report_text.why(p[models[-1]]),
        ]
        for p in report["problems"]
    ]
    yield "Problems", "", markdown_table(["problem", "split", *models, "why"], table)


def _chance(share: Mapping[str, Any] | None) -> str:
    return report_text.rate(share) if share else "–"


def _markdown_comparison(report: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    compared = [(SPLITS[split][0], report["comparison"][split]) for split in splits_of(report)]
    names = ("fast_0", "fast_1", "fast_2")
    yield (
        "Tuned less base, paired by problem",
        "Percentage points; in brackets the 95 % interval of a paired bootstrap over problems, or a bound where all of "
        "them differ alike.",
        markdown_table(
            ["split", "verified (fast_0)", "fast_1", "fast_2"],
            [[title, *(difference_text(c[name]) for name in names)] for title, c in compared],
        ),
    )
    yield (
        "First answers, paired by problem",
        "",
        markdown_table(
            ["split", "n", "both", "tuned alone", "base alone", "neither", "exact McNemar p"],
            [
                [s, c["n"], c["both"], c["wins"], c["losses"], c["neither"], p_value(c["p_value"]).removeprefix("= ")]
                for s, c in compared
            ],
        ),
    )


def _markdown_curve(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    timed = [(split, model, score["fast_p"]) for split, model, score in rows if score["fast_p"]]
    steps = range(0, len(timed[0][2]["p"]), 5)
    header = ["split", "model", "n", *(f"p = {timed[0][2]['p'][step]:g}" for step in steps)]
    table = []
    for split, model, curve in timed:
        cells = [
            f"{report_text.percent(curve['rate'][i])} % {report_text.interval([curve['low'][i], curve['high'][i]])}"
            for i in steps
        ]
        table.append([split, model, curve["n"], *cells])
    return markdown_table(header, table)
