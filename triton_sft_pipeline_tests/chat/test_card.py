"""The dataset card says what is in the files, and nothing of the machine that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from triton_sft_pipeline.chat.card import About, about, card
from triton_sft_pipeline.chat.dataset import write_dataset
from triton_sft_pipeline_tests.chat.examples import built, trace

FUNNEL = {"read": 20, "kept": 12, "dropped": {"correctness": 5, "no_kernel": 1}, "quarantined": {"not_json": 2}}


def header(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_header_is_what_the_hub_reads() -> None:
    found = header(card(built([trace(n) for n in range(10)]), "prompt_completion", About(license="apache-2.0")))
    assert found["license"] == "apache-2.0" and found["size_categories"] == ["n<1K"]
    assert found["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "train.parquet"},
                {"split": "test", "path": "test.parquet"},
            ],
        }
    ]


def test_a_split_without_rows_is_not_offered() -> None:
    files = header(card(built([trace(1)]), "prompt_completion", About()))["configs"][0]["data_files"]
    assert [file["split"] for file in files] == ["train"]


def test_the_funnel_goes_from_traces_to_rows() -> None:
    made = built([trace(n) for n in range(11)] + [trace(11, reasoning="word " * 400)], max_tokens=1500)
    text = card(made, "prompt_completion", About(budget=1500, funnel=FUNNEL))
    assert table(text, "From traces to rows") == [
        ["read", "", "20"],
        ["quarantined", "not_json", "2"],
        ["dropped", "correctness", "5"],
        ["dropped", "no_kernel", "1"],
        ["kept by the filter", "", "12"],
        ["left out here", "over the budget of 1,500 tokens; nothing is cut", "1"],
        ["rows", "", "11"],
    ]


def test_the_numbers_are_those_of_the_rows() -> None:
    speeds = [0.5, 1.0, 1.5, 2.0, None]
    made = built([trace(n, speedup=s) for n, s in enumerate(speeds)] + [trace(0, sample_key="twin", source=None)])
    text = card(made, "prompt_completion", About(tokenizer="Trinity-Mini"))
    rows = {row[0]: row[1:] for row in table(text, "Numbers")}
    tokens = sorted(e.tokens for e in made.examples)
    assert rows["all"][:2] == ["6", "5"] and rows["all"][4] == f"{tokens[-1]:,}"
    assert rows["all"][5] == f"{sum(e.completion_tokens for e in made.examples):,}"
    assert rows["all"][6:] == ["1.50", "3", "1"]  # The twin's speedup is 1.5, too.
    assert rows["test"][1] == "1" and "Rows by source: kernelbook 5, not said 1." in text
    assert "chat template of `Trinity-Mini`" in text


def test_an_empty_split_has_no_numbers() -> None:
    rows = {row[0]: row[1:] for row in table(card(built([trace(1)]), "prompt_completion", About()), "Numbers")}
    assert rows["test"] == ["0", "0", *["-"] * 7]


@pytest.mark.parametrize(("form", "column"), [("prompt_completion", "`completion`"), ("messages", "`messages`")])
def test_the_form_is_explained(form: Any, column: str) -> None:
    assert column in card(built([trace(1)]), form, About()).split("## Form")[1].split("##")[0]


def test_the_licence_is_not_guessed() -> None:
    text = card(built([trace(1)]), "prompt_completion", About())
    assert header(text)["license"] == "unknown" and "Nobody has said which licence" in text


def test_it_says_nothing_of_the_machine(tmp_path: Path) -> None:
    base, filtered = tmp_path / "models" / "base", tmp_path / "filtered"
    base.mkdir(parents=True)
    filtered.mkdir()
    (filtered / "funnel.json").write_text(json.dumps(FUNNEL))
    known = about(str(base), 640, None, filtered)
    assert known == About(640, "base", None, FUNNEL)
    assert about("arcee-ai/Trinity-Mini", 4096, "mit", None).tokenizer == "arcee-ai/Trinity-Mini"
    assert about(str(base), 640, None, tmp_path).funnel is None
    text = card(built([trace(1, file=str(tmp_path / "t.json"))]), "prompt_completion", known)
    assert str(tmp_path) not in text


def test_the_same_traces_give_the_same_files_in_any_order(tmp_path: Path) -> None:
    traces = [*(trace(n) for n in range(5)), trace(7, reasoning="word " * 400), trace(8, reasoning="word " * 500)]
    for name, order in (("a", traces), ("b", traces[::-1])):
        write_dataset(built(order, max_tokens=1500), tmp_path / name, about=About(funnel=FUNNEL))
    written = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert written[0] == written[1] and len(written[0]) == 4
