"""How much memory the whole filter takes, measured in a process of its own: what was had once is kept."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline_tests.traces.records import MODULE, labelled, write_array

PROGRAM = """
import sys
from pathlib import Path
from triton_sft_pipeline.problems import load_problems
from triton_sft_pipeline.traces import FilterSettings, filter_location, write_filtered

filtered = filter_location(sys.argv[1], FilterSettings(), load_problems(Path(sys.argv[2])))
write_filtered(filtered, Path(sys.argv[3]))
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(filtered.read, filtered.kept_count, int(peak) // 1024, "pandas" in sys.modules)
"""
HELD_OUT = Path(__file__).parents[2] / "data" / "held_out"
WORDS = ("load", "store", "mask", "block", "program", "pointer", "stride", "warp", "tile", "reduce", "row", "column")


def large(number: int) -> dict[str, Any]:
    """A record of some 23 KB, of a problem and a kernel of its own. Most of it is text: code takes far longer to read,
    and no more memory.
    """
    draw = random.Random(number)
    steps = "".join(f"        x = x * {draw.random():.6f} + torch.sin(x)\n" for _ in range(4))
    module = MODULE.format(expression="x").replace("        return x", f"{steps}        return x")
    lines = "".join(f"    x = x * {draw.random():.6f} + tl.sin(x)\n" for _ in range(8))
    plain = labelled(number)
    kernel = plain["triton_code"].replace("    tl.store", f"{lines}    tl.store")
    assert steps in module and lines in kernel
    thoughts = " ".join(draw.choices(WORDS, k=3300))
    return {**plain, "pytorch_code": module, "triton_code": kernel, "model_reasoning": thoughts}


def filtered_apart(path: Path, out: Path) -> tuple[int, int, int, bool]:
    """(read, kept, peak in MiB, whether pandas was imported) of the filter in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(HELD_OUT), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    read, kept, peak, pandas = done.stdout.split()
    return int(read), int(kept), int(peak), pandas == "True"


def test_the_filter_does_without_pandas(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [large(0), large(1), large(0)])
    assert filtered_apart(path, tmp_path / "out")[1::2] == (2, False)


@pytest.mark.slow
def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 1000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(large(number)) + "\n" for number in range(count))
        read, kept, peak, _ = filtered_apart(path, tmp_path / "out")
        assert read == kept == count
        peaks.append(peak)
    grown = path.stat().st_size * 0.8 / 2**20
    assert grown > 15 and peaks[1] < 250, peaks
    # A key for each trace, and what an allocator keeps.
    assert peaks[1] - peaks[0] < grown, peaks
