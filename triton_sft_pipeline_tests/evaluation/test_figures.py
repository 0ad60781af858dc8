"""Figures: what is drawn lies where its numbers say, and nothing of a name becomes markup."""

from __future__ import annotations

import re
from math import isclose
from typing import Any
from xml.etree import ElementTree

import pytest

from triton_sft_pipeline.evaluation import figures
from triton_sft_pipeline.evaluation.figures import LEFT, PLOT, RIGHT, TOP, WIDTH, Curve, Lane
from triton_sft_pipeline.evaluation.plots import fast_p_plot_png, score_plot_png
from triton_sft_pipeline_tests.evaluation.reports import made_problems, made_report

SPAN = WIDTH - LEFT - RIGHT


def curve(rate: list[float], low: list[float], high: list[float]) -> dict[str, Any]:
    return {"p": [0.0, 1.0, 2.0, 4.0], "rate": rate, "low": low, "high": high, "n": 10}


FALLING = curve([0.8, 0.4, 0.2, 0.0], [0.6, 0.2, 0.1, 0.0], [0.9, 0.6, 0.4, 0.3])


def places(markup: str, css: str) -> list[tuple[float, float]]:
    """The points of the one element of this class."""
    found = next(e for e in ElementTree.fromstring(markup).iter() if e.get("class") == css)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.get("points", "").split())]


def test_a_curve_lies_where_its_numbers_say() -> None:
    markup = figures.fast_p_figure([Curve("tuned", "tuned", FALLING)], top=1.0)
    line = places(markup, "line tuned")
    assert [x for x, _ in line] == [
        LEFT,
        pytest.approx(LEFT + SPAN / 4, abs=0.1),
        pytest.approx(LEFT + SPAN / 2),
        WIDTH - RIGHT,
    ]
    assert [y for _, y in line] == pytest.approx([TOP + PLOT * (1 - rate) for rate in FALLING["rate"]], abs=0.1)
    band = places(markup, "band tuned")
    assert [y for _, y in band] == pytest.approx(
        [TOP + PLOT * (1 - end) for end in [*FALLING["high"], *reversed(FALLING["low"])]], abs=0.1
    )


def test_curves_share_an_axis_that_holds_every_band() -> None:
    low = curve([0.1] * 4, [0.0] * 4, [0.2] * 4)
    assert figures.curve_top([Curve("a", "base", low)]) == 0.25
    assert figures.curve_top([Curve("a", "base", low), Curve("b", "tuned", FALLING)]) == 1.0
    assert figures.curve_top([]) == 0.25
    line = places(figures.fast_p_figure([Curve("a", "base", low)], top=0.25), "line base")
    assert line[0][1] == pytest.approx(TOP + PLOT * 0.6, abs=0.1)


def test_models_without_a_curve_are_left_out() -> None:
    empty = {"p": [0.0, 1.0], "rate": [None, None], "low": [None, None], "high": [None, None], "n": 0}
    markup = figures.fast_p_figure([Curve("a", "base", None), Curve("b", "m2", empty), Curve("c", "tuned", FALLING)])
    assert markup.count("<polyline") == 1 and "line tuned" in markup


def test_speedups_lie_on_a_logarithmic_axis_with_lines_at_one_and_two() -> None:
    mean = {"geometric_mean": 2.0, "interval": [1.0, 4.0], "n": 3, "problems": 3}
    lane = Lane("tuned", "tuned", [("a", 1.0), ("b", 2.0), ("c", 4.0)], mean)
    tree = ElementTree.fromstring(figures.speedup_figure([lane]))
    dots = sorted(float(e.get("cx", 0)) for e in tree.iter("circle"))
    assert isclose(dots[1] - dots[0], dots[2] - dots[1], abs_tol=0.15)
    marks = sorted(float(e.get("x1", 0)) for e in tree.iter("line") if e.get("class") == "mark")
    assert marks == pytest.approx(dots[:2], abs=0.1)
    whisker = next(e for e in tree.iter("line") if e.get("class") == "whisker tuned")
    assert [float(whisker.get("x1", 0)), float(whisker.get("x2", 0))] == pytest.approx([dots[0], dots[2]], abs=0.1)
    diamond = places(figures.speedup_figure([lane]), "mean tuned")
    assert [x for x, _ in diamond[1::2]] == pytest.approx([dots[1]] * 2, abs=0.1)
    assert [e.text for e in tree.iter("title")] == ["a, 1.00x", "b, 2.00x", "c, 4.00x"]


def test_many_equal_speedups_are_piled_up_inside_their_lane() -> None:
    lane = Lane("tuned", "tuned", [(str(i), 1.5) for i in range(300)], None)
    heights = [float(e.get("cy", 0)) for e in ElementTree.fromstring(figures.speedup_figure([lane])).iter("circle")]
    assert len(heights) == 300 and len(set(heights)) > 100
    assert min(heights) >= TOP and max(heights) <= TOP + figures.LANE


def test_a_model_without_a_verified_kernel_has_an_empty_lane() -> None:
    assert "no verified kernel" in figures.speedup_figure([Lane("base", "base", [], None)])


@pytest.mark.parametrize(("interval", "reach"), [([-0.1, 0.2], 0.25), ([-0.3, 0.1], 0.5), ([0.2, 0.9], 1.0)])
def test_a_difference_lies_left_or_right_of_zero(interval: list[float], reach: float) -> None:
    difference = {"difference": sum(interval) / 2, "interval": interval, "n": 9, "method": "bootstrap"}
    assert figures.difference_reach([difference, None]) == reach
    tree = ElementTree.fromstring(figures.difference_figure(difference, reach))
    zero = next(float(e.get("x1", 0)) for e in tree.iter("line") if e.get("class") == "mark")
    whisker = next(e for e in tree.iter("line") if e.get("class") == "whisker tuned")
    ends = [float(whisker.get("x1", 0)) - zero, float(whisker.get("x2", 0)) - zero]
    half = figures.REACH * 0.96
    assert ends == pytest.approx([end / reach * half for end in interval], abs=0.1)
    assert float(next(tree.iter("circle")).get("cx", 0)) - zero == pytest.approx(sum(ends) / 2, abs=0.1)


def test_nothing_is_drawn_for_no_difference() -> None:
    none = {"difference": None, "interval": None, "n": 0, "method": "bound"}
    assert figures.difference_figure(none) == "" and figures.difference_figure(None) == ""


def test_names_are_escaped_in_every_figure() -> None:
    name = "</svg><b>\"x'&"
    markup = figures.fast_p_figure([Curve(name, "m0", FALLING)])
    markup += figures.speedup_figure([Lane(name[:7], "m0", [(name, 1.0)], None)])
    assert "<b>" not in markup and markup.count("</svg>") == 2
    assert re.search(r"&lt;/svg&gt;&lt;b&gt;&#34;x&#39;&amp;", markup)


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("tuned", [True, False])
def test_the_plots_are_small_pictures(samples: int, tuned: bool) -> None:
    report = made_report(made_problems({"seen": 3, "held_out": 4, "touched": 1}, samples, tuned))
    for png in (score_plot_png(report), fast_p_plot_png(report)):
        assert png and png.startswith(b"\x89PNG")
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert 400 <= width <= 500 and 200 <= height <= 300


def test_without_timing_there_is_no_curve_to_plot() -> None:
    report = made_report(made_problems({"held_out": 2}, timed=False), timed=False)
    assert fast_p_plot_png(report) is None and score_plot_png(report).startswith(b"\x89PNG")


def test_a_report_without_a_problem_can_be_plotted() -> None:
    assert score_plot_png(made_report([])).startswith(b"\x89PNG") and fast_p_plot_png(made_report([])) is None
