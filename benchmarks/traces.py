"""How fast trace files are read, and in how much memory, beside what else reads JSON.

    python benchmarks/traces.py [--megabytes 500] [--form array|lines|both] [--runs 1] [--json FILE]

Makes a file from a seed in a temporary folder and lets each reader go through all of its records in a process of its
own. The time is that of reading alone, without imports: MB/s by the clock, MB/CPU s by what all threads together used,
which a busy machine changes less. The memory is the most that the process ever held, interpreter included. A library
that is not installed is said to be so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = 0
PROSE = (
    "the kernel loads a block of rows from global memory, masks what lies beyond the last column and keeps the running "
    "maximum in registers; each program reduces its own tile → then stores y = x * scale with tl.store(out + offs, y)"
)
WORDS = PROSE.split()
OURS = "triton_sft_pipeline"


def make(path: Path, megabytes: int, form: str) -> int:
    """Write records like real ones, about 5 KB each, until the file has that size. Returns how many."""
    dice, size, count = random.Random(SEED), 0, 0
    paragraphs = [" ".join(dice.choices(WORDS, k=60)) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("[\n" if form == "array" else "")
        while size < megabytes * 1_000_000:
            text = json.dumps(_record(dice, paragraphs, count), indent=2 if form == "array" else None)
            if form == "array":
                # As json.dump writes a list with indent=2.
                text = (",\n  " if count else "  ") + text.replace("\n", "\n  ")
            else:
                text += "\n"
            size += stream.write(text)
            count += 1
        stream.write("\n]" if form == "array" else "")
    return count


def _record(dice: random.Random, paragraphs: list[str], number: int) -> dict[str, Any]:
    speedup = dice.uniform(0.2, 4.0)
    return {
        "sample_key": f"kernelbook_{number}",
        "source": "kernelbook",
        "level": None,
        "name": None,
        "problem_id": number,
        "pytorch_code": "\n".join(dice.choices(paragraphs, k=2)),
        "model_reasoning": "\n\n".join(dice.choices(paragraphs, k=5)),
        "thinking": dice.choice(paragraphs),
        "triton_code": "\n    ".join(dice.choices(paragraphs, k=4)),
        "result": {
            "correctness": True,
            "speedup": speedup,
            "fast_0": True,
            "fast_1": speedup > 1,
            "fast_2": speedup >= 2,
            "error": None,
        },
        "timestamp": "2026-02-01T21:10:37.812609",
    }


def _ours(path: str) -> Iterator[int]:
    from triton_sft_pipeline.traces.reader import open_traces
    from triton_sft_pipeline.traces.record import RawRecord
    from triton_sft_pipeline.traces.sources import resolve

    yield 0
    yield sum(isinstance(item, RawRecord) for item in open_traces(resolve(path)))


def _json(path: str) -> Iterator[int]:
    yield 0
    with open(path, encoding="utf-8") as stream:
        yield len(json.load(stream)) if path.endswith(".json") else sum(1 for line in stream if json.loads(line))


def _orjson(path: str) -> Iterator[int]:
    import orjson

    yield 0
    with open(path, "rb") as stream:
        yield len(orjson.loads(stream.read())) if path.endswith(".json") else sum(1 for s in stream if orjson.loads(s))


def _msgspec(path: str) -> Iterator[int]:
    import msgspec

    yield 0
    decode = msgspec.json.Decoder().decode
    with open(path, "rb") as stream:
        yield len(decode(stream.read())) if path.endswith(".json") else sum(1 for line in stream if decode(line))


def _simdjson(path: str) -> Iterator[int]:
    import simdjson

    yield 0
    parser = simdjson.Parser()
    with open(path, "rb") as stream:
        if path.endswith(".json"):
            yield len(parser.parse(stream.read(), True))
        else:
            yield sum(1 for line in stream if parser.parse(line, True))


def _pandas(path: str) -> Iterator[int]:
    import pandas

    yield 0
    yield len(pandas.read_json(path, lines=path.endswith(".jsonl")))


def _pyarrow(path: str) -> Iterator[int]:
    import pyarrow.json

    yield 0
    yield pyarrow.json.read_json(path).num_rows


def _polars(path: str) -> Iterator[int]:
    import polars

    yield 0
    yield (polars.read_ndjson(path) if path.endswith(".jsonl") else polars.read_json(path)).height


def _duckdb(path: str) -> Iterator[int]:
    import duckdb

    yield 0
    # A sum over the long columns, for what nobody asks for is not read.
    query = f"SELECT count(*), sum(length(model_reasoning) + length(triton_code)) FROM read_json('{path}')"
    yield duckdb.sql(query).fetchall()[0][0]


def _ijson(path: str) -> Iterator[int]:
    import ijson

    yield 0
    with open(path, "rb") as stream:
        lines = path.endswith(".jsonl")
        items = ijson.items(stream, "" if lines else "item", multiple_values=lines, use_float=True, buf_size=2**20)
        yield sum(1 for _ in items)


def _datasets(path: str) -> Iterator[int]:
    import datasets

    datasets.disable_progress_bars()
    yield 0
    with tempfile.TemporaryDirectory() as cache:
        yield datasets.load_dataset("json", data_files=path, cache_dir=cache)["train"].num_rows


READERS: dict[str, Callable[[str], Iterator[int]]] = {
    OURS: _ours,
    "json": _json,
    "orjson": _orjson,
    "msgspec": _msgspec,
    "pysimdjson": _simdjson,
    "ijson": _ijson,
    "pandas": _pandas,
    "pyarrow": _pyarrow,
    "polars": _polars,
    "duckdb": _duckdb,
    "datasets": _datasets,
}
LINES_ONLY = {"pyarrow"}


def read_here(reader: str, path: str) -> dict[str, Any]:
    """Read the file in this process: seconds, records and the most memory in MiB."""
    steps = READERS[reader](path)
    try:
        next(steps)
    except ImportError:
        return {"reader": reader, "problem": "not installed"}
    began, cpu_began = time.perf_counter(), time.process_time()
    records = next(steps)
    seconds = time.perf_counter() - began
    cpu = time.process_time() - cpu_began
    return {"reader": reader, "seconds": seconds, "cpu_seconds": cpu, "records": records, "peak_mib": _peak_mib()}


def _peak_mib() -> int:
    # What getrusage tells counts the process that this one was started from.
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def read_apart(reader: str, path: Path, runs: int) -> dict[str, Any]:
    """The fastest of several runs, each in a process of its own."""
    if reader in LINES_ONLY and path.suffix == ".json":
        return {"reader": reader, "problem": "reads JSON Lines alone"}
    found = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, __file__, "--read", reader, str(path)], capture_output=True, text=True)
        if done.returncode:
            return {"reader": reader, "problem": (done.stderr.strip() or "killed").splitlines()[-1][:40]}
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda one: one.get("seconds", 0.0))


def measure(form: str, megabytes: int, runs: int) -> dict[str, Any]:
    """One form of file by every reader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("traces.json" if form == "array" else "traces.jsonl")
        records, rows = make(path, megabytes, form), []
        size = path.stat().st_size / 1e6
        path.read_bytes()  # What is measured is reading from memory, not from the disk.
        for reader in READERS:
            row = read_apart(reader, path, runs)
            if "seconds" in row:
                row["mb_s"] = round(size / row["seconds"])
                row["mb_cpu_s"] = round(size / row["cpu_seconds"])
                row["problem"] = None if row["records"] == records else f"found {row['records']:,} records"
            rows.append(row)
            print(f"  {reader}: {row.get('mb_s', row['problem'])}", file=sys.stderr)
    return {"form": form, "megabytes": round(size), "records": records, "load": os.getloadavg()[0], "readers": rows}


def table(result: dict[str, Any]) -> str:
    """What was measured, fastest first, at most 80 columns wide."""
    form = "one JSON array" if result["form"] == "array" else "JSON Lines"
    lines = [f"{form}, {result['megabytes']:,} MB, {result['records']:,} records", ""]
    lines.append(f"| {'reader':<19} | {'MB/s':>5} | {'MB/CPU s':>8} | {'peak MiB':>8} | {'':<22} |")
    lines.append(f"|{'-' * 21}|{'-' * 6}:|{'-' * 9}:|{'-' * 9}:|{'-' * 24}|")
    for row in sorted(result["readers"], key=lambda row: -row.get("mb_s", 0)):
        speed, cpu, peak = row.get("mb_s", ""), row.get("mb_cpu_s", ""), row.get("peak_mib", "")
        lines.append(f"| {row['reader']:<19} | {speed:>5} | {cpu:>8} | {peak:>8} | {row['problem'] or '':<22.22} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--form", choices=["array", "lines", "both"], default="array")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--read", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read_here(*given.read)))
        return 0
    forms = ["array", "lines"] if given.form == "both" else [given.form]
    results = [measure(form, given.megabytes, given.runs) for form in forms]
    print("\n\n".join(table(result) for result in results))
    if given.json:
        # Imported here: a reader's process, whose memory is measured, writes nothing.
        from triton_sft_pipeline.files import write_json

        write_json(given.json, results)
    ours = [row for result in results for row in result["readers"] if row["reader"] == OURS]
    return 0 if all(row.get("problem") is None for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
