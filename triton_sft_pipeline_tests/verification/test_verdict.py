"""The taxonomy and the plain data of a verdict."""

from __future__ import annotations

import json

import pytest

from triton_sft_pipeline.verification.verdict import CORRECT, UNJUDGED, VERDICTS, Verdict

TAXONOMY = """
    verified verified_hybrid
    incorrect_numerical incorrect_shape incorrect_dtype incorrect_nan incorrect_structure
    no_code unparsed syntax_error import_error missing_wrapper contract_error compile_error runtime_error
    timeout crash resource_limit early_exit
    no_kernel_launch dummy_kernel torch_fallback output_cached output_alias input_mutated lazy_output harness_tamper
    timing_tamper stream_escape thread_leak process_leak forged_result reference_access sandbox_violation
    forbidden_construct
    unsupported_on_cpu degenerate_task reference_error infra_error
"""


def test_the_taxonomy_is_complete_and_says_what_each_verdict_means() -> None:
    assert set(VERDICTS) == set(TAXONOMY.split())
    assert all(VERDICTS.values()) and len(set(VERDICTS.values())) == len(VERDICTS)
    assert set(VERDICTS) >= CORRECT | UNJUDGED and not CORRECT & UNJUDGED


def test_a_verdict_survives_json_and_a_newer_one_is_read() -> None:
    verdict = Verdict(
        "k",
        "verified_hybrid",
        True,
        True,
        fast_1=False,
        speedup=1.2,
        speedup_low=0.9,
        speedup_high=1.5,
        launch_bound=True,
        torch_share=0.25,
        versions={"torch": "2.11"},
    )
    line = json.loads(json.dumps(verdict.to_dict()))
    assert Verdict.from_dict({**line, "of_a_later_version": 1}) == verdict


def test_what_was_not_measured_is_none() -> None:
    line = Verdict("k", "crash", False, False).to_dict()
    measured = ("fast_1", "fast_2", "speedup", "speedup_low", "kernel_iqr_ms", "launch_bound", "torch_share")
    assert [line[name] for name in measured] == [None] * len(measured)


@pytest.mark.parametrize(
    ("name", "backend", "conclusive"),
    [
        ("verified", "interpreter", True),
        ("crash", "interpreter", True),
        ("timeout", "cuda", True),
        ("timeout", "interpreter", False),
        ("unsupported_on_cpu", "interpreter", False),
        ("infra_error", "cuda", False),
        ("degenerate_task", "cuda", False),
        ("reference_error", "cuda", False),
    ],
)
def test_a_verdict_knows_whether_it_says_something_about_the_kernel(name: str, backend: str, conclusive: bool) -> None:
    assert Verdict("k", name, False, False, backend=backend).is_conclusive is conclusive
