"""How long Dagster waits for the definitions: every web server, every run and every step imports them first.

    python benchmarks/startup.py [--runs 7]

Prints the median and the spread over fresh processes, and fails when the median is over the house's bound or a heavy
library came along.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

BOUND_S = 2.5
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "torch",
    "transformers",
    "triton",
    "trl",
)
PROGRAM = """
import json, sys, time
began = time.perf_counter()
import triton_sft_pipeline.definitions
print(json.dumps([time.perf_counter() - began, sorted(sys.modules)]))
"""


def measure() -> tuple[float, list[str]]:
    """Seconds of one import in a fresh process, and the heavy libraries that it loaded."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    seconds, modules = json.loads(output)
    return seconds, [name for name in HEAVY if name in modules]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = [measure() for _ in range(parser.parse_args().runs + 1)][1:]
    seconds = [run[0] for run in runs]
    median, heavy = statistics.median(seconds), runs[0][1]
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(f"importing triton_sft_pipeline.definitions: median {median:.2f} s ({spread}), bound {BOUND_S} s")
    print(f"heavy libraries loaded: {', '.join(heavy) or 'none'}")
    return 0 if median <= BOUND_S and not heavy else 1


if __name__ == "__main__":
    sys.exit(main())
