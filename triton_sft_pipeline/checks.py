"""Checks that "Execute" on an asset's page runs again alone: they look at what is current and change nothing."""

import heapq
from collections import Counter
from typing import TYPE_CHECKING

import dagster as dg

from triton_sft_pipeline.assets.common import sign_run
from triton_sft_pipeline.assets.gates import told_plainly
from triton_sft_pipeline.assets.plots import table_markdown
from triton_sft_pipeline.config import Config
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.resources import JudgeResource, StoreResource
from triton_sft_pipeline.traces import Trace, iterate_kept

if TYPE_CHECKING:
    from triton_sft_pipeline.verification import KernelJudge, Verdict

SAMPLE = 8
"""Enough to notice a file whose labels are wrong throughout, and seconds even in the interpreter."""


def build_checks(active: Config) -> list[dg.AssetChecksDefinition]:
    """The stand-alone checks under this configuration."""

    @dg.asset_check(
        asset="filtered_traces",
        name="labels_reproduce",
        pool="gpu",
        description=f"Warns when the judge does not agree with the labels of {SAMPLE} kept traces, chosen by hash. "
        "On a CPU it judges in Triton's interpreter: correctness alone.",
    )
    def labels_reproduce(
        context: dg.AssetCheckExecutionContext, judge: JudgeResource, store: StoreResource
    ) -> dg.AssetCheckResult:
        sign_run(context)
        with told_plainly():
            kept = iterate_kept(store.open().require("filtered_traces").path)
            sample = heapq.nsmallest(SAMPLE, kept, key=lambda t: hash_json(t.version))
            with judge.open(active) as opened:
                return labels_result(sample, _judge(sample, opened))

    return [labels_reproduce]


def labels_result(sample: list[Trace], verdicts: dict[str, "Verdict"]) -> dg.AssetCheckResult:
    """Compare labels with verdicts, {version of the trace: verdict}."""
    known = [t for t in sample if verdicts[t.version].is_conclusive]
    differing = [t for t in known if bool(t.correctness) != verdicts[t.version].correctness]
    rows = [[t.sample_key, t.correctness, *_told(verdicts[t.version])] for t in sample]
    counts = Counter(v.verdict for v in verdicts.values())
    held, unknown = len(known) - len(differing), len(sample) - len(known)
    told = f"{held} of {len(known)} labels hold; {unknown} could not be checked on this machine."
    return dg.AssetCheckResult(
        passed=not differing,
        severity=dg.AssetCheckSeverity.WARN,
        description=told + (f" The first that does not: {differing[0].sample_key}." if differing else ""),
        metadata={
            "share_that_does_not_hold": len(differing) / len(known) if known else 0.0,
            "could_not_be_checked": unknown,
            "verdicts": dg.MetadataValue.md(table_markdown(["trace", "labelled correct", *_TOLD], rows)),
            "counts": ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()),
            "isolation": ", ".join(sorted({v.isolation for v in verdicts.values()})),
        },
    )


_TOLD = ["verdict", "done by PyTorch", "speedup", "why"]


def _told(verdict: "Verdict") -> list[str]:
    """The columns of _TOLD. A share by PyTorch is told where there is one: such a kernel is verified_hybrid, or a
    torch_fallback.
    """
    share = f"{verdict.torch_share:.0%}" if verdict.torch_share else ""
    return [verdict.verdict, share, f"{verdict.speedup:.2f}" if verdict.speedup else "", verdict.detail]


def _judge(sample: list[Trace], judge: "KernelJudge") -> dict[str, "Verdict"]:
    from triton_sft_pipeline.verification import JudgeItem

    items = [JudgeItem(key=t.version, pytorch_code=t.pytorch_code, triton_code=t.triton_code) for t in sample]
    return {verdict.key: verdict for verdict in judge.verify_many(items)}
