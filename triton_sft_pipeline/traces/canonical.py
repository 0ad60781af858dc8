"""Canonical records on disk: Parquet (zstd) with a typed schema whose fields say what they hold, written and read in
batches so that memory does not follow the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.record import Trace

KEPT_FILE = "filtered_traces.parquet"

_NAMES = [field.name for field in fields(Trace)]
_INTEGERS = ("level", "problem_id", "position", "turn", "num_turns")
_FLOATS = ("speedup", "speedup_low")
_FLAGS = ("has_result", "correctness", "fast_0", "fast_1", "fast_2", "launch_bound")

_ROWS = 500
_CHARACTERS = 2 * 2**20
"""Rows and characters that are written, and read, at a time: a row group."""

_DOCS = {
    "sample_key": "name of the trace, unique within its source file",
    "source": "where the problem comes from, for example kernelbook or kernelbench",
    "level": "KernelBench's level, 1 to 4",
    "name": "readable name of the problem",
    "problem_id": "number of the problem in its source",
    "pytorch_code": "the PyTorch module with get_inputs and get_init_inputs",
    "reasoning": "the chain of thought that led to the kernel",
    "reasoning_field": "the field of the raw record that the reasoning was taken from",
    "triton_code": "the kernel; defines triton_kernel_wrapper, or ModelNew",
    "has_result": "whether the kernel was ever judged; without it the labels are null",
    "correctness": "label: the kernel's output matched PyTorch",
    "fast_0": "label: correct",
    "fast_1": "label: correct and speedup > 1",
    "fast_2": "label: correct and speedup >= 2",
    "speedup": "label: reference time / kernel time",
    "error": "label: what the judge that labelled it complained of",
    "timestamp": "when the trace was made, as the record has it",
    "problem": "SHA-256 of the normalised PyTorch module: traces of one problem share it",
    "file": "the file that it was read from",
    "position": "0-based index of the record in that file",
    "kernel_field": "where in the raw record the kernel was found",
    "turn": "of a conversation, the turn (from 1) that the trace was made of",
    "num_turns": "how many turns the conversation had",
    "messages": "the conversation up to that turn's answer, as JSON: [{role, content}, ...]",
    "launch_bound": "the reference is so short that its launch outweighs what it computes",
    "speedup_low": "lower end of the speedup's confidence interval",
    "version": "SHA-256 of the whole record, without its place",
}


def schema() -> Any:
    """The Arrow schema of canonical records; the metadata of each field says what it holds."""
    import pyarrow as pa

    types = dict.fromkeys(_INTEGERS, pa.int64()) | dict.fromkeys(_FLOATS, pa.float64())
    types |= dict.fromkeys(_FLAGS, pa.bool_())
    return pa.schema([pa.field(n, types.get(n, pa.string()), metadata={"doc": _DOCS[n]}) for n in [*_NAMES, "version"]])


class TraceWriter:
    """Writes traces to an open binary stream as they come: a context manager, to be left before the stream is closed.
    What was written when an error ends it is no Parquet file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow.parquet as pq

        self.count = 0
        self._schema = schema()
        self._writer = pq.ParquetWriter(stream, self._schema, compression="zstd")
        self._rows: list[Trace] = []
        self._versions: list[str] = []
        self._characters = 0

    def add(self, trace: Trace, version: str | None = None) -> None:
        """Write one trace, sooner or later; its version may be known already."""
        self.count += 1
        self._rows.append(trace)
        self._versions.append(version or trace.version)
        self._characters += len(trace.pytorch_code) + len(trace.reasoning or "") + len(trace.triton_code)
        self._characters += len(trace.messages or "")
        if len(self._rows) >= _ROWS or self._characters >= _CHARACTERS:
            self._flush()

    def add_batch(self, batch: Any) -> None:
        """Write rows that `read_batches` gave."""
        if batch.num_rows:
            self.count += batch.num_rows
            self._writer.write_batch(batch)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._writer.close()
        else:
            with suppress(Exception):
                self._writer.close()
            # Else it tries again when it is forgotten, and complains.
            self._writer.is_open = False

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns: dict[str, list[Any]] = {name: [getattr(trace, name) for trace in self._rows] for name in _NAMES}
            columns["version"] = self._versions
            arrays = [_array(columns[field.name], field.type) for field in self._schema]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._rows, self._versions, self._characters = [], [], 0


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """Record batches of a file that `TraceWriter` wrote, in order.

    Raises:
        PipelineError: the file is not there or is not one of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = columns or schema().names
            there = set(file.schema_arrow.names)
            if missing := [name for name in wanted if name not in there]:
                raise KeyError(f"it has no column {missing[0]}")
            # One row group after another and in this thread: else several are read ahead, each by a thread that keeps
            # memory of its own.
            for group in range(file.num_row_groups):
                yield from file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False)
    except (OSError, KeyError, pa.ArrowException) as error:
        told = error.args[0] if isinstance(error, KeyError) else error
        raise PipelineError(f"{path}: not readable as filtered traces ({told}). Run the filter again.") from error


def select(source: Path, stream: IO[bytes], keep: Callable[[str, int], bool], lost: Callable[[Trace], None]) -> int:
    """Copy the traces of `source` for which `keep(file, position)` holds to `stream`; the others are handed to `lost`.

    Returns:
        How many were copied.
    """
    import pyarrow as pa

    with TraceWriter(stream) as writer:
        for batch in read_batches(source):
            places = zip(batch["file"].to_pylist(), batch["position"].to_pylist(), strict=True)
            mask = [keep(*place) for place in places]
            writer.add_batch(batch.filter(_array(mask, pa.bool_())))
            for row in batch.filter(_array([not kept for kept in mask], pa.bool_())).to_pylist():
                lost(_trace(row))
    return writer.count


def iterate_kept(directory: Path) -> Iterator[Trace]:
    """The kept traces of a directory that the filter wrote, a batch in memory at a time.

    Raises:
        PipelineError: the file is not there or is not one of ours.
    """
    for batch in read_batches(Path(directory) / KEPT_FILE, list(_NAMES)):
        yield from (Trace(**row) for row in batch.to_pylist())


def read_kept(directory: Path) -> list[Trace]:
    """All of `iterate_kept`."""
    return list(iterate_kept(directory))


def _array(values: list[Any], kind: Any) -> Any:
    """A column of Python values (None: no value) as an Arrow array. As `pyarrow.array`, which imports pandas to see
    whether it was handed something of it, and with it 60 MB.
    """
    import numpy as np
    import pyarrow as pa

    present = np.fromiter((value is not None for value in values), dtype=bool, count=len(values))
    validity = None if present.all() else _bits(present)
    if pa.types.is_string(kind):
        texts = [(value or "").encode() for value in values]
        ends = np.zeros(len(texts) + 1, dtype=np.int32)
        np.cumsum([len(text) for text in texts], out=ends[1:])
        data = [pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    elif pa.types.is_boolean(kind):
        data = [_bits(np.fromiter((value is True for value in values), dtype=bool, count=len(values)))]
    else:
        data = [pa.py_buffer(np.array([value or 0 for value in values], dtype=kind.to_pandas_dtype()))]
    return pa.Array.from_buffers(kind, len(values), [validity, *data])


def _bits(flags: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def _trace(row: dict[str, Any]) -> Trace:
    del row["version"]
    return Trace(**row)
