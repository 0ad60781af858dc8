"""What an evaluation depends on: every knob of this room, validated, and nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SAMPLED = 0.7
"""Temperature of several samples when none is given; the original system's."""


class EvaluationSettings(BaseModel):
    """How answers are generated and judged. The defaults suit the real model; `presets/tiny.yaml` overrides some."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(2048, ge=1, description="Longest answer, in tokens, reasoning included.")
    batch_size: int = Field(8, ge=1, description="Answers that are generated at the same time.")
    samples: int = Field(1, ge=1, description="Answers a problem. All are judged, and all count.")
    temperature: float | None = Field(
        None,
        ge=0.0,
        description="0 is greedy decoding; above it, answers are sampled. Nothing means 0 for one sample and 0.7 for "
        "several.",
    )
    top_p: float = Field(
        0.95, gt=0.0, le=1.0, description="Nucleus sampling: the probability mass that is kept. Greedy ignores it."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling; each answer's own is made of it.")
    levels: tuple[int, ...] | None = Field(
        None,
        description="Levels of KernelBench that are asked; problems that say no level are asked in any case. Nothing "
        "means 3 and 4 of KernelBench as a whole, from the Hub or from a local copy, and all of anything else. What is "
        "held out of training is not narrowed by it.",
    )
    bootstrap_resamples: int = Field(
        10_000, ge=1, description="Resamples of the problems behind an interval of a difference or of a mean."
    )
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

    @field_validator("temperature")
    @classmethod
    def _several_samples_differ(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        if temperature == 0.0 and info.data.get("samples", 1) > 1:
            raise ValueError(
                "several samples at temperature 0 are all the same answer; leave the temperature out, raise it, or ask "
                "for one sample"
            )
        return temperature

    @property
    def resolved_temperature(self) -> float:
        """The temperature in force: what was given, else 0.0 for one sample and `SAMPLED` for several."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples == 1 else SAMPLED

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.resolved_temperature == 0.0
