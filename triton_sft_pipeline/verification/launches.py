"""Counts the Triton kernels that a process launches.

Sits in the kernel's own process, so what it finds may lower a verdict and never raise one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from triton_sft_pipeline.verification.interpreter import MAX_PROGRAMS, UnsupportedOnCpuError


class LaunchCounter:
    """Counts launches from when it is made. `count` is the number so far."""

    def __init__(self, backend: str) -> None:
        self.count = 0
        if backend == "interpreter":
            from triton.runtime.interpreter import InterpretedFunction

            self._hook(InterpretedFunction, _check_grid)
        else:
            from triton.runtime.jit import JITFunction

            self._hook(JITFunction, None)

    def _hook(self, kind: Any, check: Callable[[Any, Any, dict[str, Any]], None] | None) -> None:
        launch = kind.run

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if check is not None and not warmup:
                check(function, grid, dict(zip(function.arg_names, args, strict=False)) | kwargs)
            result = launch(function, *args, grid=grid, warmup=warmup, **kwargs)
            # After the launch: one that raised, and was perhaps caught to let PyTorch do the work, does not count.
            self.count += not warmup
            return result

        kind.run = run


def _check_grid(function: Any, grid: Any, arguments: dict[str, Any]) -> None:
    """Refuse a grid that the interpreter would work on for hours."""
    parameters = inspect.signature(function.fn).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    sizes = grid(defaults | arguments) if callable(grid) else grid
    programs = math.prod(sizes) if isinstance(sizes, tuple | list) else sizes
    if isinstance(programs, int) and programs > MAX_PROGRAMS:
        raise UnsupportedOnCpuError(
            f"a grid of {programs} programs; the CPU interpreter takes at most {MAX_PROGRAMS}, judge this one on a GPU"
        )
