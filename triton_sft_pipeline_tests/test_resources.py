"""The judge that assets are handed: the configuration's settings, and what a trial puts in their place."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.resources import JudgeResource

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
    with resource.open(load_config(overrides=OVERRIDES)) as judge:
        assert isinstance(judge, Judge) and len(made) == 1
    assert made[1] == {"closed": True}
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
