"""`triton-sft evaluate`, `compare` and `infer`: exit codes, what is printed, what is written and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from triton_sft_pipeline.config import data_dir, load_config
from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.evaluation.generation import Completion, Request
from triton_sft_pipeline.files import read_json, write_json
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.commands import Outcome, Run
from triton_sft_pipeline_tests.evaluation.models import ScriptedModel, byte_tokenizer
from triton_sft_pipeline_tests.problems.codes import LEVEL_4, cached

PROBLEM = """import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return {0}


def get_inputs():
    return [torch.randn(4)]
"""
ADD, SOFTMAX = PROBLEM.format("x + 1"), PROBLEM.format("torch.softmax(x, 0)")
RIGHT = "Short.\n</think>\n\n<triton>\ndef right(): pass\n</triton>"
WRONG = "Short.\n</think>\n\n<triton>\nwrong\n</triton>"


def one_message(outcome: Outcome) -> str:
    assert "Traceback" not in outcome.err and "This is a bug" not in outcome.err
    assert outcome.err.count("triton-sft: ") == 1
    return outcome.err


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems, and a file that is none."""
    folder = tmp_path / "problems"
    folder.mkdir()
    (folder / "1_add.py").write_text(ADD)
    (folder / "2_softmax.py").write_text(SOFTMAX)
    (folder / "3_broken.py").write_text("def get_inputs(")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny base model, with the chat dataset that it was trained on beside it."""
    from triton_sft_pipeline.api import write_chat_dataset
    from triton_sft_pipeline.traces import FilterSettings, filter_location
    from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
    from triton_sft_pipeline.training.model import load_model_and_tokenizer
    from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings
    from triton_sft_pipeline_tests.traces.records import record, write_array

    directory = tmp_path_factory.mktemp("trained")
    base = ModelSettings(base_model=str(data_dir() / "tiny_base"), load_in_4bit=False, compute_dtype="float32")
    model, _ = load_model_and_tokenizer(base)
    attach_lora(model, create_lora_config(LoraSettings(r=2, alpha=4))).save_pretrained(directory)
    records = [record(n) for n in range(100, 112)]
    records[0]["pytorch_code"] = SOFTMAX
    kept = filter_location(write_array(directory / "t.json", records), FilterSettings()).kept
    write_chat_dataset(load_config(), kept, directory / "dataset")
    return directory


class Answering:
    """Stands in for what loads a model: keeps what it was asked to load, and answers as scripted."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, Path | None]] = []
        self.answers = {
            ("x + 1", False): WRONG,
            ("x + 1", True): RIGHT,
            ("softmax", False): "nothing",
            ("softmax", True): RIGHT,
        }

    def __call__(self, settings: Any, adapter: Path | None = None, *, progress: bool = False) -> Any:
        self.loaded.append((Path(settings.base_model).name, adapter))
        tokenizer = byte_tokenizer()
        return ScriptedModel(tokenizer, self.answers), tokenizer


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Answering:
    answering = Answering()
    monkeypatch.setattr("triton_sft_pipeline.training.model.load_model_and_tokenizer", answering)
    return answering


class FakeJudge:
    """Stands in for the judge: `wrong` is wrong; a number at the end of the code is its speedup. Interrupted before the
    verdict on what says `interrupt`.
    """

    made: list[dict[str, Any]]
    asked: list[str]
    backend = "interpreter"

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def __enter__(self) -> FakeJudge:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        for item in items:
            code = item.triton_code or ""
            if "interrupt" in code:
                raise KeyboardInterrupt
            self.asked.append(code)
            right = "wrong" not in code
            last = code.split()[-1]
            speed = float(last) if last[0].isdigit() else None
            yield Verdict(
                item.key,
                "verified" if right else "incorrect_shape",
                right,
                right,
                speedup=speed,
                speedup_low=speed and speed - 0.1,
                speedup_high=speed and speed + 0.1,
                detail="The outputs were compared in every trial, and this sentence is too long for a line.",
                isolation="namespaces",
            )


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> type[FakeJudge]:
    class Judge(FakeJudge):
        made, asked = [], []

    monkeypatch.setattr("triton_sft_pipeline.verification.KernelJudge", Judge)
    return Judge


# ----- evaluate -----


def test_an_evaluation_of_base_and_adapter_writes_the_report_and_says_its_headline(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    done = run("evaluate", "--adapter", trained, "--problems", problems, "--out", "o")
    assert done.code == 0
    report = read_json(Path("o", "report.json"))
    *headline, last = done.out.splitlines()
    assert " ".join(headline) == report["headline"] and last == "report  o/report.html"
    assert len(headline) == 2 and max(map(len, headline)) <= 80
    assert "base 0/1 -> tuned 1/1 on held-out problems" in report["headline"]
    assert {p.name for p in Path("o").iterdir()} >= {
        "generations.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "verdicts.jsonl",
    }
    assert model.loaded == [("tiny_base", trained)]
    assert [(row["key"], row["split"]) for row in report["problems"]] == [
        ("1_add", "held_out"),
        ("2_softmax", "touched"),
    ]
    assert [item["key"] for item in report["unusable"]] == ["3_broken"]
    about = report["provenance"]
    assert about["repeat_with"] == f"triton-sft evaluate --adapter {trained} --problems {problems} --out o"
    assert about["trained_on"] == str(trained / "dataset") and len(about["trained_on_sha256"]) == 64
    assert about["preset"] == "tiny" and len(about["adapter_version"]) == 64 and about["judge_settings"]["trials"] == 5


def test_what_cannot_be_asked_and_what_was_trained_on_is_named_before_the_run(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    said = run("evaluate", "--adapter", trained, "--problems", problems, "--out", "o").err
    assert "unusable   1 invalid" in said and "3_broken" in said
    assert "touched    1 by the training data; reported apart" in said and "2_softmax" in said
    assert max(map(len, said.splitlines())) <= 80


def test_without_an_adapter_the_base_alone_is_asked(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    assert run("evaluate", "--problems", problems, "--out", "o").code == 0
    report = read_json(Path("o", "report.json"))
    assert "tuned" not in report and report["base"]["held_out"]["n"] == 2
    assert model.loaded == [("tiny_base", None)]


def test_the_options_are_settings_of_the_evaluation(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    options = ["--samples", "3", "--temperature", "0.9", "--top-p", "0.5", "--set", "evaluation.seed=7"]
    assert run("evaluate", "--problems", problems, "--out", "o", *options).code == 0
    settings = read_json(Path("o", "report.json"))["settings"]
    assert (settings["samples"], settings["temperature"], settings["top_p"], settings["seed"]) == (3, 0.9, 0.5, 7)
    assert len(Path("o", "generations.jsonl").read_text().splitlines()) == 6


def test_the_judge_is_made_with_the_settings_of_the_evaluation(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    sets = ["--set", "evaluation.judge_trials=2", "--set", "evaluation.judge_device=cpu"]
    assert run("evaluate", "--problems", problems, "--out", "o", *sets).code == 0
    assert (judge.made[0]["trials"], judge.made[0]["device"]) == (2, "cpu")


def test_models_that_problems_load_are_shown_to_the_judge_where_the_cache_holds_them(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (problems / "4_model.py").write_text(LEVEL_4)
    model.answers["lm-small", False] = "nothing"
    assert run("evaluate", "--problems", problems, "--out", "without").code == 0
    cached(tmp_path / "hub", "owner/lm-small", "config.json", "model.safetensors")
    assert run("evaluate", "--problems", problems, "--out", "with").code == 0
    assert [made["models"] for made in judge.made] == [[], ["owner/lm-small"]]
    unusable = [
        [problem["key"] for problem in read_json(Path(out, "report.json"))["unusable"]] for out in ("without", "with")
    ]
    assert unusable == [["3_broken", "4_model"], ["3_broken"]]


def test_an_interrupted_evaluation_exits_130_and_goes_on_where_it_was(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    command = ["evaluate", "--adapter", trained, "--problems", problems, "--out", "o"]
    before = dict(model.answers)
    model.answers["softmax", True] = RIGHT.replace("right", "interrupt")
    done = run(*command)
    assert done.code == 130 and "interrupted; what was finished is kept" in done.err
    rows = Path("o", "generations.jsonl").read_text().splitlines()
    assert len(rows) == 4 and not Path("o", "report.json").exists()
    # As if the last answer had not been there yet either.
    kept = [row for row in rows if "interrupt" not in row]
    Path("o", "generations.jsonl").write_text("".join(f"{row}\n" for row in kept) + '{"model": "tu')
    judged = list(judge.asked)
    model.answers = before
    done = run(*command)
    assert done.code == 0 and "going on   3 of 4 answers are there\n" in done.err
    assert sorted([*judged, *judge.asked[len(judged) :]]) == sorted(["wrong", *["def right(): pass"] * 2])


def test_a_run_that_asked_something_else_is_not_gone_on_with(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    assert run("evaluate", "--problems", problems, "--out", "o").code == 0
    model.loaded.clear()
    done = run("evaluate", "--problems", problems, "--out", "o", "--samples", "2")
    assert done.code == 2 and "settings.samples was 1, is 2" in one_message(done)
    assert "answers are there" not in done.err and model.loaded == [], "known before a model is loaded"
    done = run("evaluate", "--problems", problems, "--out", "o", "--samples", "2", "--dry-run")
    assert done.code == 2 and "settings.samples was 1, is 2" in one_message(done)
    assert "4: 2 problems, 2 samples" in done.out and "answers are there" not in done.out


def test_a_finished_evaluation_writes_its_report_again_without_loading_a_model(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    command = ["evaluate", "--adapter", trained, "--problems", problems, "--out", "o"]
    assert run(*command).code == 0
    first = read_json(Path("o", "report.json"))
    Path("o", "report.md").unlink()
    model.loaded.clear()
    done = run(*command)
    assert done.code == 0 and "going on   4 of 4 answers are there\n" in done.err and model.loaded == []
    assert read_json(Path("o", "report.json")) == first and Path("o", "report.md").is_file()


def test_an_answer_that_is_missing_from_a_finished_evaluation_is_asked_for(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    command = ["evaluate", "--adapter", trained, "--problems", problems, "--out", "o"]
    assert run(*command).code == 0
    rows = Path("o", "generations.jsonl").read_text().splitlines(keepends=True)
    Path("o", "generations.jsonl").write_text("".join(rows[:-1]))
    assert run(*command).code == 0 and len(model.loaded) == 2
    again = Path("o", "generations.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == rows[:-1] and [json.loads(line)["text"] for line in again[-1:]] == [f"<think>\n{RIGHT}"]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("adapter_version", "other"),
        ("base_model_version", "other"),
        ("model_settings", {}),
        ("asker", {"asked": "a server"}),
        ("asker", None),
    ],
)
def test_a_report_of_other_weights_or_of_a_server_does_not_spare_the_loading(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge], change: str, value: Any
) -> None:
    command = ["evaluate", "--adapter", trained, "--problems", problems, "--out", "o"]
    assert run(*command).code == 0
    report = read_json(Path("o", "report.json"))
    report["provenance"][change] = value
    write_json(Path("o", "report.json"), report)
    assert run(*command).code == 0 and len(model.loaded) == 2


def test_a_step_that_fails_exits_1(
    run: Run, problems: Path, judge: type[FakeJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any, **options: Any) -> None:
        raise StepError("the model does not fit.")

    monkeypatch.setattr("triton_sft_pipeline.training.model.load_model_and_tokenizer", too_large)
    done = run("evaluate", "--problems", problems, "--out", "o")
    assert done.code == 1 and "the model does not fit." in one_message(done)


# ----- the dry run -----


def test_a_dry_run_says_what_would_be_asked_of_whom_and_loads_and_writes_nothing(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    command = ["evaluate", "--adapter", trained, "--problems", problems, "--samples", "4", "--dry-run"]
    done = run(*command)
    assert (done.code, done.err) == (0, "") and model.loaded == judge.made == list(Path().iterdir()) == []
    lines = [line for line in done.out.splitlines() if "/" not in line]
    assert max(map(len, lines)) <= 80
    said = " ".join(done.out.split())
    assert "held-out 1 element-wise 1 touched 1" in said and "level" not in said
    assert "unusable 1 invalid 3_broken" in said and "touched 1 by the training data; reported apart 2_softmax" in said
    assert "asked base and tuned" in said and f"with {trained}" in said
    assert f"training problems of {trained / 'dataset'}" in said
    assert "16: 2 problems, 4 samples, 2 models; temperature 0.7, top-p 0.95" in said


def test_a_dry_run_counts_problems_by_level_and_says_what_is_there_already(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    for name, level in (("1_add.py", "level1"), ("2_softmax.py", "level2")):
        (problems / level).mkdir()
        (problems / name).rename(problems / level / name)
    (problems / "3_broken.py").unlink()
    assert run("evaluate", "--problems", problems, "--out", "o").code == 0
    done = run("evaluate", "--problems", problems, "--out", "o", "--dry-run")
    assert "level 1: 1, 2: 1" in done.out and "going on   2 of 2 answers are there" in done.out
    done = run("evaluate", "--problems", problems, "--levels", "2", "--dry-run")
    assert "level 2: 1\n" in done.out and "answers    1: 1 problem, 1 sample, 1 model; greedy" in done.out
    assert run("evaluate", "--problems", problems, "--levels", "1,2", "--dry-run").out.count("level 1: 1, 2: 1") == 1


def test_problems_that_say_no_level_are_asked_beside_the_levels_and_that_is_noted(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    (problems / "level1").mkdir()
    (problems / "1_add.py").rename(problems / "level1" / "1_add.py")
    done = run("evaluate", "--problems", problems, "--levels", "1", "--dry-run")
    said = " ".join(done.out.split())
    assert "level 1: 1, unknown: 1" in said and "1 invalid" in said
    assert "note 1 of 2 problems say no level, and are asked whatever the levels." in said


def test_every_line_about_a_long_place_fits_80_columns(tmp_path: Path) -> None:
    from triton_sft_pipeline.evaluation.contamination import TrainedOn
    from triton_sft_pipeline.evaluation_lines import against_lines

    place = tmp_path / "a-dataset" / ("of-a-long-name-" * 5)
    lines = list(against_lines(TrainedOn(place, "ab" * 32, [])))
    assert max(map(len, lines)) <= 80 and lines[0].startswith("against    0 training problems of")
    assert "".join("".join(lines).split()).endswith(str(place))


def test_an_adapter_without_a_recorded_dataset_is_noted(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("dataset", "t.json"))
    done = run("evaluate", "--adapter", tmp_path / "bare", "--problems", problems, "--dry-run")
    said = " ".join(done.out.split())
    assert "What the tuned model was trained on is not recorded" in said and "held-out 2" in said
    assert "Name its chat dataset with --trained-on DIR." in said
    named = ["--trained-on", trained / "dataset"]
    done = run("evaluate", "--adapter", tmp_path / "bare", "--problems", problems, "--dry-run", *named)
    assert "not recorded" not in " ".join(done.out.split()) and "touched    1 by" in done.out


# ----- what is refused -----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--out o --server http://127.0.0.1:1", "--server needs --model NAME"),
        ("--out o --model base", "--model belongs to --server URL"),
        ("--out o --tuned-model tuned", "--tuned-model belongs to --server URL"),
        ("--out o --concurrency 4", "--concurrency belongs to --server URL"),
        ("--out o --server http://127.0.0.1:1 --model base --adapter a", "--adapter is put on a model that is loaded"),
        ("", "Missing option '--out'"),
        ("--out o --levels 3,5", "'3,5' is not a list of levels from 1 to 4"),
        ("--out o --samples 0", "--samples"),
        ("--out o --temperature -1", "--temperature"),
        ("--out o --top-p 0", "--top-p"),
    ],
)
def test_bad_usage_exits_2_and_says_what_belongs_together(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge], arguments: str, said: str
) -> None:
    done = run("evaluate", "--problems", problems, *arguments.split())
    assert done.code == 2 and done.err.startswith("Usage: triton-sft evaluate") and said in done.err
    assert not Path("o").exists() and model.loaded == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--problems none", "There are no problems at none"),
        ("--problems empty", "empty holds no problems"),
        ("--problems bad.jsonl", "bad.jsonl"),
        ("--problems p.py --adapter none", "none: no adapter there"),
        ("--problems p.py --samples 2 --temperature 0", "several samples at temperature 0"),
        ("--problems p.py --preset nothing", "unknown preset 'nothing'"),
        ("--problems p.py --levels 2", "p.py: none of its problems says its level, so --levels cannot choose"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_loads_nothing(
    run: Run, model: Answering, judge: type[FakeJudge], arguments: str, said: str
) -> None:
    Path("empty").mkdir()
    Path("bad.jsonl").write_text("{\n")
    Path("p.py").write_text(ADD)
    done = run("evaluate", *arguments.split(), "--out", "o")
    assert done.code == 2 and said in one_message(done)
    assert not Path("o").exists() and model.loaded == []


def test_an_adapter_of_another_base_is_refused_with_what_differs(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge], tmp_path: Path
) -> None:
    (tmp_path / "wide").mkdir()
    config = read_json(data_dir() / "tiny_base" / "config.json") | {"hidden_size": 96, "num_hidden_layers": 3}
    write_json(tmp_path / "wide" / "config.json", {k: v for k, v in config.items() if k != "layer_types"})
    base = ["--set", f"model.base_model={tmp_path / 'wide'}"]
    done = run("evaluate", "--adapter", trained, "--problems", problems, "--out", "o", *base)
    assert done.code == 2
    said = one_message(done)
    assert "does not fit the base model" in said and "4 in the adapter, 3 in the base" in said
    assert "64 to 64 in the adapter, 96 to 64 in the base" in said and str(data_dir() / "tiny_base") in said
    assert model.loaded == [] and not Path("o").exists()


# ----- which configuration -----


def test_an_adapter_brings_the_configuration_that_it_records(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge], own_storage: Path
) -> None:
    from triton_sft_pipeline.storage import ArtifactStore

    config = load_config("tiny", overrides={"evaluation.max_new_tokens": 123, "evaluation.judge_trials": 3})
    with ArtifactStore(own_storage).building("lora_adapter") as draft:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(trained / name, draft.path)
        record = {"configuration": config.model_dump(mode="json"), "dataset": "gone"}
        draft.promote("v", "c", record=record)
    current = own_storage / "lora_adapter" / "current"
    command = ["evaluate", "--adapter", current, "--problems", problems, "--trained-on", trained / "dataset"]
    assert "at most 123 tokens" in " ".join(run(*command, "--dry-run").out.split())
    assert "device auto, 3 trials" in run(*command, "--dry-run").out
    over = run(*command, "--dry-run", "--set", "evaluation.max_new_tokens=9").out
    assert "at most 9 tokens" in " ".join(over.split()) and "3 trials" in over
    assert "at most 400 tokens" in " ".join(run(*command, "--dry-run", "--preset", "tiny").out.split())


# ----- a server -----


class Serving:
    """Stands in for a server: answers as scripted, until it dies."""

    made: list[tuple[Any, ...]]
    dies_after: int | None

    def __init__(self, url: str, models: Any, settings: Any, **options: Any) -> None:
        self.models = tuple(models)
        self.made.append((url, dict(models), options))

    def facts(self) -> dict[str, Any]:
        return {"server": "here"}

    def ask(
        self,
        model: str,
        requests: Iterable[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: Any = None,
    ) -> None:
        for number, request in enumerate(requests):
            if number == self.dies_after:
                raise StepError("the server went away; the same command goes on.")
            text = f"<think>\n{RIGHT}" if model == "tuned" else "nothing"
            on_completion(Completion(request.index, request.sample, text, 1, 5, "stop", 0.1))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Serving]:
    class Server(Serving):
        made, dies_after = [], None

    monkeypatch.setattr("triton_sft_pipeline.evaluation.server.ServerAsker", Server)
    return Server


def test_a_server_is_asked_by_its_own_names_and_no_model_is_loaded(
    run: Run, problems: Path, model: Answering, judge: type[FakeJudge], server: type[Serving], trained: Path
) -> None:
    command = ["evaluate", "--problems", problems, "--server", "http://h:1/v1", "--model", "b", "--out", "o"]
    done = run(*command, "--tuned-model", "t", "--concurrency", "3", "--trained-on", trained / "dataset")
    assert done.code == 0 and model.loaded == []
    assert server.made == [("http://h:1/v1", {"base": "b", "tuned": "t"}, {"concurrency": 3})]
    report = read_json(Path("o", "report.json"))
    assert report["tuned"]["held_out"]["n"] == 1 and report["tuned"]["touched"]["n"] == 1
    assert "adapter" not in report["provenance"]


def test_a_server_with_one_model_is_the_base_alone(
    run: Run, problems: Path, judge: type[FakeJudge], server: type[Serving]
) -> None:
    command = ["evaluate", "--problems", problems, "--server", "http://h:1", "--model", "b", "--out", "o"]
    assert run(*command).code == 0 and server.made == [("http://h:1", {"base": "b"}, {})]
    assert "tuned" not in read_json(Path("o", "report.json"))
    assert "base: b on http://h:1" in run(*command, "--dry-run").out and len(server.made) == 1


def test_a_server_that_dies_exits_1_and_the_same_command_goes_on(
    run: Run, problems: Path, judge: type[FakeJudge], server: type[Serving]
) -> None:
    command = ["evaluate", "--problems", problems, "--server", "http://h:1", "--model", "b", "--out", "o"]
    server.dies_after = 1
    done = run(*command)
    assert done.code == 1 and "the same command goes on" in one_message(done)
    server.dies_after = None
    done = run(*command)
    assert done.code == 0 and "going on   1 of 2 answers are there" in done.err


# ----- compare -----


def test_reports_are_compared_on_the_terminal_and_in_files(
    run: Run, problems: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    for out in ("first", "second"):
        assert run("evaluate", "--adapter", trained, "--problems", problems, "--out", out).code == 0
        model.answers["x + 1", True] = WRONG
    done = run("compare", "first/report.json", "second", "--out", "c")
    assert done.code == 0 and done.err == "" and done.out.splitlines()[-1] == "written to c"
    assert max(map(len, done.out.splitlines())) <= 80
    assert "first" in done.out and "second less first" in done.out
    assert sorted(p.name for p in Path("c").iterdir()) == ["compare.html", "compare.json", "compare.md"]
    paired = read_json(Path("c", "compare.json"))["splits"]["held_out"]["paired"]["second"]["comparison"]
    assert (paired["n"], paired["wins"], paired["losses"]) == (1, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.json", "other.json"], "none.json: no such file"),
        (["text.json", "text2.json"], "text.json"),
    ],
)
def test_a_comparison_of_what_is_no_report_exits_2(run: Run, arguments: list[str], said: str) -> None:
    for name in ("text.json", "text2.json"):
        Path(name).write_text("[]")
    done = run("compare", *arguments, "--out", "c")
    assert done.code == 2 and said in one_message(done) and not Path("c").exists()


def test_a_comparison_of_one_report_exits_2(run: Run, problems: Path, model: Answering, judge: type[FakeJudge]) -> None:
    assert run("evaluate", "--problems", problems, "--out", "o").code == 0
    done = run("compare", "o")
    assert done.code == 2 and "two reports or more" in one_message(done)


# ----- infer -----


class Sampling:
    """Stands in for generating several answers: one text a sample."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.temperature: float | None = None

    def __call__(self, model: Any, tokenizer: Any, requests: Any, settings: Any, **options: Any) -> list[Completion]:
        self.temperature = settings.resolved_temperature
        found = [Completion(0, r.sample, self.texts[r.sample], 1, 1, "stop", 0.1) for r in requests]
        for completion in found:
            options["on_completion"](completion)
        return found


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch, model: Answering) -> Callable[..., Sampling]:
    def install(*texts: str) -> Sampling:
        sampling = Sampling(*texts)
        monkeypatch.setattr("triton_sft_pipeline.evaluation.infer.generate", sampling)
        return sampling

    return install


@pytest.fixture
def module(run: Run) -> Path:
    Path("add.py").write_text(ADD)
    return Path("add.py")


def test_a_single_answer_is_printed_as_the_model_wrote_it_and_said_to_be_unjudged(
    run: Run, module: Path, trained: Path, model: Answering, judge: type[FakeJudge]
) -> None:
    done = run("infer", module, "--adapter", trained, "--out", "k.py")
    assert done.code == 0 and done.out == f"<think>\n{RIGHT}\n"
    assert done.err.splitlines() == [
        "This kernel was not judged: --best-of N judges several and returns one that holds.",
        "written to k.py",
    ]
    assert Path("k.py").read_text() == "def right(): pass\n"
    assert judge.made == [] and model.loaded == [("tiny_base", trained)]


def test_a_single_answer_without_a_kernel_exits_1_and_writes_none(
    run: Run, module: Path, trained: Path, model: Answering
) -> None:
    model.answers["x + 1", True] = "I cannot."
    done = run("infer", module, "--adapter", trained, "--out", "k.py")
    assert done.code == 1 and one_message(done) == "triton-sft: the answer holds no kernel.\n"
    assert done.out == "<think>\nI cannot.\n" and not Path("k.py").exists()


def test_the_code_can_come_from_standard_input(
    run: Run, trained: Path, model: Answering, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text(ADD)
    with open(tmp_path / "in") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run("infer", "-", "--adapter", trained).code == 0


def test_the_best_of_several_is_the_fastest_that_the_judge_verified(
    run: Run, module: Path, trained: Path, sampled: Callable[..., Sampling], judge: type[FakeJudge]
) -> None:
    sampling = sampled(WRONG, RIGHT.replace("pass", "1.5"), RIGHT.replace("pass", "2.5"), "nothing")
    done = run("infer", module, "--adapter", trained, "--best-of", "4", "--device", "cpu", "--out", "k.py")
    assert done.code == 0 and done.out == "def right(): 2.5\n" and Path("k.py").read_text() == done.out
    assert sampling.temperature == 0.7 and judge.made[0]["device"] == "cpu"
    lines = done.err.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:3] for line in lines if line[:6].strip().isdigit()] == [
        ["1", "incorrect_shape", "-"],
        ["2", "verified", "1.50"],
        ["3", "verified", "2.50"],
        ["4", "unparsed", "-"],
    ]
    assert "verified: answer 3 of 4, speedup 2.50 (2.40 to 2.60)" in lines


def test_when_none_of_several_holds_the_verdicts_are_shown_and_nothing_is_written(
    run: Run, module: Path, trained: Path, sampled: Callable[..., Sampling], judge: type[FakeJudge]
) -> None:
    sampled(WRONG, "nothing")
    done = run("infer", module, "--adapter", trained, "--best-of", "2", "--temperature", "1.1", "--out", "k.py")
    assert done.code == 1 and done.out == "" and not Path("k.py").exists()
    assert "none of 2 answers holds a correct kernel." in one_message(done)
    assert "incorrect_shape" in done.err and "unparsed" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("empty.py", "there is no current lora_adapter"),
        ("empty.py --adapter none", "none: no adapter there"),
        ("binary.py", "binary.py: not UTF-8 text"),
        ("broken.py", "the PyTorch code is not valid Python"),
        ("no_problem.py --best-of 2", "no_problem.py: no class derives from nn.Module"),
        ("broken.py --best-of 2", "broken.py: the PyTorch code is not valid Python"),
        ("empty.py --device cpu", "--device is the judge's"),
        ("empty.py --best-of 0", "--best-of"),
        ("none.py", "none.py"),
    ],
)
def test_bad_input_to_infer_exits_2(run: Run, model: Answering, arguments: str, said: str) -> None:
    Path("empty.py").touch()
    Path("binary.py").write_bytes(b"\xff\xfe")
    Path("broken.py").write_text("def f(:")
    Path("no_problem.py").write_text("x = 1\n")
    done = run("infer", *arguments.split())
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert model.loaded == []


def test_several_answers_at_temperature_0_are_refused_before_a_model_is_loaded(
    run: Run, module: Path, trained: Path, model: Answering
) -> None:
    done = run("infer", module, "--adapter", trained, "--best-of", "2", "--temperature", "0")
    assert done.code == 2 and "several samples at temperature 0" in one_message(done) and model.loaded == []
