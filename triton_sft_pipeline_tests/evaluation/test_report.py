"""The drawn report: nothing of a model's answer becomes markup, nothing is loaded from anywhere, no number stands
without its n, and none that is not in the report.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.evaluation.highlight import highlight_python
from triton_sft_pipeline.evaluation.report import render_html, render_markdown, write_report
from triton_sft_pipeline.evaluation.report_text import (
    LONGEST_SHOWN,
    best_answer,
    difference_text,
    longest_shown,
    percent,
    share_text,
    tally,
)
from triton_sft_pipeline_tests.evaluation.pages import Page, assert_self_contained
from triton_sft_pipeline_tests.evaluation.reports import answer, made_problems, made_report, problem

HOSTILE = '</pre></details></script><script>alert("x & y")</script><img src="http://evil.example/a.png">'
SIZES = {"seen": 3, "test": 1, "held_out": 4, "touched": 1}
UNUSABLE = {
    "key": "level4/<9>",
    "place": "problems/level4/9.py",
    "kind": "unsupported",
    "reason": "It needs the weights <gpt2>: download them.",
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made_report(made_problems(SIZES, samples=8), unusable=[UNUSABLE])


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return made_report(made_problems(SIZES, samples=1))


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return render_html(report)


def test_the_page_loads_nothing_and_runs_no_script(html: str, single: dict[str, Any]) -> None:
    assert_self_contained(html)
    assert_self_contained(render_html(single))


def test_in_markdown_there_is_no_table_by_level_where_no_problem_says_one() -> None:
    rows = made_problems({"seen": 2, "held_out": 3})
    markdown = render_markdown(made_report([{**row, "level": None} if row["split"] == "seen" else row for row in rows]))
    assert "## Held-out problems by level" in markdown and "## Seen problems by level" not in markdown
    assert "## Seen problems by family" in markdown


@pytest.mark.parametrize("field", ["code", "answer", "detail", "verdict"])
def test_whatever_a_model_or_the_judge_wrote_is_text_on_the_page(field: str) -> None:
    text = f"{HOSTILE}\x00\x1b[31m\ud800"
    held = problem("<b>held", "held_out", name=HOSTILE, family=HOSTILE, source=HOSTILE)
    answers = [{**answer("verified"), field: text}, {**answer("compile_error", 1), field: text}]
    html = render_html(made_report([{**held, "base": answers, "tuned": answers}]))
    assert_self_contained(html)
    wanted = f"{HOSTILE}\ufffd\ufffd[31m\ufffd"
    assert (wanted.replace("_", " ") if field == "verdict" else wanted) in Page(html).text
    assert not re.search(r"[\x00\x1b\ud800]", html + render_markdown(made_report([{**held, "base": answers}])))


def test_hostile_facts_headlines_notes_and_reasons_are_text_too(single: dict[str, Any]) -> None:
    parts = {
        "headline": HOSTILE,
        "notes": [HOSTILE],
        "unusable": [dict.fromkeys(("key", "place", "kind", "reason"), HOSTILE)],
        "provenance": {"base_model": HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "repeat_with": HOSTILE},
    }
    html = render_html({**single, **parts})
    Page(html)
    assert "<script" not in html and "<img" not in html


def test_each_problem_folds_with_its_code_both_best_kernels_and_every_verdict(
    html: str, report: dict[str, Any]
) -> None:
    page = Page(html)
    assert page.attributes.count(("class", "problem card")) == sum(SIZES.values())
    for row in report["problems"]:
        assert row["pytorch_code"] in page.text
        for model in ("base", "tuned"):
            best = best_answer(row[model])
            assert best and (best["code"] or "") in page.text and best["answer"] in page.text
            assert all(each["detail"] in page.text for each in row[model])


def test_people_count_answers_from_one_and_data_from_zero() -> None:
    several = [answer("unparsed"), answer("verified", 1, 2.5), answer("verified", 2, 1.5)]
    report = made_report([problem("held", "held_out", base=several[:1] * 3, tuned=several)])
    html = render_html(report)
    shown = Page(html).text
    assert [each["sample"] for each in report["problems"][0]["tuned"]] == [0, 1, 2]
    assert "answer 2 of 3 · 2/3 verified, 2.50x" in shown and "<title>held, answer 2, 2.50x</title>" in html
    assert re.findall(r'title="(\d): verified"', html) == ["2", "3"]
    assert re.findall(r'<li><span class="facts">(\d)</span>', html)[-3:] == ["1", "2", "3"]


def test_where_no_answer_is_verified_the_one_that_got_furthest_is_shown_with_its_verdict() -> None:
    failed = [answer("unparsed"), answer("compile_error", 1), answer("incorrect_shape", 2, detail="(1,), not (2,).")]
    report = made_report([problem("held", "held_out", base=failed, tuned=failed)])
    assert "answer 3 of 3, which got furthest · 0/3 verified" in Page(render_html(report)).text
    assert "| 0/3 verified | incorrect shape: (1,), not (2,). |" in render_markdown(report)


def test_a_legend_names_the_kinds_of_verdicts_that_occur(html: str) -> None:
    row = problem("held", "held_out", base=[answer("verified"), answer("unparsed", 1)], tuned=[answer("timeout")])
    few = Page(render_html(made_report([row]))).words
    assert "in their order: verified did not compile, or broke off no code Held-out" in few
    assert "ran, and was wrong" in Page(html).text


def test_a_model_that_never_succeeds_is_said_to_where_its_line_cannot_be_seen() -> None:
    good, bad = answer("verified", 0, 2.0), answer("incorrect_shape")
    rows = [
        problem("held", "held_out", base=[bad, bad], tuned=[good, bad]),
        problem("seen", "seen", base=[bad], tuned=[bad]),
    ]
    shown = Page(render_html(made_report(rows))).words
    assert "base, n = 1: 0 % throughout tuned, n = 1 " in shown
    assert "base: no verified kernel tuned: 2.00x" in shown
    assert shown.count("none, as no kernel was verified") == 1, "of the seen problems: two empty lanes say no more"


def test_pass_at_k_stands_beside_no_count_of_another_k(report: dict[str, Any]) -> None:
    table = render_markdown(report).partition("## pass@k")[2].partition("##")[0]
    assert "| split | model | n | k = 1 |" in table and "/" not in table.partition("| split")[2]


def test_touched_and_unusable_problems_stand_apart_with_their_reasons(html: str, report: dict[str, Any]) -> None:
    shown = Page(html).text
    before, touched = shown.split("Touched problems\nAsked as held-out ones", 1)
    row = next(row for row in report["problems"] if row["split"] == "touched")
    assert row["touched"] in touched and row["key"] in touched
    assert row["touched"] not in before
    assert UNUSABLE["reason"] in touched and UNUSABLE["key"] in touched and UNUSABLE["place"] in touched
    assert "1 of those that were given" in touched


def test_the_best_answer_is_the_fastest_verified_one_else_the_one_that_got_furthest() -> None:
    slow, fast = answer("verified", 1, 0.5), answer("verified", 2, 3.0)
    wrong = answer("compile_error", 0, None)
    assert best_answer([wrong, slow, fast]) is fast
    furthest = [answer(v, i) for i, v in enumerate(("unparsed", "compile_error", "timeout", "incorrect_shape"))]
    for n in range(1, 5):
        assert best_answer([*furthest[:n], answer(furthest[n - 1]["verdict"], n)]) is furthest[n - 1], "the first"
    assert best_answer([wrong, untimed := answer("verified", 1), answer("verified", 2)]) is untimed
    assert best_answer([]) is None
    assert tally([wrong, slow, fast]) == "2/3 verified, 3.00x"
    assert tally([wrong]) == "compile error" and tally([]) == "not asked"


@pytest.mark.parametrize("samples", [1, 8])
def test_every_share_is_shown_with_its_interval_and_its_n(samples: int) -> None:
    report = made_report(made_problems({"held_out": 7}, samples))
    shown = Page(render_html(report)).words
    markdown = render_markdown(report)
    for model in ("base", "tuned"):
        score = report[model]["held_out"]
        for share in (score["compiled"], score["fast_0"], score["fast_1"], score["fast_2"], score["refused"]):
            text = share_text(share)
            assert text in markdown.replace("&lt;", "<")
            rate, _, tally_ = text.partition("], ")
            assert f"{rate}] {tally_}" in shown
    for text, start, end in ((shown, "Compiles: the kernel", "Base against"), (markdown, "## Scores", "## Tuned less")):
        table = text[text.index(start) : text.index(end)].replace("&lt;", "<").replace("95 % Wilson", "")
        rates = re.findall(r"[\d.]+ %", table)
        assert len(rates) >= 8
        assert len(rates) == len(re.findall(r"[\d.]+ % \[[<>]?[\d.]+, [<>]?[\d.]+\],? ?\d+/\d+", table))


def test_every_number_of_the_score_table_comes_from_the_report() -> None:
    """Each share gets a number that occurs nowhere else; all of them have to be on the page, and in Markdown."""
    report = made_report(made_problems({"held_out": 3}, samples=8))
    wanted = []
    for place, (model, name) in enumerate(
        (m, s) for m in ("base", "tuned") for s in ("compiled", "fast_0", "fast_1", "fast_2", "refused")
    ):
        share = {
            "rate": 0.2 + place / 100,
            "interval": [0.11, 0.8 + place / 100],
            "n": 3,
            "count": 40 + place,
            "answers": 977,
        }
        report[model]["held_out"][name] = share
        wanted.append((f"{20 + place} % [11, {percent(0.8 + place / 100)}]", f"{40 + place}/977, n = 3"))
    for place, name in enumerate(("fast_0", "fast_1", "fast_2")):
        report["comparison"]["held_out"][name] = {
            "difference": 0.31 + place / 100,
            "interval": [-0.13, 0.71 + place / 100],
            "n": 3,
            "method": "bootstrap",
        }
        wanted.append((f"+{31 + place}", f"[−13, +{71 + place}]"))
    shown = Page(render_html(report)).words
    markdown = render_markdown(report)
    for rate, count in wanted:
        assert rate in shown and count in shown
        assert rate in markdown and count in markdown


def test_the_command_that_repeats_it_is_shown_as_it_is_typed(html: str, report: dict[str, Any]) -> None:
    command = report["provenance"]["repeat_with"]
    assert command in Page(html).text
    assert f"    {command}\n" in render_markdown(report)


def test_the_page_of_a_base_model_alone_has_no_tuned_model() -> None:
    report = made_report(made_problems(SIZES, samples=8, tuned=False))
    for text in (Page(render_html(report)).text, render_markdown(report)):
        assert "base" in text and "tuned" not in text and "McNemar" not in text


def test_without_timing_no_speed_is_claimed() -> None:
    report = made_report(made_problems(SIZES, samples=2, timed=False), timed=False)
    html = render_html(report)
    assert "Speed was not measured" in html and "<polyline" not in html and '<circle class="dot-mark' not in html
    assert "not measured" in render_markdown(report)


def test_a_report_without_a_problem_says_so() -> None:
    report = made_report([], unusable=[UNUSABLE])
    page = Page(render_html(report))
    assert "No problem could be asked: the 1 that were given are named below" in page.text
    assert UNUSABLE["reason"] in page.text
    assert_self_contained(render_html(report))
    assert render_markdown(report).startswith("# Evaluation report")


def test_a_problem_that_one_model_was_not_asked_is_drawn() -> None:
    row = problem("held", "held_out", base=[answer("verified")], tuned=[])
    assert_self_contained(render_html(made_report([row])))
    assert "not asked" in render_markdown(made_report([row]))


def test_one_answer_a_problem_has_no_lists_of_answers(single: dict[str, Any]) -> None:
    shown = Page(render_html(single)).text
    assert "All 1 answers" not in shown and "pass@k" not in shown and 'class="strip"' not in render_html(single)


def test_rubbish_and_endless_answers_are_drawn_and_cut_visibly() -> None:
    endless = answer("unparsed", answer="\x00\x1b[31m\ud800" + "again " * LONGEST_SHOWN, detail="a | pipe\nand a line")
    report = made_report([problem("seen_a", "seen", base=[endless], tuned=[endless])])
    shown = Page(render_html(report)).text
    assert "\x00" not in shown and "\ud800" not in shown
    assert "100,007 more characters: see generations.jsonl" in shown
    assert len(shown) < 4 * LONGEST_SHOWN
    table = [line for line in render_markdown(report).splitlines() if line.startswith("| `seen_a`")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 6


def test_a_page_of_many_endless_answers_stays_within_its_budget() -> None:
    noise = "".join(chr(97 + i * 7919 % 26) for i in range(30_000))
    rows = made_problems({"held_out": 300}, samples=1)
    for row in rows:
        for model in ("base", "tuned"):
            row[model][0] |= {"answer": noise, "code": noise}
    html = render_html(made_report(rows))
    assert 4_000_000 < len(html.encode()) < 9_000_000
    assert rows[0]["pytorch_code"].splitlines()[-1] in Page(html).text


def test_the_longest_texts_alone_are_cut_to_fit_a_budget() -> None:
    texts = ["a" * 10, None, "b" * 5_000, "c" * 9_000]
    assert longest_shown(texts, budget=20_000) == LONGEST_SHOWN
    assert longest_shown(texts, budget=11_010) == 6_000
    assert longest_shown(texts, budget=6_010) == 3_000
    assert longest_shown(texts, budget=10) == 500
    assert longest_shown([], budget=10) == LONGEST_SHOWN


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "100"),
        (0.0001, "<0.1"),
        (0.9999, ">99.9"),
        (0.996, "99.6"),
        (0.05, "5"),
        (0.0625, "6.2"),
        (0.334, "33"),
    ],
)
def test_percent_rounds_neither_to_none_nor_to_all(value: float, text: str) -> None:
    assert percent(value) == text


def test_differences_are_signed_points() -> None:
    shown = difference_text({"difference": -0.126, "interval": [-0.3, 0.05], "n": 9, "method": "bootstrap"})
    assert shown == "−13 points [−30, +5], n = 9"
    assert difference_text(None) == "not measured"


def test_markdown_tables_have_as_many_cells_as_their_header(report: dict[str, Any]) -> None:
    width = None
    for line in render_markdown(report).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (width, cells) or cells == width, line
        width = cells


def test_markdown_puts_everything_but_provenance_before_the_problems(report: dict[str, Any]) -> None:
    """The Dagster UI shows what stands before them."""
    before, _, after = render_markdown(report).partition("\n## Problems\n")
    for title in (
        "Scores",
        "Tuned less base",
        "fast_p",
        "pass@k",
        "Refused",
        "Tokens",
        "Verdicts",
        "Touched",
        "Held-out",
    ):
        assert title in before.split("## Scores")[1] or title == "Scores"
    assert "Every number here is made up." in before and "## Settings" in after


def test_the_three_files_are_written_and_the_json_is_the_report(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8")) == report
    assert (tmp_path / "new" / "report.md").read_text(encoding="utf-8") == render_markdown(report)


def test_a_speedup_is_shown_with_its_interval_and_what_it_has_to_be_read_with() -> None:
    timed = {
        "speedup_low": 1.1,
        "speedup_high": 1.41,
        "launch_bound": True,
        "graph_speedup": 0.7,
        "compile_speedup": 0.85,
        "reference_time_ms": 0.05,
        "kernel_time_ms": 0.04,
        "torch_share": 0.25,
    }
    row = problem("test_a", "test", base=[answer("verified", 0, 1.254, **timed)], tuned=[answer("verified", 0, 1.5)])
    shown = Page(render_html(made_report([row]))).text
    speed = "1.25x [1.10, 1.41], bound by launches, 0.70x as CUDA graphs, 0.85x against torch.compile"
    assert f"{speed} · 0.04 ms against 0.05 ms · 0.25 of the work by PyTorch" in shown


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):  # a <comment>\n    return \"a & b\" + 'it'\n",
        '"""never closed\nimport os',
        "x = 'broken\n@triton.jit\ndef kernel(a, N: tl.constexpr): return 0x1F + 1e-5",
        'a @ b\r\n\t<tag attr="v"> &amp; é',
        "",
    ],
)
def test_highlighting_changes_no_character(source: str) -> None:
    assert Page(str(highlight_python(source))).text.replace("\r\n", "\n") == source.replace("\r\n", "\n")


def test_highlighting_marks_what_is_worth_a_colour() -> None:
    marked = str(highlight_python("@triton.jit\ndef kernel(x):\n    return tl.load(x) * 2 # <twice>\n"))
    assert '<span class="d">@triton.jit</span>' in marked
    assert '<span class="k">def</span> <span class="f">kernel</span>' in marked
    assert 'tl.<span class="f">load</span>' in marked
    assert '<span class="n">2</span>' in marked
    assert '<span class="c"># &lt;twice&gt;</span>' in marked
