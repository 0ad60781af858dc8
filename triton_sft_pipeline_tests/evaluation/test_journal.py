"""What a killed, doubled or starved run leaves on disk, and what the next one makes of it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.journal import Journal, open_run, rows_of_same_run

IDENTITY = {"models": ["base"], "settings": {"seed": 0, "samples": 1}, "questions": {"test/a/12": "asked"}}


def test_a_row_is_whole_on_disk_when_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append({"text": "é\n\ud800\x00"})
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"text": "é\n\ud800\x00"}
    journal.append({"n": 2})
    journal.close()
    assert Journal(tmp_path / "rows.jsonl").rows == [{"text": "é\n\ud800\x00"}, {"n": 2}]


@pytest.mark.parametrize("torn", ['{"n": 2, "te', "{", '{"n": 2}'])
def test_a_last_line_without_its_newline_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n' + torn)
    journal = Journal(path)
    assert journal.rows == [{"n": 1}]
    journal.append({"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'


@pytest.mark.parametrize("line", ["not json", "[1]", ""])
def test_a_line_of_something_else_is_named_and_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n{{"n": 2}}\n')
    with pytest.raises(PipelineError, match=r"rows\.jsonl, line 2: not a row of an evaluation"):
        Journal(path)
    assert path.read_text() == f'{{"n": 1}}\n{line}\n{{"n": 2}}\n'


def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from triton_sft_pipeline.evaluation.journal import open_run\n"
        f"with open_run(Path({str(tmp_path)!r}), {IDENTITY!r}):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        with pytest.raises(PipelineError, match="another run is writing there"), open_run(tmp_path, IDENTITY):
            pass
        first.communicate("")
    with open_run(tmp_path, IDENTITY) as run:
        run.generations.append({"n": 1})


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk with so much room: a write beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_and_what_was_written_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal = Journal(path)
    journal.append({"n": 1})
    with files_of_at_most(20), pytest.raises(StepError, match=r"rows\.jsonl: .*\. Every row before is kept: start"):
        journal.append({"text": "x" * 100})
    journal.close()
    assert path.stat().st_size == 20, "half a row"
    assert Journal(path).rows == [{"n": 1}]


def test_the_same_run_goes_on_and_another_one_is_refused_with_what_differs(tmp_path: Path) -> None:
    with open_run(tmp_path, IDENTITY) as run:
        run.generations.append({"n": 1})
    with open_run(tmp_path, IDENTITY) as run:
        assert run.generations.rows == [{"n": 1}]
    other = {**IDENTITY, "settings": {"seed": 3}}
    with (
        pytest.raises(
            PipelineError,
            match=r"run\.json: an earlier run there asked something else "
            r"\(settings\.samples was 1, is not there; settings\.seed was 0, is 3\)",
        ),
        open_run(tmp_path, other),
    ):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY


def test_rows_are_counted_when_what_is_known_is_the_same_and_nothing_is_written(tmp_path: Path) -> None:
    assert rows_of_same_run(tmp_path / "none", IDENTITY) == 0 and not (tmp_path / "none").exists()
    with open_run(tmp_path, {**IDENTITY, "asker": {"weights": "ab"}}) as run:
        run.generations.append({"n": 1})
        run.generations.append({"n": 2})
    assert rows_of_same_run(tmp_path, IDENTITY) == 2, "who answered is not known yet"
    with pytest.raises(PipelineError, match=r"something else \(settings\.seed was 0, is 3\)"):
        rows_of_same_run(tmp_path, {"settings": {**IDENTITY["settings"], "seed": 3}})
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(PipelineError, match="what was asked is not known"):
        rows_of_same_run(tmp_path, IDENTITY)


def test_a_run_that_left_no_row_may_become_another(tmp_path: Path) -> None:
    with open_run(tmp_path, IDENTITY):
        pass
    with open_run(tmp_path, {"models": ["base"]}):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == {"models": ["base"]}


@pytest.mark.parametrize("content", [None, "{torn"])
def test_rows_of_nobody_knows_what_are_not_gone_on_with(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "generations.jsonl").write_text('{"n": 1}\n')
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(PipelineError, match="what was asked is not known"), open_run(tmp_path, IDENTITY):
        pass
    assert (tmp_path / "generations.jsonl").read_text() == '{"n": 1}\n'


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"file/out: cannot be made"), open_run(tmp_path / "file" / "out", IDENTITY):
        pass
