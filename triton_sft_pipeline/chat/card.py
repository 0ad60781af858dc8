"""The dataset card: what a reader of the chat dataset must know, as the Hub shows it.

It holds no date and no place, so that the same dataset always has the same card.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.chat.examples import ChatDataset, Example
from triton_sft_pipeline.chat.settings import Form
from triton_sft_pipeline.files import read_json

CARD_FILE = "README.md"
_FUNNEL_FILE = "funnel.json"
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


@dataclass(frozen=True)
class About:
    """What a card says beyond what is in the rows.

    Attributes:
        budget: most tokens a row may have.
        tokenizer: name of the one that counted; of a directory its last part, which says enough and nothing of the
            machine.
        license: as the Hub spells it; None: unknown.
        funnel: what became of the traces, as the filter writes it in funnel.json.
    """

    budget: int | None = None
    tokenizer: str | None = None
    license: str | None = None
    funnel: Mapping[str, Any] | None = None


def about(base_model: str, budget: int, license: str | None, filtered: Path | None) -> About:
    """What is known of a dataset that is made with a base model's tokenizer out of a filter's output directory."""
    name = Path(base_model).name if Path(base_model).is_dir() else base_model
    funnel = filtered / _FUNNEL_FILE if filtered else None
    return About(budget, name, license, read_json(funnel) if funnel and funnel.is_file() else None)


def card(dataset: ChatDataset, form: Form, about: About) -> str:
    """README.md of a chat dataset: the Hub's header, then form, numbers, funnel and licence for a person."""
    parts = [
        _header(dataset, about),
        "# Reasoning traces: from PyTorch modules to Triton kernels\n\n"
        "Each row is a PyTorch module, a chain of thought, and the Triton kernel it led to, whose output was labelled "
        "as matching PyTorch's. For supervised fine-tuning of models that write GPU kernels.",
        _form(form),
        _numbers(dataset, about),
        _funnel(dataset, about),
        _licence(dataset, about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(dataset: ChatDataset, about: About) -> str:
    import yaml

    # A split without rows has no features that a loader could find.
    files = [{"split": n, "path": f"{n}.parquet"} for n in ("train", "test") if dataset.split(n)]
    rows = len(dataset.examples)
    fields = {
        "pretty_name": "Reasoning traces from PyTorch to Triton",
        "license": about.license or "unknown",
        "language": ["en"],
        "task_categories": ["text-generation"],
        "tags": ["triton", "pytorch", "gpu-kernels", "reasoning", "code", "sft"],
        "size_categories": [next((name for most, name in _SIZES.items() if rows < most), "n>1M")],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _form(form: Form) -> str:
    if form == "messages":
        columns = (
            "`messages` is the conversation, a list of `{role, content}`. The loss is meant for every assistant turn, "
            "each behind the text it was asked with."
        )
    else:
        columns = (
            "`prompt` is one user turn and `completion` one assistant turn, each a list of `{role, content}`. The loss "
            "is meant for the completion alone."
        )
    return (
        f"## Form\n\n{columns} An answer is `<think>`, the reasoning, `</think>`, then `<triton>`, the kernel, "
        "`</triton>`. `problem` is a hash of the normalised module: all rows of one problem are in one split. `file`, "
        "`sample_key` and `trace` say where a row came from, `speedup` is its label (reference time / kernel time), "
        "and the token counts are under the chat template below.\n\n"
        '```python\nfrom datasets import load_dataset\n\nrows = load_dataset("parquet", data_files={"train": '
        '"train.parquet"}, split="train")\n```'
    )


def _numbers(dataset: ChatDataset, about: About) -> str:
    named = {n: dataset.split(n) for n in ("train", "test")} | {"all": dataset.examples}
    rows = [[name, *_measures(examples)] for name, examples in named.items()]
    head = ["split", "rows", "problems", "tokens, median", "95 %", "most", "learned", "speedup, median", "> 1", ">= 2"]
    sources = Counter(e.source or "not said" for e in dataset.examples)
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(sources.items(), key=lambda i: (-i[1], i[0])))
    counted = f" Tokens are counted with the chat template of `{about.tokenizer}`." if about.tokenizer else ""
    return f"## Numbers\n\n{_table(head, rows)}\n\nRows by source: {told or 'none'}.{counted}"


def _measures(examples: Sequence[Example]) -> list[str]:
    if not examples:
        return ["0", "0", *["-"] * 7]
    tokens = sorted(e.tokens for e in examples)
    speedups = [e.speedup for e in examples if e.speedup is not None]
    return [
        f"{len(examples):,}",
        f"{len({e.problem for e in examples}):,}",
        f"{statistics.median_high(tokens):,}",
        f"{tokens[(len(tokens) * 95 - 1) // 100]:,}",
        f"{tokens[-1]:,}",
        f"{sum(e.completion_tokens for e in examples):,}",
        f"{statistics.median(speedups):.2f}" if speedups else "-",
        f"{sum(s > 1 for s in speedups):,}",
        f"{sum(s >= 2 for s in speedups):,}",
    ]


def _funnel(dataset: ChatDataset, about: About) -> str:
    rows: list[list[str]] = []
    if about.funnel:
        rows.append(["read", "", f"{about.funnel['read']:,}"])
        for fate in ("quarantined", "dropped"):
            rows += [[fate, reason, f"{count:,}"] for reason, count in about.funnel[fate].items()]
        rows.append(["kept by the filter", "", f"{about.funnel['kept']:,}"])
    budget = f" of {about.budget:,} tokens" if about.budget else ""
    rows.append(["left out here", f"over the budget{budget}; nothing is cut", f"{len(dataset.over_budget):,}"])
    rows.append(["rows", "", f"{len(dataset.examples):,}"])
    return f"## From traces to rows\n\n{_table(['', 'why', 'traces'], rows)}"


def _licence(dataset: ChatDataset, about: About) -> str:
    said = f"Published as `{about.license}`. " if about.license else "Nobody has said which licence this is under. "
    return (
        f"## Licence\n\n{said}The PyTorch modules keep the licences of where they came from (the column `source`), "
        "and reasoning and kernels were written by a model whose terms may say what its output may be used for. Check "
        "both before you publish or train on this. Labels are what the traces claim, as measured on one machine."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
