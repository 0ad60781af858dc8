"""The command line: exit codes, what is printed, what is written. A process is started where that is the point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from triton_sft_pipeline import cli
from triton_sft_pipeline.config import data_dir
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.commands import Outcome, Run, one_message
from triton_sft_pipeline_tests.traces.records import labelled, record, write_array


def process(*arguments: str | Path, **environment: str) -> Outcome:
    """The installed command, or the module where the package is not installed."""
    script = Path(sys.executable).with_name("triton-sft")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "triton_sft_pipeline.cli"]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Twelve good traces and one that is labelled incorrect."""
    return write_array(tmp_path / "t.json", [*(record(n) for n in range(100, 112)), labelled(1, correctness=False)])


COMMANDS = [
    [],
    ["filter"],
    ["dataset"],
    ["dataset", "build"],
    ["dataset", "show"],
    ["dataset", "push"],
    ["train"],
    ["verify"],
    ["evaluate"],
    ["compare"],
    ["infer"],
    ["refresh"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_in_80_columns(command: list[str]) -> None:
    for flag in ("--help", "-h"):
        shown = CliRunner().invoke(cli.cli, [*command, flag])
        assert shown.exit_code == 0 and shown.output.startswith("Usage:")
        assert max(len(line) for line in shown.output.splitlines()) <= 80


def test_the_installed_command_filters_the_shipped_sample(tmp_path: Path) -> None:
    done = process("filter", "--out", tmp_path / "out")
    assert done.code == 0 and done.err == ""
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    records = json.loads((data_dir() / "reasoning_traces.json").read_text(encoding="utf-8"))
    assert funnel["read"] == len(records)
    assert funnel["kept"] + sum(funnel["dropped"].values()) + sum(funnel["quarantined"].values()) == funnel["read"]
    assert funnel["kept"] >= 24 and funnel["breaks"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dropped.jsonl",
        "filtered_traces.parquet",
        "funnel.json",
        "quarantine.jsonl",
    ]
    lines = done.out.splitlines()
    assert lines[0].split() == ["read", str(funnel["read"])] and lines[-2].split()[:2] == ["kept", str(funnel["kept"])]
    assert all(len(line) <= 80 for line in lines[:-1]) and lines[-1] == f"written to {tmp_path / 'out'}"


def test_the_installed_command_says_what_is_wrong_in_one_message(tmp_path: Path) -> None:
    done = process("filter", "--out", tmp_path / "out", TRITON_SFT_TRACES=str(tmp_path / "none.json"))
    assert done.code == 2 and done.out == "" and "none.json: no such file or folder" in one_message(done)
    assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_error_to_tell(tmp_path: Path) -> None:
    command = f"{sys.executable} -m triton_sft_pipeline.cli train --dry-run | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_exit_code_0_when_enough_traces_are_kept(run: Run, traces: Path) -> None:
    done = run("filter", traces, "--out", "out")
    assert done.code == 0 and done.err == ""
    assert json.loads(Path("out", "funnel.json").read_text())["dropped"] == {"correctness": 1}


def test_exit_code_1_when_too_few_are_kept_and_the_reasons_are_on_disk(run: Run, traces: Path) -> None:
    done = run("filter", traces, "--out", "out", "--min-traces", "13")
    assert done.code == 1
    assert (
        one_message(done) == "triton-sft: min_traces: 12 traces are kept, at least 13 are wanted. "
        "Why the rest was not: out/dropped.jsonl.\n"
    )
    assert Path("out", "dropped.jsonl").is_file()


def test_exit_code_1_when_every_trace_is_dropped(run: Run, tmp_path: Path) -> None:
    done = run("filter", write_array(tmp_path / "bad.json", [labelled(correctness=False)] * 20), "--out", "out")
    assert done.code == 1 and "0 traces are kept" in one_message(done)


def test_the_flags_of_the_filter_are_its_settings(run: Run, tmp_path: Path) -> None:
    speeds = [0.5, 1.2, 2.5]
    records = [labelled(100 + n, speedup=s, fast_1=s > 1, fast_2=s >= 2) for n, s in enumerate(speeds)]
    path = write_array(tmp_path / "speeds.json", records)
    flags: list[list[str]] = [
        [],
        ["--require-fast-1"],
        ["--require-fast-2"],
        ["--min-speedup", "1.3"],
        ["--min-speedup", "0"],
    ]
    for flag, kept in zip(flags, [3, 2, 1, 1, 3], strict=True):
        assert run("filter", path, "--out", "out", "--min-traces", "1", *flag).code == 0
        assert json.loads(Path("out", "funnel.json").read_text())["kept"] == kept, flag


def test_a_flag_wins_over_a_setting_and_a_file(run: Run, traces: Path) -> None:
    Path("mine.yaml").write_text("filter: {min_traces: 13}\n")
    assert run("filter", traces, "--out", "out", "--config", "mine.yaml").code == 1
    assert run("filter", traces, "--out", "out", "--config", "mine.yaml", "--set", "filter.min_traces=12").code == 0
    assert run("filter", traces, "--out", "out", "--set", "filter.min_traces=13", "--min-traces", "12").code == 0


def test_a_file_that_breaks_off_is_filtered_and_strict_exits_2(run: Run, traces: Path) -> None:
    traces.write_bytes(traces.read_bytes()[:-5])
    done = run("filter", traces, "--out", "out")
    assert done.code == 0 and "t.json: breaks off at byte" in done.out and "in record 12" in done.out
    assert json.loads(Path("out", "funnel.json").read_text())["breaks"][0]["position"] == 12
    done = run("filter", traces, "--out", "strict", "--strict")
    assert done.code == 2 and "breaks off at byte" in one_message(done) and not Path("strict").exists()


def test_a_dry_run_of_the_filter_writes_nothing(run: Run, traces: Path) -> None:
    done = run("filter", traces, "--out", "out", "--dry-run")
    assert done.code == 0 and done.out.startswith("read") and "written" not in done.out
    done = run("filter", traces, "--out", "out", "--dry-run", "--min-traces", "20")
    assert done.code == 1 and "says why" not in one_message(done)
    assert list(Path().iterdir()) == []


def test_a_dry_run_of_the_training_prints_settings_that_can_be_read_back(run: Run) -> None:
    done = run("train", "--dry-run", "--set", "training.learning_rate=1e-3")
    assert done.code == 0 and list(Path().iterdir()) == []
    shown = yaml.safe_load(done.out)
    assert shown["training"]["learning_rate"] == 1e-3 and shown["preset"] == "tiny"
    Path("mine.yaml").write_text(done.out)
    assert yaml.safe_load(run("train", "--dry-run", "--config", "mine.yaml").out) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("filter --out o --preset nothing", "unknown preset 'nothing'. The presets are: "),
        ("filter --out o --set filter.min_trace=2", "filter.min_trace: unknown field; did you mean min_traces?"),
        ("filter --out o --set nonsense", "--set nonsense: expected section.field=value"),
        ("filter --out o --set preset=tiny", "use --preset tiny"),
        ("filter --out o --min-traces 0", "filter.min_traces: input should be greater than or equal to 1"),
        ("filter --out o --min-speedup -1", "filter.min_speedup: input should be greater than or equal to 0"),
        ("filter --out o --config none.yaml", "none.yaml: the configuration file cannot be read"),
        ("filter --out o none.json", "none.json: no such file or folder"),
        ("dataset build none --out o", "none/filtered_traces.parquet: not readable as filtered traces"),
        ("dataset build --out o", "there is no current filtered_traces"),
        ("train --traces none.json", "none.json: no such file or folder"),
        ("train --set training.epochs=zero", "training.epochs: input should be a valid number"),
        ("verify none.json --out o", "none.json: no such file or folder"),
        ("refresh --preset nothing", "unknown preset 'nothing'"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_writes_nothing(run: Run, arguments: str, said: str) -> None:
    done = run(*arguments.split())
    assert done.code == 2 and said in one_message(done)
    assert not Path("o").exists()


@pytest.mark.parametrize("arguments", ["nonsense", "filter", "filter --out", "filter --outt o", "verify", "dataset"])
def test_bad_usage_exits_2_with_the_way_to_help(run: Run, arguments: str) -> None:
    done = run(*arguments.split())
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.startswith("Usage: triton-sft ") or done.err.startswith("Error: Option '--out'")


def test_an_output_that_is_a_file_is_named(run: Run, traces: Path) -> None:
    Path("out").touch()
    done = run("filter", traces, "--out", "out")
    assert done.code == 1 and one_message(done) == "triton-sft: out: File exists.\n"


def test_an_interruption_exits_130(run: Run, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("triton_sft_pipeline.filtering.filter_location", interrupted)
    done = run("filter", traces, "--out", "out")
    assert done.code == 130 and "interrupted; what was finished is kept." in done.err


def test_a_bug_names_itself_and_shows_its_trace_when_asked(
    run: Run, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("triton_sft_pipeline.filtering.filter_location", broken)
    done = run("filter", traces, "--out", "out")
    assert (
        done.code == 1
        and "unexpected ZeroDivisionError: division by zero" in done.err
        and "TRITON_SFT_DEBUG=1" in done.err
    )
    monkeypatch.setenv("TRITON_SFT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("filter", traces, "--out", "out")


class WordJudge:
    """Stands in for the judge: a kernel that says `wrong` is wrong, every other is right. Keeps how it was made and
    what it was asked; interrupted after `dies_after` verdicts.
    """

    made: list[WordJudge]
    dies_after: int | None
    backend: str
    isolation, isolation_reason = "namespaces", ""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.asked = arguments, 0
        self.made.append(self)

    def __enter__(self) -> WordJudge:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        for item in items:
            if self.asked == self.dies_after:
                raise KeyboardInterrupt
            self.asked += 1
            right = "wrong" not in (item.triton_code or "")
            name = "verified" if right else "incorrect_shape"
            found = Verdict(
                item.key, name, right, right, detail="Compared.", backend=self.backend, isolation="namespaces"
            )
            yield found


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> type[WordJudge]:
    """The class that `verify` makes its judge from."""

    class Judge(WordJudge):
        made, dies_after, backend = [], None, "interpreter"

    monkeypatch.setattr("triton_sft_pipeline.verification.KernelJudge", Judge)
    return Judge


def test_verify_judges_every_record_and_says_what_does_not_hold(
    run: Run, judge: type[WordJudge], tmp_path: Path
) -> None:
    records = [record(1), record(2, triton_code="wrong"), labelled(3, correctness=False), record(4, result=None)]
    done = run("verify", write_array(tmp_path / "t.json", records), "--out", "v.jsonl")
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "1 of 3 labels hold." in lines
    assert [line.split()[:3] for line in lines if line.startswith("sample_")] == [
        ["sample_2", "correct", "incorrect_shape"],
        ["sample_3", "incorrect", "verified"],
    ]
    assert "isolation  namespaces" in lines and lines[-1] == "verdicts   v.jsonl"
    assert len(Path("v.jsonl").read_text().splitlines()) == 4


def test_verify_hands_its_options_to_the_judge(run: Run, judge: type[WordJudge], traces: Path) -> None:
    options = "--device cpu --workers 3 --timeout 7.5 --trials 2 --no-timing --compile-baseline"
    assert (
        run("verify", traces, "--out", "a.jsonl").code
        == run("verify", traces, "--out", "b", *options.split()).code
        == 0
    )
    assert judge.made[0].arguments == {
        "device": "auto",
        "workers": None,
        "timeout_s": 60.0,
        "trials": 5,
        "timing": True,
        "compile_baseline": False,
    }
    assert judge.made[1].arguments == {
        "device": "cpu",
        "workers": 3,
        "timeout_s": 7.5,
        "trials": 2,
        "timing": False,
        "compile_baseline": True,
    }


def test_verify_says_before_it_begins_that_kernels_can_read_files(
    run: Run, judge: type[WordJudge], traces: Path
) -> None:
    assert run("verify", traces, "--out", "a.jsonl").err == ""
    judge.isolation, judge.isolation_reason = "process", "as this user:\n  unshare: Operation not permitted"
    judge.dies_after = 0
    told = run("verify", traces, "--out", "b.jsonl").err.splitlines()[0]
    assert told == (
        "isolation is only process: kernels can read your files (as this user: unshare: Operation not permitted)"
    )


def test_verify_refuses_to_write_over_the_traces_before_it_judges(
    run: Run, judge: type[WordJudge], traces: Path
) -> None:
    done = run("verify", traces, "--out", "v.jsonl", "--relabel", traces)
    assert done.code == 2 and "Give --relabel another name" in one_message(done)
    assert judge.made == [] and not Path("v.jsonl").exists()


def test_verify_goes_on_where_it_was_interrupted(run: Run, judge: type[WordJudge], traces: Path) -> None:
    judge.dies_after = 5
    assert run("verify", traces, "--out", "v.jsonl").code == 130
    assert len(Path("v.jsonl").read_text().splitlines()) == 5
    judge.dies_after = None
    done = run("verify", traces, "--out", "v.jsonl")
    assert done.code == 0 and judge.made[1].asked == 13 - 5 and ", 5 judged earlier" in done.out
    assert len({json.loads(line)["key"] for line in Path("v.jsonl").read_text().splitlines()}) == 13


@pytest.mark.parametrize(
    ("backend", "option", "code"),
    [
        ("interpreter", ["--trials", "3"], 2),
        ("interpreter", ["--no-timing"], 0),
        ("cuda", ["--no-timing"], 2),
        ("cuda", ["--timeout", "10"], 0),
    ],
)
def test_verify_refuses_to_go_on_with_other_settings_where_they_matter(
    run: Run, judge: type[WordJudge], traces: Path, backend: str, option: list[str], code: int
) -> None:
    judge.backend = backend
    assert run("verify", traces, "--out", "v.jsonl").code == 0
    done = run("verify", traces, "--out", "v.jsonl", *option)
    assert done.code == code
    if code:
        assert "give --out another name" in one_message(done)
    assert judge.made[1].asked == 0


def test_verify_exits_1_when_a_record_got_no_verdict_and_judges_the_others(
    run: Run, judge: type[WordJudge], tmp_path: Path
) -> None:
    path = write_array(tmp_path / "t.json", [record(1), {"sample_key": "no code"}, record(2)])
    done = run("verify", path, "--out", "v.jsonl", "--relabel", "new.json")
    assert done.code == 1
    assert done.err.splitlines() == [
        f"not judged: {path}, record 1 (no code): pytorch_code is missing or no text",
        "triton-sft: 1 could not be judged; they are named above.",
    ]
    assert len(Path("v.jsonl").read_text().splitlines()) == 2 and len(json.loads(Path("new.json").read_text())) == 3


def test_verify_relabels_in_the_original_schema(run: Run, judge: type[WordJudge], tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1, triton_code="wrong"), record(2, result=None)])
    done = run("verify", path, "--out", "v.jsonl", "--relabel", "new.json")
    assert done.code == 0 and done.out.splitlines()[-1] == "relabelled new.json"
    new = json.loads(Path("new.json").read_text())
    assert new[0]["result"]["correctness"] is False and new[0]["result"]["error"] == "incorrect_shape: Compared."
    assert new[1]["result"] is None
