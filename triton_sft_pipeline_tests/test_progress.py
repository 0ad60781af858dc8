"""The bar on a terminal, as tqdm would draw it."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline import progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every bar that is made."""
    made: list[Any] = []

    class Kept(progress.tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(progress, "tqdm", Kept)
    monkeypatch.setattr(progress, "on_a_terminal", lambda: True)
    return made


def test_what_an_earlier_run_did_is_shown_as_done_and_not_in_the_rate(bars: list[Any]) -> None:
    with progress.progress_bar("kernels", show=True, resumes=True) as update:
        began = bars[0].start_t
        update(900, 1000)
        assert bars[0].format_dict | {"elapsed": 0} == bars[0].format_dict | {"elapsed": 0, "n": 900, "initial": 900}
        assert bars[0].start_t >= began
        update(910, 1000)
        drawn = bars[0].format_meter(**{**bars[0].format_dict, "elapsed": 10.0, "rate": None, "ncols": None})
    assert "91%" in drawn and "910/1000" in drawn
    assert "[00:10<01:30,  1.00it/s]" in drawn, "ten in ten seconds, ninety to go"


def test_a_bar_that_resumes_nothing_counts_from_its_first_call(bars: list[Any]) -> None:
    with progress.progress_bar("answers", show=True) as update:
        update(1, 4)
        update(2, 4)
        assert (bars[0].n, bars[0].total, bars[0].initial) == (2, 4, 0)


def test_bytes_are_shown_in_megabytes_with_rate_and_time_left(bars: list[Any]) -> None:
    with progress.progress_bar("reading", show=True, unit="B") as update:
        update(250_000_000, 500_000_000)
        drawn = bars[0].format_meter(**{**bars[0].format_dict, "elapsed": 1.0, "rate": None, "ncols": None})
    assert "250M/500M [00:01<00:01, 250MB/s]" in drawn


def test_a_hidden_bar_takes_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    for resumes in (True, False):
        with progress.progress_bar("kernels", show=False, resumes=resumes) as update:
            update(0, 2)
            update(2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_note_stands_in_place_of_rate_and_time_left_until_the_next_one(bars: list[Any]) -> None:
    def drawn() -> str:
        return bars[0].format_meter(**{**bars[0].format_dict, "elapsed": 301.0, "rate": None, "ncols": 80})

    with progress.progress_bar("answers and verdicts", show=True) as update:
        update(40, 160, "340 tokens/s, 2:05 of asking left")
        assert drawn().endswith(" 40/160 [05:01, 340 tokens/s, 2:05 of asking left]") and len(drawn()) <= 80
        update(41, 160)
        assert " 41/160 [05:01, 340 tokens/s" in drawn()
        update(120, 160, "judging")
        assert drawn().endswith(" 120/160 [05:01, judging]")


def test_a_new_note_is_drawn_when_nothing_has_moved(bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("answers and verdicts", show=True) as update:
        update(0, 160)
        update(0, 160, "340 tokens/s, 64 at 12 tokens")
        assert "64 at 12 tokens" in capsys.readouterr().err
        update(0, 160, "340 tokens/s, 64 at 80 tokens")
        assert "64 at 80 tokens" in capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then_with_the_latest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress_bar("answers and verdicts", show=True, resumes=True) as update:
        update(0, 160)
        for done in range(1, 40):
            now += 1
            update(done, 160, f"{done}0 tokens/s")
        now += 1
        update(40, 160)
    assert capsys.readouterr().err.splitlines() == [
        "answers and verdicts: 0/160 [00:00]",
        "answers and verdicts: 15/160, 150 tokens/s [00:15]",
        "answers and verdicts: 30/160, 300 tokens/s [00:30]",
    ]
