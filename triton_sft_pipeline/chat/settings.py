"""What the chat dataset may be told. The token budget itself is the preset's `training.max_length`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Form = Literal["prompt_completion", "messages"]


class DatasetSettings(BaseModel):
    """How examples are made and split, and what happens to those that are too long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test_size: float = Field(0.1, ge=0, lt=1, description="Share of the problems whose traces go to the test split.")
    over_budget: Literal["drop", "fail"] = Field(
        "drop",
        description="A sample over training.max_length tokens is dropped with a reason, or fails the run; never cut.",
    )
    form: Form = Field(
        "prompt_completion",
        description="Columns of the Parquet files: prompt and completion, or messages, the whole conversation in one. "
        "What is learned of a single-turn trace is the same.",
    )
    multi_turn: bool = Field(
        False,
        description="Train on the whole repair conversation of a multi-turn trace, up to its best turn, with the loss "
        "on every answer; needs form: messages. Otherwise on the best turn alone.",
    )
    license: str | None = Field(
        None, description="The dataset card's licence, as the Hub spells it (apache-2.0); null: unknown."
    )

    @model_validator(mode="after")
    def _several_answers_need_messages(self) -> Self:
        if self.multi_turn and self.form != "messages":
            raise ValueError("multi_turn needs form: messages, because a completion is a single answer")
        return self
