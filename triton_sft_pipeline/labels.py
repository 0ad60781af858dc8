"""Judging the traces of files: one verdict a kernel, on disk the moment it is decided, and labels measured anew.

A killed run goes on where it was: a kernel is known by its file, its position and a hash of what is judged, because
keys repeat in real files. Knows nothing of how a verdict is found, or of how the outcome is shown.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import atomic_writer, hash_json, json_bytes
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.reader import open_traces
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.verification import JUDGE_VERSION, JudgeItem, KernelJudge, Verdict

_SPEED = ("reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms")
_INTERVAL = ("speedup_low", "speedup_high")
_ASKED = ("sample_key", "pytorch_code", "result", "final_result")
_OURS = ("sample_key", "file", "position", "turn", "judge_version", "settings")


@dataclass(frozen=True)
class JudgeSettings:
    """What decides whether verdicts may stand in one file. A line of the file keeps them.

    Attributes:
        backend: "cuda", or "interpreter" for Triton's CPU interpreter.
        trials: draws of inputs that were asked for.
        timing: whether speedups are measured.
        compile_baseline: whether torch.compile is measured too.
    """

    backend: str
    trials: int = 5
    timing: bool = True
    compile_baseline: bool = False


@dataclass(frozen=True)
class Judgeable:
    """A kernel that can be judged: it needs pytorch_code and its own code, nothing else.

    Attributes:
        record: where it stands, and of its value what is asked here: its keys, its module and its labels.
        identity: content hash, position and file; what its verdict is known by.
        code: the kernel; empty when the record has none.
        turn: which turn of a conversation wrote it, from 1; None for a record's one kernel, or its final one.
    """

    record: RawRecord
    identity: str
    code: str
    turn: int | None = None

    @property
    def item(self) -> JudgeItem:
        """What the judge is given; the verdict comes back under the identity."""
        return JudgeItem(key=self.identity, pytorch_code=self.record.value["pytorch_code"], triton_code=self.code)

    @property
    def name(self) -> str:
        """What a person knows it by: its sample_key, or file and position."""
        key = self.record.value.get("sample_key") or f"{Path(self.record.file).name}, record {self.record.position}"
        return f"{key} turn {self.turn}" if self.turn else str(key)

    @property
    def label(self) -> bool | None:
        """Whether it is labelled correct; None without a label."""
        value = self.record.value
        holder = value if self.turn is None else value["turns"][self.turn - 1]
        result = holder.get("result", holder.get("final_result"))
        correctness = result.get("correctness") if isinstance(result, dict) else None
        return correctness if isinstance(correctness, bool) else None


@dataclass(frozen=True)
class Refused:
    """What cannot be judged: a sentence that names file, record and reason."""

    sentence: str


@dataclass(frozen=True)
class Judged:
    """What became of the kernels.

    Attributes:
        verdicts: identity -> verdict of every kernel, those of earlier runs included.
        judged_now: how many of them this run decided.
        seconds: how long it took.
    """

    verdicts: dict[str, Verdict]
    judged_now: int
    seconds: float


def read_judgeable(places: Sequence[Path]) -> list[Judgeable | Refused]:
    """Every kernel of the files, in order, as something to judge or as refused.

    Of a conversation (a record with `turns`) every turn with code is one, and so is a final kernel that no turn wrote.
    Codes and labels are kept, reasoning and completions are not: some kilobytes a kernel.

    Args:
        places: files, folders, patterns or datasets of the Hub; see `sources.resolve`.

    Raises:
        PipelineError: a place cannot be read.
    """
    found: list[Judgeable | Refused] = []
    for item in open_traces(resolve(places)):
        if isinstance(item, Break):
            found.append(Refused(str(item)))
        elif isinstance(item, Malformed):
            found.append(Refused(f"{item.file}, record {item.position}: {item.detail}"))
        elif why := _why_not(item.value):
            found.append(Refused(f"{item.file}, record {item.position}{_key_of(item.value)}: {why}"))
        else:
            found += _kernels(item)
    return found


def check_destinations(traces: Sequence[Path], out: Path, relabel: Path | None) -> None:
    """Refuse what cannot be written, or must not be written over, before anything is judged rather than after.

    Raises:
        PipelineError: a destination is one of the trace files, a folder or a device, or may not be written; or both are
            the same file; or traces are to be relabelled that can be read only once.
    """
    files = [file.path for file in resolve(traces)]
    sources = {file.resolve() for file in files}
    for option, path in (("--out", out), ("--relabel", relabel)):
        if path is None:
            continue
        if path.resolve() in sources:
            raise PipelineError(f"{path}: these are the traces to judge. Give {option} another name.")
        if path.exists() and not path.is_file() and (option, str(path)) != ("--out", os.devnull):
            raise PipelineError(f"{path}: not a file. Give {option} the name of one.")
        # Verdicts are appended; the relabelled traces are written beside and renamed.
        appends = option == "--out" and path.exists()
        touched = path if appends else next(folder for folder in path.absolute().parents if folder.exists())
        if not os.access(touched, os.W_OK) or not (appends or touched.is_dir()):
            raise PipelineError(f"{path}: {touched} cannot be written. Give {option} another place.")
    if relabel is not None and relabel.resolve() == out.resolve():
        raise PipelineError(f"{out}: named for --out and for --relabel. They need a file each.")
    if relabel is not None and (once := [file for file in files if not file.is_file()]):
        raise PipelineError(f"{once[0]}: --relabel reads the traces again at its end. Give it a file.")


def judge_records(
    records: list[Judgeable],
    judge: KernelJudge,
    out: Path,
    settings: JudgeSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Judge what `out` does not hold yet, one line appended a verdict.

    Args:
        progress: called with (done, total); first with what earlier runs have done.

    Raises:
        PipelineError: `out` is one of the trace files, holds something else than verdicts, or verdicts of another judge
            or of other settings; or another run is writing to it.
        StepError: `out` can no longer be written, as on a full disk.
    """
    if any(out.resolve() == Path(r.record.file).resolve() for r in records):
        raise PipelineError(f"{out}: these are the traces to judge. Give --out another name.")
    began = time.monotonic()
    kernels = {r.identity: r for r in records}
    with _opened(out) as stream:
        known = _resume(stream, out, settings)
        todo = [kernel for identity, kernel in kernels.items() if identity not in known]
        done = len(kernels) - len(todo)
        if progress:
            progress(done, len(kernels))
        for verdict in judge.verify_many(kernel.item for kernel in todo):
            known[verdict.key] = verdict
            line = _line(verdict, kernels[verdict.key], settings)
            _append(stream, out, json_bytes(json.dumps(line, ensure_ascii=False) + "\n"))
            done += 1
            if progress:
                progress(done, len(kernels))
    verdicts = {identity: known[identity] for identity in kernels}
    return Judged(verdicts, len(todo), time.monotonic() - began)


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
        kernels = [] if _why_not(record) else _kernels(item)
        if any(kernel.identity not in verdicts for kernel in kernels):
            raise PipelineError(
                f"{item.file}, record {item.position}: the file changed while its kernels were judged. Start again "
                "with the same --out: what is still the same is not judged again."
            )
        judged = [(kernel, verdicts[kernel.identity]) for kernel in kernels]
        if not judged:
            yield record
        elif _is_conversation(record):
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


def _is_conversation(value: dict[str, Any]) -> bool:
    return "triton_code" not in value and ("turns" in value or "final_triton_code" in value)


def _key_of(value: Any) -> str:
    """How a person finds the record in its file: the sample_key, when there is one that a line can show."""
    key = value.get("sample_key") if isinstance(value, dict) else None
    return f" ({key})" if isinstance(key, str) and 0 < len(key) <= 80 and key.isprintable() else ""


def _why_not(value: Any) -> str | None:
    """The reason why a record cannot be judged, or None."""
    if not isinstance(value, dict) or not isinstance(value.get("pytorch_code"), str):
        return "pytorch_code is missing or no text"
    turns = (value.get("turns") or []) if _is_conversation(value) else []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "turns is no list of objects"
    codes = [value.get("triton_code"), value.get("final_triton_code"), *(turn.get("triton_code") for turn in turns)]
    return None if all(isinstance(code, str | None) for code in codes) else "triton_code is no text"


def _kernels(record: RawRecord) -> list[Judgeable]:
    value = record.value
    if not _is_conversation(value):
        return [_judgeable(record, value.get("triton_code"))]
    codes = [turn.get("triton_code") or "" for turn in value.get("turns") or []]
    written = [_judgeable(record, code, turn) for turn, code in enumerate(codes, 1) if code.strip()]
    final = value.get("final_triton_code") or ""
    if not written or (final.strip() and final not in codes):
        written.append(_judgeable(record, final))
    return written


def _judgeable(record: RawRecord, code: str | None, turn: int | None = None) -> Judgeable:
    content = hash_json([record.value["pytorch_code"], code])[:16]
    place = f"{record.position}.{turn}" if turn else f"{record.position}"
    light = RawRecord(record.file, record.position, record.byte, _asked(record.value), "")
    return Judgeable(light, f"{content}@{place}@{record.file}", code or "", turn)


def _asked(value: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a record's value once its kernels are known."""
    light: dict[str, Any] = {name: value[name] for name in _ASKED if name in value}
    if _is_conversation(value):
        turns = value.get("turns") or []
        light["turns"] = [{name: turn[name] for name in ("result", "final_result") if name in turn} for turn in turns]
    return light


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


def _line(verdict: Verdict, kernel: Judgeable, settings: JudgeSettings) -> dict[str, Any]:
    record = kernel.record
    place: dict[str, Any] = {"file": record.file, "position": record.position}
    if kernel.turn is not None:
        place["turn"] = kernel.turn
    judge = {"judge_version": JUDGE_VERSION, "settings": asdict(settings)}
    return {"sample_key": record.value.get("sample_key"), **place, **judge, **verdict.to_dict()}


@contextmanager
def _opened(out: Path) -> Iterator[FileIO]:
    """The verdicts file, for this run alone: two at once would each judge everything."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stream = FileIO(out, "a+")
    except OSError as error:
        raise PipelineError(f"{out}: cannot be written ({error.strerror}). Give --out another place.") from error
    with stream:
        # Not every file system knows locks.
        with suppress(OSError):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PipelineError(
                    f"{out}: another run is writing its verdicts there. Wait for it, or give --out another name."
                ) from error
        yield stream


def _append(stream: FileIO, out: Path, data: bytes) -> None:
    try:
        while data:
            data = data[stream.write(data) :]
    except OSError as error:
        raise StepError(
            f"{out}: {error.strerror}. What was judged before is kept: start again with the same --out to go on."
        ) from error


def _resume(stream: FileIO, out: Path, settings: JudgeSettings) -> dict[str, Verdict]:
    """Verdicts of an earlier run. A last line that a kill cut off is removed from the file and judged again; a file of
    anything else is not touched.
    """
    stream.seek(0)
    data = stream.readall()
    *lines, rest = data.split(b"\n")
    whole = [*lines, rest] if rest and not _is_cut_off(rest) else lines
    verdicts = [_verdict_of(line, f"{out}, line {number}", settings) for number, line in enumerate(whole, 1)]
    if len(whole) > len(lines):
        _append(stream, out, b"\n")
    elif rest:
        stream.truncate(len(data) - len(rest))
    return {verdict.key: verdict for verdict in verdicts}


def _verdict_of(line: bytes, place: str, settings: JudgeSettings) -> Verdict:
    try:
        fields = json.loads(line)
        verdict = Verdict.from_dict({k: v for k, v in fields.items() if k not in _OURS})
        theirs = {"judge_version": fields.get("judge_version", "unknown"), **fields.get("settings", {})}
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(f"{place}: not a verdict of this command ({error}). Give --out another name.") from error
    ours = {"judge_version": JUDGE_VERSION, **asdict(settings)}
    if differing := [name for name in ours if ours[name] != theirs.get(name, ours[name])]:
        was, now = (", ".join(f"{name} {side[name]}" for name in differing) for side in (theirs, ours))
        raise PipelineError(
            f"{place}: judged with {was}; this run judges with {now}. Verdicts of both in one file could not be told "
            "apart: give --out another name, or judge as before."
        )
    return verdict


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
