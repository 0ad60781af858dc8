"""Drawing a comparison of reports: as lines for a terminal, as Markdown, and as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from triton_sft_pipeline.evaluation import figures
from triton_sft_pipeline.evaluation.report import page_template
from triton_sft_pipeline.evaluation.report_text import (
    SPLITS,
    clip,
    difference_text,
    interval,
    markdown_cell,
    markdown_table,
    mean_speedup,
    p_value,
    points,
    printable,
    rate,
    share_text,
)

WIDTH = 80
_NAME, _N, _CELL = 18, 6, 18
_MEASURES = ("fast_0", "fast_1", "fast_2")
_HEADS = ("verified", "fast_1", "fast_2")
# Not every terminal and log can show these.
_PLAIN = str.maketrans({"−": "-", "–": "-", "…": "~"})
COLOURS = 6
"""Series that a style sheet knows; more reports begin again with the first colour."""


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """The comparison in lines of at most 80 columns."""
    lines: list[str] = []
    for warning in comparison["warnings"]:
        lines += _wrapped(f"warning: {warning}", "  ")
    for split, found in comparison["splits"].items():
        lines += ["", SPLITS[split][0], f"{'':<{_NAME}}{'n':>{_N}}" + "".join(f"{m:>{_CELL}}" for m in _HEADS)]
        for label, own in found["scores"].items():
            cells = [rate(own["score"][m]) if own["score"][m] else "not measured" for m in _MEASURES]
            lines.append(
                f"{_short(label):<{_NAME}}{own['score']['n']:>{_N}}" + "".join(f" {c:>{_CELL - 1}}" for c in cells)
            )
        for label, own in found["paired"].items():
            lines += _paired_lines(label, comparison["first"], own)
    return [line.translate(_PLAIN).rstrip() for line in lines]


def _paired_lines(label: str, first: str, paired: Mapping[str, Any]) -> list[str]:
    found = paired["comparison"]
    if not found["n"]:
        return _wrapped(f"{label} less {first}: no problem in common.", "  ")
    parts = [f"{name} {_points(found[m])}" for name, m in zip(_HEADS, _MEASURES, strict=True) if found[m]]
    text = (
        f"{label} less {first}, in points, n = {found['n']}: {', '.join(parts)}. First answers: {found['wins']} solved "
        f"by {label} alone, {found['losses']} by {first} alone, exact McNemar p {p_value(found['p_value'])}."
    )
    return _wrapped(" ".join([text, *left_out_texts(paired["left_out"])]), "  ")


def left_out_texts(left_out: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each reason for which problems were not paired, with the first few of them."""
    counts = Counter(row["reason"] for row in left_out)
    texts = []
    for reason, count in counts.items():
        keys = [row["key"] for row in left_out if row["reason"] == reason]
        named = ", ".join(keys[:3]) + (", ..." if count > 3 else "")
        texts.append(f"{count} left out, because {reason}: {named}.")
    return texts


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown: warnings, and for each split scores, differences and problems."""
    lines = ["# Comparison of evaluation reports", ""]
    lines += [
        f"- **{markdown_cell(label)}** ({own['model']}): {markdown_cell(own['headline'])}"
        for label, own in comparison["reports"].items()
    ]
    if comparison["warnings"]:
        lines += ["", "## Read this with the numbers", ""]
        lines += [f"- {markdown_cell(warning)}" for warning in comparison["warnings"]]
    for split, found in comparison["splits"].items():
        for title, text, table in _markdown_tables(found, comparison["first"]):
            lines += ["", f"## {SPLITS[split][0]}: {title}", "", *([text, ""] if text else []), *table]
    return printable("\n".join(lines)) + "\n"


def _markdown_tables(found: Mapping[str, Any], first: str) -> Iterator[tuple[str, str, list[str]]]:
    rows = []
    for label, own in found["scores"].items():
        for model in dict.fromkeys(("base", own["model"])):
            score = own["score" if model == own["model"] else "base"]
            rows.append([label, model, *(share_text(score[m]) for m in _MEASURES), mean_speedup(score["speedup"])])
    header = ["report", "model", "verified (fast_0)", "fast_1", "fast_2", "mean speedup"]
    yield "scores", "In brackets: 95 % intervals.", markdown_table(header, rows)
    rows = []
    for label, own in found["paired"].items():
        c = own["comparison"]
        rows.append(
            [
                label,
                *(difference_text(c[m]) for m in _MEASURES),
                c["both"],
                c["wins"],
                c["losses"],
                c["neither"],
                p_value(c["p_value"]).removeprefix("= "),
                " ".join(left_out_texts(own["left_out"])) or "none",
            ]
        )
    if rows:
        header = ["report", *_MEASURES, "both", "it alone", "first alone", "neither", "exact McNemar p", "left out"]
        about = f"Less {markdown_cell(first)}, on the problems that both have; both to p: first answers alone."
        yield "differences", about, markdown_table(header, rows)
    labels = list(found["scores"])
    rows = [[f"`{row['key']}`", *(cell_text(row["cells"].get(label)) for label in labels)] for row in found["problems"]]
    yield "problems", "Verified answers of all, and the best speedup.", markdown_table(["problem", *labels], rows)


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """The comparison as one HTML page like a report's: no script, nothing loaded from anywhere."""
    colours = {label: f"m{place % COLOURS}" for place, label in enumerate(comparison["reports"])}
    splits = [_page_split(split, found, colours) for split, found in comparison["splits"].items()]
    differences = [
        own["comparison"][m]
        for found in comparison["splits"].values()
        for own in found["paired"].values()
        for m in _MEASURES
    ]
    page = page_template("compare.html.j2").render(
        comparison=comparison,
        colours=colours,
        splits=splits,
        top=figures.curve_top([curve for split in splits for curve in split["curves"]]),
        speeds=figures.speed_reach([lane for split in splits for lane in split["lanes"]]),
        reach=figures.difference_reach(differences),
        cell_text=cell_text,
        left_out_texts=left_out_texts,
    )
    return printable(page)


def cell_text(cell: Mapping[str, Any] | None) -> str:
    """`3/8, 1.42x`; a dash where the report does not have the problem."""
    if cell is None:
        return "–"
    text = f"{cell['verified']}/{cell['answers']}"
    return f"{text}, {max(cell['speedups']):.2f}x" if cell["speedups"] else text


def _page_split(split: str, found: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    scores = {label: own["score"] for label, own in found["scores"].items()}
    lanes = []
    for label, score in scores.items():
        kernels = [
            (row["key"], s) for row in found["problems"] for s in row["cells"].get(label, {}).get("speedups", [])
        ]
        lanes.append(figures.Lane(label, colours[label], kernels, score["speedup"]))
    curves = [figures.Curve(label, colours[label], score["fast_p"]) for label, score in scores.items()]
    return {
        "key": split,
        "title": SPLITS[split][0],
        "meaning": SPLITS[split][1],
        "found": found,
        "curves": [curve for curve in curves if curve.points],
        "lanes": lanes,
    }


def _points(difference: Mapping[str, Any]) -> str:
    method = " (bound)" if difference["method"] == "bound" else ""
    return f"{points(difference['difference'])} {interval(difference['interval'], points)}{method}"


def _short(label: str) -> str:
    shown = clip(label).replace("\n", " ")
    return shown if len(shown) < _NAME else f"…{shown[2 - _NAME :]}"


def _wrapped(text: str, indent: str) -> list[str]:
    return wrap(clip(text).replace("\n", " "), WIDTH, subsequent_indent=indent)
