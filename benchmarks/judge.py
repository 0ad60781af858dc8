"""How fast the judge is, how far to trust its times, how soon it ends a hang.

parts:
  rate       judge the kernels of trace files: kernels a minute, time of one,
             the verdicts, how many labels they confirm, how busy the GPU is
  yardstick  the same kernels, as many at once, each in a fresh process that
             imports torch, compares in itself and times, as KernelBench does;
             it takes what `rate` has executed, so run both
  aa         (GPU) kernels against themselves: none may be flagged as faster
  repeat     (GPU) the kernels of `rate` a second time, and large ones twice: are
             the same fast?
  hang       kernels that never end, in three places: from limit to verdict

A rate counts only kernels that were executed: what was refused unseen, does not
compile, or is beyond the machine costs little and proves nothing. The judge's
rate includes its start.

examples:
  taskset -c 0,1 python benchmarks/judge.py --traces traces.json --device cpu
  python benchmarks/judge.py --device cuda --workers 16 --out result.json
  python benchmarks/judge.py --parts aa --aa-runs 40

Exit code 0: every bound was met. 1: one was missed. 2: usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import judge_machine
import judge_parts
from judge_report import rows, table

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import write_json
from triton_sft_pipeline.judgeable import Judgeable, read_judgeable
from triton_sft_pipeline.verification import JUDGE_VERSION, Verdict

PARTS = ("rate", "yardstick", "aa", "repeat", "hang")
REAL_TRACES = "gpt_oss_120b_single_turn.json"


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        parts = chosen_parts(arguments.parts)
        records = read_records(arguments.traces, arguments.limit) if needs_records(parts) else []
    except PipelineError as error:
        parser.error(str(error))
    about = judge_machine.about()
    device = ("cuda" if about["gpu"] else "cpu") if arguments.device == "auto" else arguments.device
    options = judge_parts.Options(
        device=device,
        workers=arguments.workers or about["processors"],
        trials=arguments.trials,
        timeout_s=arguments.timeout,
        timing=arguments.timing and device == "cuda",
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    result: dict[str, Any] = {"about": about | {"judge_version": JUDGE_VERSION}, "options": described(options)}
    result["options"] |= {"traces": str(arguments.traces or ""), "limit": arguments.limit, "records": len(records)}
    began = time.monotonic()
    try:
        run_parts(parts, options, records, arguments, result)
    except PipelineError as error:
        parser.error(str(error))
    finally:
        result["seconds"] = time.monotonic() - began
        if arguments.out:
            write_json(arguments.out, result)
    lines = rows(result)
    print(table(lines, result))
    return 1 if any(row.met is False for row in lines) else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--traces", type=Path, help=f"trace file or folder (default: {REAL_TRACES} in TRITON_SFT_REAL_TRACES)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--workers", type=positive, help="kernels at once (default: one a processor that may be used)")
    add("--trials", type=positive, default=5, help="input draws a kernel (default 5)")
    add("--limit", type=positive, help="at most this many records, spread evenly over the files")
    add("--timeout", type=float, default=60.0, help="seconds a kernel may take in the judge (default 60)")
    add("--parts", default=",".join(PARTS), help=f"comma-separated (default {','.join(PARTS)})")
    add("--no-timing", dest="timing", action="store_false", help="rate and yardstick: correctness only, on a GPU too")
    add("--yardstick-timeout", type=float, default=180.0, help="seconds a kernel may take in the yardstick (180)")
    add("--aa-runs", type=positive, default=200, help="kernels against themselves (default 200)")
    add("--hang-runs", type=positive, default=3, help="hangs of each kind (default 3)")
    add("--out", type=Path, help="JSON file for every figure")
    add("--verdicts", type=Path, help="JSONL file for the verdicts of `rate`; benchmarks/judge_table.py reads it")
    return parser


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def chosen_parts(text: str) -> list[str]:
    """The parts in the order in which they run."""
    asked = {part.strip() for part in text.split(",") if part.strip()}
    if not asked or not asked <= set(PARTS):
        raise PipelineError(f"--parts {text}: choose from {', '.join(PARTS)}.")
    return [part for part in PARTS if part in asked]


def needs_records(parts: list[str]) -> bool:
    return bool({"rate", "yardstick", "repeat"} & set(parts))


def read_records(place: Path | None, limit: int | None) -> list[Judgeable]:
    """The records that can be judged, at most `limit` of them, spread evenly."""
    if place is None:
        folder = os.environ.get("TRITON_SFT_REAL_TRACES")
        if not folder:
            raise PipelineError("Name trace files with --traces, or their folder in TRITON_SFT_REAL_TRACES.")
        place = Path(folder) / REAL_TRACES
    # The same kernel at the same place of a file is judged once.
    records = list({item.identity: item for item in read_judgeable([place]) if isinstance(item, Judgeable)}.values())
    if not records:
        raise PipelineError(f"{place}: there is no record to judge.")
    count = min(limit or len(records), len(records))
    return [records[number * len(records) // count] for number in range(count)]


def run_parts(
    parts: list[str],
    options: judge_parts.Options,
    records: list[Judgeable],
    arguments: argparse.Namespace,
    result: dict[str, Any],
) -> None:
    """Run the parts one after the other; each leaves its figures in `result` under its name."""
    verdicts: dict[str, Verdict] = {}
    timed = replace(options, timing=options.device == "cuda")
    for part in parts:
        if part in ("aa", "repeat") and not timed.timing:
            result[part] = {"skipped": "needs a GPU"}
        elif part == "rate":
            with ExitStack() as stack:
                result[part], verdicts = judge_parts.run_rate(
                    options, records, verdict_writer(stack, arguments.verdicts, records)
                )
            result[part]["kernels_one_by_one"] = [verdict.to_dict() for verdict in verdicts.values()]
        elif part == "yardstick":
            result[part] = judge_parts.run_yardstick(options, records, verdicts, arguments.yardstick_timeout)
        elif part == "aa":
            result[part] = judge_parts.run_against_itself(timed, arguments.aa_runs)
        elif part == "repeat":
            result[part] = judge_parts.run_repeat(timed, records, verdicts if options.timing else {})
        else:
            result[part] = judge_parts.run_hang(options, arguments.hang_runs)
        # What was measured before an interruption is worth keeping.
        if arguments.out:
            write_json(arguments.out, result)


def verdict_writer(stack: ExitStack, out: Path | None, records: list[Judgeable]) -> Callable[[Verdict], None]:
    """A function that appends a verdict to `out` in the format of `triton-sft verify`, the moment it is there."""
    if out is None:
        return lambda verdict: None
    stream = stack.enter_context(out.open("w", encoding="utf-8"))
    places = {record.identity: record.record for record in records}

    def write(verdict: Verdict) -> None:
        record = places[verdict.key]
        line = {"sample_key": record.value.get("sample_key"), "file": record.file, "position": record.position}
        stream.write(json.dumps({**line, **verdict.to_dict()}, ensure_ascii=False) + "\n")
        stream.flush()

    return write


def described(options: judge_parts.Options) -> dict[str, Any]:
    names = ("device", "workers", "trials", "timeout_s", "timing")
    return {name: getattr(options, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
