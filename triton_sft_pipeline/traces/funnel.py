"""The filter as one step: files in, kept, dropped and quarantined out, every record accounted for, written as Parquet
and JSON Lines.

Knows nothing of Dagster, of tokens or of what a kept trace is used for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_writer, hash_json, write_json, write_jsonl
from triton_sft_pipeline.traces.filters import Dropped, Step, filter_traces, label_steps, training_steps
from triton_sft_pipeline.traces.reader import Break, hash_sources, open_trace_file, trace_files
from triton_sft_pipeline.traces.record import Malformed, Trace, parse_record
from triton_sft_pipeline.traces.settings import FilterSettings

KEPT_FILE = "filtered_traces.parquet"
DROPPED_FILE = "dropped.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
FUNNEL_FILE = "funnel.json"

_DOCS = {
    "sample_key": "name of the trace, unique within its source file",
    "source": "where the problem comes from, for example kernelbook or kernelbench",
    "problem": "SHA-256 of the normalised PyTorch module: traces of one problem share it",
    "pytorch_code": "the PyTorch module with get_inputs and get_init_inputs",
    "reasoning": "the chain of thought that led to the kernel",
    "reasoning_field": "the field of the raw record that the reasoning was taken from",
    "triton_code": "the kernel; defines triton_kernel_wrapper",
    "correctness": "label: the kernel's output matched PyTorch",
    "fast_0": "label: correct",
    "fast_1": "label: correct and speedup > 1",
    "fast_2": "label: correct and speedup >= 2",
    "speedup": "label: reference time / kernel time",
    "file": "the file that it was read from",
    "position": "0-based index of the record in that file",
    "version": "SHA-256 of the whole record, without its place",
}


@dataclass(frozen=True)
class Filtered:
    """What became of every record that was read.

    Attributes:
        source_hash: hash of the bytes that were really read.
        breaks: files that broke off, and where.
        raw: the raw records of the kept traces, in the same order.
    """

    source_hash: str
    kept: list[Trace]
    raw: list[dict[str, Any]]
    dropped: list[Dropped]
    quarantined: list[Malformed]
    breaks: list[Break]
    read: int

    @property
    def funnel(self) -> dict[str, Any]:
        """Counts: read = kept + dropped + quarantined, always."""
        return {
            "read": self.read,
            "kept": len(self.kept),
            "dropped": dict(Counter(d.reason for d in self.dropped).most_common()),
            "quarantined": dict(Counter(m.reason for m in self.quarantined).most_common()),
            "breaks": [asdict(b) for b in self.breaks],
            "source_hash": self.source_hash,
        }

    @property
    def data_version(self) -> str:
        """Hash of the kept records, whatever their order and wherever they stood."""
        return hash_json(sorted(t.version for t in self.kept))


def filter_location(
    location: Path | Sequence[Path], settings: FilterSettings, held_out: Mapping[str, str] | None = None
) -> Filtered:
    """Read and filter the traces at `location`.

    Args:
        location: a .json or .jsonl file, a folder of them, or several such.
        held_out: fingerprint -> name of the held-out problems, none of which may be trained on; None asks for the label
            filters alone.

    Raises:
        PipelineError: nothing can be read there, or a file breaks off and `settings.strict` is set.
    """
    steps = label_steps(settings) + ([] if held_out is None else training_steps(held_out))
    places = [location] if isinstance(location, str | Path) else location
    # A file that is named twice is read once.
    files = {file.resolve(): file for place in places for file in trace_files(place)}
    return _filter_files(list(files.values()), steps, settings.strict)


def _filter_files(paths: list[Path], steps: list[Step], strict: bool) -> Filtered:
    hashes: list[tuple[str, str]] = []
    traces: list[Trace] = []
    raw: dict[tuple[str, int], dict[str, Any]] = {}
    quarantined: list[Malformed] = []
    breaks: list[Break] = []
    read = 0
    for path in paths:
        file = open_trace_file(path)
        hashes.append((path.name, file.sha256))
        for item in file.records():
            if isinstance(item, Break):
                breaks.append(item)
                continue
            read += 1
            parsed = item if isinstance(item, Malformed) else parse_record(item)
            if isinstance(parsed, Malformed):
                quarantined.append(parsed)
            else:
                traces.append(parsed)
                raw[parsed.file, parsed.position] = item.value  # type: ignore[union-attr]
    if strict and breaks:
        raise PipelineError(
            f"{breaks[0]}. Mend the file, or leave out --strict to keep the whole records before the break."
        )
    kept, dropped = filter_traces(traces, steps)
    return Filtered(
        hash_sources(hashes), kept, [raw[t.file, t.position] for t in kept], dropped, quarantined, breaks, read
    )


def write_filtered(filtered: Filtered, directory: Path) -> None:
    """Write filtered_traces.parquet, dropped.jsonl, quarantine.jsonl and funnel.json into `directory`."""
    directory = Path(directory)
    _write_parquet(filtered.kept, directory / KEPT_FILE)
    write_jsonl(directory / DROPPED_FILE, [_dropped_row(d) for d in filtered.dropped])
    write_jsonl(directory / QUARANTINE_FILE, [asdict(m) for m in filtered.quarantined])
    write_json(directory / FUNNEL_FILE, filtered.funnel)


def read_kept(directory: Path) -> list[Trace]:
    """The kept traces of a directory that `write_filtered` wrote.

    Raises:
        PipelineError: the file is not there or is not one of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(directory) / KEPT_FILE
    names = [f.name for f in fields(Trace)]
    try:
        rows = pq.read_table(path, columns=names).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PipelineError(f"{path}: not readable as filtered traces ({error}). Run the filter again.") from error
    return [Trace(**row) for row in rows]


def describe(filtered: Filtered) -> str:
    """The funnel as lines for a terminal of 80 columns."""
    lines = [f"read         {filtered.read:>7,}"]
    lines += [f"- {reason:<20} {count:>7,}  quarantined" for reason, count in filtered.funnel["quarantined"].items()]
    lines += [f"- {reason:<20} {count:>7,}  dropped" for reason, count in filtered.funnel["dropped"].items()]
    share = f"  ({len(filtered.kept) / filtered.read:.0%})" if filtered.read else ""
    lines.append(f"kept         {len(filtered.kept):>7,}{share}")
    lines += [f"warning: {item}; the whole records before it are kept" for item in filtered.breaks]
    return "\n".join(lines)


def _dropped_row(dropped: Dropped) -> dict[str, Any]:
    trace = dropped.trace
    return {
        "reason": dropped.reason,
        "detail": dropped.detail,
        "sample_key": trace.sample_key,
        "file": trace.file,
        "position": trace.position,
        "trace": asdict(trace),
    }


def _write_parquet(traces: list[Trace], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**asdict(t), "version": t.version} for t in traces]
    table = pa.Table.from_pylist(rows, schema=_schema())
    with atomic_writer(path) as stream:
        pq.write_table(table, stream, compression="zstd")


def _schema() -> Any:
    import pyarrow as pa

    types = {"level": pa.int64(), "problem_id": pa.int64(), "position": pa.int64(), "speedup": pa.float64()}
    types |= dict.fromkeys(("has_result", "correctness", "fast_0", "fast_1", "fast_2"), pa.bool_())
    names = [f.name for f in fields(Trace)] + ["version"]
    return pa.schema(
        [pa.field(n, types.get(n, pa.string()), metadata={"doc": _DOCS[n]} if n in _DOCS else None) for n in names]
    )
