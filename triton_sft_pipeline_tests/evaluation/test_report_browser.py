"""The drawn pages in headless Chromium: on a phone and on a desktop, the page itself never scrolls sideways."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from triton_sft_pipeline.evaluation.compare import compare_reports
from triton_sft_pipeline.evaluation.compare_report import comparison_html
from triton_sft_pipeline.evaluation.report import render_html
from triton_sft_pipeline_tests.evaluation.reports import made_problems, made_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking "
    "--disable-component-update --allow-file-access-from-files --window-size=1400,1000 --virtual-time-budget=3000 "
    "--dump-dom"
)

# A window cannot be as narrow as a phone, a frame can. Everything that folds is opened first.
FRAME = """<iframe id=f style="border:0;width:{width}px;height:800px" src="{name}"></iframe><pre id=o></pre><script>
onload = () => {{
  const page = document.getElementById("f").contentDocument
  page.querySelectorAll("details").forEach(each => each.open = true)
  document.getElementById("o").textContent = "width " + page.documentElement.scrollWidth
}}
</script>"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages with the longest names and words that there are likely to be."""
    place = tmp_path_factory.mktemp("pages")
    rows = made_problems({"seen": 2, "held_out": 3, "touched": 1}, samples=8)
    rows[0] |= {"key": "level3/" + "a_long_name_of_a_problem_" * 6, "name": "another_long_name_" * 6}
    rows[0]["tuned"][0]["detail"] = "word" * 200
    parts = {
        "notes": ["a/very/long/path/without/a/space" * 9],
        "unusable": [{"key": "level4/" + "x" * 90, "place": "y" * 90, "kind": "invalid", "reason": "z" * 300}],
        "headline": "verified kernels: " + "0/27 -> 27/27 on seen problems; " * 4,
    }
    report = made_report(rows, **parts)
    report["provenance"] |= {"repeat_with": "triton-sft evaluate " + "--option=value" * 30, "device": "d" * 200}
    (place / "report.html").write_text(render_html(report), encoding="utf-8")
    labels = ("a/rather/long/name-of-a-run", "b" * 60, "third")
    comparison = compare_reports(dict.fromkeys(labels, report), resamples=50)
    (place / "compare.html").write_text(comparison_html(comparison), encoding="utf-8")
    return place


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report.html", "compare.html"])
def test_no_page_is_wider_than_its_window(directory: Path, tmp_path: Path, name: str, width: int) -> None:
    frame = directory / f"frame-{width}-{name}"
    frame.write_text(FRAME.format(width=width, name=name), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"width (\d+)</pre>", drawn)
    assert found and int(found[1]) == width
