"""`triton-sft`: the same rooms from a shell. Every command is a few lines over a room; what is printed fits 80 columns.

Exit codes: 0 done or nothing to do; 1 a step failed or a gate held something back; 2 usage or input; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from triton_sft_pipeline.cli_dataset import dataset
from triton_sft_pipeline.cli_evaluation import compare, evaluate
from triton_sft_pipeline.cli_infer import infer
from triton_sft_pipeline.cli_options import PATH, configured
from triton_sft_pipeline.cli_options import chosen_config as _config
from triton_sft_pipeline.cli_training import merge
from triton_sft_pipeline.config import (
    TRACES_SETTING,
    load_config,
    parse_overrides,
    storage_root,
    traces_location,
)
from triton_sft_pipeline.errors import PipelineError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(package_name="triton-sft-pipeline")
def cli() -> None:
    """Turn verified reasoning traces into a model that writes Triton kernels.

    \b
    The whole pipeline, only what is stale:   triton-sft refresh
    One step at a time:                       triton-sft filter | dataset build
                                              | train | merge
    Does the tuned model beat the base?       triton-sft evaluate | compare
    One kernel for one module:                triton-sft infer softmax.py
    Are these kernels any good?               triton-sft verify traces.json
    What does the model learn from?           triton-sft dataset show 0
    """


for command in (compare, dataset, evaluate, infer, merge):
    cli.add_command(command)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Say what would run and why; run nothing.")
@configured
def refresh(dry_run: bool, preset: str | None, config_file: Path | None, sets: tuple[str, ...]) -> None:
    """Materialise the Dagster assets that are stale, and nothing else.

    Observes the traces (TRITON_SFT_TRACES, else the shipped sample), then runs one wave after another until nothing is
    stale. What failed is not tried again, and what is below it is held back.

    \b
    Exit code 0  refreshed, or nothing to do
              1  a step failed or a gate held something back
              2  usage or input
            130  interrupted; the same command goes on
    """
    config = _config(preset, config_file, sets)

    from triton_sft_pipeline.definitions import build_definitions
    from triton_sft_pipeline.files import read_json
    from triton_sft_pipeline.progress import on_a_terminal
    from triton_sft_pipeline.refresh import open_instance
    from triton_sft_pipeline.refresh import refresh as run
    from triton_sft_pipeline.resources import GPUResource
    from triton_sft_pipeline.storage import ArtifactStore

    store = ArtifactStore(storage_root())
    with open_instance() as instance:
        outcome = run(
            instance,
            build_definitions(config),
            config,
            store,
            say=_say,
            dry_run=dry_run,
            resources={"gpu": GPUResource(progress=on_a_terminal())},
        )
    if dry_run:
        return
    if not outcome.ran and not outcome.failed:
        _say("Nothing to do: everything is up to date.")
    for key in outcome.held_back:
        _say(f"held back: {key}, because something above it failed")
    report = store.current("evaluation_report")
    if report and not outcome.failed:
        _say(f"\nreport  {store.current_link('evaluation_report') / 'report.html'}")
        _say(read_json(report.path / "report.json")["headline"])
    sys.exit(outcome.exit_code)


@cli.command("filter")
@click.argument("inputs", nargs=-1, type=str)
@click.option("--out", type=PATH, help="Directory to write to; not needed with --dry-run.")
@click.option("--require-fast-1", is_flag=True, help="Keep only speedups above 1.0.")
@click.option("--require-fast-2", is_flag=True, help="Keep only speedups of at least 2.0.")
@click.option("--min-speedup", type=float, help="Keep only speedups of at least this.")
@click.option("--min-traces", type=int, help="Exit with 1 when fewer are kept (default 10).")
@click.option("--strict", is_flag=True, help="Refuse a file that breaks off (exit code 2).")
@click.option("--dry-run", is_flag=True, help="Print the funnel; write nothing.")
@configured
def filter_command(
    inputs: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Keep the traces worth training on.

    INPUTS are files (.json, .jsonl, also .gz or .zst, or .parquet), folders, patterns or hf://owner/name; without any:
    TRITON_SFT_TRACES, else the shipped sample. Writes filtered_traces.parquet, dropped.jsonl (each with its first
    reason), quarantine.jsonl (what was no trace) and funnel.json.

    The token budget belongs to the chat dataset. With --preset, what is over that preset's training.max_length is
    dropped here already.
    """
    from triton_sft_pipeline.filtering import filter_with_progress
    from triton_sft_pipeline.traces import write_filtered

    given = {f"filter.{name}": value for name, value in flags.items() if value is not None and value is not False}
    config = load_config(preset=preset, file=config_file, overrides={**parse_overrides(sets), **given})
    if not out and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    destination = None if dry_run else out
    filtered = filter_with_progress(
        config,
        list(inputs) or traces_location(),
        token_budget=preset is not None,
        workplace=_nearest_folder(destination) if destination else None,
        origin=None if inputs else TRACES_SETTING,
    )
    if destination:
        write_filtered(filtered, destination)
        _say(f"written to {destination}")
    if filtered.kept_count < config.filter.min_traces:
        losses = {"dropped.jsonl": filtered.losses_dropped, "quarantine.jsonl": filtered.losses_quarantined}
        files = [str(destination / name) for name, lost in losses.items() if lost.counts] if destination else []
        why = f" Why the rest was not: {' and '.join(files)}." if files else ""
        wanted = f"at least {config.filter.min_traces} are wanted"
        _fail(f"min_traces: {filtered.kept_count} traces are kept, {wanted}.{why}", 1)


def _nearest_folder(path: Path) -> Path:
    """The closest folder above a path that is there: on the same disk, whatever is made of the path later."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@cli.command()
@click.option("--traces", type=PATH, help="Traces to filter and train on (default: TRITON_SFT_TRACES).")
@click.option("--dataset", "dataset_dir", type=PATH, help="Train on this chat dataset instead.")
@click.option("--out", type=PATH, help="Output directory (default: sft_output under storage).")
@click.option("--gpus", type=click.IntRange(1), help="GPUs to share each step (default: training.gpus).")
@click.option("--dry-run", is_flag=True, help="Print the settings; train nothing.")
@configured
def train(
    traces: Path | None,
    dataset_dir: Path | None,
    out: Path | None,
    gpus: int | None,
    dry_run: bool,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> None:
    """Filter, build the dataset and train, without Dagster.

    Writes an adapter that AutoPeftModelForCausalLM.from_pretrained loads. Started again after a kill, it goes on from
    its last checkpoint.
    """
    from triton_sft_pipeline.api import OUTPUT, train_adapter, train_from_traces

    config = _config(preset, config_file, (*sets, f"training.gpus={gpus}") if gpus else sets)
    out = out or storage_root() / OUTPUT
    if dry_run:
        import yaml

        _say(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    elif dataset_dir:
        train_adapter(config, dataset_dir, out)
    else:
        train_from_traces(config, traces or traces_location(), out)


@cli.command()
@click.argument("traces", nargs=-1, required=True, type=PATH)
@click.option(
    "--out", required=True, type=PATH, help="JSON Lines, one verdict a kernel; a file from before is continued."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="cpu is Triton's interpreter: correctness alone.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Kernels judged at a time (default: by cores).")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="Seconds a kernel may take for all trials, and again for its timing.",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Draws of inputs a kernel must agree on."
)
@click.option("--no-timing", is_flag=True, help="Correctness alone, on a GPU too.")
@click.option("--compile-baseline", is_flag=True, help="Also against torch.compile (GPU; many seconds a kernel).")
@click.option(
    "--relabel",
    type=PATH,
    metavar="OUT.json",
    help="Also write the traces with measured results; a record without a result keeps none.",
)
def verify(
    traces: tuple[Path, ...],
    out: Path,
    relabel: Path | None,
    no_timing: bool,
    trials: int,
    compile_baseline: bool,
    **limits: Any,
) -> None:
    """Judge every kernel of TRACES (files, folders, patterns or hf://owner/name).

    A record needs only pytorch_code and triton_code; of a multi-turn record every turn with code is judged. Killed and
    started again with the same --out, it goes on where it was.

    \b
    Exit code 0  every record got a verdict, whatever it was
              1  a record could not be judged, the others were; or disk full
              2  usage or input; --out was judged in another way, or is in use
    """
    from triton_sft_pipeline.judgeable import Judgeable, Refused, read_judgeable
    from triton_sft_pipeline.judging import JudgeSettings, check_destinations, judge_records
    from triton_sft_pipeline.label_table import outcome_lines
    from triton_sft_pipeline.labels import write_relabelled
    from triton_sft_pipeline.progress import progress_bar
    from triton_sft_pipeline.verification import KernelJudge

    check_destinations(list(traces), out, relabel)
    everything = read_judgeable(list(traces))
    records = [item for item in everything if isinstance(item, Judgeable)]
    refused = [item for item in everything if isinstance(item, Refused)]
    for item in refused:
        click.echo(f"not judged: {item.sentence}", err=True)
    if not records:
        raise PipelineError("there is nothing to judge: no record has pytorch_code and triton_code.")
    with KernelJudge(trials=trials, timing=not no_timing, compile_baseline=compile_baseline, **limits) as judge:
        if judge.isolation == "process":
            why = " ".join(judge.isolation_reason.split()) or "no reason is known"
            click.echo(f"isolation is only process: kernels can read your files ({why})", err=True)
        times = judge.backend == "cuda" and not no_timing
        settings = JudgeSettings(judge.backend, trials, times, times and compile_baseline)
        with progress_bar("kernels", resumes=True) as progress:
            judged = judge_records(records, judge, out, settings, progress)
    for line in (*outcome_lines(records, judged), f"verdicts   {out}"):
        _say(line)
    if relabel:
        write_relabelled(list(traces), judged.verdicts, relabel)
        _say(f"relabelled {relabel}")
    if refused:
        _fail(f"{len(refused)} could not be judged; they are named above.", 1)


def _say(text: str) -> None:
    click.echo(text)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"triton-sft: {message}", err=True)
    sys.exit(exit_code)


def main() -> None:
    """The entry point: errors meant for a person are printed as one, the rest names itself and how to see more."""
    if not os.environ.get("TRITON_SFT_DEBUG"):
        # The training libraries warn about each other's next versions; ours are pinned.
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        cli(prog_name="triton-sft", standalone_mode=False)
    except PipelineError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was finished is kept.", 130)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if os.environ.get("TRITON_SFT_DEBUG"):
            raise
        _fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error), 1)
    except Exception as error:
        if os.environ.get("TRITON_SFT_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error}\nThis is a bug; TRITON_SFT_DEBUG=1 shows where.", 1)


if __name__ == "__main__":
    main()
