"""`labels_reproduce`: which labels count as not holding, and what the check's page shows of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.checks import labels_result
from triton_sft_pipeline.traces.reader import open_traces
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.verification import Verdict
from triton_sft_pipeline.verification.verdict import CORRECT
from triton_sft_pipeline_tests.traces.records import record, write_array


@pytest.fixture
def kept(tmp_path: Path) -> list[Trace]:
    path = write_array(tmp_path / "t.json", [record(n) for n in range(4)])
    parsed = [parse_record(r) for r in open_traces(resolve(path)) if isinstance(r, RawRecord)]
    return [trace for trace in parsed if isinstance(trace, Trace)]


def result(kept: list[Trace], *names: str, **fields: Any) -> dg.AssetCheckResult:
    verdicts = {
        trace.version: Verdict(
            **{
                "key": trace.version,
                "verdict": name,
                "correctness": name in CORRECT,
                "fast_0": name in CORRECT,
                **fields,
            }
        )
        for trace, name in zip(kept, names, strict=True)
    }
    return labels_result(kept, verdicts)


def test_labels_that_hold_pass_and_a_hybrid_kernel_holds(kept: list[Trace]) -> None:
    found = result(kept, "verified", "verified_hybrid", "verified", "verified")
    assert found.passed and found.metadata["share_that_does_not_hold"].value == 0.0
    assert found.description == "4 of 4 labels hold; 0 could not be checked on this machine."


def test_the_share_that_does_not_hold_is_of_those_that_could_be_checked(kept: list[Trace]) -> None:
    found = result(kept, "verified", "torch_fallback", "infra_error", "timeout", torch_share=0.75, detail="Half of it.")
    assert not found.passed and found.severity == dg.AssetCheckSeverity.WARN
    assert found.metadata["share_that_does_not_hold"].value == 0.5
    assert found.metadata["could_not_be_checked"].value == 2
    assert found.description is not None and found.description.endswith(f"does not: {kept[1].sample_key}.")
    shown = str(found.metadata["verdicts"].value)
    assert f"| {kept[1].sample_key} | True | torch_fallback | 75% |  | Half of it. |" in shown


def test_a_timeout_on_a_gpu_contradicts_the_label(kept: list[Trace]) -> None:
    found = result(kept, "verified", "verified", "verified", "timeout", backend="cuda", isolation="namespaces")
    assert not found.passed and found.metadata["isolation"].value == "namespaces"


def test_nothing_that_could_be_checked_is_no_failure(kept: list[Trace]) -> None:
    assert result(kept, *["unsupported_on_cpu"] * 4).passed
