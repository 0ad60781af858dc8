"""`triton-sft dataset`: building, looking at and sending what training reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.chat.dataset import read_examples
from triton_sft_pipeline.chat.prompt import assistant_message, user_message
from triton_sft_pipeline_tests.commands import Outcome, Run, one_message
from triton_sft_pipeline_tests.evaluation.models import byte_tokenizer
from triton_sft_pipeline_tests.traces.records import record, write_array


@pytest.fixture
def run(run: Run, tmp_path: Path) -> Run:
    """The command line with a tokenizer of one token a byte, and a budget."""
    byte_tokenizer().save_pretrained(tmp_path / "base")

    def call(*arguments: str | Path, budget: int = 4096) -> Outcome:
        settings = [f"model.base_model={tmp_path / 'base'}", f"training.max_length={budget}"]
        options = [] if "push" in arguments else [part for s in settings for part in ("--set", s)]
        return run(*arguments, *options)

    return call


@pytest.fixture
def filtered(run: Run, tmp_path: Path) -> Path:
    """Twelve good traces, filtered, and one that was dropped."""
    bad = record(1, result={"correctness": False, "speedup": 0.0})
    traces = write_array(tmp_path / "t.json", [*(record(n) for n in range(100, 112)), bad])
    assert run("filter", traces, "--out", tmp_path / "filtered").code == 0
    return tmp_path / "filtered"


def test_a_dataset_is_built_from_a_filtered_directory_with_its_card(run: Run, filtered: Path) -> None:
    done = run("dataset", "build", filtered, "--out", "data")
    assert done.code == 0 and done.out == "chat dataset  11 train, 1 test  data\n"
    assert sorted(p.name for p in Path("data").iterdir()) == [
        "README.md",
        "dropped.jsonl",
        "test.parquet",
        "train.parquet",
    ]
    card = Path("data", "README.md").read_text()
    assert "| read |  | 13 |" in card and "| dropped | correctness | 1 |" in card
    assert "budget of 4,096 tokens" in card and "`base`" in card


def test_a_sample_over_the_budget_is_dropped_or_fails_the_build(run: Run, filtered: Path) -> None:
    done = run("dataset", "build", filtered, "--out", "small", budget=64)
    assert done.code == 1 and "the train split is empty" in one_message(done) and not Path("small").exists()
    done = run("dataset", "build", filtered, "--out", "small", "--set", "dataset.over_budget=fail", budget=64)
    assert done.code == 2 and "Raise training.max_length" in one_message(done) and not Path("small").exists()


def test_a_filter_that_kept_nothing_gives_no_dataset(run: Run, tmp_path: Path) -> None:
    bad = record(1, result={"correctness": False, "speedup": 0.0})
    assert run("filter", write_array(tmp_path / "bad.json", [bad]), "--out", "none").code == 1
    done = run("dataset", "build", "none", "--out", "data")
    assert done.code == 2 and "there are no filtered traces" in one_message(done) and not Path("data").exists()


def test_the_form_of_the_rows_is_a_setting(run: Run, filtered: Path) -> None:
    import pyarrow.parquet as pq

    assert run("dataset", "build", filtered, "--out", "a").code == 0
    assert run("dataset", "build", filtered, "--out", "b", "--set", "dataset.form=messages").code == 0
    assert pq.read_schema("b/train.parquet").names[0] == "messages"
    assert read_examples(Path("a"), "train") == read_examples(Path("b"), "train")
    done = run("dataset", "build", filtered, "--out", "c", "--set", "dataset.multi_turn=true")
    assert done.code == 2 and "multi_turn needs form: messages" in one_message(done)


@pytest.fixture
def built(run: Run, filtered: Path) -> Path:
    assert run("dataset", "build", filtered, "--out", "data").code == 0
    return Path("data")


def test_a_row_is_shown_to_the_letter_with_the_mask_in_markers(run: Run, built: Path) -> None:
    done = run("dataset", "show", "0", "--dataset", built)
    first = read_examples(built, "train")[0]
    answer = first.completion[0]["content"].removeprefix("<think>\n")
    assert done.out == (
        f"<|im_start|>user\n{first.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        f"{{+{answer}<|im_end|>\n+}}\n"
    )
    assert done.code == 0
    assert done.err == f"{first.sample_key}: {first.tokens:,} tokens of 4,096, {first.completion_tokens:,} learned\n"
    named = run("dataset", "show", first.sample_key, "--dataset", built)
    assert named == done


def test_in_colour_what_is_learned_is_green_and_the_text_is_the_same(run: Run, built: Path) -> None:
    import click

    plain = run("dataset", "show", "0", "--split", "test", "--dataset", built)
    coloured = run("dataset", "show", "0", "--split", "test", "--dataset", built, "--color")
    assert click.unstyle(coloured.out) == plain.out.replace("{+", "").replace("+}", "")
    [example] = read_examples(built, "test")
    green = click.style("</think>", fg="green", bold=True)
    assert coloured.out.count(green) == 1 and click.style("<think>", dim=True) in coloured.out
    assert example.sample_key in coloured.err


def test_a_row_is_shown_token_by_token_with_the_mask_under_it(run: Run, built: Path) -> None:
    done = run("dataset", "show", "3", "--tokens", "--dataset", built)
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("|<|im_start|>|u|s|e|r|\u23ce|")
    example = read_examples(built, "train")[3]
    assert sum(set(cell) == {"^"} for line in lines[1::2] for cell in line.split("|")) == example.completion_tokens


def test_every_part_of_a_conversation_is_shown(run: Run, tmp_path: Path) -> None:
    question, code = record(5)["pytorch_code"], record(5)["triton_code"]
    result = {"correctness": True, "speedup": 1.5, "fast_0": True, "fast_1": True, "fast_2": False, "error": None}
    turns = [
        {
            "turn": 1,
            "reasoning": None,
            "triton_code": "x = 1",
            "full_completion": "<think>\nFirst.\n</think>\n\n<triton>\nx = 1\n</triton>",
            "result": {"correctness": False, "error": "wrong"},
            "feedback_given": "Wrong. Fix it.",
        },
        {
            "turn": 2,
            "reasoning": "Second thoughts.",
            "triton_code": code,
            "full_completion": assistant_message("Second thoughts.", code),
            "result": result,
            "feedback_given": None,
        },
    ]
    opening = [{"role": "system", "content": "Expert."}, {"role": "user", "content": user_message(question)}]
    several = {"sample_key": "several", "pytorch_code": question, "num_turns": 2, "turns": turns}
    traces = write_array(tmp_path / "m.json", [{**several, "full_messages": opening}, record(6)])
    assert run("filter", traces, "--out", "filtered", "--min-traces", "1").code == 0
    options = ["--set", "dataset.form=messages", "--set", "dataset.multi_turn=true", "--set", "dataset.test_size=0"]
    assert run("dataset", "build", "filtered", "--out", "data", *options).code == 0
    done = run("dataset", "show", "several", "--dataset", "data")
    assert done.code == 0
    # The byte tokenizer's template only appends, so one sample holds both answers.
    assert done.out.count("{+") == 2 and "{+First.\n</think>" in done.out and "{+Second thoughts.\n" in done.out
    assert "Wrong. Fix it.<|im_end|>\n<|im_start|>assistant\n<think>\n{+Second" in done.out
    assert done.err.startswith("several: ") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("dataset show 12 --dataset data", "12: the train split has rows 0 to 10, and no sample_key of that name."),
        ("dataset show relu --dataset data", "relu: the train split has rows 0 to 10"),
        ("dataset show 0 --dataset none", "none/train.parquet: not readable as a chat dataset"),
        ("dataset show 0", "there is no current chat_dataset"),
        ("dataset push --repo owner/name", "there is no current chat_dataset"),
        ("dataset push data --repo name", "--repo name: expected owner/name"),
        ("dataset push data --repo owner/name", "nothing was sent: add --yes to send it."),
        ("dataset push data --repo owner/name --yes", "HF_HUB_OFFLINE is set"),
    ],
)
def test_bad_input_exits_2_with_one_message(run: Run, built: Path, arguments: str, said: str) -> None:
    done = run(*arguments.split())
    assert done.code == 2 and said in one_message(done)
