"""`triton-sft infer`: one kernel for one module. Thin, like cli.py, which lists it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triton_sft_pipeline.cli_options import PATH
from triton_sft_pipeline.errors import PipelineError, StepError

if TYPE_CHECKING:
    from triton_sft_pipeline.evaluation.infer import Inference


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--adapter", type=PATH, metavar="DIR", help="Adapter directory (default: the current lora_adapter).")
@click.option(
    "--best-of",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Answers to generate; of several the judge chooses the fastest correct kernel.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    help="0 is greedy (default: the preset's; 0.7 for several).",
)
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), help="Where several are judged (default: the preset's)."
)
@click.option("--out", type=PATH, metavar="FILE", help="Also write the kernel to this file.")
def infer(
    file: Any, adapter: Path | None, best_of: int, temperature: float | None, device: str | None, out: Path | None
) -> None:
    """Ask the tuned model for a kernel for FILE ('-': standard input).

    One answer is shown as it is written, and is not judged. With --best-of, FILE has to be a whole problem in
    KernelBench's format, with get_inputs() (and get_init_inputs()): every answer is judged against it, and what is
    printed is the kernel that is correct and the fastest. On the judge's CPU there are no speeds, and it is the first
    correct one.

    \b
      triton-sft infer softmax.py
      triton-sft infer softmax.py --best-of 8 --out kernel.py

    \b
    Exit code 0  there is a kernel; with --best-of, the judge verified it
              1  there is none, or none of several held; or memory is out
              2  usage or input
            130  interrupted
    """
    from triton_sft_pipeline.api import answer
    from triton_sft_pipeline.progress import progress_bar

    try:
        pytorch_code = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{file.name}: not UTF-8 text ({error}).") from error
    if device and best_of == 1:
        raise click.UsageError("--device is the judge's, and one answer is not judged: add --best-of N.")
    if best_of > 1:
        from triton_sft_pipeline.problems.loading import require_problem

        require_problem(pytorch_code, file.name)
    asked: dict[str, Any] = {"best_of": best_of, "temperature": temperature, "device": device}
    if best_of > 1:
        with progress_bar("answers and verdicts") as progress:
            found = answer(pytorch_code, adapter, **asked, progress=progress)
        kernel = _told_best(found)
    else:
        found = answer(pytorch_code, adapter, **asked, on_text=lambda text: click.echo(text, nl=False))
        kernel = _told_single(found)
    if out:
        from triton_sft_pipeline.files import atomic_write_text

        atomic_write_text(out, kernel + "\n")
        click.echo(f"written to {out}", err=True)


def _told_single(found: Inference) -> str:
    """End the line that was streamed, and return the kernel."""
    if not found.text.endswith("\n"):
        click.echo()
    if found.code is None:
        raise StepError("the answer holds no kernel.")
    click.echo("This kernel was not judged: --best-of N judges several and returns one that holds.", err=True)
    return found.code


def _told_best(found: Inference) -> str:
    """Print the chosen kernel, its verdict beside it, and return it."""
    from triton_sft_pipeline.evaluation_lines import candidate_lines, chosen_line

    if found.code is None:
        for line in candidate_lines(found.candidates):
            click.echo(line, err=True)
        raise StepError(f"none of {len(found.candidates)} answers holds a correct kernel.")
    chosen = next(c for c in found.candidates if c.verdict is found.verdict)
    click.echo(found.code)
    for line in (*candidate_lines(found.candidates), chosen_line(chosen, len(found.candidates))):
        click.echo(line, err=True)
    return found.code
