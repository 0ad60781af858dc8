"""Trace records for tests: one good record, and as many different ones as are wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULE = """import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return {expression}


def get_inputs():
    return [torch.rand(4, 4)]


def get_init_inputs():
    return []
"""

KERNEL = """import torch
import triton
import triton.language as tl


@triton.jit
def kernel(p, q, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(p + i)
    tl.store(q + i, {expression})


def triton_kernel_wrapper(x):
    y = torch.empty_like(x)
    kernel[(1,)](x, y, 16)
    return y"""


def record(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A good record about problem `number`. A change to `...` removes the field."""
    result = {"correctness": True, "speedup": 1.5, "fast_0": True, "fast_1": True, "fast_2": False, "error": None}
    good = {
        "sample_key": f"sample_{number}",
        "source": "kernelbook",
        "level": 1,
        "name": f"add_{number}",
        "problem_id": number,
        "pytorch_code": MODULE.format(expression=f"x + {number}"),
        "model_reasoning": f"Each program adds {number} to a block.",
        "thinking": "Add.",
        "triton_code": KERNEL.format(expression=f"x + {number}"),
        "result": result,
        "timestamp": "2025-01-01T00:00:00",
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def labelled(number: int = 0, **labels: Any) -> dict[str, Any]:
    """A good record with some labels changed. A change to `...` removes the label."""
    result = {**record(number)["result"], **labels}
    return record(number, result={name: value for name, value in result.items() if value is not ...})


def write_array(path: Path, records: list[Any]) -> Path:
    """Write records as one JSON array, non-ASCII text as it is."""
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write records as JSON Lines."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path
