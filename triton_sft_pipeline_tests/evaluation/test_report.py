"""The drawn report: nothing of a model's answer becomes markup, nothing is loaded from anywhere, no number stands
without its n.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from triton_sft_pipeline.evaluation import render_html, render_markdown, score_plot_png, write_report
from triton_sft_pipeline.evaluation.highlight import highlight_python
from triton_sft_pipeline.evaluation.report import LONGEST_SHOWN
from triton_sft_pipeline_tests.evaluation.conftest import HOSTILE, SPLITS, Evaluation, run
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


@pytest.fixture(scope="module")
def html(evaluation: Evaluation) -> str:
    return render_html(evaluation.report)


def test_the_page_loads_nothing_and_runs_no_script(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "svg"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"url\(|@import", html)


def test_hostile_code_is_text_on_the_page(html: str) -> None:
    assert HOSTILE in Page(html).text
    assert HOSTILE not in html


def test_each_problem_folds_with_both_kernels_and_the_reason(html: str, evaluation: Evaluation) -> None:
    page = Page(html)
    assert page.attributes.count(("class", "problem card")) == sum(map(len, SPLITS.values()))
    for row in evaluation.report["problems"]:
        assert row["pytorch_code"] in page.text
        for model in ("base", "tuned"):
            assert row[model]["detail"] in page.text
            assert row[model]["answer"] in page.text
    for note in evaluation.report["notes"]:
        assert note in page.text


def test_no_share_is_shown_without_its_n_and_interval(html: str, evaluation: Evaluation) -> None:
    shown = Page(html).text
    assert "1/3 33 % [6, 79]" in re.sub(r"\s+", " ", shown)
    for text in (shown, render_markdown(evaluation.report)):
        rates = re.findall(r"\d+ %(?! Wilson)", text)
        assert rates
        assert len(rates) == len(re.findall(r"\d+ % \[\d+, \d+\]", text))


def test_the_page_of_a_base_model_alone_has_no_tuned_model(tmp_path: Path) -> None:
    report = run(tmp_path, has_adapter=False).report
    for text in (Page(render_html(report)).text, render_markdown(report)):
        assert "base" in text and "tuned" not in text and "McNemar" not in text
    assert score_plot_png(report).startswith(b"\x89PNG")


def test_rubbish_and_endless_answers_are_drawn_and_cut_visibly(evaluation: Evaluation) -> None:
    report = json.loads(json.dumps(evaluation.report))
    row = report["problems"][0]["base"]
    row["answer"] = "\x00\x1b[31m\ud800" + "again " * LONGEST_SHOWN
    row["detail"] = "a | pipe\nand a line"
    shown = Page(render_html(report)).text
    assert "\x00" not in shown and "\ud800" not in shown
    assert "more characters: see generations.jsonl" in shown
    assert len(shown) < 3 * LONGEST_SHOWN
    table = [line for line in render_markdown(report).splitlines() if line.startswith("| `seen_a`")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 6


def test_markdown_tables_have_as_many_cells_as_their_header(evaluation: Evaluation) -> None:
    width = None
    for line in render_markdown(evaluation.report).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (width, cells) or cells == width, line
        width = cells


def test_the_three_files_are_written_and_the_json_is_the_report(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(evaluation.report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8")) == evaluation.report
    assert (tmp_path / "new" / "report.md").read_text(encoding="utf-8").count("memorisation check") == 1


def test_the_plot_is_a_small_picture(evaluation: Evaluation) -> None:
    png = score_plot_png(evaluation.report)
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert png.startswith(b"\x89PNG") and 400 <= width <= 500 and 200 <= height <= 300


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


def test_a_speedup_is_shown_with_its_interval_and_what_it_has_to_be_read_with(tmp_path: Path) -> None:
    timed = {
        "speedup": 1.254,
        "speedup_low": 1.1,
        "speedup_high": 1.41,
        "launch_bound": True,
        "graph_speedup": 0.7,
        "compile_speedup": 0.85,
        "reference_time_ms": 0.05,
        "kernel_time_ms": 0.04,
        "torch_share": 0.25,
    }
    report = run(tmp_path, splits={"test": SPLITS["test"]}, judge=RecordingJudge(**timed)).report
    shown = Page(render_html(report)).text
    speed = "1.25x [1.10, 1.41], bound by launches, 0.70x as CUDA graphs, 0.85x against torch.compile"
    assert f"{speed} · 0.04 ms against 0.05 ms · 0.25 of the work by PyTorch" in shown


def test_a_speedup_without_interval_is_shown_alone(tmp_path: Path) -> None:
    report = run(tmp_path, splits={"test": SPLITS["test"]}, judge=RecordingJudge(speedup=1.5), samples=2).report
    shown = Page(render_html(report)).text
    assert "· 1.50x ·" in shown and "2 of 2 answers verified" in shown


def test_highlighting_marks_what_is_worth_a_colour() -> None:
    marked = str(highlight_python("@triton.jit\ndef kernel(x):\n    return tl.load(x) * 2 # <twice>\n"))
    assert '<span class="d">@triton.jit</span>' in marked
    assert '<span class="k">def</span> <span class="f">kernel</span>' in marked
    assert 'tl.<span class="f">load</span>' in marked
    assert '<span class="n">2</span>' in marked
    assert '<span class="c"># &lt;twice&gt;</span>' in marked
