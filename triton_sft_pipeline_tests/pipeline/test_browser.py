"""What a person sees: the real web server's pages, drawn by headless Chromium."""

import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from triton_sft_pipeline_tests.pipeline.processes import Workplace
from triton_sft_pipeline_tests.pipeline.webserver import WebServer, web_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

# Virtual time: the page's timers run as fast as its requests are answered; it is dumped when the budget is spent.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1200 --virtual-time-budget=15000 --dump-dom"
)


class Words(HTMLParser):
    """The text of a page, without its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        text = data.strip()
        # The page holds some texts twice, one to show and one to measure.
        if text and not self._silent and text not in self.found[-1:]:
            self.found.append(text)


class Look:
    """The texts on a page, once it has drawn itself."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._directory = directory

    def __call__(self, page: str) -> list[str]:
        command = [
            str(CHROMIUM),
            *OPTIONS.split(),
            f"--user-data-dir={self._directory / 'profile'}",
            f"{self._url}{page}",
        ]
        drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        parser = Words()
        parser.feed(drawn.stdout)
        return parser.found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    workplace = Workplace(tmp_path_factory.mktemp("browser"))
    with workplace.instance() as instance:
        workplace.make_here("filtered_traces", instance)
    with web_server(workplace) as server:
        yield server


@pytest.fixture
def words(server: WebServer, tmp_path: Path) -> Look:
    return Look(server.url, tmp_path)


def test_the_lineage_page_shows_the_five_assets_at_once(words: Look) -> None:
    page = words("/asset-groups/")
    for name in ("reasoning_traces", "filtered_traces", "chat_dataset", "lora_adapter", "evaluation_report"):
        assert name in page


def test_the_page_of_the_filtered_traces_shows_the_funnel(words: Look) -> None:
    page = words("/assets/filtered_traces")
    for name in ("read", "dropped", "quarantined", "share_kept", "funnel", "funnel_plot", "samples"):
        assert name in page
    # The table of the funnel is short enough for the page to show it in place.
    assert "what became of them" in page


def test_the_checks_of_the_filtered_traces_are_listed_with_how_they_went(words: Look) -> None:
    page = words("/assets/filtered_traces?view=checks")
    for name in ("correctness", "fast_0", "min_traces", "accounting", "share_kept", "whole_files"):
        assert page[page.index(name) + 1] == "Succeeded"
    assert page[page.index("labels_reproduce") + 1] == "Not evaluated"
