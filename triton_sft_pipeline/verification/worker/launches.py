"""Watches the Triton kernels that a process launches, and can make every launch do nothing.

Sits in the kernel's own process, so what it finds may lower a verdict and never raise one. Knows nothing of what the
kernels compute, nor of the PyTorch operators around them; see `operators` for those.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from triton_sft_pipeline.verification.worker.interpreter import MAX_PROGRAMS, UnsupportedOnCpuError

Run = Callable[..., Any]


class LaunchMonitor:
    """Watches launches from when it is made until the process ends.

    Args:
        backend: "cuda", or "interpreter" for Triton's CPU interpreter.

    Attributes:
        count: launches so far. One that raised, was ablated, only compiled, or had no programs is not counted.
        ablated: while true, launches do nothing, compile nothing and return None.
        seen: called with the arguments and the keywords of each launch, ablated ones too, before it.
        before_launch: called before each launch, when what can be compiled beforehand is compiled.
        inside: while true, the operators that run belong to Triton itself, which copies arguments to the host and
            back in the interpreter, and empties the cache between measurements when it tunes.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.count = 0
        self.ablated = False
        self.before_launch: Callable[[], None] | None = None
        self.seen: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        self.inside = False
        if backend == "interpreter":
            self._watch_interpreter()
        else:
            self._watch_driver()

    @contextlib.contextmanager
    def within_triton(self) -> Iterator[None]:
        """Says that what runs here is Triton's own work."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _watch_interpreter(self) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction

        InterpretedFunction.run = self._watched(InterpretedFunction.run, _sizes_for_interpreter, compiles=False)
        # Only these two: the body of the kernel and a callable grid are Python that the kernel's author wrote.
        for name in ("_init_args_hst", "_restore_args_dev"):
            setattr(GridExecutor, name, self._as_triton(getattr(GridExecutor, name)))

    def _watch_driver(self) -> None:
        from triton.backends.nvidia.driver import CudaDriver
        from triton.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        JITFunction.run = self._watched(JITFunction.run, _sizes_for_driver, compiles=True)
        CompiledKernel.__getitem__ = self._watched_handle(CompiledKernel.__getitem__)
        for name in ("get_empty_cache_for_benchmark", "clear_cache"):
            if hasattr(CudaDriver, name):
                setattr(CudaDriver, name, self._as_triton(getattr(CudaDriver, name)))

    def _as_triton(self, function: Run) -> Run:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within_triton():
                return function(*args, **kwargs)

        return run

    def _watched(self, launch: Run, sizes: Callable[..., tuple[Any, list[int]]], compiles: bool) -> Run:
        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if self.seen is not None and not warmup:
                self.seen(args, kwargs)
            if self.ablated:
                return None
            if warmup:
                return launch(function, *args, grid=grid, warmup=True, **kwargs)
            if self.before_launch is not None:
                if compiles:
                    _load(launch(function, *args, grid=grid, warmup=True, **kwargs))
                self.before_launch()
            grid, programs = sizes(function, grid, args, kwargs)
            result = launch(function, *args, grid=grid, warmup=False, **kwargs)
            # After the launch: one that raised, and was perhaps caught to let PyTorch do the work, does not count.
            self.count += bool(programs and programs[-1])
            return result

        return run

    def _watched_handle(self, get_item: Run) -> Run:
        def watched_get_item(kernel: Any, grid: Any) -> Run:
            runner = get_item(kernel, grid)

            def run(*args: Any, **kwargs: Any) -> Any:
                if self.seen is not None:
                    self.seen(args, kwargs)
                if self.ablated:
                    return None
                if self.before_launch is not None:
                    self.before_launch()
                result = runner(*args, **kwargs)
                self.count += bool(_programs(grid))
                return result

            return run

        return watched_get_item


def _load(kernel: Any) -> None:
    """Build the launcher and load the machine code, which a first launch would do."""
    initialise = getattr(kernel, "_init_handles", None)
    if initialise is not None:
        initialise()


def _programs(sizes: Any) -> int:
    """The number of programs of a grid; 1 for what cannot be a grid, so that the launch itself may complain."""
    numbers = tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,)
    return math.prod(numbers) if all(isinstance(number, int) for number in numbers) else 1


def _sizes_for_driver(function: Any, grid: Any, args: Any, kwargs: Any) -> tuple[Any, list[int]]:
    """The grid, and a list that holds its number of programs when the launch is over."""
    if not callable(grid):
        return grid, [_programs(grid)]
    programs: list[int] = []

    def measured(arguments: Any) -> Any:
        sizes = grid(arguments)
        programs.append(_programs(sizes))
        return sizes

    return measured, programs


def _sizes_for_interpreter(function: Any, grid: Any, args: Any, kwargs: Any) -> tuple[Any, list[int]]:
    """The grid as numbers, worked out on the arguments as they are on a GPU; refuses one that would take hours."""
    parameters = inspect.signature(function.fn).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    arguments = defaults | dict(zip(function.arg_names, args, strict=False)) | kwargs
    sizes = grid(arguments) if callable(grid) else grid
    programs = _programs(sizes)
    if programs > MAX_PROGRAMS:
        raise UnsupportedOnCpuError(
            f"a grid of {programs} programs; the CPU interpreter takes at most {MAX_PROGRAMS}, judge this one on a GPU"
        )
    return tuple(sizes) if isinstance(sizes, tuple | list) else sizes, [programs]
