"""Records of a Parquet file, row by row, as the JSON values that they stand for. Knows nothing of what a record should
hold.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.record import RawRecord

_BATCH = 64
# Of a row group of any size so much is read at a time, in bytes a column.
_BUFFER = 65_536


def parquet_records(
    name: str, stream: IO[bytes], progress: Callable[[float], None] | None = None
) -> Iterator[RawRecord | Break]:
    """Every row in order: structs become objects, lists arrays, and columns without a value null. A row has no text of
    its own, so its place is its position alone (its byte is 0) and its raw text is JSON made from it. Rows that cannot
    be read any more give a `Break`.

    Args:
        name: what the records carry as their file.
        stream: of the whole file, seekable.
        progress: called with the share of rows that were read.

    Raises:
        PipelineError: it is no Parquet file, or one whose end is missing: a Parquet file cannot be read without it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{name}: not a whole Parquet file ({_first_line(error)}).") from error
    total, position = max(file.metadata.num_rows, 1), 0
    try:
        for batch in file.iter_batches(_BATCH, use_threads=False):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                value = _plain(row)
                yield RawRecord(name, position, 0, value, json.dumps(value, ensure_ascii=False))
                position += 1
            if progress:
                progress(position / total)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Break(name, 0, position, f"the Parquet data is damaged ({_first_line(error)})")


def _plain(value: Any) -> Any:
    """The JSON value that a value of Arrow's stands for."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
