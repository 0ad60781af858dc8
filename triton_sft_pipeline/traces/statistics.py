"""What the filter made, in numbers: of the records that were dropped while they pass, of those that were kept from the
file that was written, so that a gate looks at what will be read and not at what was meant.

Memory follows the number of kept traces by about a hundred bytes each, never their text.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_sft_pipeline.traces.canonical import read_batches

SAMPLES = 5
"""How many records of each reason are remembered."""

_FAULTS = 20

_FAMILIES = {
    name: re.compile(pattern)
    for name, pattern in {
        "attention": r"scaled_dot_product_attention|multiheadattention|transformer\w*",
        "recurrent network": r"lstm(cell)?|gru(cell)?|rnn\w*",
        "convolution": r"(lazy)?conv(_?transpose)?\dd",
        "matrix product": r"matmul|b?mm|mv|(b?add)(b?mm|mv)|einsum|tensordot|(bi|lazy)?linear|cdist",
        "normalisation": r"(batch|layer|group|instance|rms|localresponse|local_response_)_?norm(\dd)?",
        "softmax": r"(log_?)?softmax(2d)?|softmin|logsumexp",
        "pooling": r"\w*pool\dd",
        "interpolation": r"interpolate|upsample\w*|grid_sample",
        "loss": r"\w+loss|\w*cross_entropy\w*|kl_div",
        "scan or sort": r"(log)?cum\w+|(arg)?sort|topk",
    }.items()
}
"""What the calls of each family look like in lower case, roughly the dearest first."""
_REDUCTIONS = frozenset({"mean", "sum", "var", "std", "amax", "amin", "max", "min", "prod", "argmax", "argmin", "norm"})
_CALLED = re.compile(r"\.([A-Za-z]\w*)\s*\(")
_MOVING = re.compile(
    "view|reshape|permute|transpose|size|dim|numel|contiguous|to|cuda|float|unsqueeze|squeeze|expand|expand_as|repeat|"
    "cat|concat|stack|split|chunk|flatten|zeros|ones|zeros_like|ones_like|empty|full|tensor|rand|randn|randint|arange|"
    "type|clone|detach|parameter|append|items|format|sequential|modulelist|register_buffer|save_for_backward"
)
"""What a module calls beside what it computes."""


def operator_family(pytorch_code: str) -> str:
    """What a module mostly does, roughly, by the names that it calls: the dearest family of operators among them, else
    the first reduction, else the first operator, else "arithmetic".

    Nothing is parsed and nothing followed: good enough to notice that a set of traces is all of one kind, and nothing
    is decided by it.
    """
    code = pytorch_code.split("def get_inputs")[0]
    called = [name.lower() for name in _CALLED.findall(code)] + ["matmul"] * (" @ " in code)
    for family, pattern in _FAMILIES.items():
        if any(map(pattern.fullmatch, called)):
            return family
    computing = [name for name in called if not _MOVING.fullmatch(name)]
    reducing = [name for name in computing if name in _REDUCTIONS]
    return next(iter(reducing or computing), "arithmetic")


@dataclass(frozen=True)
class Refused:
    """A record that was not kept, as a person is shown it."""

    reason: str
    sample_key: str
    file: str
    position: int
    detail: str


@dataclass
class Losses:
    """Counts of what was dropped or quarantined, and the first few of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Refused]] = field(default_factory=dict)

    def add(self, refused: Refused) -> None:
        """Count one."""
        self.counts[refused.reason] += 1
        shown = self.samples.setdefault(refused.reason, [])
        if len(shown) < SAMPLES:
            shown.append(refused)

    @property
    def by_frequency(self) -> dict[str, int]:
        """Reason -> count, the most frequent first; equal ones by name, so that no order of the input shows."""
        return dict(sorted(self.counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Fault:
    """Kept traces that something does not hold for: how many, and which the first ones are."""

    count: int = 0
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeptSummary:
    """The kept traces in numbers.

    Attributes:
        count: rows of the file.
        version: hash of the kept records, whatever their order and wherever they stood.
        problems: fingerprint -> how many traces.
        families: operator family -> how many traces.
        median_characters: of reasoning and kernel together.
        faults: "correctness", "fast_0" -> traces whose label is not set.
        names: fingerprint -> a name that a person knows the problem by.
    """

    count: int
    version: str
    problems: Mapping[str, int]
    families: Mapping[str, int]
    median_characters: int
    faults: Mapping[str, Fault]
    names: Mapping[str, str]

    @property
    def largest_problem(self) -> tuple[str, int]:
        """A name of the problem with the most traces, and their number."""
        if not self.count:
            return "", 0
        problem, count = max(self.problems.items(), key=lambda item: (item[1], item[0]))
        return self.names[problem], count

    @property
    def largest_family(self) -> tuple[str, int]:
        """The operator family with the most traces, and their number."""
        return max(self.families.items(), key=lambda item: (item[1], item[0])) if self.count else ("", 0)


def summarise(path: Path) -> KeptSummary:
    """Read a file of kept traces once and count.

    Raises:
        PipelineError: it is not one of ours.
    """
    columns = ["sample_key", "name", "file", "position", "problem", "pytorch_code", "reasoning", "triton_code"]
    versions: list[bytes] = []
    lengths = array("q")
    problems: Counter[str] = Counter()
    families: dict[str, str] = {}
    names: dict[str, str] = {}
    faults = {"correctness": _Faults(), "fast_0": _Faults()}
    for batch in read_batches(path, [*columns, "version", *faults]):
        for row in _light_rows(batch):
            versions.append(bytes.fromhex(row["version"]))
            lengths.append(row["characters"])
            problem = row["problem"]
            if problem not in families:
                families[problem] = operator_family(row["pytorch_code"].as_py())
                names[problem] = row["name"] or row["sample_key"]
            problems[problem] += 1
            for label, found in faults.items():
                if not row[label]:
                    found.add(f"{row['file']}, record {row['position']} ({row['sample_key']})")
    by_family: Counter[str] = Counter()
    for problem, count in problems.items():
        by_family[families[problem]] += count
    return KeptSummary(
        len(versions),
        _hash_of_versions(versions),
        problems,
        by_family,
        sorted(lengths)[len(lengths) // 2] if lengths else 0,
        {label: Fault(found.count, tuple(found.first)) for label, found in faults.items()},
        names,
    )


class _Faults:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < _FAULTS:
            self.first.append(place)


def _light_rows(batch: Any) -> list[dict[str, Any]]:
    """Rows in which the long texts are counted, and the code of a module is left in Arrow until somebody asks."""
    import pyarrow.compute as pc

    lengths = [pc.utf8_length(batch[name]).to_pylist() for name in ("reasoning", "triton_code")]
    light = batch.drop_columns(["reasoning", "triton_code", "pytorch_code"]).to_pylist()
    for index, row in enumerate(light):
        row["characters"] = sum(length[index] or 0 for length in lengths)
        row["pytorch_code"] = batch["pytorch_code"][index]
    return light


def _hash_of_versions(versions: list[bytes]) -> str:
    """`hash_json` of the sorted versions, without the text of all of them at once."""
    digest = hashlib.sha256(b"[")
    for index, version in enumerate(sorted(versions)):
        digest.update((f',"{version.hex()}"' if index else f'"{version.hex()}"').encode())
    digest.update(b"]")
    return digest.hexdigest()
