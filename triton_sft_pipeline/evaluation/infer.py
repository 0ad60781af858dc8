"""One problem, one kernel: ask the model once, or several times and let the judge choose the fastest correct kernel.

What is returned as a kernel of several answers is a kernel that the judge verified, or nothing. One answer alone is not
judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.chat.prompt import parse_answer, user_message
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.evaluate import Judge, unparsed
from triton_sft_pipeline.evaluation.generation import Completion, Request, generate
from triton_sft_pipeline.evaluation.meter import Meter
from triton_sft_pipeline.evaluation.sampling import request_seed
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.files import sha256_bytes
from triton_sft_pipeline.progress import Progress
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict

if TYPE_CHECKING:
    from triton_sft_pipeline.verification import KernelJudge


@dataclass(frozen=True)
class Candidate:
    """One of several answers: what was generated, the kernel in it (None: there is none), and the judge's word."""

    completion: Completion
    code: str | None
    verdict: Verdict

    @property
    def sample(self) -> int:
        """0 for the first answer."""
        return self.completion.sample


@dataclass(frozen=True)
class Inference:
    """What the model made of one problem.

    Attributes:
        text: the chosen answer as the model wrote it, with its reasoning; where none of several held, the first one.
        code: the kernel. Of one answer: what it holds, unjudged. Of several: the fastest that the judge verified.
            None: there is none.
        verdict: the judge's, on that kernel; None when nothing was judged or nothing held.
        candidates: all answers with their verdicts, when there were several.
    """

    text: str
    code: str | None
    verdict: Verdict | None = None
    candidates: tuple[Candidate, ...] = ()


def infer(
    model: Any,
    tokenizer: Any,
    pytorch_code: str,
    settings: EvaluationSettings,
    *,
    best_of: int = 1,
    judge: Judge | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Inference:
    """Ask for a kernel.

    Args:
        model, tokenizer: from `load_model_and_tokenizer`, with the adapter that is to answer.
        pytorch_code: a module in KernelBench's format; without `get_inputs()` nothing can be judged.
        settings: how it is generated; the temperature as `infer_settings` has it.
        best_of: answers to choose from.
        judge: decides about several; the caller opens and closes it.
        on_text: called with pieces of the text as they are generated; of one answer alone.
        progress: called with (steps done, steps in all, note): of several answers each is two, generated and judged.

    Raises:
        PipelineError: the code is no Python, or several answers without a judge.
        StepError: the GPU's memory is out, or the judge left an answer without a verdict.
    """
    require_python(pytorch_code)
    settings = infer_settings(settings, best_of)
    # The code is all that a problem without a name has: the same code gets the same answers.
    key = sha256_bytes(pytorch_code.encode("utf-8", "surrogatepass"))
    prompt = user_message(pytorch_code)
    requests = [Request(0, sample, prompt, request_seed(settings.seed, key, sample)) for sample in range(best_of)]
    if best_of == 1:
        (only,) = generate(model, tokenizer, requests, settings, on_text=on_text)
        return Inference(only.text, parse_answer(only.text).code)
    if judge is None:
        raise PipelineError("several answers need a judge to choose between them.")
    meter = Meter(best_of, 0, 0, settings.max_new_tokens, progress)
    completions = generate(
        model,
        tokenizer,
        requests,
        settings,
        on_completion=lambda completion: meter.generated(completion.tokens),
        on_tokens=meter.running,
    )
    meter.judging()
    candidates = _judged(pytorch_code, completions, judge, meter.judged)
    best = fastest_correct(candidates)
    if best is None:
        return Inference(candidates[0].completion.text, None, None, tuple(candidates))
    return Inference(best.completion.text, best.code, best.verdict, tuple(candidates))


def infer_settings(
    settings: EvaluationSettings, best_of: int = 1, temperature: float | None = None
) -> EvaluationSettings:
    """The settings to answer one problem with.

    Args:
        settings: the preset's.
        best_of: answers to choose from.
        temperature: None: what the preset says; of several answers 0.7 where it says nothing, or 0.

    Raises:
        PipelineError: several answers at temperature 0, or a value out of range.
    """
    from pydantic import ValidationError

    if temperature is None and not (best_of > 1 and settings.temperature == 0.0):
        temperature = settings.temperature
    try:
        return EvaluationSettings.model_validate(
            {**settings.model_dump(), "samples": best_of, "temperature": temperature}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise PipelineError(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}.") from None


def judge_options(settings: EvaluationSettings, device: str | None = None) -> dict[str, Any]:
    """What a `KernelJudge` is made with under these settings; `device` wins over `settings.judge_device`."""
    return {
        "device": device or settings.judge_device,
        "timeout_s": settings.judge_timeout_s,
        "trials": settings.judge_trials,
        "timing": settings.timing,
        "compile_baseline": settings.compile_baseline,
    }


def open_judge(
    settings: EvaluationSettings, device: str | None = None, problems: Iterable[str] = ()
) -> AbstractContextManager[KernelJudge]:
    """A judge with these settings, as a context manager that leaves no process behind.

    Args:
        problems: the code of what will be judged; models of the Hub that it loads can be read there from the local
            cache.

    Raises:
        PipelineError: a setting out of range; on entering the block, no GPU where "cuda" was asked for.
    """
    from triton_sft_pipeline.problems.weights import hub_models
    from triton_sft_pipeline.verification import KernelJudge

    return KernelJudge(**judge_options(settings, device), models=hub_models(problems))


def require_python(pytorch_code: str) -> None:
    """Refuse what is no Python before a model is loaded for it.

    Raises:
        PipelineError: it is not.
    """
    try:
        compile(pytorch_code, "the PyTorch code", "exec", dont_inherit=True)
    # The last two: an expression nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PipelineError(f"the PyTorch code is not valid Python: {error}.") from error


def fastest_correct(candidates: Sequence[Candidate]) -> Candidate | None:
    """The verified kernel with the highest speedup; those whose speed is not known come last, ties in their order.

    All are measured against the same reference, so the highest speedup is the fastest kernel; the ratio is steadier
    than the times, because the reference is measured again beside each kernel.
    """
    correct = [candidate for candidate in candidates if candidate.verdict.correctness]
    return min(correct, key=lambda c: (-(c.verdict.speedup or 0.0), c.sample), default=None)


def _judged(
    pytorch_code: str, completions: Sequence[Completion], judge: Judge, advance: Callable[[], None]
) -> list[Candidate]:
    """Every answer with its verdict, in the order of the samples. What was written twice is judged once."""
    codes = {completion.sample: parse_answer(completion.text).code for completion in completions}
    asked: dict[str, int] = {}
    for sample, code in codes.items():
        if code is not None:
            asked.setdefault(code, sample)
    verdicts = {c.sample: unparsed(str(c.sample), c) for c in completions if codes[c.sample] is None}
    for _ in verdicts:
        advance()
    items = [JudgeItem(str(sample), pytorch_code, code) for code, sample in asked.items()]
    for verdict in judge.verify_many(items):
        for sample, code in codes.items():
            if code == codes[int(verdict.key)]:
                verdicts[sample] = replace(verdict, key=str(sample))
                advance()
    if missing := [sample for sample in codes if sample not in verdicts]:
        raise StepError(f"the judge gave no verdict on {len(missing)} of {len(codes)} answers: run it again.")
    return [Candidate(c, codes[c.sample], verdicts[c.sample]) for c in completions]
