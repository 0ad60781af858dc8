"""Judging the traces of files: one verdict a record, on disk the moment it is decided, and labels measured anew.

A killed run goes on where it was: a record is known by its file, its position and a hash of what is judged, because
keys repeat in real files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_write_bytes, hash_json, json_bytes, write_json
from triton_sft_pipeline.traces.reader import Break, open_trace_file, trace_files
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict

UNMEASURED = frozenset({"infra_error", "reference_error", "unsupported_on_cpu", "degenerate_task"})
"""Verdicts that say nothing about the kernel: no label is written for them."""


@dataclass(frozen=True)
class Judgeable:
    """A record that can be judged: it needs pytorch_code and triton_code, nothing else.

    Attributes:
        identity: content hash, position and file; what its verdict is known by.
    """

    record: RawRecord
    identity: str

    @property
    def item(self) -> JudgeItem:
        value = self.record.value
        return JudgeItem(
            key=self.identity, pytorch_code=value["pytorch_code"], triton_code=value.get("triton_code") or ""
        )


@dataclass(frozen=True)
class Refused:
    """What cannot be judged: its value, when it is JSON at all, and a sentence that names file, record and reason."""

    value: Any
    sentence: str


def read_judgeable(places: list[Path]) -> list[Judgeable | Refused]:
    """Every record of the files, in order, as something to judge or as refused.

    Raises:
        PipelineError: a place cannot be read.
    """
    found: list[Judgeable | Refused] = []
    for path in [file for place in places for file in trace_files(place)]:
        for item in open_trace_file(path).records():
            if isinstance(item, Break):
                found.append(Refused(None, str(item)))
            elif isinstance(item, Malformed):
                found.append(Refused(None, f"{item.file}, record {item.position}: {item.detail}"))
            elif not _is_judgeable(item.value):
                why = "pytorch_code is missing or no text, or triton_code is no text"
                found.append(Refused(item.value, f"{item.file}, record {item.position}: {why}"))
            else:
                found.append(Judgeable(item, _identity(item)))
    return found


def judge_records(
    records: list[Judgeable], judge: KernelJudge, out: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Verdict]:
    """Judge what `out` does not hold yet, one line appended a verdict.

    Returns:
        identity -> verdict of every record, the ones of earlier runs included.

    Raises:
        PipelineError: `out` is one of the trace files, or holds something else than verdicts.
    """
    if any(out.resolve() == Path(r.record.file).resolve() for r in records):
        raise PipelineError(f"{out}: these are the traces to judge. Give --out another name.")
    known = _resume(out)
    todo = [r for r in records if r.identity not in known]
    places = {r.identity: r.record for r in records}
    done = len(records) - len(todo)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as stream:
        for verdict in judge.verify_many(r.item for r in todo):
            known[verdict.key] = verdict
            stream.write(json_bytes(json.dumps(_line(verdict, places[verdict.key]), ensure_ascii=False) + "\n"))
            stream.flush()
            done += 1
            if progress:
                progress(done, len(records))
    return {r.identity: known[r.identity] for r in records}


def relabelled(records: list[Judgeable | Refused], verdicts: Mapping[str, Verdict]) -> Iterator[Any]:
    """The records in their original schema, with the measured result in place of the label where there was a result.

    What cannot be judged, and a record whose result is missing or null, stays as it is: the pipeline must see it. Flags
    follow the point estimate, as that schema means them: fast_1 is a speedup above 1, fast_2 one of at least 2.
    """
    for item in records:
        if isinstance(item, Refused):
            if item.value is not None:
                yield item.value
            continue
        record = dict(item.record.value)
        verdict = verdicts[item.identity]
        if record.get("result") is not None and verdict.verdict not in UNMEASURED:
            record["result"] = _with_known_speed(result_of(verdict), record["result"])
        yield record


def result_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict in the schema of a trace's `result`, with the times and the judge's word beside it.

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
        "reference_time_ms": _rounded(verdict.reference_time_ms, 6),
        "kernel_time_ms": _rounded(verdict.kernel_time_ms, 6),
    }


def _with_known_speed(measured: dict[str, Any], labelled: Any) -> dict[str, Any]:
    """Keep the labelled speed where a right kernel was not timed: an interpreter must not wipe out a measurement."""
    if measured["speedup"] is not None or not isinstance(labelled, dict) or not labelled.get("correctness"):
        return measured
    known = ("speedup", "fast_1", "fast_2", "reference_time_ms", "kernel_time_ms")
    return {**measured, **{name: labelled[name] for name in known if name in labelled}}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def write_relabelled(records: list[Judgeable | Refused], verdicts: Mapping[str, Verdict], out: Path) -> None:
    """Write the relabelled records as one JSON array.

    Raises:
        PipelineError: `out` is one of the trace files; a label that was replaced could not be had back.
    """
    if any(isinstance(r, Judgeable) and out.resolve() == Path(r.record.file).resolve() for r in records):
        raise PipelineError(f"{out}: these are the traces that were judged. Give --relabel another name.")
    write_json(out, list(relabelled(records, verdicts)))


def _is_judgeable(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("pytorch_code"), str):
        return False
    return isinstance(value.get("triton_code"), str | None)


def _identity(record: RawRecord) -> str:
    content = [record.value["pytorch_code"], record.value.get("triton_code")]
    return f"{hash_json(content)[:16]}@{record.position}@{record.file}"


def _line(verdict: Verdict, record: RawRecord) -> dict[str, Any]:
    key = record.value.get("sample_key")
    return {"sample_key": key, "file": record.file, "position": record.position, **verdict.to_dict()}


def _resume(out: Path) -> dict[str, Verdict]:
    """Verdicts of an earlier run. A last line that a kill cut off is removed from the file and judged again; a file of
    anything else is not touched.
    """
    if not out.exists():
        return {}
    data = out.read_bytes()
    *lines, rest = data.split(b"\n")
    verdicts = [_verdict_of(line, f"{out}, line {number}") for number, line in enumerate(lines, 1)]
    if rest:
        if not _is_cut_off(rest):
            verdicts.append(_verdict_of(rest, f"{out}, line {len(lines) + 1}"))
            atomic_write_bytes(out, data + b"\n")
        else:
            atomic_write_bytes(out, data[: -len(rest)])
    return {verdict.key: verdict for verdict in verdicts}


def _verdict_of(line: bytes, place: str) -> Verdict:
    try:
        fields = json.loads(line)
        return Verdict.from_dict({k: v for k, v in fields.items() if k not in ("sample_key", "file", "position")})
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(f"{place}: not a verdict of this command ({error}). Give --out another name.") from error


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is the beginning of one of ours. Whatever else does not end in a newline is somebody's file under
    a mistaken name.
    """
    beginning = b'{"sample_key": '
    if not beginning.startswith(line[: len(beginning)]):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False
