"""Runs snippets in processes of their own where Triton interprets kernels, so that a test may patch what it likes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any

# Imports once, then forks for every snippet: the imports take seconds.
_SERVER = """
import json, os, runpy, sys
import torch, torch._dynamo, triton, triton.language, triton.runtime.interpreter
import triton_sft_pipeline.verification.worker.operators
torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            result = runpy.run_path(line.rstrip("\\n"))["result"]
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\\n")
        answers.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""

PRELUDE = """
import torch, triton, triton.language as tl
from triton_sft_pipeline.verification.worker import interpreter, tampering
from triton_sft_pipeline.verification.worker.launches import LaunchMonitor
from triton_sft_pipeline.verification.worker.operators import OperatorLog

@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * 2, mask=mask)

def launch(x, y):
    double[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)
    return y
"""


class Interpreted:
    """A context manager around the process that forks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __enter__(self) -> Interpreted:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, code: str, prelude: str = PRELUDE) -> Any:
        """What the snippet calls `result`, as JSON has it; {"error": ...} when it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        # A file, because Triton reads the text of its kernels again.
        file = self._folder / f"snippet_{self._count}.py"
        file.write_text(prelude + textwrap.dedent(code), encoding="utf-8")
        self._process.stdin.write(f"{file}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
