"""Verdicts against labels, in Markdown: a table of counts, and one line for each kernel that the two disagree on.

    python benchmarks/judge_table.py verdicts.jsonl --traces FILE_OR_FOLDER

The verdicts come from `triton-sft verify --out` or from `benchmarks/judge.py --verdicts`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.judgeable import Judgeable, read_judgeable
from triton_sft_pipeline.verification import Verdict

LABELS = {True: "labelled correct", False: "labelled incorrect", None: "no label"}


@dataclass(frozen=True)
class Pair:
    """A verdict and what its record's label says. `name` is for a person to find it by."""

    name: str
    verdict: Verdict
    label: bool | None
    label_fast_1: bool | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verdicts", type=Path)
    parser.add_argument("--traces", type=Path, required=True, help="the trace file or folder that was judged")
    arguments = parser.parse_args()
    try:
        records = [item for item in read_judgeable([arguments.traces]) if isinstance(item, Judgeable)]
        lines = arguments.verdicts.read_text(encoding="utf-8").splitlines()
    except (OSError, PipelineError) as error:
        parser.error(str(error))
    pairs = list(paired([json.loads(line) for line in lines], records))
    print("\n".join(markdown(pairs)))
    if len(pairs) < len(lines):
        print(f"{len(lines) - len(pairs)} verdicts belong to none of these records.", file=sys.stderr)
    return 0


def paired(lines: Iterable[Mapping[str, Any]], records: Iterable[Judgeable]) -> Iterator[Pair]:
    """Put verdicts to their records. Files may have moved in between: a folder's name does not count."""
    by_identity = {_portable(record.identity): record for record in records}
    for line in lines:
        record = by_identity.get(_portable(line["key"]))
        if record is not None:
            result = record.record.value.get("result")
            fast_1 = result.get("fast_1") if isinstance(result, dict) else None
            name = f"{record.name} ({Path(record.record.file).stem}, record {record.record.position})"
            yield Pair(name, Verdict.from_dict(dict(line)), record.label, fast_1)


def _portable(identity: str) -> tuple[str, str, str]:
    content, position, file = identity.split("@", 2)
    return content, position, Path(file).name


def markdown(pairs: list[Pair]) -> Iterator[str]:
    """The table, the sentence that sums it up, and the disagreements."""
    yield from _counts(pairs)
    labelled = [pair for pair in pairs if pair.label is not None and pair.verdict.is_conclusive]
    differ = [pair for pair in labelled if pair.verdict.correctness != pair.label]
    yield ""
    yield f"{len(labelled) - len(differ)} of {len(labelled)} conclusive verdicts agree with the label on correctness."
    timed = [pair for pair in labelled if pair.label and pair.verdict.correctness and pair.verdict.fast_1 is not None]
    if timed:
        agree = sum(pair.verdict.fast_1 == pair.label_fast_1 for pair in timed)
        yield f"{agree} of the {len(timed)} that are correct by both agree with the label on fast_1."
    if differ:
        yield ""
        for pair in sorted(differ, key=lambda pair: (pair.verdict.verdict, pair.name)):
            yield f"- `{pair.name}`: {LABELS[pair.label]}, judged **{pair.verdict.verdict}**. {_one_line(pair.verdict)}"


def _counts(pairs: list[Pair]) -> Iterator[str]:
    counts = Counter((pair.verdict.verdict, pair.label) for pair in pairs)
    labels = [label for label in LABELS if any(pair.label is label for pair in pairs)]
    totals = Counter(pair.verdict.verdict for pair in pairs)
    yield f"| verdict | {' | '.join(LABELS[label] for label in labels)} | all |"
    yield f"|---|{'---:|' * (len(labels) + 1)}"
    for verdict, total in totals.most_common():
        yield f"| {verdict} | {' | '.join(str(counts[verdict, label]) for label in labels)} | {total} |"
    sums = [sum(pair.label is label for pair in pairs) for label in labels]
    yield f"| **all** | {' | '.join(map(str, sums))} | {len(pairs)} |"


def _one_line(verdict: Verdict) -> str:
    low, high = verdict.speedup_low, verdict.speedup_high
    speed = f" Speedup {verdict.speedup:.2f} ({low:.2f} to {high:.2f})." if verdict.speedup and low and high else ""
    return " ".join(verdict.detail.split()).replace("|", "\\|") + speed


if __name__ == "__main__":
    sys.exit(main())
