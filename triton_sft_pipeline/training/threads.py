"""How many threads a small model gets on a CPU. Knows nothing of what is computed with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SMALL = 20_000_000
"""Parameters. Below it an operator is done before a second thread has woken up, and on a busy machine the threads that
wait for each other make a step many times slower."""


@contextmanager
def suitable_threads(model: Any) -> Iterator[None]:
    """One thread for a small model on a CPU while the block runs; the number is what it was afterwards. On a GPU
    nothing changes."""
    import torch

    parameters = list(model.parameters())
    if any(p.device.type != "cpu" for p in parameters) or sum(p.numel() for p in parameters) >= SMALL:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
