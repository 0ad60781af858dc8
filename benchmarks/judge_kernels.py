"""Kernels that the judge's benchmark brings along, as source text: ones to compare with themselves, ones that hang."""

from __future__ import annotations

from collections.abc import Iterable

_IMPORTS = """
import torch
import triton
import triton.language as tl
"""

_SCALE = """
@triton.jit
def scale_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x * 1.5 + 0.25, mask=mask)


def launch(x):
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out
"""

_SOFTMAX = """
@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    start = tl.program_id(0) * columns
    x = tl.load(x_ptr + start + offsets, mask=mask, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + start + offsets, e / tl.sum(e, axis=0), mask=mask)


def launch(x):
    out = torch.empty_like(x)
    softmax_kernel[(x.shape[0],)](x, out, x.shape[1], BLOCK=1024)
    return out
"""

_MATMUL = """
@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, N, K, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
        b = tl.load(b_ptr + inner[:, None] * N + columns[None, :])
        total += tl.dot(a, b, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total)


def launch(a, b):
    out = torch.empty((a.shape[0], b.shape[1]), device=a.device, dtype=a.dtype)
    matmul_kernel[(a.shape[0] // 64, b.shape[1] // 64)](a, b, out, b.shape[1], a.shape[1], BLOCK=64)
    return out
"""

_MODULE = """

class {name}(torch.nn.Module):
    def forward(self, {arguments}):
        return launch({arguments})
"""

_INPUTS = """

def get_inputs():
    return [{inputs}]


def get_init_inputs():
    return []
"""


def twins() -> dict[str, tuple[str, str]]:
    """name -> (problem, kernel): the problem's Model launches the very same Triton kernel as the kernel's ModelNew."""
    return {
        "scale, 256 KB": _twin(_SCALE, "x", "torch.randn(64, 1024)"),
        "scale, 16 MB": _twin(_SCALE, "x", "torch.randn(4096, 1024)"),
        "softmax, 16 MB": _twin(_SOFTMAX, "x", "torch.randn(4096, 1000)"),
        "matmul, 512^3": _twin(_MATMUL, "a, b", "torch.randn(512, 512), torch.randn(512, 512)"),
    }


def _twin(kernel: str, arguments: str, inputs: str) -> tuple[str, str]:
    problem = _IMPORTS + kernel + _MODULE.format(name="Model", arguments=arguments) + _INPUTS.format(inputs=inputs)
    return problem, _IMPORTS + kernel + _MODULE.format(name="ModelNew", arguments=arguments)


# What PyTorch does in one to three passes over memory, and the kernel in one. Some are as fast as PyTorch: on those two
# measurements may differ.
_EXPRESSIONS = {
    "relu": ("torch.relu(x)", "tl.maximum(x, 0.0)"),
    "square": ("x * x", "x * x"),
    "exp": ("torch.exp(x)", "tl.exp(x)"),
    "scale and shift": ("x * 1.5 + 0.25", "x * 1.5 + 0.25"),
    "silu by hand": ("torch.sigmoid(x) * x", "x / (1.0 + tl.exp(-x))"),
    "three passes": ("torch.abs((x + 1.0) * 2.0)", "tl.abs((x + 1.0) * 2.0)"),
}
LARGE_MB = (32, 48, 64, 96)

_POINTWISE_PROBLEM = """
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return {expression}
"""


def large(sizes_mb: Iterable[float] = LARGE_MB) -> dict[str, tuple[str, str]]:
    """name -> (problem, kernel): element-wise ones whose references are not bound by their launch."""
    found = {}
    for size in sizes_mb:
        inputs = f"torch.randn({int(size * 2**20 / 4 / 1024)}, 1024)"
        for name, (reference, kernel) in _EXPRESSIONS.items():
            problem = _POINTWISE_PROBLEM.format(expression=reference) + _INPUTS.format(inputs=inputs)
            code = _IMPORTS + _SCALE.replace("x * 1.5 + 0.25", kernel) + _WRAPPER
            found[f"{name}, {size:g} MB"] = problem, code
    return found


_WRAPPER = """

def triton_kernel_wrapper(x):
    return launch(x)
"""

HANG_PROBLEM = f"""
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return x * 1.5 + 0.25

{_INPUTS.format(inputs="torch.randn(64, 64)")}
"""

HONEST = _IMPORTS + _SCALE + _WRAPPER

_IN_WRAPPER = f"""{_IMPORTS}{_SCALE}

def triton_kernel_wrapper(x):
    out = launch(x)
    while True:
        pass
    return out
"""

_AT_IMPORT = f"""{_IMPORTS}{_SCALE}

def triton_kernel_wrapper(x):
    return launch(x)


count = 0
while count >= 0:
    count += 1
"""

# Nobody ever writes the flag. The atomic keeps the compiler from taking the loop out.
_IN_KERNEL = f"""{_IMPORTS}
@triton.jit
def waiting_kernel(x_ptr, out_ptr, flag_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    flag = tl.atomic_add(flag_ptr, 0)
    while flag == 0:
        flag = tl.atomic_add(flag_ptr, 0)
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x * 1.5 + 0.25, mask=mask)


def triton_kernel_wrapper(x):
    out = torch.empty_like(x)
    flag = torch.zeros(1, device=x.device, dtype=torch.int32)
    waiting_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, flag, x.numel(), BLOCK=1024)
    return out
"""


def hangs() -> dict[str, str]:
    """name -> a kernel for HANG_PROBLEM that never ends."""
    return {"in the wrapper": _IN_WRAPPER, "at import": _AT_IMPORT, "in the Triton kernel": _IN_KERNEL}
