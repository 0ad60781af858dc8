"""What the filter may be told. Defaults are those of `load_and_filter_traces`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FilterSettings(BaseModel):
    """Which traces are kept. Nothing here depends on a model: a changed hyper-parameter never re-runs the filter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    require_correctness: bool = Field(True, description="Keep only traces whose kernel matched PyTorch.")
    require_fast_0: bool = Field(
        True, description="Keep only traces whose fast_0 flag is set (the same bar as correctness)."
    )
    require_fast_1: bool = Field(False, description="Keep only traces with a speedup above 1.0.")
    require_fast_2: bool = Field(False, description="Keep only traces with a speedup of at least 2.0.")
    min_speedup: float | None = Field(None, ge=0, description="Keep only traces with at least this speedup; null: any.")
    min_traces: int = Field(
        10, ge=1, description="The gate holds everything downstream back when fewer traces are kept."
    )
    min_share_kept: float = Field(0.25, ge=0, le=1, description="Warn when a smaller share of the traces read is kept.")
    strict: bool = Field(
        False, description="Refuse a file that breaks off instead of keeping the whole records before the break."
    )
