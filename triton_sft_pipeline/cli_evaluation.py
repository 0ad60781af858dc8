"""Commands of `triton-sft` about what a model can do. Thin, like cli.py, which lists them."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from triton_sft_pipeline.cli_options import PATH, configured
from triton_sft_pipeline.config import Config, parse_overrides, storage_root
from triton_sft_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from triton_sft_pipeline.evaluation.contamination import TrainedOn
    from triton_sft_pipeline.evaluation.generation import Asker
    from triton_sft_pipeline.problems import Problem, Unusable


class _Levels(click.ParamType):
    """`3,4`: levels of KernelBench."""

    name = "levels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part in ("1", "2", "3", "4") for part in parts):
            self.fail(f"{value!r} is not a list of levels from 1 to 4, such as 3,4.", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class Plan(NamedTuple):
    """What an evaluation will ask: problems by split, and everything a reader has to know of the others."""

    location: str
    splits: dict[str, list[Problem]]
    unusable: list[Unusable]
    touched: list[tuple[Problem, str]]
    trained_on: TrainedOn | None
    notes: list[str]

    @property
    def asked(self) -> int:
        """How many problems are asked."""
        return sum(map(len, self.splits.values()))


@click.command()
@click.option("--adapter", type=PATH, metavar="DIR", help="The tuned model's adapter; without one, the base alone.")
@click.option(
    "--problems",
    "location",
    required=True,
    metavar="LOCATION",
    help="Folder of KernelBench-format files, one .py, .jsonl, .parquet, or hf://ScalingIntelligence/KernelBench.",
)
@click.option("--levels", type=_Levels(), metavar="3,4", help="Levels to ask (default: all; KernelBench: 3,4).")
@click.option("--samples", type=click.IntRange(min=1), help="Answers a problem (default: the preset's).")
@click.option(
    "--temperature", type=click.FloatRange(min=0.0), help="0 is greedy (default: 0 for one sample, 0.7 for several)."
)
@click.option(
    "--top-p", type=click.FloatRange(min=0.0, max=1.0, min_open=True), help="Nucleus (default: the preset's)."
)
@click.option("--trained-on", type=PATH, metavar="DIR", help="The chat dataset of the tuned model, if not recorded.")
@click.option("--server", metavar="URL", help="Ask an OpenAI-compatible server instead of loading a model.")
@click.option("--model", "base_name", metavar="NAME", help="The base model's name on the server.")
@click.option("--tuned-model", "tuned_name", metavar="NAME", help="The tuned model's name on the server.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Answers under way on the server (default: 16).")
@click.option("--dry-run", is_flag=True, help="Say what would be asked of whom; load no model, write nothing.")
@click.option("--out", type=PATH, metavar="DIR", help="Directory of the report; not needed with --dry-run.")
@configured
def evaluate(
    adapter: Path | None,
    location: str,
    trained_on: Path | None,
    server: str | None,
    base_name: str | None,
    tuned_name: str | None,
    concurrency: int | None,
    dry_run: bool,
    out: Path | None,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    **given: Any,
) -> None:
    """Does the tuned model write better kernels than the base?

    Asks both for a kernel for every problem, has the judge decide, and writes report.html, report.md and report.json,
    with the generations and verdicts behind them. Problems that the adapter's training data touches are reported apart
    from the held-out ones. Killed and started again with the same --out, it goes on where it was.

    With --adapter, and without --preset or --config, the configuration is the one that the adapter records.

    \b
      triton-sft evaluate --adapter storage/sft_output \\
                          --problems data/held_out --samples 8 --out report
      triton-sft evaluate --preset trinity-mini \\
                          --adapter storage/sft_output \\
                          --problems hf://ScalingIntelligence/KernelBench \\
                          --levels 1,2 --out report
      triton-sft evaluate --server http://localhost:8000/v1 --model base \\
                          --tuned-model triton --problems data/held_out \\
                          --out report
      triton-sft evaluate --problems data/held_out --dry-run

    \b
    Exit code 0  the report is written
              1  a step failed: the server died, memory or disk is full; what
                 was finished is kept, and the same command goes on
              2  usage or input: no problems, an adapter of another base
            130  interrupted; the same command goes on
    """
    _check_usage(adapter, server, base_name, tuned_name, concurrency, out, dry_run)
    overrides = {f"evaluation.{name}": value for name, value in given.items() if value is not None}
    config, adapter = _config_of(adapter, preset, config_file, sets, overrides)
    notes = [config.note]
    if adapter:
        from triton_sft_pipeline.training.adapter_fit import check_adapter_fits

        notes.append(check_adapter_fits(adapter, config.model) or "")
    plan = _planned(location, config, adapter, trained_on, tuned=bool(adapter or tuned_name), notes=notes)
    if given["levels"] and not any(p.level for problems in plan.splits.values() for p in problems):
        raise PipelineError(
            f"{location}: none of its problems says its level, so --levels cannot choose. Leave it out, or give them a "
            "`level`."
        )
    models = {"base": base_name, "tuned": tuned_name} if server else {"base": "", "tuned": "" if adapter else None}
    roles = [role for role, name in models.items() if name is not None]
    who = _who(config, adapter, server, models)
    if dry_run:
        for line in _plan_lines(plan, config, roles, who, out):
            click.echo(line)
        return
    assert out is not None
    # Before a model is loaded for nothing.
    _answers_there(plan, config, roles, out)
    _tell_before(plan, config)
    facts = _facts(config, adapter, plan, location)
    report = _run(_asker(config, adapter, server, models, concurrency, out, facts), plan, config, out, facts)
    click.echo(textwrap.fill(report["headline"], 80))
    click.echo(f"report  {out / 'report.html'}")


def _check_usage(
    adapter: Path | None,
    server: str | None,
    base_name: str | None,
    tuned_name: str | None,
    concurrency: int | None,
    out: Path | None,
    dry_run: bool,
) -> None:
    if server and not base_name:
        raise click.UsageError("--server needs --model NAME: the name under which it knows the base model.")
    if server and adapter:
        raise click.UsageError(
            "--adapter is put on a model that is loaded here; a server holds its own. Serve base and adapter "
            "(`triton-sft merge`, or the server's LoRA option) and name it with --tuned-model."
        )
    for option, value in (("--model", base_name), ("--tuned-model", tuned_name), ("--concurrency", concurrency)):
        if value is not None and not server:
            raise click.UsageError(f"{option} belongs to --server URL; without one the preset's base model is loaded.")
    if not out and not dry_run:
        raise click.UsageError("Missing option '--out'.")


def _config_of(
    adapter: Path | None, preset: str | None, config_file: Path | None, sets: tuple[str, ...], given: dict[str, Any]
) -> tuple[Config, Path | None]:
    """The configuration in force: what the adapter records, unless a preset or file was named."""
    from triton_sft_pipeline.adapters import adapter_settings
    from triton_sft_pipeline.config import load_config

    if adapter and not preset and not config_file:
        return adapter_settings(adapter, {**parse_overrides(sets), **given})
    return load_config(preset=preset, file=config_file, overrides={**parse_overrides(sets), **given}), adapter


def _planned(
    location: str, config: Config, adapter: Path | None, trained_on: Path | None, *, tuned: bool, notes: list[str]
) -> Plan:
    """Read the problems, and set those apart that the tuned model was trained on.

    Raises:
        PipelineError: none of them can be asked.
    """
    from triton_sft_pipeline.evaluation_lines import unusable_lines
    from triton_sft_pipeline.problems.reading import read_problems

    found = read_problems(location, config.evaluation.levels)
    if not found.problems:
        named = "\n".join(unusable_lines(found.unusable))
        raise PipelineError(f"{location} holds no problem that can be asked.\n{named}")
    unlevelled = sum(problem.level is None for problem in found.problems)
    if config.evaluation.levels and unlevelled:
        notes.append(f"{unlevelled} of {len(found.problems)} problems say no level, and are asked whatever the levels.")
    clean: list[Problem] = list(found.problems)
    touched: list[tuple[Problem, str]] = []
    known = None
    if tuned or trained_on:
        from triton_sft_pipeline.evaluation.contamination import split_touched, training_problems

        known = training_problems(adapter, storage_root(), trained_on)
        if known is None:
            notes.append(
                "What the tuned model was trained on is not recorded, so no problem could be compared with it: a "
                "held-out problem may be one that it has seen. Name its chat dataset with --trained-on DIR."
            )
        else:
            clean, touched = split_touched(found.problems, known)
    splits = {"held_out": clean, "touched": [problem for problem, _ in touched]}
    return Plan(location, splits, list(found.unusable), touched, known, [note for note in notes if note])


def _who(config: Config, adapter: Path | None, server: str | None, models: dict[str, str | None]) -> str:
    if server:
        return f"{' and '.join(name for name in models.values() if name)} on {server}"
    on = f", with {adapter}" if adapter else ""
    return f"{config.model.base_model}{on}, loaded here"


def _plan_lines(plan: Plan, config: Config, roles: list[str], who: str, out: Path | None) -> Iterator[str]:
    from triton_sft_pipeline.evaluation_lines import (
        against_lines,
        asking_lines,
        problem_lines,
        touched_lines,
        unusable_lines,
    )
    from triton_sft_pipeline.problems.families import family_of

    yield from problem_lines(plan.location, plan.splits, family_of)
    yield from unusable_lines(plan.unusable)
    yield from touched_lines(plan.touched)
    if plan.trained_on:
        yield from against_lines(plan.trained_on)
    yield from asking_lines(who, roles, plan.asked, config.evaluation)
    for note in plan.notes:
        yield from _note(note)
    if out:
        yield f"{'out':11}{out}"
        if there := _answers_there(plan, config, roles, out):
            yield _going_on(there, plan.asked * len(roles) * config.evaluation.samples)


def _tell_before(plan: Plan, config: Config) -> None:
    """What somebody who waits for hours should know now: on standard error, like all that is not the result."""
    from triton_sft_pipeline.evaluation_lines import MOST_SHOWN, touched_lines, unusable_lines

    for line in (
        *unusable_lines(plan.unusable, MOST_SHOWN),
        *touched_lines(plan.touched, MOST_SHOWN),
        *(line for note in plan.notes if note != config.note for line in _note(note)),
    ):
        click.echo(line, err=True)


def _note(text: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, 80, initial_indent=f"{'note':11}", subsequent_indent=" " * 11, break_on_hyphens=False
    )


def _answers_there(plan: Plan, config: Config, roles: list[str], out: Path) -> int:
    """How many answers an earlier run left. Refused is a place where something else was asked."""
    from triton_sft_pipeline.evaluation.evaluate import answers_there

    return answers_there(out, roles, plan.splits, config.evaluation)


def _going_on(there: int, asked: int) -> str:
    return f"{'going on':11}{there:,} of {asked:,} answers are there"


def _tell_going_on(there: int, asked: int) -> None:
    from tqdm import tqdm

    # Not click: the bar stands on this line already.
    tqdm.write(_going_on(there, asked), file=sys.stderr)


def _asker(
    config: Config,
    adapter: Path | None,
    server: str | None,
    models: dict[str, str | None],
    concurrency: int | None,
    out: Path,
    facts: dict[str, Any],
) -> Asker:
    """A server, or a model that is loaded here: now, or of a finished evaluation when an answer turns out missing."""
    if server:
        from triton_sft_pipeline.evaluation.server import ServerAsker

        named = {role: name for role, name in models.items() if name}
        limit: dict[str, Any] = {"concurrency": concurrency} if concurrency else {}
        return ServerAsker(server, named, config.evaluation, **limit)
    from triton_sft_pipeline.evaluation.generation import LocalAsker
    from triton_sft_pipeline.evaluation.late import LateAsker, recorded_facts
    from triton_sft_pipeline.progress import on_a_terminal
    from triton_sft_pipeline.training.model import load_model_and_tokenizer

    def load() -> LocalAsker:
        model, tokenizer = load_model_and_tokenizer(config.model, adapter, progress=on_a_terminal())
        return LocalAsker(model, tokenizer, config.evaluation, has_adapter=adapter is not None)

    recorded = recorded_facts(out, facts)
    roles = [role for role, name in models.items() if name is not None]
    return load() if recorded is None else LateAsker(roles, recorded, load)


def _run(asker: Asker, plan: Plan, config: Config, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    from triton_sft_pipeline.evaluation import write_report
    from triton_sft_pipeline.evaluation.infer import open_judge
    from triton_sft_pipeline.evaluation.run import evaluate_splits
    from triton_sft_pipeline.progress import progress_bar

    codes = (problem.pytorch_code for problems in plan.splits.values() for problem in problems)
    with (
        open_judge(config.evaluation, problems=codes) as judge,
        progress_bar("answers and verdicts", resumes=True) as progress,
    ):
        report = evaluate_splits(
            asker,
            plan.splits,
            config.evaluation,
            judge=judge,
            out=out,
            facts=facts,
            notes=plan.notes,
            unusable=plan.unusable,
            touched={problem.key: what for problem, what in plan.touched},
            progress=progress,
            on_going_on=_tell_going_on,
        )
    write_report(report, out)
    return report


def _facts(config: Config, adapter: Path | None, plan: Plan, location: str) -> dict[str, Any]:
    """What the report says of where models and problems come from."""
    from triton_sft_pipeline.config import base_model_version
    from triton_sft_pipeline.evaluation.infer import judge_options
    from triton_sft_pipeline.files import sha256_file
    from triton_sft_pipeline.problems import hash_problems
    from triton_sft_pipeline.verification import JUDGE_VERSION

    facts: dict[str, Any] = {
        "preset": config.preset,
        "base_model": config.model.base_model,
        "base_model_version": base_model_version(config.model.base_model, config.model.revision),
        # Which base it is stands above; this is how it is loaded.
        "model_settings": config.model.model_dump(mode="json", exclude={"base_model", "revision"}),
        "problems": location,
        "problems_version": hash_problems([problem for problems in plan.splits.values() for problem in problems]),
        "sampling_seed": config.evaluation.seed,
        "judge_version": JUDGE_VERSION,
        "judge_settings": judge_options(config.evaluation),
        "repeat_with": shlex.join(["triton-sft", *sys.argv[1:]]),
    }
    if adapter:
        facts |= {"adapter": str(adapter), "adapter_version": sha256_file(adapter / "adapter_model.safetensors")}
    if plan.trained_on:
        facts |= {"trained_on": str(plan.trained_on.dataset), "trained_on_sha256": plan.trained_on.sha256}
    return facts


@click.command()
@click.argument("reports", nargs=-1, required=True, type=PATH, metavar="REPORT.json...")
@click.option("--out", type=PATH, metavar="DIR", help="Also write compare.json, compare.md and compare.html there.")
def compare(reports: tuple[Path, ...], out: Path | None) -> None:
    """Put several evaluations side by side.

    REPORT.json are files that `triton-sft evaluate` wrote, or the directories that hold them. The tuned model of each
    (the base, where there is no other) is paired with that of the first, problem by problem, on the problems that both
    were asked, with the same intervals and tests as in one report.

    \b
      triton-sft compare low-rank/report.json high-rank/report.json
      triton-sft compare monday tuesday --out comparison

    \b
    Exit code 0  compared
              2  usage or input: no such report, or fewer than two
    """
    from triton_sft_pipeline.evaluation.compare import compare_reports, read_reports
    from triton_sft_pipeline.evaluation.compare_report import comparison_html, comparison_lines, comparison_markdown
    from triton_sft_pipeline.files import atomic_write_text, write_json

    found = compare_reports(read_reports(reports))
    for line in comparison_lines(found):
        click.echo(line)
    if out:
        write_json(out / "compare.json", found)
        atomic_write_text(out / "compare.md", comparison_markdown(found))
        atomic_write_text(out / "compare.html", comparison_html(found))
        click.echo(f"written to {out}")
