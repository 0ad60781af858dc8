"""Labels measured anew: the records of files as they were, with what the judge found in place of their results.

Knows nothing of how a verdict is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_writer, json_bytes
from triton_sft_pipeline.judgeable import Judgeable, is_conversation, kernels_of
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.reader import open_traces
from triton_sft_pipeline.traces.record import Malformed
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.verification import Verdict

_SPEED = ("reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms")
_INTERVAL = ("speedup_low", "speedup_high")


def relabelled(places: Sequence[Path], verdicts: Mapping[str, Verdict]) -> Iterator[Any]:
    """The records, read anew, in their original schema, with the measured result in place of the label where there was
    a result.

    What cannot be judged, and a record whose result is missing or null, stays as it is: the pipeline must see it. Flags
    follow the point estimate, as that schema means them: fast_1 is a speedup above 1, fast_2 one of at least 2. Of a
    conversation the result of every turn is replaced, and its final result.

    Raises:
        PipelineError: a record is not the one that was judged.
    """
    for item in open_traces(resolve(places)):
        if isinstance(item, Break | Malformed):
            continue
        record = item.value
        kernels = kernels_of(item)
        if any(kernel.identity not in verdicts for kernel in kernels):
            raise PipelineError(
                f"{item.file}, record {item.position}: the file changed while its kernels were judged. Start again "
                "with the same --out: what is still the same is not judged again."
            )
        judged = [(kernel, verdicts[kernel.identity]) for kernel in kernels]
        if not judged:
            yield record
        elif is_conversation(record):
            yield _relabelled_conversation(record, judged)
        else:
            yield _with_result(record, "result", judged[0][1])


def result_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict in the schema of a trace's `result`, with times, intervals and the judge's word beside it.

    A wrong kernel has speedup 0, as in that schema; a right one whose speed was not measured (Triton's interpreter) has
    none.
    """
    # Rounded first, so that the flags never contradict the number beside them.
    speedup = 0.0 if not verdict.correctness else _rounded(verdict.speedup, 4)
    return {
        "correctness": verdict.correctness,
        "speedup": speedup,
        "fast_0": verdict.correctness,
        "fast_1": None if speedup is None else speedup > 1.0,
        "fast_2": None if speedup is None else speedup >= 2.0,
        "error": None if verdict.correctness else f"{verdict.verdict}: {verdict.detail}",
        **{name: _rounded(getattr(verdict, name), 6) for name in _SPEED},
        **{name: _rounded(getattr(verdict, name), 4) for name in _INTERVAL},
        "launch_bound": verdict.launch_bound,
    }


def write_relabelled(places: Sequence[Path], verdicts: Mapping[str, Verdict], out: Path) -> None:
    """Write the relabelled records as one JSON array, a record in memory at a time.

    Raises:
        PipelineError: `out` is one of the trace files (a label that was replaced could not be had back), or see
            `relabelled`.
    """
    if any(out.resolve() == file.path.resolve() for file in resolve(places)):
        raise PipelineError(f"{out}: these are the traces that were judged. Give --relabel another name.")
    with atomic_writer(out) as stream:
        before = "["
        for record in relabelled(places, verdicts):
            text = json.dumps(record, indent=2, ensure_ascii=False).replace("\n", "\n  ")
            stream.write(json_bytes(f"{before}\n  {text}"))
            before = ","
        stream.write(b"[]\n" if before == "[" else b"\n]\n")


def _relabelled_conversation(record: dict[str, Any], judged: list[tuple[Judgeable, Verdict]]) -> dict[str, Any]:
    new = deepcopy(record)
    final = record.get("final_triton_code") or ""
    for kernel, verdict in judged:
        if kernel.turn is not None:
            turn = new["turns"][kernel.turn - 1]
            new["turns"][kernel.turn - 1] = _with_result(turn, "result", verdict)
        if kernel.code == final:
            # From the old label each time: of several turns with this code the last one decides.
            new["final_result"] = _with_result(record, "final_result", verdict).get("final_result")
    return {name: new[name] for name in record}


def _with_result(holder: dict[str, Any], name: str, verdict: Verdict) -> dict[str, Any]:
    """The object with the measured result under `name`, unless it had none or the verdict says nothing."""
    if holder.get(name) is None or not verdict.is_conclusive:
        return holder
    return {**holder, name: _with_known_speed(result_of(verdict), holder[name])}


def _with_known_speed(measured: dict[str, Any], labelled: Any) -> dict[str, Any]:
    """Keep the labelled speed where a right kernel was not timed: an interpreter must not wipe out a measurement."""
    if measured["speedup"] is not None or not isinstance(labelled, dict) or not labelled.get("correctness"):
        return measured
    known = ("speedup", "fast_1", "fast_2", *_SPEED, *_INTERVAL, "launch_bound")
    return {**measured, **{name: labelled[name] for name in known if name in labelled}}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
