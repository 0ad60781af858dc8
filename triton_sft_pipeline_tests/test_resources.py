"""The judge and the GPU that assets are handed: the configuration's settings, and what a trial puts in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.config import code_versions, load_config
from triton_sft_pipeline.resources import GPUResource, JudgeResource

OVERRIDES = {
    "evaluation.judge_timeout_s": 9.0,
    "evaluation.judge_trials": 3,
    "evaluation.timing": True,
    "evaluation.judge_device": "cpu",
    "evaluation.compile_baseline": True,
}


def opened(monkeypatch: pytest.MonkeyPatch, resource: JudgeResource) -> dict[str, Any]:
    """What the judge is made with."""
    made: list[dict[str, Any]] = []

    class Judge:
        def __init__(self, **arguments: Any) -> None:
            made.append(arguments)

        def __enter__(self) -> Judge:
            return self

        def __exit__(self, *error: object) -> None:
            made.append({"closed": True})

    monkeypatch.setattr("triton_sft_pipeline.verification.KernelJudge", Judge)
    with resource.open(load_config(overrides=OVERRIDES), ["owner/name"]) as judge:
        assert isinstance(judge, Judge) and len(made) == 1
    assert made[1] == {"closed": True}
    assert made[0].pop("models") == ["owner/name"]
    return made[0]


def test_the_judge_has_the_settings_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch, JudgeResource()) == {
        "device": "cpu",
        "workers": None,
        "timeout_s": 9.0,
        "trials": 3,
        "timing": True,
        "compile_baseline": True,
    }


def test_what_a_resource_says_itself_wins_also_when_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Any] = {"device": "cuda", "workers": 2, "timeout_s": 1.5, "trials": 1}
    off = {"timing": False, "compile_baseline": False}
    assert opened(monkeypatch, JudgeResource(**own, **off)) == own | off


def test_how_many_gpus_train_is_the_settings_unless_the_resource_says_and_makes_nothing_stale() -> None:
    active = load_config(overrides={"training.gpus": 2})
    assert GPUResource().settings(active) is active
    shared = GPUResource(gpus=4, overrides={"training.learning_rate": 1e-4}).settings(active)
    assert (shared.training.gpus, shared.training.learning_rate) == (4, 1e-4)
    assert code_versions(GPUResource(gpus=4).settings(active)) == code_versions(active) == code_versions(load_config())


def test_the_gpu_hands_the_number_of_gpus_to_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "triton_sft_pipeline.training.run.train_on_dataset", lambda *arguments, **options: given.append(arguments[2])
    )
    gpu = GPUResource(gpus=2)
    gpu.train(gpu.settings(load_config()), tmp_path, tmp_path, lambda step, metrics: None)
    assert given[0].gpus == 2
