"""Lets code that was written for a GPU run in Triton's CPU interpreter. Installed in children, never in the judge.

Triton takes part in this by itself: with TRITON_INTERPRET=1 in the environment when it is imported, `@triton.jit` gives
functions that run on NumPy. What is left to do is to make the code around the kernels believe in a GPU: "cuda" in its
source text becomes "cpu", tensors claim to be CUDA tensors, and what wrappers ask of `torch.cuda` and of Triton's
driver has a harmless answer.

What a kernel proves in the interpreter: its arithmetic and its addressing. What it does not: TF32 rounding, the least
sizes of tl.dot, shared memory and register limits, races between programs, and speed. Arithmetic in bfloat16 is beyond
it: it adds and multiplies the bits.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

# A draw of inputs beyond this many elements takes the interpreter minutes and gigabytes.
MAX_ELEMENTS = 300_000_000
# The interpreter runs the programs of a grid one after the other, some hundreds to thousands a second.
MAX_PROGRAMS = 1_000_000
# An A100's figures: only ever used to choose block sizes and numbers of programs.
_PROCESSORS = 108
_SHARED_MEMORY = 163 << 10
_MEMORY = 40 << 30
_PROPERTIES = {
    "name": "interpreter",
    "major": 8,
    "minor": 0,
    "multi_processor_count": _PROCESSORS,
    "total_memory": _MEMORY,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_block_optin": _SHARED_MEMORY,
    "shared_memory_per_multiprocessor": 164 << 10,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "L2_cache_size": 40 << 20,
    "warp_size": 32,
    "clock_rate": 1410000,
    "memory_clock_rate": 1215000,
    "memory_bus_width": 5120,
    "is_integrated": False,
    "is_multi_gpu_board": False,
    "gcnArchName": "",
}
# "cuda", "cuda:0", and "cuda:{index}" in a formatted string.
_CUDA_TEXT = re.compile(r"""(['"])cuda(:\d+|:\{[^{}'"]*\})?\1""")


class UnsupportedOnCpuError(RuntimeError):
    """The interpreter cannot run this, or not in any reasonable time."""


def on_cpu(source: str) -> str:
    """Source text with the device's name replaced in its string literals. Lines stay in place: Triton reads them."""
    return _CUDA_TEXT.sub(r"\1cpu\1", source)


def install() -> None:
    """Make torch and Triton of this process pass for ones with a GPU."""
    import torch

    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment, method-assign]
    device = _Device()
    for name, value in _cuda_functions(device).items():
        setattr(torch.cuda, name, value)
    if hasattr(torch, "accelerator"):
        torch.accelerator.synchronize = device.synchronize
    _defer_launches(device)
    _pretend_driver(device)
    _cut_autotune()
    _refuse_libdevice()


def is_unsupported(error: BaseException) -> bool:
    """Whether this exception says that the interpreter lacks what the kernel uses, and not that the kernel is wrong."""
    message = str(error)
    gaps = ("not supported in interpreter mode", "'InterpreterBuilder' object has no attribute")
    return isinstance(error, UnsupportedOnCpuError) or any(gap in message for gap in gaps)


class _Work:
    """Something in a stream's queue: a launch, or the wait for another stream."""

    def __init__(self, run: Callable[[], Any], finish: Callable[[], Any], launches: int) -> None:
        self._run = run
        self.finish = finish
        self.launches = launches
        self._done = False

    def run(self) -> None:
        if not self._done:
            self._done = True
            self._run()


class Stream:
    """Stands for torch.cuda.Stream. What is launched on it runs when somebody waits for it, and not before.

    On a GPU it would run at any time from the launch on; this is the latest, at which results that nobody waited for
    are missing.
    """

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.priority = priority
        self.device = device
        self.enqueued = 0
        self._queue: list[_Work] = []
        self.cuda_stream = self.stream_id = _device().add(self) if _device_or_none() else 0

    def put(self, work: _Work) -> None:
        """Queue work."""
        self.enqueued += 1
        self._queue.append(work)

    def settle(self, position: int | None = None) -> None:
        """Run what is queued, up to the work of this number, without having waited for it."""
        for work in self._queue[: self._length(position)]:
            work.run()

    def finish(self, position: int | None = None) -> None:
        """Run what is queued, up to the work of this number, for somebody who waits for it."""
        for _ in range(self._length(position)):
            work = self._queue.pop(0)
            work.run()
            work.finish()

    def pending(self) -> int:
        """Launches that nobody has waited for."""
        return sum(work.launches for work in self._queue)

    def synchronize(self) -> None:
        self.finish()

    def query(self) -> bool:
        # Who asks until the answer is yes has waited.
        self.finish()
        return True

    def wait_stream(self, stream: Stream) -> None:
        self._wait(stream, stream.enqueued)

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self._wait(event.stream, event.position)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._before = _device().set_stream(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _device().set_stream(self._before)

    def _wait(self, other: Stream, position: int) -> None:
        if self is _device().default:
            other.finish(position)
        elif other is not self and other is not _device().default:
            self.put(_Work(lambda: other.settle(position), lambda: other.finish(position), launches=0))

    def _length(self, position: int | None) -> int:
        finished = self.enqueued - len(self._queue)
        return len(self._queue) if position is None else min(len(self._queue), max(0, position - finished))


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or _device().current
        self.position = self.stream.enqueued

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _device().current).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.position)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        # So long that triton.testing.do_bench, which repeats what is fast, is content with one more call.
        return 1000.0


class _Device:
    """The pretended GPU: its streams, and which of them is current."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.default = Stream()
        self.current = self.default

    def add(self, stream: Stream) -> int:
        self.streams.append(stream)
        return len(self.streams)

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    def default_stream(self, device: Any = None) -> Stream:
        return self.default

    def set_stream(self, stream: Stream | None) -> Stream:
        """Make a stream the current one; returns the one before."""
        before = self.current
        self.current = before if stream is None else stream
        return before

    def external_stream(self, pointer: int, device: Any = None, **_: Any) -> Stream:
        return next((stream for stream in self.streams if stream.cuda_stream == pointer), self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream | None = None) -> Iterator[None]:
        before = self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            stream.finish()

    def launch(self, run: Callable[[], Any]) -> Any:
        """Run a launch now on the default stream, and later on any other."""
        if self.current is self.default:
            return run()
        self.current.put(_Work(run, lambda: None, launches=1))
        return None


def _device_or_none() -> _Device | None:
    import torch

    # Kept where torch keeps what is asked of it, so that this module has no state.
    owner = getattr(torch.cuda.current_stream, "__self__", None)
    return owner if isinstance(owner, _Device) else None


def _device() -> _Device:
    device = _device_or_none()
    if device is None:
        raise RuntimeError("interpreter.install() has not run")
    return device


def pending_launches() -> int:
    """Launches on side streams that nobody has waited for; they would race with whoever reads their results."""
    device = _device_or_none()
    return 0 if device is None else sum(stream.pending() for stream in device.streams)


def settle() -> None:
    """Run what waits on the current stream, for an operator that runs on it next. Still nobody has waited for it."""
    device = _device_or_none()
    if device is not None and device.current is not device.default:
        device.current.settle()


def _cuda_functions(device: _Device) -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": device.synchronize,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
        "device": lambda device=None: contextlib.nullcontext(),
        "device_of": lambda tensor=None: contextlib.nullcontext(),
        "stream": device.stream,
        "StreamContext": device.stream,
        "current_stream": device.current_stream,
        "default_stream": device.default_stream,
        "set_stream": lambda stream: device.set_stream(stream) and None,
        "Stream": Stream,
        "ExternalStream": device.external_stream,
        "Event": Event,
        "CUDAGraph": _refusal("torch.cuda.CUDAGraph"),
        "graph": _refusal("torch.cuda.graph"),
        "get_device_properties": lambda device=None: SimpleNamespace(**_PROPERTIES),
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "interpreter",
        "get_arch_list": lambda: ["sm_80"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "_sleep": lambda cycles: None,
    }


def _defer_launches(device: _Device) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return device.launch(lambda: launch(function, *args, grid=grid, warmup=warmup, **kwargs))

    InterpretedFunction.run = run


def _pretend_driver(device: _Device) -> None:
    """Give Triton a driver that answers what wrappers ask one for."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {
        "multiprocessor_count": _PROCESSORS,
        "max_shared_mem": _SHARED_MEMORY,
        "warpSize": 32,
        "max_num_regs": 65536,
        "sm_clock_rate": 1410000,
        "mem_clock_rate": 1215000,
        "mem_bus_width": 5120,
    }
    active = SimpleNamespace(
        is_active=lambda: True,
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda index=None: device.current.cuda_stream,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
        get_device_interface=lambda: torch.cuda,
        get_device_capability=lambda device=None: (8, 0),
        get_benchmarker=_benchmarker,
        get_empty_cache_for_benchmark=lambda: torch.empty(1, dtype=torch.int32),
        clear_cache=lambda cache: None,
        utils=SimpleNamespace(get_device_properties=lambda device=0: properties),
    )
    driver.set_active(active)


def _benchmarker() -> Any:
    from triton.testing import do_bench

    return do_bench


def _cut_autotune() -> None:
    """Keep the first configuration of each tuned kernel: trying them all measures nothing here and takes long."""
    import triton
    from triton.runtime import autotuner

    tune = autotuner.autotune

    def first_configuration(configs: list[Any], *args: Any, **kwargs: Any) -> Any:
        return tune(configs[:1], *args, **kwargs)

    triton.autotune = first_configuration
    autotuner.autotune = first_configuration


def _refuse_libdevice() -> None:
    """CUDA's device library is machine code for a GPU; without this, calling it fails as if the kernel were wrong."""
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda_libdevice

    for library in (libdevice, cuda_libdevice):
        for name, value in list(vars(library).items()):
            if callable(value) and not name.startswith("_"):
                setattr(library, name, _refusal(f"libdevice.{name}"))


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOnCpuError(f"{name} needs a GPU")

    return refuse
