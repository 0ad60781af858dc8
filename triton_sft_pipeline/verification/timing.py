"""Measures how long a call takes on a GPU. Runs in the process of what is measured; knows nothing of kernels or references."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP_S = 0.2
MIN_ITERATIONS = 50
MAX_ITERATIONS = 200
_BUDGET_S = 2.0


def median_ms(call: Callable[[], Any]) -> float:
    """Median time of `call` on the GPU in milliseconds, by CUDA events, with a cold L2 cache.

    Before each iteration a buffer of twice the size of the L2 cache is overwritten, so that no iteration finds its inputs there. 50 to 200
    iterations, as many as fit in two seconds.
    """
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
    iterations = _warm_up(call)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(iterations)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(iterations)]
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))


def _warm_up(call: Callable[[], Any]) -> int:
    """Run `call` until compilation, tuning and clocks have settled; return how many iterations fit in the budget."""
    import torch

    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    calls = 0
    while calls < 5 or time.perf_counter() - began < WARM_UP_S:
        call()
        torch.cuda.synchronize()
        calls += 1
    one = (time.perf_counter() - began) / calls
    return min(MAX_ITERATIONS, max(MIN_ITERATIONS, int(_BUDGET_S / one)))
