"""What has been asked, answered and judged, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from triton_sft_pipeline.chat.prompt import Answer
from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.verification.verdict import Verdict


@dataclass(frozen=True)
class Question:
    """A problem, and the split that it is asked for."""

    split: str
    problem: Problem


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer of one model to one question, with what became of it."""

    model: str
    question: Question
    completion: Completion
    answer: Answer
    verdict: Verdict
