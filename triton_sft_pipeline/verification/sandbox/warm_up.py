"""What the zygote does once so that its children need not: find the GPU, import torch and Triton, compile a kernel.

Nothing here may touch CUDA in the calling process, because a process that has cannot fork children that use it; only
`probe`, which runs in a child, does.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.worker import tampering

Task = Callable[[socket.socket, str], None]
_INTERPRETER_MODULES = (
    "triton.runtime.interpreter",
    "triton.experimental.gluon",
    "torch.fx.experimental.symbolic_shapes",
    "numpy.random",
)
_CUDA_MODULES = ("triton.compiler.compiler", "triton.backends.nvidia.driver", "torch.cuda")


def library_files() -> list[Path]:
    """A file of each library that children must be able to read, found without importing it."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "triton", "numpy", "json")]
    return [Path(spec.origin) for spec in specs if spec and spec.origin]


def probe(connection: socket.socket, device: str, files: list[Path]) -> None:
    """A task: try what children need, report it as one JSON line, and wait for the other end to close.

    While it waits it holds a CUDA context open, which keeps the driver loaded and makes the children's contexts quick.

    Args:
        connection: where to report.
        device: "auto", "cuda" or "cpu".
        files: what must be readable, as `library_files` gives it.
    """
    found: dict[str, Any] = {"error": ""}
    try:
        _try_imports(files)
        if device != "cpu":
            found |= _find_gpu()
        if found.get("gpu"):
            _try_compiler()
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"[:500]
    connection.sendall(json.dumps(found).encode() + b"\n")
    connection.recv(1)


def load_tasks(table: dict[str, str]) -> dict[str, Task]:
    """Import the functions that a table names as "module:function"."""
    tasks = {}
    for name, place in table.items():
        module, _, function = place.partition(":")
        tasks[name] = getattr(importlib.import_module(module), function)
    return tasks


def warm_up(backend: str, capability: int | None) -> dict[str, str]:
    """Import torch and Triton with all that children would import or load later. Gives the versions.

    Args:
        backend: "cuda" or "interpreter".
        capability: the GPU's compute capability, as in 90.
    """
    if backend == "interpreter":
        # Triton decides by this when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    # torch and Triton import some of these on first use: half a second in every child if it is not done here.
    modules = _INTERPRETER_MODULES if backend == "interpreter" else _CUDA_MODULES
    for name in ("triton.language", *modules):
        importlib.import_module(name)
    # Looks at much of torch, which is imported by that.
    tampering.fingerprint()
    if backend == "interpreter":
        torch.set_num_threads(1)
    else:
        _warm_up_cuda(capability or 80)
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}


def _try_imports(files: list[Path]) -> None:
    # Seldom imported and thus not yet loaded.
    importlib.import_module("colorsys")
    for path in files:
        path.read_bytes()


def _find_gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.cuda.init()
    torch.zeros(1, device="cuda").add_(1).item()
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": major * 10 + minor,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return next(word for word in text.split() if word.count(".") == 2)
    except (OSError, StopIteration):
        return ""


def _try_compiler() -> None:
    """Triton builds a small library with the C compiler for each kernel."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler is seen")
    Path("probe.c").write_text("int probe(void) { return 0; }\n")
    command = [*compiler.split(), "-shared", "-fPIC", "-o", "probe.so", "probe.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the C compiler fails: {done.stderr[-300:]}")


def _warm_up_cuda(capability: int) -> None:
    """Load the driver's helpers, LLVM and the assembler's surroundings without making a context."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    driver.set_active(CudaDriver())
    compile_small_kernel(capability)


def compile_small_kernel(capability: int) -> None:
    """Compile a kernel for a GPU that need not be here."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit  # type: ignore
    def add_one(x, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)

    source = ASTSource(fn=add_one, signature={"x": "*fp32", "n": "i32", "block": "constexpr"}, constexprs={"block": 64})
    triton.compile(source, target=GPUTarget("cuda", capability, 32))
