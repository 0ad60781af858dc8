"""Traces become examples: prompt, completion, split and lineage, in Parquet that `datasets.load_dataset("parquet",
...)` reads.

The split is by problem and depends on nothing but the set of problems: no order, no clock, no random state. Knows
nothing of training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from triton_sft_pipeline.chat.prompt import assistant_message, parse_answer, user_message
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_writer, hash_json, write_jsonl
from triton_sft_pipeline.traces.record import Trace

SPLITS = ("train", "test")
DROPPED_FILE = "dropped.jsonl"

Messages = list[dict[str, str]]
CountTokens = Callable[[Messages, Messages], tuple[int, int]]
"""(prompt, completion) -> (tokens of the prompt, tokens of both) as the trainer will see them."""


@dataclass(frozen=True)
class Example:
    """One row of the chat dataset.

    Attributes:
        prompt, completion: one user turn, one assistant turn, each {"role", "content"}.
        problem: fingerprint of the PyTorch module.
        trace: version of the trace that it was made from.
        prompt_tokens, completion_tokens, tokens: as the preset's chat template and tokenizer count them.
    """

    prompt: Messages
    completion: Messages
    split: str
    sample_key: str
    source: str | None
    problem: str
    trace: str
    speedup: float | None
    file: str
    prompt_tokens: int
    completion_tokens: int
    tokens: int

    @property
    def version(self) -> str:
        """Hash of the row. The file's name is lineage, not content: renaming it makes nothing stale."""
        content = asdict(self)
        del content["file"]
        return hash_json(content)


@dataclass(frozen=True)
class OverBudget:
    """A trace that would not fit the model's context: never cut, so left out."""

    sample_key: str
    file: str
    position: int
    tokens: int
    budget: int

    @property
    def detail(self) -> str:
        return f"{self.tokens:,} tokens, {self.tokens - self.budget:,} over the budget of {self.budget:,}"


@dataclass(frozen=True)
class ChatDataset:
    """Examples in a fixed order, and what was left out."""

    examples: list[Example]
    over_budget: list[OverBudget]

    def split(self, name: str) -> list[Example]:
        return [e for e in self.examples if e.split == name]

    @property
    def data_version(self) -> str:
        return hash_json([e.version for e in self.examples])


def split_problems(problems: Iterable[str], test_size: float) -> set[str]:
    """The problems of the test split: the `test_size` share with the lowest hashes, at least one when there are two or
    more.

    Ordering by a hash makes the split the same for any order of the input, and lets a new problem move at most the
    boundary.
    """
    distinct = sorted(set(problems), key=lambda p: hashlib.sha256(p.encode()).digest())
    if test_size <= 0 or len(distinct) < 2:
        return set()
    count = min(len(distinct) - 1, max(1, math.floor(len(distinct) * test_size + 0.5)))
    return set(distinct[:count])


def messages_of(pytorch_code: str, reasoning: str, triton_code: str) -> tuple[Messages, Messages]:
    """The user turn and the assistant turn of one trace, in the field's conversational form."""
    prompt = [{"role": "user", "content": user_message(pytorch_code)}]
    completion = [{"role": "assistant", "content": assistant_message(reasoning, triton_code)}]
    return prompt, completion


def build_dataset(
    traces: Iterable[Trace],
    count_tokens: CountTokens,
    *,
    max_tokens: int,
    test_size: float,
    over_budget: str,
    progress: Callable[[int, int], None] | None = None,
) -> ChatDataset:
    """Make examples of traces that all have a reasoning.

    Raises:
        PipelineError: a sample is over the budget and `over_budget` is "fail".
    """
    ordered = sorted(traces, key=lambda t: (t.sample_key, t.version))
    rows: list[tuple[Trace, Messages, Messages, int, int]] = []
    long: list[OverBudget] = []
    for done, trace in enumerate(ordered, 1):
        prompt, completion = messages_of(trace.pytorch_code, trace.reasoning or "", trace.triton_code)
        prompt_tokens, tokens = count_tokens(prompt, completion)
        if tokens <= max_tokens:
            rows.append((trace, prompt, completion, prompt_tokens, tokens))
        else:
            long.append(OverBudget(trace.sample_key, trace.file, trace.position, tokens, max_tokens))
        if progress:
            progress(done, len(ordered))
    if long and over_budget == "fail":
        first = long[0]
        raise PipelineError(
            f"{first.file}: record {first.position} ({first.sample_key}) has {first.detail}, "
            f"and {len(long) - 1} more are over it. "
            "Raise training.max_length, or set dataset.over_budget to drop."
        )
    # Split what is left: a test split made of samples that were dropped would be empty.
    test = split_problems((row[0].problem for row in rows), test_size)
    return ChatDataset([_example(*row, test=test) for row in rows], long)


def _example(
    trace: Trace, prompt: Messages, completion: Messages, prompt_tokens: int, tokens: int, test: set[str]
) -> Example:
    return Example(
        prompt=prompt,
        completion=completion,
        split="test" if trace.problem in test else "train",
        sample_key=trace.sample_key,
        source=trace.source,
        problem=trace.problem,
        trace=trace.version,
        speedup=trace.speedup,
        file=trace.file,
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens - prompt_tokens,
        tokens=tokens,
    )


def format_faults(example: Example) -> list[str]:
    """What is wrong with an example's form; an empty list for a good one."""
    faults = []
    if [m["role"] for m in example.prompt] != ["user"] or [m["role"] for m in example.completion] != ["assistant"]:
        return ["expected one user turn and one assistant turn"]
    text = example.completion[0]["content"]
    answer = parse_answer(text)
    if not text.startswith("<think>\n") or not answer.reasoning:
        faults.append("the answer does not begin with a <think> block that holds a reasoning")
    if answer.how != "triton" or not text.endswith("\n</triton>"):
        faults.append("the answer does not end in a <triton> block")
    elif not text.endswith(f"<triton>\n{answer.code}\n</triton>"):
        faults.append("the kernel cannot be read back from the answer as it was written")
    if example.completion_tokens <= 0:
        faults.append("the completion has no tokens")
    return faults


def overlaps(examples: Iterable[Example], held_out: Iterable[str]) -> dict[str, set[str]]:
    """Problems that stand on two sides: {"train/test": ..., "train/held_out": ..., "test/held_out": ...}."""
    sides: dict[str, set[str]] = {"train": set(), "test": set(), "held_out": set(held_out)}
    for example in examples:
        sides[example.split].add(example.problem)
    pairs = [("train", "test"), ("train", "held_out"), ("test", "held_out")]
    return {f"{a}/{b}": sides[a] & sides[b] for a, b in pairs}


def write_dataset(dataset: ChatDataset, directory: Path) -> None:
    """Write train.parquet, test.parquet and dropped.jsonl into `directory`."""
    directory = Path(directory)
    for name in SPLITS:
        _write_parquet(dataset.split(name), directory / f"{name}.parquet")
    rows = [{"reason": "over_budget", "detail": o.detail, **asdict(o)} for o in dataset.over_budget]
    write_jsonl(directory / DROPPED_FILE, rows)


def read_examples(directory: Path, split: str) -> list[Example]:
    """The examples of one split of a dataset directory.

    Raises:
        PipelineError: the directory holds no such dataset.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(directory) / f"{split}.parquet"
    try:
        return [Example(**row) for row in pq.read_table(path).to_pylist()]
    except (OSError, TypeError, pa.ArrowException) as error:
        raise PipelineError(
            f"{path}: not readable as a chat dataset ({error}). Build it with `triton-sft dataset build`."
        ) from error


def _write_parquet(examples: list[Example], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"prompt": messages, "completion": messages, "speedup": pa.float64()}
    types |= dict.fromkeys(("prompt_tokens", "completion_tokens", "tokens"), pa.int64())
    schema = pa.schema([(name, types.get(name, pa.string())) for name in Example.__dataclass_fields__])
    with atomic_writer(path) as stream:
        pq.write_table(pa.Table.from_pylist([asdict(e) for e in examples], schema=schema), stream, compression="zstd")
