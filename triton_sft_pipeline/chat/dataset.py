"""Traces become examples: prompt, completion, split and lineage, in Parquet that `datasets.load_dataset("parquet",
...)` and the Hub's viewer read, with a dataset card beside it.

The split is by problem and depends on nothing but the set of problems: no order, no clock, no random state. Knows
nothing of training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.chat.card import CARD_FILE, About, card
from triton_sft_pipeline.chat.conversation import Messages, conversation_of, messages_of
from triton_sft_pipeline.chat.examples import ChatDataset, Example, OverBudget
from triton_sft_pipeline.chat.prompt import parse_answer
from triton_sft_pipeline.chat.settings import Form
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_write_text, atomic_writer, write_jsonl
from triton_sft_pipeline.traces.record import Trace

SPLITS = ("train", "test")
DROPPED_FILE = "dropped.jsonl"

CountTokens = Callable[[Messages, Messages], tuple[int, int]]
"""(prompt, completion) -> (tokens of the prompt, tokens of both) as the trainer will see them."""

_DOCS = {
    "prompt": "what the model is asked: one user turn",
    "completion": "what it learns to answer: one assistant turn, reasoning and kernel in their tags",
    "messages": "the whole conversation; the loss is on the assistant's turns",
    "split": "train or test; all rows of a problem are on one side",
    "sample_key": "name of the trace",
    "source": "where the problem comes from, for example kernelbook or kernelbench",
    "problem": "SHA-256 of the normalised PyTorch module: rows of one problem share it",
    "trace": "SHA-256 of the trace",
    "speedup": "label: reference time / kernel time",
    "file": "the file that the trace was read from",
    "prompt_tokens": "tokens before the last answer",
    "completion_tokens": "tokens that the loss is on",
    "tokens": "most tokens that the model reads at once for this row",
}


class NotContinued(PipelineError):
    """A chat template renders a prompt, and with the answer added a text that does not begin with it: the model would
    be trained on another prompt than it is asked with.
    """


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


def build_dataset(
    traces: Iterable[Trace],
    count_tokens: CountTokens,
    *,
    max_tokens: int,
    test_size: float,
    over_budget: str,
    multi_turn: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ChatDataset:
    """Make examples of traces that all have a reasoning, in an order that depends on nothing but the traces.

    Args:
        max_tokens: most tokens that may be read at once.
        test_size: share of the problems that goes to the test split.
        over_budget: "drop" leaves out what is longer, "fail" refuses it.
        multi_turn: make the whole repair conversation of a multi-turn trace, not its best turn alone.
        progress: called with (traces done, traces in all).

    Raises:
        PipelineError: a sample is over the budget and `over_budget` is "fail".
    """
    ordered = sorted(traces, key=lambda t: (t.sample_key, t.version, t.file, t.position))
    rows: list[tuple[Trace, Messages, Messages, _Counts]] = []
    long: list[OverBudget] = []
    for done, trace in enumerate(ordered, 1):
        if multi_turn:
            prompt, completion = conversation_of(trace)
        else:
            prompt, completion = messages_of(trace.pytorch_code, trace.reasoning or "", trace.triton_code)
        counts = _counts(prompt, completion, count_tokens)
        if counts.most <= max_tokens:
            rows.append((trace, prompt, completion, counts))
        else:
            long.append(OverBudget(trace.sample_key, trace.file, trace.position, counts.most, max_tokens))
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


@dataclass(frozen=True)
class _Counts:
    before_last: int
    learned: int
    most: int


def _counts(prompt: Messages, completion: Messages, count_tokens: CountTokens) -> _Counts:
    """Tokens of a row, counted for each answer as it was asked for."""
    asked, most = count_tokens(prompt, completion)
    learned = most - asked
    for index, message in enumerate(prompt):
        if message["role"] != "assistant":
            continue
        try:
            before, whole = count_tokens(prompt[:index], [message])
        except NotContinued:
            continue  # It is read and not learned.
        learned, most = learned + whole - before, max(most, whole)
    return _Counts(asked, learned, most)


def _example(trace: Trace, prompt: Messages, completion: Messages, counts: _Counts, test: set[str]) -> Example:
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
        prompt_tokens=counts.before_last,
        completion_tokens=counts.learned,
        tokens=counts.most,
    )


def format_faults(example: Example) -> list[str]:
    """What is wrong with an example's form; an empty list for a good one."""
    faults = []
    roles = [m["role"] for m in example.messages]
    if len(example.completion) != 1 or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        single = len(roles) <= 2
        return ["expected one user turn and one assistant turn" if single else "expected user and assistant in turns"]
    if not all(m["content"].strip() for m in example.messages):
        return ["a turn is empty"]
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


def write_dataset(
    dataset: ChatDataset, directory: Path, form: Form = "prompt_completion", about: About | None = None
) -> None:
    """Write train.parquet, test.parquet, dropped.jsonl and the dataset card (README.md) into `directory`.

    Args:
        form: the columns that hold the conversation: prompt and completion, or messages.
        about: what the card says beyond what is in the rows.

    Raises:
        PipelineError: a row holds several answers, and `form` has room for one.
    """
    several = next((e for e in dataset.examples if len(e.prompt) > 1), None)
    if several and form != "messages":
        raise PipelineError(
            f"{several.sample_key} holds several answers, which a prompt and its completion cannot say: "
            "set dataset.form to messages."
        )
    directory = Path(directory)
    for name in SPLITS:
        _write_parquet(dataset.split(name), directory / f"{name}.parquet", form)
    rows = [{"reason": "over_budget", "detail": o.detail, **asdict(o)} for o in dataset.over_budget]
    write_jsonl(directory / DROPPED_FILE, rows)
    atomic_write_text(directory / CARD_FILE, card(dataset, form, about or About()))


def read_examples(directory: Path, split: str) -> list[Example]:
    """The examples of one split of a dataset directory, whichever columns hold the conversations.

    Raises:
        PipelineError: the directory holds no such dataset.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(directory) / f"{split}.parquet"
    try:
        return [_from_row(row) for row in pq.read_table(path).to_pylist()]
    except (OSError, TypeError, pa.ArrowException) as error:
        raise PipelineError(
            f"{path}: not readable as a chat dataset ({error}). Build it with `triton-sft dataset build`."
        ) from error


def _to_row(example: Example, form: Form) -> dict[str, Any]:
    row = asdict(example)
    if form == "prompt_completion":
        return row
    del row["prompt"], row["completion"]
    return {"messages": example.messages, **row}


def _from_row(row: dict[str, Any]) -> Example:
    if "messages" in row:
        messages = row.pop("messages")
        row |= {"prompt": messages[:-1], "completion": messages[-1:]}
    return Example(**row)


def _write_parquet(examples: list[Example], path: Path, form: Form) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"prompt": messages, "completion": messages, "messages": messages, "speedup": pa.float64()}
    types |= dict.fromkeys(("prompt_tokens", "completion_tokens", "tokens"), pa.int64())
    names = list(Example.__dataclass_fields__)
    if form == "messages":
        names = ["messages", *(name for name in names if name not in ("prompt", "completion"))]
    schema = pa.schema([pa.field(n, types.get(n, pa.string()), metadata={"doc": _DOCS[n]}) for n in names])
    table = pa.Table.from_pylist([_to_row(e, form) for e in examples], schema=schema)
    with atomic_writer(path) as stream:
        # Small row groups and a page index let the Hub's viewer read one page of rows without the rest.
        pq.write_table(table, stream, compression="zstd", row_group_size=1000, write_page_index=True)
