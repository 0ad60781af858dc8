"""What the UI shows of a report: headline, score tables, plots, and numbers that become trends over runs.

Plain data in, Dagster metadata out; reads nothing but the report.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.gates import Gate
from triton_sft_pipeline.assets.plots import png_markdown, table_markdown
from triton_sft_pipeline.evaluation.report_text import (
    SPLITS,
    difference_text,
    mean_speedup,
    models_of,
    p_value,
    percent,
    share_text,
    splits_of,
)

SCORES = ("fast_0", "fast_1", "fast_2")


def tuned_not_worse(report: Mapping[str, Any]) -> Gate:
    """Whether the tuned model's fast_0 is at least the base's on every split that has problems."""
    compared = [split for split in splits_of(report) if split in report["comparison"]]
    worse = [split for split in compared if _fast_0(report, "tuned", split) < _fast_0(report, "base", split)]
    names = ", ".join(SPLITS[split][0].lower() for split in worse)
    told = " ".join(_sentence(report, split) for split in worse or compared)
    return Gate("tuned_not_worse", not worse, f"Worse on {names}. {told}" if worse else told)


def report_metadata(report: Mapping[str, Any], path: Path, link: Path) -> dict[str, Any]:
    """The metadata of a materialisation.

    Args:
        report: as `evaluation.summary.summarise` makes it.
        path: the artifact with report.md.
        link: the path of whatever artifact is current.
    """
    from triton_sft_pipeline.evaluation import fast_p_plot_png, score_plot_png

    curves = fast_p_plot_png(report)
    return {
        "headline": report["headline"],
        "scores": dg.MetadataValue.md(score_table(report)),
        "tuned_against_base": dg.MetadataValue.md(difference_table(report)),
        "scores_plot": dg.MetadataValue.md(png_markdown(score_plot_png(report))),
        **({"fast_p_plot": dg.MetadataValue.md(png_markdown(curves))} if curves else {}),
        "notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in report["notes"])),
        # A browser opens no file from a page that came over HTTP: what fits into a dialog is here as well as linked.
        "report": dg.MetadataValue.md(_without_problems((path / "report.md").read_text(encoding="utf-8"))),
        "report_html": dg.MetadataValue.url((link / "report.html").as_uri()),
        "path": dg.MetadataValue.path(str(path)),
        **numbers(report),
    }


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Every score as a number with a name of its own, for the plots over runs: `held_out_tuned_fast_0` and so on. What
    was not asked or not measured is left out.
    """
    found: dict[str, float | None] = {"unusable_problems": len(report["unusable"])}
    for split in splits_of(report):
        for model in models_of(report):
            score = report[model][split]
            shares = {name: score[name] for name in SCORES if score[name]}
            found |= {f"{split}_{model}_{name}": share["rate"] for name, share in shares.items()}
            if score["speedup"]:
                found[f"{split}_{model}_speedup"] = score["speedup"]["geometric_mean"]
    for model, facts in report["generation"].items():
        found[f"{model}_tokens_per_second"] = facts["tokens_per_second"]
    return {name: value for name, value in found.items() if value is not None}


def score_table(report: Mapping[str, Any]) -> str:
    """fast_0, fast_1, fast_2 and the mean speedup by split and model, each with interval and n, as Markdown. What was
    not measured has no column, because the page has little room, and is named below.
    """
    cells = [(split, model, report[model][split]) for split in splits_of(report) for model in models_of(report)]
    names = [name for name in SCORES if any(score[name] for *_, score in cells)]
    timed = [mean_speedup] if any(score["speedup"] for *_, score in cells) else []
    rows = [
        [
            _short(split),
            model,
            *(share_text(score[name]) for name in names),
            *(told(score["speedup"]) for told in timed),
        ]
        for split, model, score in cells
    ]
    table = table_markdown(["split", "model", *names, *(["speedup"] if timed else [])], rows)
    missing = [name for name in SCORES if name not in names]
    return f"{table}\n\nnot measured: {', '.join(missing)}" if missing else table


def difference_table(report: Mapping[str, Any]) -> str:
    """Tuned less base, paired by problem, as Markdown."""
    compared = [(split, found) for split in splits_of(report) if (found := report["comparison"].get(split))]
    names = [name for name in SCORES if any(found[name] for _, found in compared)]
    rows = [
        [
            _short(split),
            *(difference_text(found[name]) for name in names),
            f"{found['wins']} : {found['losses']}, p {p_value(found['p_value'])}",
        ]
        for split, found in compared
    ]
    return table_markdown(["split", *names, "first answers won : lost, exact McNemar"], rows)


def _short(split: str) -> str:
    """`held-out`: so short that the interval beside it is seen in a window of 1280 pixels."""
    return split.replace("_", "-")


def _fast_0(report: Mapping[str, Any], model: str, split: str) -> float:
    return float(report[model][split]["fast_0"]["rate"])


def _sentence(report: Mapping[str, Any], split: str) -> str:
    base, tuned = (percent(_fast_0(report, model, split)) for model in ("base", "tuned"))
    difference = difference_text(report["comparison"][split]["fast_0"])
    return f"{SPLITS[split][0]}: fast_0 {base} % -> {tuned} %, difference {difference}."


def _without_problems(markdown: str) -> str:
    return markdown.partition("\n## Problems")[0] + "\n\nEach problem with its answers: `report.html`."
