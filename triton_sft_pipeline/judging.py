"""Judging kernels, one verdict a line of a file, on disk the moment it is decided.

A killed run goes on where it was: what the file holds is not judged again. Knows nothing of how a verdict is found, or
of how the outcome is shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import json_bytes, locked
from triton_sft_pipeline.judgeable import Judgeable
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.verification import JUDGE_VERSION, KernelJudge, Verdict

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


def _line(verdict: Verdict, kernel: Judgeable, settings: JudgeSettings) -> dict[str, Any]:
    record = kernel.record
    place: dict[str, Any] = {"file": record.file, "position": record.position}
    if kernel.turn is not None:
        place["turn"] = kernel.turn
    judge = {"judge_version": JUDGE_VERSION, "settings": asdict(settings)}
    return {"sample_key": record.value.get("sample_key"), **place, **judge, **verdict.to_dict()}


def _opened(out: Path) -> FileIO:
    """The verdicts file, for this run alone: two at once would each judge everything."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stream = FileIO(out, "a+")
    except OSError as error:
        raise PipelineError(f"{out}: cannot be written ({error.strerror}). Give --out another place.") from error
    in_use = f"{out}: another run is writing its verdicts there. Wait for it, or give --out another name."
    return locked(stream, PipelineError(in_use), required=False)


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
