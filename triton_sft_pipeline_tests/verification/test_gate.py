"""What is refused before anything runs."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.verification.gate import inspect_source


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (None, "no_code"),
        ("", "no_code"),
        (" \n\t", "no_code"),
        ("...", "missing_wrapper"),
        ("def wrapper(x): pass", "missing_wrapper"),
        ("class A:\n    def triton_kernel_wrapper(self): pass", "missing_wrapper"),
        ("def triton_kernel_wrapper(x)", "syntax_error"),
        ("x = '\0'", "syntax_error"),
        ("x = '\ud800'", "syntax_error"),
        ("(" * 10_000, "syntax_error"),
    ],
)
def test_code_that_cannot_be_judged_is_refused_unread(code: str | None, verdict: str) -> None:
    found = inspect_source(code)
    assert found is not None and found.verdict == verdict


@pytest.mark.parametrize(
    "code",
    [
        "def triton_kernel_wrapper(x): pass",
        "class ModelNew: pass",
        "triton_kernel_wrapper = lambda x: x",
        "if True:\n    def triton_kernel_wrapper(x): pass",
        "try:\n    from fast import triton_kernel_wrapper\nexcept ImportError:\n    pass",
    ],
)
def test_code_that_defines_either_contract_passes(code: str) -> None:
    assert inspect_source(code) is None
