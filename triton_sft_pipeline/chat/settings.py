"""What the chat dataset may be told. The token budget itself is the preset's `training.max_length`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DatasetSettings(BaseModel):
    """How examples are split and what happens to those that are too long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test_size: float = Field(0.1, ge=0, lt=1, description="Share of the problems whose traces go to the test split.")
    over_budget: Literal["drop", "fail"] = Field(
        "drop",
        description="A sample over training.max_length tokens is dropped with a reason, or fails the run; never cut.",
    )
