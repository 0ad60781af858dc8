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
from types import SimpleNamespace
from typing import Any

# A draw of inputs beyond this many elements takes the interpreter minutes and gigabytes.
MAX_ELEMENTS = 300_000_000
# The interpreter runs the programs of a grid one after the other, some hundreds to thousands a second.
MAX_PROGRAMS = 1_000_000
_PROCESSORS = 108
_SHARED_MEMORY = 163 << 10
_CUDA_TEXT = re.compile(r"""(['"])cuda(:\d+)?\1""")


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
    for name, value in _cuda_functions().items():
        setattr(torch.cuda, name, value)
    _pretend_driver()
    _cut_autotune()
    _refuse_libdevice()


def is_unsupported(error: BaseException) -> bool:
    """Whether this exception says that the interpreter lacks what the kernel uses, and not that the kernel is wrong."""
    message = str(error)
    gaps = ("not supported in interpreter mode", "'InterpreterBuilder' object has no attribute")
    return isinstance(error, UnsupportedOnCpuError) or any(gap in message for gap in gaps)


class _Idle:
    """A stream or event: whatever is asked of it, there is nothing to do, because nothing here runs asynchronously."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def _cuda_functions() -> dict[str, Any]:
    # An A100's figures: only ever used to choose block sizes and numbers of programs.
    properties = SimpleNamespace(
        name="interpreter",
        major=8,
        minor=0,
        multi_processor_count=_PROCESSORS,
        total_memory=40 << 30,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=_SHARED_MEMORY,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
        "device": lambda device=None: contextlib.nullcontext(),
        "stream": lambda stream=None: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Idle(),
        "default_stream": lambda device=None: _Idle(),
        "Stream": _Idle,
        "Event": _Idle,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "interpreter",
    }


def _pretend_driver() -> None:
    """Give Triton a driver that answers what wrappers ask one for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {
        "multiprocessor_count": _PROCESSORS,
        "max_shared_mem": _SHARED_MEMORY,
        "warpSize": 32,
        "max_num_regs": 65536,
    }
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        utils=SimpleNamespace(get_device_properties=lambda device=0: properties),
    )
    driver.set_active(active)


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

    def refusal(name: str) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedOnCpuError(f"libdevice.{name} needs a GPU")

        return refuse

    for library in (libdevice, cuda_libdevice):
        for name, value in list(vars(library).items()):
            if callable(value) and not name.startswith("_"):
                setattr(library, name, refusal(name))
