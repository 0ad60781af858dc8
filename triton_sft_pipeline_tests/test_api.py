"""The functions of the original script and `answer`, short of training: the walk through them is an end-to-end test."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import triton_sft_pipeline
from triton_sft_pipeline import load_and_filter_traces, prepare_dataset
from triton_sft_pipeline.api import answer, train_from_traces
from triton_sft_pipeline.chat.prompt import assistant_message, user_message
from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.errors import GateError, PipelineError, StepError
from triton_sft_pipeline.evaluation import Completion
from triton_sft_pipeline.evaluation.infer import Candidate, Inference
from triton_sft_pipeline.verification.verdict import Verdict
from triton_sft_pipeline_tests.traces.records import MODULE, labelled, record, write_array

NAMES = [
    "answer",
    "create_lora_config",
    "create_training_config",
    "inference",
    "load_and_filter_traces",
    "load_model_and_tokenizer",
    "main",
    "prepare_dataset",
    "train",
]

PROBLEM = MODULE.format(expression="x + 1")


def test_the_package_offers_the_functions_of_the_original_and_answer() -> None:
    assert triton_sft_pipeline.__all__ == NAMES == dir(triton_sft_pipeline)
    assert all(callable(getattr(triton_sft_pipeline, name)) for name in NAMES)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        triton_sft_pipeline.trian  # noqa: B018
    with pytest.raises(ImportError):
        exec("from triton_sft_pipeline import load_config")


def test_filtering_returns_the_records_as_they_stood_and_prints_the_funnel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(1, extra={"x": [1]}), labelled(2, correctness=False), record(3, result=None), {"no": "trace"}]
    kept = load_and_filter_traces(write_array(tmp_path / "t.json", records))
    assert kept == [records[0]] and type(kept[0]) is dict
    said = capsys.readouterr().out
    for reason in ("correctness", "no_result", "missing_field"):
        assert reason in said
    assert said.splitlines()[0].split() == ["read", "4"] and said.splitlines()[-1].split() == ["kept", "1", "(25%)"]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, [0.5, 1.0, 1.5, 2.0, None]),
        ({"require_fast_1": True}, [1.5, 2.0]),
        ({"require_fast_2": True}, [2.0]),
        ({"min_speedup": 1.0}, [1.0, 1.5, 2.0]),
        ({"require_correctness": False}, [0.5, 1.0, 1.5, 2.0, None]),
        ({"require_correctness": False, "require_fast_0": False}, [0.5, 1.0, 1.5, 2.0, None, 9.0]),
    ],
)
def test_each_filter_does_what_the_original_did(
    tmp_path: Path, arguments: dict[str, Any], kept: list[float | None]
) -> None:
    flags = {"fast_0": ..., "fast_1": ..., "fast_2": ...}
    records = [labelled(n, speedup=s, **flags) for n, s in enumerate([0.5, 1.0, 1.5, 2.0, None])]
    records.append(labelled(9, correctness=False, speedup=9.0, **flags))
    found = load_and_filter_traces(str(write_array(tmp_path / "t.json", records)), **arguments)
    assert [r["result"]["speedup"] for r in found] == kept


def test_filtering_asks_for_labels_alone(tmp_path: Path) -> None:
    held_out = load_config().held_out / "01_hardtanh_shift.py"
    records = [record(1, model_reasoning=None, thinking=None), record(2, pytorch_code=held_out.read_text())]
    assert len(load_and_filter_traces(write_array(tmp_path / "t.json", [*records, records[0]]))) == 3


def test_without_a_path_the_environment_and_then_the_shipped_sample_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load_and_filter_traces()) >= 24
    monkeypatch.setenv("TRITON_SFT_TRACES", str(write_array(tmp_path / "t.json", [record(1)])))
    assert load_and_filter_traces() == [record(1)]


def test_traces_that_are_not_there_are_an_error_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such file or folder"):
        load_and_filter_traces(tmp_path / "none.json")


def test_a_dataset_has_the_turns_of_the_original_and_the_best_reasoning() -> None:
    records = [record(1), record(2, model_reasoning=None, reasoning="r"), record(3, model_reasoning=...)]
    dataset = prepare_dataset(records, test_size=0)
    assert set(dataset) == {"train", "test"} and len(dataset["test"]) == 0
    rows = {row["sample_key"]: row for row in dataset["train"]}
    for number, reasoning in [(1, "Each program adds 1 to a block."), (2, "r"), (3, "Add.")]:
        row, raw = rows[f"sample_{number}"], records[number - 1]
        assert row["prompt"] == [{"role": "user", "content": user_message(raw["pytorch_code"])}]
        assert row["completion"] == [{"role": "assistant", "content": assistant_message(reasoning, raw["triton_code"])}]


def test_the_split_is_deterministic_and_keeps_a_problem_on_one_side() -> None:
    records = [record(n, sample_key=f"{n}_{copy}") for n in range(10) for copy in range(2)]
    dataset = prepare_dataset(records, test_size=0.3)
    sides = {side: {row["sample_key"].split("_")[0] for row in dataset[side]} for side in dataset}
    assert len(sides["test"]) == 3 and sides["train"].isdisjoint(sides["test"])
    again = prepare_dataset(iter(records[::-1]), test_size=0.3)
    assert {side: again[side].to_list() for side in again} == {side: dataset[side].to_list() for side in dataset}
    assert dataset["test"].features == dataset["train"].features


def test_the_defaults_split_off_a_tenth() -> None:
    dataset = prepare_dataset([record(n) for n in range(20)])
    assert [len(dataset[side]) for side in ("train", "test")] == [18, 2]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (record(2, triton_code=None), r"trace 1 \(sample_2\): triton_code is missing\. Filter the traces first"),
        (
            record(2, model_reasoning="", thinking=None),
            r"trace 1 \(sample_2\): no model_reasoning, reasoning or thinking",
        ),
        (None, "trace 1: the record is null, expected an object"),
        ("text", "trace 1: the record is text, expected an object"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named(bad: Any, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        prepare_dataset([record(1), bad])


def test_a_dataset_of_nothing_is_refused() -> None:
    with pytest.raises(PipelineError, match="was given no traces"):
        prepare_dataset([])


def test_the_whole_program_stops_before_anything_heavy_when_too_few_traces_are_kept(tmp_path: Path) -> None:
    config = load_config(overrides={"filter.min_traces": 3})
    path = write_array(tmp_path / "t.json", [record(100), record(101), labelled(102, correctness=False)])
    with pytest.raises(GateError, match=r"t\.json: 2 traces are kept, filter\.min_traces wants 3\.") as caught:
        train_from_traces(config, path, tmp_path / "out")
    assert caught.value.gate == "min_traces" and not (tmp_path / "out").exists()


def test_a_held_out_problem_is_kept_out_of_the_whole_program(tmp_path: Path) -> None:
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "p.py").write_text(MODULE.format(expression="x + 100"))
    config = load_config(overrides={"held_out": str(tmp_path / "held_out"), "filter.min_traces": 2})
    with pytest.raises(GateError, match="1 traces are kept"):
        train_from_traces(config, write_array(tmp_path / "t.json", [record(100), record(101)]), tmp_path / "out")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the functions that ask a model hand on: the loading is left out, and the answer is written in advance."""
    seen: dict[str, Any] = {"found": Inference("<think>\n</think>", "def k(): pass"), "adapter": tmp_path}

    def infer(model: Any, tokenizer: Any, code: str, settings: Any, **options: Any) -> Inference:
        seen.update(code=code, settings=settings, **options)
        return seen["found"]

    def load(settings: Any, adapter: Path, **options: Any) -> tuple[Any, Any]:
        seen.update(loaded=(settings.base_model, adapter))
        return None, None

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    monkeypatch.setattr("triton_sft_pipeline.training.adapter_fit.check_adapter_fits", lambda adapter, model: None)
    monkeypatch.setattr("triton_sft_pipeline.training.model.load_model_and_tokenizer", load)
    monkeypatch.setattr("triton_sft_pipeline.evaluation.infer.infer", infer)
    monkeypatch.setattr("triton_sft_pipeline.evaluation.infer.open_judge", lambda *given: nullcontext(("judge", given)))
    return seen


def test_inference_returns_the_text_of_one_answer_as_it_did(asked: dict[str, Any]) -> None:
    assert triton_sft_pipeline.inference("x = 1", asked["adapter"]) == "<think>\n</think>"
    assert asked["code"] == "x = 1" and asked["loaded"] == ("somebody/else", asked["adapter"])
    assert (asked["best_of"], asked["judge"]) == (1, None) and asked["settings"].greedy


def test_inference_has_the_options_of_the_command(asked: dict[str, Any]) -> None:
    told: list[Any] = []
    options: dict[str, Any] = {"on_text": told.append, "progress": lambda done, total, note="": None}
    triton_sft_pipeline.inference(PROBLEM, str(asked["adapter"]), best_of=3, temperature=1.1, device="cpu", **options)
    assert asked["judge"] == ("judge", (asked["settings"], "cpu", [PROBLEM])) and asked["best_of"] == 3
    assert (asked["settings"].samples, asked["settings"].temperature) == (3, 1.1)
    assert {name: asked[name] for name in options} == options


def test_inference_fails_when_none_of_several_answers_held_and_answer_says_so(asked: dict[str, Any]) -> None:
    verdicts = [Verdict("0", "unparsed", False, False), Verdict("1", "timeout", False, False)]
    candidates = tuple(Candidate(Completion(0, n, "", 1, 1, "stop", 0.1), None, v) for n, v in enumerate(verdicts))
    asked["found"] = Inference("no", None, None, candidates)
    with pytest.raises(StepError, match="holds a correct kernel: answer 1 unparsed, answer 2 timeout"):
        triton_sft_pipeline.inference(PROBLEM, asked["adapter"], best_of=2)
    assert answer(PROBLEM, asked["adapter"], best_of=2) is asked["found"]


def test_one_answer_without_a_kernel_is_returned_as_it_is(asked: dict[str, Any]) -> None:
    asked["found"] = Inference("no", None)
    assert triton_sft_pipeline.inference("", asked["adapter"]) == "no"


def test_code_that_is_no_python_is_refused_before_a_model_is_loaded(asked: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match="the PyTorch code is not valid Python"):
        triton_sft_pipeline.inference("def f(:", asked["adapter"])
    assert "loaded" not in asked


def test_several_answers_to_what_is_no_problem_are_refused_before_a_model_is_loaded(asked: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=r"the PyTorch code: no class derives from nn\.Module.*ask for one"):
        triton_sft_pipeline.answer("x = 1", asked["adapter"], best_of=2)
    assert "loaded" not in asked
    assert triton_sft_pipeline.answer("x = 1", asked["adapter"]) is asked["found"]


@pytest.mark.slow
def test_without_arguments_the_hyper_parameters_are_those_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_sft_pipeline import create_lora_config, create_training_config

    settings = tmp_path / "mine.yaml"
    settings.write_text("lora: {r: 2}\ntraining: {learning_rate: 1.0}\n")
    monkeypatch.setenv("TRITON_SFT_CONFIG", str(settings))
    lora = create_lora_config()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 128, 0.05)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    training = create_training_config(tmp_path)
    assert (training.learning_rate, training.lr_scheduler_type, training.weight_decay) == (2e-4, "cosine", 0.01)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 8)
    assert (training.num_train_epochs, training.max_length, training.gradient_checkpointing) == (3, 4096, True)
    assert training.output_dir == str(tmp_path) and training.report_to == ["tensorboard"]
    assert create_lora_config(r=8).r == 8 and create_lora_config(r=8).lora_alpha == 128
    assert create_training_config(tmp_path, preset="tiny").max_length == load_config("tiny").training.max_length
    with pytest.raises(PipelineError, match=r"training\.epoch: unknown field; did you mean epochs\?"):
        create_training_config(tmp_path, epoch=1)
