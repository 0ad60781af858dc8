"""One problem: the single answer as it is written, and of several the fastest that the judge verified, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from triton_sft_pipeline.chat.prompt import user_message
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation import EvaluationSettings, meter
from triton_sft_pipeline.evaluation import infer as infer_module
from triton_sft_pipeline.evaluation.generation import Completion, Request
from triton_sft_pipeline.evaluation.infer import Inference, infer, infer_settings, judge_options
from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge, ScriptedModel, byte_tokenizer
from triton_sft_pipeline_tests.problems.codes import LEVEL_4

CODE = "import torch.nn as nn\n\n\nclass Model(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
SETTINGS = EvaluationSettings(max_new_tokens=400)


def written(code: str) -> str:
    return f"<think>\nShort.\n</think>\n\n<triton>\n{code}\n</triton>"


class Asked:
    """Stands in for the model: one text a sample; keeps what it was asked."""

    def __init__(self, *texts: str, stopped: str = "stop") -> None:
        self.texts, self.stopped = texts, stopped
        self.requests: list[Request] = []
        self.settings: EvaluationSettings | None = None

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        settings: EvaluationSettings,
        *,
        on_completion: Callable[[Completion], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_tokens: Callable[[Sequence[int]], None] | None = None,
    ) -> list[Completion]:
        self.requests, self.settings = list(requests), settings
        found = [Completion(r.index, r.sample, self.texts[r.sample], 9, 7, self.stopped, 0.1) for r in requests]
        for completion in found:
            if on_completion:
                on_completion(completion)
        return found


class SpeedJudge:
    """Verifies every kernel but those that say `wrong`; a number in the code is its speedup. Last item first."""

    def __init__(self, silent_on: str = "never") -> None:
        self.items: list[JudgeItem] = []
        self.silent_on = silent_on

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        self.items = list(items)
        for item in reversed(self.items):
            code = item.triton_code or ""
            if self.silent_on in code:
                continue
            right = "wrong" not in code
            speed = float(code.split()[-1]) if right and code.split()[-1][0].isdigit() else None
            yield Verdict(
                item.key, "verified" if right else "incorrect_shape", right, right, speedup=speed, detail="Judged."
            )


def best(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], judge: Any = None, **options: Any) -> Inference:
    monkeypatch.setattr(infer_module, "generate", Asked(*texts))
    return infer(None, None, CODE, SETTINGS, best_of=len(texts), judge=judge or SpeedJudge(), **options)


def test_one_answer_is_what_the_model_wrote_and_is_streamed_and_not_judged() -> None:
    tokenizer = byte_tokenizer()
    model = ScriptedModel(tokenizer, {("x + 1", True): "Short.\n</think>\n\n<triton>\ndef k(): 'é'\n</triton>"})
    pieces: list[str] = []
    found = infer(model, tokenizer, CODE, SETTINGS, on_text=pieces.append)
    assert found == Inference("<think>\nShort.\n</think>\n\n<triton>\ndef k(): 'é'\n</triton>", "def k(): 'é'")
    assert "".join(pieces) == found.text and len(pieces) > 5
    assert model.asked == [(1, True)]


def test_an_answer_without_a_kernel_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best(monkeypatch, ["I cannot."]) == Inference("I cannot.", None)


def test_of_several_answers_the_fastest_correct_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["nothing", written("slow 1.1"), written("wrong 9.9"), written("fast 2.5"), written("slow 1.2")]
    found = best(monkeypatch, texts)
    assert (found.text, found.code) == (texts[3], "fast 2.5")
    assert found.verdict and (found.verdict.verdict, found.verdict.speedup) == ("verified", 2.5)
    assert [c.verdict.verdict for c in found.candidates] == [
        "unparsed",
        "verified",
        "incorrect_shape",
        "verified",
        "verified",
    ]
    assert [c.sample for c in found.candidates] == [0, 1, 2, 3, 4]
    assert [c.code for c in found.candidates] == [None, "slow 1.1", "wrong 9.9", "fast 2.5", "slow 1.2"]


@pytest.mark.parametrize(
    ("codes", "chosen"),
    [
        (["wrong", "b", "c"], "b"),
        (["a 1.5", "b 1.5"], "a 1.5"),
        (["untimed", "b 0.2"], "b 0.2"),
        (["b 0.2", "untimed", "c 0.3"], "c 0.3"),
    ],
)
def test_without_speeds_the_first_correct_one_is_chosen_and_a_known_speed_goes_first(
    monkeypatch: pytest.MonkeyPatch, codes: list[str], chosen: str
) -> None:
    assert best(monkeypatch, [written(code) for code in codes]).code == chosen


def test_when_none_holds_no_kernel_is_returned_and_every_verdict_is(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [written("wrong a"), "", written("wrong b")]
    found = best(monkeypatch, texts)
    assert (found.text, found.code, found.verdict) == (texts[0], None, None)
    assert [c.verdict.verdict for c in found.candidates] == ["incorrect_shape", "unparsed", "incorrect_shape"]
    assert found.candidates[1].verdict.detail == "The answer is empty."


def test_what_was_written_twice_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = SpeedJudge()
    found = best(monkeypatch, [written("wrong"), written("k 2"), written("wrong"), written("k 2")], judge)
    assert [item.triton_code for item in judge.items] == ["wrong", "k 2"]
    assert {item.pytorch_code for item in judge.items} == {CODE}
    assert [c.verdict.key for c in found.candidates] == ["0", "1", "2", "3"]
    assert [c.verdict.correctness for c in found.candidates] == [False, True, False, True]
    assert found.verdict == found.candidates[1].verdict


def test_each_answer_is_two_steps_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    best(
        monkeypatch,
        ["", written("k"), written("k")],
        progress=lambda done, total, note="": steps.append((done, total)),
    )
    assert steps == [(n, 6) for n in range(7)]


def test_answers_under_way_move_the_progress_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Asked):
        def __call__(self, *arguments: Any, on_tokens: Any = None, **options: Any) -> list[Completion]:
            monkeypatch.setattr(meter.time, "monotonic", lambda: 1e9)
            on_tokens([40, 40])
            return super().__call__(*arguments, **options)

    notes: list[str] = []
    monkeypatch.setattr(infer_module, "generate", Slow(written("k"), written("k")))
    told = lambda done, total, note="": notes.append(note)  # noqa: E731
    infer(None, None, CODE, SETTINGS, best_of=2, judge=SpeedJudge(), progress=told)
    assert "2 at 40 tokens, 0/2 answers" in notes[1]


def test_several_answers_are_sampled_each_with_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("", "", "")
    monkeypatch.setattr(infer_module, "generate", asked)
    infer(None, None, CODE, SETTINGS, best_of=3, judge=SpeedJudge())
    first = asked.requests
    assert [r.prompt for r in first] == [user_message(CODE)] * 3 and [r.sample for r in first] == [0, 1, 2]
    assert len({r.seed for r in first}) == 3
    assert asked.settings and asked.settings.resolved_temperature == 0.7
    infer(None, None, CODE, SETTINGS.model_copy(update={"seed": 5}), best_of=3, judge=SpeedJudge())
    assert {r.seed for r in asked.requests}.isdisjoint({r.seed for r in first})
    infer(None, None, CODE, SETTINGS, best_of=3, judge=SpeedJudge())
    assert asked.requests == first


@pytest.mark.parametrize(
    ("preset", "best_of", "given", "resolved"),
    [
        (None, 1, None, 0.0),
        (None, 4, None, 0.7),
        (0.0, 4, None, 0.7),
        (0.3, 4, None, 0.3),
        (0.3, 1, None, 0.3),
        (0.3, 4, 1.2, 1.2),
        (0.3, 1, 0.0, 0.0),
    ],
)
def test_the_temperature_is_what_was_asked_else_the_presets_else_by_the_number_of_answers(
    preset: float | None, best_of: int, given: float | None, resolved: float
) -> None:
    settings = infer_settings(EvaluationSettings(temperature=preset), best_of, given)
    assert settings.resolved_temperature == resolved and settings.samples == best_of


def test_a_preset_with_several_samples_is_still_asked_once() -> None:
    assert infer_settings(EvaluationSettings(samples=8)).greedy


def test_several_answers_at_temperature_0_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"temperature: several samples at temperature 0 are all the same answer"):
        infer_settings(SETTINGS, 4, 0.0)


def test_several_answers_without_a_judge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineError, match="need a judge"):
        infer(None, None, CODE, SETTINGS, best_of=2)


@pytest.mark.parametrize("code", ["def f(:", "\0", "(" * 5000])
def test_code_that_is_no_python_is_refused_before_anything_is_asked(code: str) -> None:
    with pytest.raises(PipelineError, match="the PyTorch code is not valid Python"):
        infer(None, None, code, SETTINGS)


def test_an_answer_that_the_judge_forgot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StepError, match="no verdict on 1 of 2 answers"):
        best(monkeypatch, [written("forget me"), written("k 1")], SpeedJudge(silent_on="forget"))


def test_a_verdict_keeps_what_the_judge_said_of_where_it_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = best(monkeypatch, [written("a"), written("b")], RecordingJudge({"a": "timeout"}))
    assert found.verdict == replace(found.candidates[1].verdict, key="1")
    assert found.candidates[0].verdict.verdict == "timeout" and found.verdict.versions == {"triton": "3.7.1"}


def test_the_judge_is_made_with_the_settings_of_the_evaluation() -> None:
    settings = EvaluationSettings(judge_device="cpu", judge_timeout_s=7.0, judge_trials=2, timing=False)
    assert judge_options(settings) == {
        "device": "cpu",
        "timeout_s": 7.0,
        "trials": 2,
        "timing": False,
        "compile_baseline": False,
    }
    assert judge_options(settings, "auto")["device"] == "auto"
    judge = infer_module.open_judge(settings, problems=[LEVEL_4, "x = 1"])
    assert isinstance(judge, KernelJudge) and judge._models == ("owner/lm-small",)
