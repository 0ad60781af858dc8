"""What a trace is: reading real files, refusing what is malformed, keeping what is worth training on."""

from triton_sft_pipeline.traces.canonical import iterate_kept, read_kept
from triton_sft_pipeline.traces.funnel import Filtered, describe, filter_location, write_filtered
from triton_sft_pipeline.traces.reader import hash_location
from triton_sft_pipeline.traces.record import Trace
from triton_sft_pipeline.traces.settings import FilterSettings

__all__ = [
    "FilterSettings",
    "Filtered",
    "Trace",
    "describe",
    "filter_location",
    "hash_location",
    "iterate_kept",
    "read_kept",
    "write_filtered",
]
