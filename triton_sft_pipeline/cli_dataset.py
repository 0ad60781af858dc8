"""Commands of `triton-sft dataset`. Thin, like cli.py, which lists them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from triton_sft_pipeline.cli_options import PATH, chosen_config, configured
from triton_sft_pipeline.config import storage_root
from triton_sft_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from triton_sft_pipeline.chat.examples import Example
    from triton_sft_pipeline.chat.push import PushPlan
    from triton_sft_pipeline.training.samples import Sample


@click.group()
def dataset() -> None:
    """The chat dataset that training reads."""


@dataset.command()
@click.argument("filtered", required=False, type=PATH)
@click.option("--out", required=True, type=PATH, help="Directory to write train.parquet and test.parquet to.")
@configured
def build(
    filtered: Path | None, out: Path, preset: str | None, config_file: Path | None, sets: tuple[str, ...]
) -> None:
    """Build train.parquet and test.parquet from FILTERED.

    FILTERED is a directory that `triton-sft filter` wrote; without it, the current filtered_traces. The token budget is
    the preset's training.max_length: a longer sample is dropped with a reason, never cut. README.md beside them is the
    dataset card, dropped.jsonl says what was left out.

    \b
      --set dataset.form=messages       one column, messages, for prompt and
                                        completion
      --set dataset.multi_turn=true     whole repair conversations (with
                                        form=messages)
      --set dataset.over_budget=fail    stop at a sample that is too long
    """
    from triton_sft_pipeline.api import write_chat_dataset
    from triton_sft_pipeline.storage import ArtifactStore
    from triton_sft_pipeline.traces import read_kept

    config = chosen_config(preset, config_file, sets)
    source = filtered or ArtifactStore(storage_root()).require("filtered_traces").path
    write_chat_dataset(config, read_kept(source), out, source)


@dataset.command()
@click.argument("row", metavar="N")
@click.option("--dataset", "directory", type=PATH, help="Dataset directory (default: the current chat_dataset).")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--tokens", "by_token", is_flag=True, help="Token by token, with the loss mask drawn under it.")
@click.option("--color/--no-color", default=None, help="Colour (default: on a terminal).")
@configured
def show(
    row: str,
    directory: Path | None,
    split: str,
    by_token: bool,
    color: bool | None,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> None:
    """Print what the model learns from row N.

    N counts from 0, or is a sample_key. It is the exact training text, as the base model's chat template renders it and
    the trainer reads it, special tokens included. What the loss is on is green; where there is no colour, it stands
    between {+ and +}. What is printed beside it goes to standard error.
    """
    from triton_sft_pipeline.chat.dataset import read_examples
    from triton_sft_pipeline.chat.show import marked, painted, runs, token_lines
    from triton_sft_pipeline.chat.tokens import load_tokenizer
    from triton_sft_pipeline.training.samples import IGNORED, tokenize_rows

    config = chosen_config(preset, config_file, sets)
    example = _find(read_examples(directory or _current(), split), row, split)
    tokenizer = load_tokenizer(config.model.base_model, config.model.revision)
    learned_from = {"messages": example.messages, "sample_key": example.sample_key}
    for sample in tokenize_rows([learned_from], tokenizer, None, split):
        mask = [label != IGNORED for label in sample.labels]
        click.echo(_headline(sample, mask, config.training.max_length), err=True)
        if by_token:
            lines = token_lines(sample.input_ids, mask, tokenizer)
            click.echo("\n".join(lines))
            continue
        stretches = runs(sample.input_ids, mask, tokenizer)
        in_colour = sys.stdout.isatty() if color is None else color
        text = painted(stretches, _paint) if in_colour else marked(stretches)
        click.echo(text, color=True)


@dataset.command()
@click.argument("directory", metavar="[DATASET]", required=False, type=PATH)
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The dataset's name on the Hub.")
@click.option("--public", is_flag=True, help="Anybody may read it (default: private).")
@click.option("--yes", is_flag=True, help="Really send it. Without it, only say what would be sent.")
def push(directory: Path | None, repo: str, public: bool, yes: bool) -> None:
    """Send a dataset to the Hugging Face Hub.

    DATASET is a directory that `triton-sft dataset build` wrote; without it, the current chat_dataset. Sends README.md,
    train.parquet and test.parquet in one commit, and makes the dataset when there is none. Log in first: `hf auth
    login`, or HF_TOKEN.

    \b
    Exit code 0  sent
              1  the Hub failed or cannot be reached
              2  usage or input, not logged in, or --yes is missing
    """
    from triton_sft_pipeline.chat.push import plan_push
    from triton_sft_pipeline.chat.push import push as send
    from triton_sft_pipeline.progress import on_a_terminal

    plan = plan_push(directory or _current(), repo)
    for line in _plan_lines(plan, public):
        click.echo(line)
    if not yes:
        raise PipelineError("nothing was sent: add --yes to send it.")
    click.echo(f"sent     {send(plan, public=public, progress=on_a_terminal())}")


def _current() -> Path:
    from triton_sft_pipeline.storage import ArtifactStore

    return ArtifactStore(storage_root()).require("chat_dataset").path


def _find(examples: list[Example], row: str, split: str) -> Example:
    named = [e for e in examples if e.sample_key == row]
    if named:
        return named[0]
    if row.isdecimal() and int(row) < len(examples):
        return examples[int(row)]
    there = f"rows 0 to {len(examples) - 1}" if examples else "no rows"
    raise PipelineError(f"{row}: the {split} split has {there}, and no sample_key of that name.")


def _headline(sample: Sample, mask: list[bool], budget: int) -> str:
    return f"{sample.key}: {len(mask):,} tokens of {budget:,}, {sum(mask):,} learned"


def _paint(text: str, learned: bool) -> str:
    return click.style(text, fg="green", bold=True) if learned else click.style(text, dim=True)


def _plan_lines(plan: PushPlan, public: bool) -> list[str]:
    lines = [
        f"dataset  {plan.directory}",
        f"rows     {plan.rows['train']:,} train, {plan.rows['test']:,} test",
        f"files    {', '.join(file.name for file in plan.files)} ({plan.size:,} bytes)",
        f"to       {plan.repo}, {'public' if public else 'private'}",
    ]
    if plan.folders:
        lines.append(f"names    folders of this machine, in the column `file`: {', '.join(plan.folders[:5])}")
    return lines
