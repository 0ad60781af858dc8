"""Gates: checks that hold a step back before anything of it is promoted.

Dagster records an asset whose blocking check failed as materialised and fresh, so that the next stale-only run would
train on it. A gate is stricter: the failed check is reported, then the step fails, and the artifact never becomes
current. The asset stays stale and nothing downstream runs on it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from triton_sft_pipeline.errors import PipelineError


@dataclass(frozen=True)
class Gate:
    """One condition on what a step made: its name in the UI, whether it holds, and a sentence for when it does not."""

    name: str
    passed: bool
    detail: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def gate_specs(asset: str, gates: Mapping[str, str]) -> list[dg.AssetCheckSpec]:
    """Specs of gates, {name: what it demands}: blocking, run in the asset's own step."""
    return [dg.AssetCheckSpec(name, asset=asset, description=text, blocking=True) for name, text in gates.items()]


def enforce(asset: str, gates: Sequence[Gate]) -> Generator[dg.AssetCheckResult, None, list[dg.AssetCheckResult]]:
    """Report every gate and fail the step when one did not hold. To be consumed before the draft is promoted.

    Returns:
        What to report with the materialisation when all hold: of a result that comes before it, the UI says that it is
        about the materialisation of last time.

    Raises:
        dg.Failure: a gate failed. Not retried: the same input fails again.
    """
    results = [_result(asset, gate, dg.AssetCheckSeverity.ERROR) for gate in gates]
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        yield from results
        told = " ".join(f"{gate.name}: {gate.detail}" for gate in failed)
        raise dg.Failure(f"{asset}: not promoted, the previous version stays. {told}", allow_retries=False)
    return results


def warning(asset: str, gate: Gate) -> dg.AssetCheckResult:
    """A condition that a person should know of and that holds nothing back."""
    return _result(asset, gate, dg.AssetCheckSeverity.WARN)


def _result(asset: str, gate: Gate, severity: dg.AssetCheckSeverity) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=gate.name,
        asset_key=asset,
        passed=gate.passed,
        severity=severity,
        description=gate.detail,
        metadata=dict(gate.metadata),
    )


@contextmanager
def told_plainly() -> Iterator[None]:
    """Errors meant for a person become step failures with that message and no retry; the rest stay bugs."""
    try:
        yield
    except PipelineError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
