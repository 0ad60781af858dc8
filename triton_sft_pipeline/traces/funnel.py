"""The filter as one step: files in, kept, dropped and quarantined out, every record accounted for, written as Parquet
and JSON Lines.

Records pass one by one: what a step refuses is written down at once, what all let through is spilled to a temporary
Parquet file until the steps that compare traces have spoken. Memory follows the number of traces by a small key each,
never their text. Knows nothing of Dagster, of tokens or of what a kept trace is used for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_writer, json_bytes, write_json
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.problems.likeness import HeldOut
from triton_sft_pipeline.problems.normalise import kernel_tokens, module_tokens
from triton_sft_pipeline.traces.cache import Cache, Finding, context_of
from triton_sft_pipeline.traces.canonical import KEPT_FILE, TraceWriter, iterate_kept, read_kept, select
from triton_sft_pipeline.traces.decontamination import decontamination_step
from triton_sft_pipeline.traces.duplicates import TraceKey, form_of
from triton_sft_pipeline.traces.filters import Dropped, Step, first_refusal, label_steps, quality_steps
from triton_sft_pipeline.traces.items import Break, Item
from triton_sft_pipeline.traces.reader import open_traces
from triton_sft_pipeline.traces.record import Malformed, RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.selection import key_of, set_steps
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.traces.statistics import KeptSummary, Losses, Refused, summarise

DROPPED_FILE = "dropped.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
FUNNEL_FILE = "funnel.json"
_FILES = (KEPT_FILE, DROPPED_FILE, QUARANTINE_FILE, FUNNEL_FILE)
_SPILL_FILE = "passed.parquet"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Filtered:
    """What became of every record that was read: the numbers here, the records in files.

    Attributes:
        directory: where the files are; a temporary directory that goes with this object, see `write_filtered`.
        read: how many records were read.
        source_hash: hash of the bytes that were really read.
        breaks: files that broke off, and where.
        summary: the kept traces in numbers, from the file that was written.
        losses_dropped, losses_quarantined: counts by reason, and the first few records of each.
        raw: when it was asked for, the raw records of the kept traces, in the same order.
    """

    directory: Path
    read: int
    source_hash: str
    breaks: list[Break]
    summary: KeptSummary
    losses_dropped: Losses
    losses_quarantined: Losses
    raw: list[Any]

    @property
    def kept_count(self) -> int:
        """How many traces the written file holds."""
        return self.summary.count

    @property
    def data_version(self) -> str:
        """Hash of the kept records, whatever their order and wherever they stood."""
        return self.summary.version

    @property
    def accounted(self) -> int:
        """kept + dropped + quarantined, which is `read`, always."""
        lost = self.losses_dropped.counts.total() + self.losses_quarantined.counts.total()
        return self.kept_count + lost

    @property
    def funnel(self) -> dict[str, Any]:
        """Counts: read = kept + dropped + quarantined."""
        return {
            "read": self.read,
            "kept": self.kept_count,
            "dropped": self.losses_dropped.by_frequency,
            "quarantined": self.losses_quarantined.by_frequency,
            "breaks": [asdict(b) for b in self.breaks],
            "source_hash": self.source_hash,
        }

    def traces(self) -> Iterator[Trace]:
        """The kept traces, a batch in memory at a time."""
        # A generator of its own, because it holds on to this object and so to its files.
        yield from iterate_kept(self.directory)

    @property
    def kept(self) -> list[Trace]:
        """All of `traces`, read anew."""
        return read_kept(self.directory)

    @property
    def dropped(self) -> list[Dropped]:
        """What was dropped, read anew: in the order of the input, those that a comparison dropped last."""
        rows = _read_lines(self.directory / DROPPED_FILE)
        return [Dropped(Trace(**row["trace"]), row["reason"], row["detail"]) for row in rows]

    @property
    def quarantined(self) -> list[Malformed]:
        """What was no trace, read anew."""
        return [Malformed(**row) for row in _read_lines(self.directory / QUARANTINE_FILE)]

    def discard(self) -> None:
        """Remove the files; the numbers stay."""
        shutil.rmtree(self.directory, ignore_errors=True)


def filter_location(
    location: str | Path | Sequence[str | Path],
    settings: FilterSettings,
    held_out: Iterable[Problem] | None = None,
    *,
    extra_steps: Sequence[Step] = (),
    keep_raw: bool = False,
    workplace: Path | None = None,
    cache: Path | None = None,
    origin: str | None = None,
    on_bytes: Progress | None = None,
    on_compared: Progress | None = None,
) -> Filtered:
    """Read and filter the traces at `location`.

    Args:
        location: files, folders, patterns or datasets of the Hub; see `sources.resolve`.
        held_out: the held-out problems, none of which may be trained on; None asks for the label filters alone.
        extra_steps: more steps of one trace each, after the others and before traces are compared.
        keep_raw: remember the raw records of kept traces, all of them in memory.
        workplace: the directory to make the temporary one in; default the system's. On the disk of the destination
            nothing is copied.
        cache: a file in which to remember what was found out about records, see `cache.Cache`; default none. Not
            together with `extra_steps`, which it knows nothing of.
        origin: what the location was read from, for errors.
        on_bytes: told (bytes read, bytes in all).
        on_compared: told (kernels compared, kernels in all).

    Raises:
        PipelineError: nothing can be read there, or a file breaks off and `settings.strict` is set.
    """
    steps = label_steps(settings)
    problems = None if held_out is None else list(held_out)
    if problems is not None:
        steps += quality_steps(settings)
        if settings.decontaminate:
            steps.append(decontamination_step(HeldOut(problems, settings.contamination)))
    assert not (cache and extra_steps), "what an extra step says is in no key"
    reading = open_traces(resolve(location, origin), on_bytes)
    directory = Path(tempfile.mkdtemp(prefix=".tmp-filter-", dir=workplace))
    memory = Cache(cache, context_of(settings, problems or [])) if cache else None
    try:
        run = _Run(directory, [*steps, *extra_steps], settings, keep_raw)
        findings = Findings(run.steps, memory, compares=problems is not None and settings.drop_duplicates)
        places = run.first_pass(reading, findings)
        refusals = set_steps(places, settings, on_compared) if problems is not None else {}
        # What compares nothing asks for no keys.
        for _ in places:
            pass
        run.second_pass(refusals)
        filtered = run.result(reading.source_hash)
        write_json(directory / FUNNEL_FILE, filtered.funnel)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        if memory:
            memory.close()
    weakref.finalize(filtered, shutil.rmtree, directory, ignore_errors=True)
    return filtered


class Findings:
    """What the steps of one trace say about records, worked out or remembered.

    Args:
        memory: what earlier runs found out.
        compares: whether kernels will be compared, so that their normal forms are wanted.
    """

    def __init__(self, steps: list[Step], memory: Cache | None, compares: bool) -> None:
        self._steps = steps
        self._memory = memory
        self._compares = compares
        self._problems: set[str] = set()

    def of(self, record: RawRecord) -> tuple[Trace | Malformed, Finding]:
        """The trace of a record, and what is found out about it."""
        known = self._memory.record(record.raw) if self._memory else None
        parsed = parse_record(record, known.problem if known else None)
        if known or isinstance(parsed, Malformed):
            return parsed, known or Finding("")
        refused = first_refusal(parsed, self._steps)
        form = form_of(kernel_tokens(parsed.triton_code)) if self._compares and not refused else None
        found = Finding(parsed.problem, refused, form)
        if self._memory:
            self._memory.remember_record(record.raw, found)
        return parsed, found

    def key_of(self, trace: Trace, finding: Finding) -> TraceKey:
        """What the steps that compare traces need of one."""
        key = key_of(trace)
        if not self._compares:
            return key
        module = None
        if self._memory and trace.problem not in self._problems:
            self._problems.add(trace.problem)
            module = self._memory.module(trace.pytorch_code)
            if module is None:
                module = form_of(module_tokens(trace.pytorch_code))
                self._memory.remember_module(trace.pytorch_code, module)
        return replace(key, kernel_form=finding.kernel_form, module_form=module)


class _Run:
    """The two passes, and what they count."""

    def __init__(self, directory: Path, steps: list[Step], settings: FilterSettings, keep_raw: bool) -> None:
        self._directory = directory
        self.steps = steps
        self._strict = settings.strict
        self._raw: dict[tuple[str, int], Any] | None = {} if keep_raw else None
        self._read = 0
        self._breaks: list[Break] = []
        self._dropped = Losses()
        self._quarantined = Losses()

    def first_pass(self, reading: Iterable[Item], findings: Findings) -> Iterator[TraceKey]:
        """Read every record once; what passes the steps of one trace is spilled, and its key is given."""
        with ExitStack() as stack:
            dropped = stack.enter_context(atomic_writer(self._directory / DROPPED_FILE))
            quarantine = stack.enter_context(atomic_writer(self._directory / QUARANTINE_FILE))
            stream = stack.enter_context(atomic_writer(self._directory / _SPILL_FILE))
            spill = stack.enter_context(TraceWriter(stream))
            for item in reading:
                if isinstance(item, Break):
                    self._break(item)
                    continue
                self._read += 1
                if isinstance(item, Malformed):
                    self._quarantine(quarantine, item)
                    continue
                parsed, finding = findings.of(item)
                if isinstance(parsed, Malformed):
                    self._quarantine(quarantine, parsed)
                elif finding.refused:
                    self._drop(dropped, Dropped(parsed, *finding.refused))
                else:
                    key = findings.key_of(parsed, finding)
                    spill.add(parsed, key.version)
                    if self._raw is not None:
                        self._raw[parsed.file, parsed.position] = item.value
                    yield key

    def second_pass(self, refusals: dict[tuple[str, int], tuple[str, str]]) -> None:
        """Write what is kept, and add to the dropped what a comparison refused."""
        spill, kept = self._directory / _SPILL_FILE, self._directory / KEPT_FILE
        if not refusals:
            spill.rename(kept)
            return
        with atomic_writer(kept) as stream, open(self._directory / DROPPED_FILE, "ab") as dropped:

            def lose(trace: Trace) -> None:
                self._drop(dropped, Dropped(trace, *refusals[trace.file, trace.position]))

            select(spill, stream, lambda file, position: (file, position) not in refusals, lose)
        spill.unlink()
        for place in refusals if self._raw is not None else ():
            del self._raw[place]  # type: ignore[union-attr]

    def result(self, source_hash: str) -> Filtered:
        """What was counted, and what the written file says of itself."""
        return Filtered(
            directory=self._directory,
            read=self._read,
            source_hash=source_hash,
            breaks=self._breaks,
            summary=summarise(self._directory / KEPT_FILE),
            losses_dropped=self._dropped,
            losses_quarantined=self._quarantined,
            raw=list((self._raw or {}).values()),
        )

    def _break(self, found: Break) -> None:
        self._breaks.append(found)
        if self._strict:
            raise PipelineError(
                f"{found}. Mend the file, or leave out --strict to keep the whole records before the break."
            )

    def _drop(self, stream: IO[bytes], dropped: Dropped) -> None:
        trace = dropped.trace
        refused = Refused(dropped.reason, trace.sample_key, trace.file, trace.position, dropped.detail)
        self._dropped.add(refused)
        _write_line(stream, {**vars(refused), "trace": vars(trace)})

    def _quarantine(self, stream: IO[bytes], malformed: Malformed) -> None:
        refused = Refused(malformed.reason, "(malformed)", malformed.file, malformed.position, malformed.detail)
        self._quarantined.add(refused)
        _write_line(stream, vars(malformed))


def write_filtered(filtered: Filtered, directory: Path) -> None:
    """Put filtered_traces.parquet, dropped.jsonl, quarantine.jsonl and funnel.json into `directory`, each of them whole
    or not at all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        source, target = filtered.directory / name, directory / name
        temporary = directory / f"{filtered.directory.name}-{name}"
        try:
            os.link(source, temporary)
            os.replace(temporary, target)
            # A second time, both names are the same file already, and then nothing was replaced.
            temporary.unlink(missing_ok=True)
        except OSError:
            # Another disk, or one that knows no links.
            temporary.unlink(missing_ok=True)
            with open(source, "rb") as stream, atomic_writer(target) as copy:
                shutil.copyfileobj(stream, copy, 2**20)


def describe(filtered: Filtered) -> str:
    """The funnel as lines for a terminal of 80 columns."""
    funnel = filtered.funnel
    lines = [f"read         {filtered.read:>7,}"]
    lines += [f"- {reason:<20} {count:>7,}  quarantined" for reason, count in funnel["quarantined"].items()]
    lines += [f"- {reason:<20} {count:>7,}  dropped" for reason, count in funnel["dropped"].items()]
    share = f"  ({filtered.kept_count / filtered.read:.0%})" if filtered.read else ""
    lines.append(f"kept         {filtered.kept_count:>7,}{share}")
    lines += [f"warning: {item}; the whole records before it are kept" for item in filtered.breaks]
    return "\n".join(lines)


def _write_line(stream: IO[bytes], row: dict[str, Any]) -> None:
    stream.write(json_bytes(json.dumps(row, ensure_ascii=False) + "\n"))


def _read_lines(path: Path) -> list[Any]:
    with open(path, encoding="utf-8", newline="\n") as stream:
        return [json.loads(line) for line in stream]
