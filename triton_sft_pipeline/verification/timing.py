"""Measures how long a call takes on a GPU. Runs in the process that is measured; knows nothing of kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP_S = 0.2
MIN_ITERATIONS = 50
MAX_ITERATIONS = 200
_BUDGET_S = 2.0
# Times the size of the L2 cache. Two would empty it. Eight also keep the GPU busy (about 0.1 ms) while Python launches
# what is measured; else a launch of 20 us would be measured for some kernels, and not for others that Python happens to
# keep ahead of.
FLUSH = 8


def median_ms(call: Callable[[], Any]) -> float:
    """Median time of `call` on the GPU in milliseconds, by CUDA events, with a cold L2 cache.

    Before each iteration a buffer larger than the L2 cache is overwritten, so that no iteration finds its inputs
    there and none waits for its launch: it is time on the GPU. 50 to 200 iterations, as many as fit in two seconds.
    """
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(FLUSH * properties.L2_cache_size, dtype=torch.int8, device="cuda")
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
