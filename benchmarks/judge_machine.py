"""What the judge's benchmark asks of the machine: which GPU, how busy it is, which versions."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any


def gpu() -> dict[str, str] | None:
    """Name, driver and memory of the GPU that is used; None without one."""
    answer = _nvidia_smi("name,driver_version,memory.total")
    if not answer:
        return None
    name, driver, memory = (part.strip() for part in answer.splitlines()[0].split(","))
    return {"name": name, "driver": driver, "memory": memory}


def about() -> dict[str, Any]:
    """Everything that a figure depends on and that is not in the command."""
    versions = {}
    for package in ("torch", "triton", "numpy", "triton-sft-pipeline"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "gpu": gpu(),
        "versions": versions,
    }


class BusyGpu:
    """Samples, ten times a second while its block runs, the share of time that the GPU ran a kernel.

    Attributes:
        share: the mean, 0 to 1, after the block; None without a GPU or samples.
    """

    share: float | None = None

    def __enter__(self) -> BusyGpu:
        self._samples = tempfile.TemporaryFile("w+", encoding="utf-8")
        command = [*_query("utilization.gpu"), "-lms", "100"]
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._samples, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._samples.seek(0)
        samples = [float(line) for line in self._samples.read().split("\n")[:-1] if line.strip().isdigit()]
        self._samples.close()
        self.share = statistics.fmean(samples) / 100 if samples else None


def _query(fields: str) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", f"--id={visible}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def _nvidia_smi(fields: str) -> str:
    try:
        done = subprocess.run(_query(fields), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
