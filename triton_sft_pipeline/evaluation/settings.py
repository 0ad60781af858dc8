"""What an evaluation depends on: every knob of this room, validated, and nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EvaluationSettings(BaseModel):
    """How answers are generated and judged. The defaults suit the real model; `presets/tiny.yaml` overrides some."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(2048, ge=1, description="Longest answer, in tokens, reasoning included.")
    batch_size: int = Field(8, ge=1, description="Answers that are generated at the same time.")
    samples: int = Field(1, ge=1, description="Answers a problem. All are judged; the scores count the first.")
    temperature: float = Field(0.0, ge=0.0, description="0 is greedy decoding; above it, answers are sampled.")
    top_p: float = Field(
        0.95, gt=0.0, le=1.0, description="Nucleus sampling: the probability mass that is kept. Greedy ignores it."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling.")
    max_seen: int = Field(
        64, ge=0, description="Problems of the train split that are asked again; which ones is decided by a hash."
    )
    judge_timeout_s: float = Field(60.0, gt=0.0, description="Seconds one kernel may take, compilation included.")
    judge_trials: int = Field(5, ge=1, description="Draws of inputs on which a kernel has to agree with its reference.")
    judge_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cpu is Triton's interpreter, which knows no speed; auto takes a GPU where there is one."
    )
    timing: bool = Field(True, description="Measure speedups where the device allows it.")
    compile_baseline: bool = Field(
        False, description="Measure the speedup against torch.compile too; it takes seconds a problem."
    )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0
