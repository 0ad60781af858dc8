"""What the filter may be told. The label filters' defaults are those of `load_and_filter_traces`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FilterSettings(BaseModel):
    """Which traces are kept. Nothing here depends on a model: a changed hyper-parameter never re-runs the filter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What the labels say.
    require_correctness: bool = Field(True, description="Keep only traces whose kernel matched PyTorch.")
    require_fast_0: bool = Field(
        True, description="Keep only traces whose fast_0 flag is set (the same bar as correctness)."
    )
    require_fast_1: bool = Field(False, description="Keep only traces with a speedup above 1.0.")
    require_fast_2: bool = Field(False, description="Keep only traces with a speedup of at least 2.0.")
    min_speedup: float | None = Field(None, ge=0, description="Keep only traces with at least this speedup; null: any.")
    ignore_launch_bound: bool = Field(
        False,
        description="A speedup over a reference that is shorter than its launches does not count for require_fast_1, "
        "require_fast_2 and min_speedup.",
    )
    check_labels: bool = Field(
        True,
        description="Drop traces whose labels contradict each other: correct with an error, correct with a speedup of "
        "0, flags that do not follow from the speedup.",
    )

    # What the code is, read from its syntax tree; the judge has the last word.
    require_kernel: bool = Field(True, description="Drop traces without code, or whose code is a literal `...`.")
    check_syntax: bool = Field(True, description="Drop kernels that are not valid Python.")
    require_wrapper: bool = Field(
        True, description="Drop kernels that define neither triton_kernel_wrapper nor ModelNew."
    )
    require_launch: bool = Field(True, description="Drop kernels that launch no @triton.jit function.")
    forbid_fallback: bool = Field(
        True, description="Drop kernels that leave the module's heavy work to a PyTorch operator."
    )

    # What the model would learn to write.
    require_reasoning: bool = Field(True, description="Drop traces without a reasoning.")
    prose_is_reasoning: bool = Field(
        True,
        description="Where a completion marks no reasoning, let the prose before its code (20 words or more) count as "
        "one.",
    )
    drop_refusals: bool = Field(True, description="Drop traces whose reasoning declines the task or reports a failure.")
    drop_loops: bool = Field(True, description="Drop traces whose reasoning repeats itself for more than half of it.")
    require_readable: bool = Field(
        True, description="Drop traces whose kernel could not be read back from the answer that it would be trained in."
    )

    # What the traces are to each other and to the held-out problems.
    drop_duplicates: bool = Field(
        True, description="Of kernels that are the same, or nearly, keep the fastest correct one."
    )
    duplicate_similarity: float = Field(
        0.9, gt=0, le=1, description="Kernels count as the same from this Jaccard similarity of token 5-grams on."
    )
    max_per_problem: int | None = Field(None, ge=1, description="Keep at most this many traces of one problem.")
    prefer_shorter: bool = Field(
        False, description="Of equally fast traces of one problem (within 5 %) keep the one with the shorter reasoning."
    )
    decontaminate: bool = Field(True, description="Drop traces about a held-out problem, or nearly about one.")
    contamination: float = Field(
        0.8,
        gt=0,
        le=1,
        description="A module is nearly a held-out one when it holds this share of the other's token n-grams.",
    )

    # What holds everything downstream back, or warns.
    min_traces: int = Field(
        10, ge=1, description="The gate holds everything downstream back when fewer traces are kept."
    )
    min_share_kept: float = Field(0.25, ge=0, le=1, description="Warn when a smaller share of the traces read is kept.")
    strict: bool = Field(
        False, description="Refuse a file that breaks off instead of keeping the whole records before the break."
    )
