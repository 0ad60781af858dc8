"""Right kernels that a judge might trip over: each has something that looks wrong or breaks a simple harness."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.honest import binding, forms, likenesses, memory, operations, surroundings
from triton_sft_pipeline_tests.verification.snippets import Case

KINDS = frozenset(
    {
        "0-d output",
        "another dtype",
        "arguments",
        "autotune",
        "buffers",
        "constant for some draws",
        "dictionary of outputs",
        "empty tensor",
        "helper classes",
        "in-place reference",
        "keyword default",
        "likeness of the answer",
        "memory",
        "non-contiguous input",
        "non-finite reference",
        "operation",
        "small work by torch",
        "surroundings",
        "tuple of outputs",
        "weights",
    }
)

HONEST: tuple[Case, ...] = (
    *forms.CASES,
    *operations.CASES,
    *memory.CASES,
    *likenesses.CASES,
    *surroundings.CASES,
    *binding.CASES,
)
