"""Commands of `triton-sft` about what training made. Thin, like cli.py, which lists them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from triton_sft_pipeline.training.merge import MergePlan

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--base", required=True, metavar="DIR", help="The unquantised base model; or its hub name, once fetched.")
@click.option("--adapter", required=True, type=_PATH, metavar="DIR", help="What `triton-sft train` wrote, or any PEFT.")
@click.option("--out", type=_PATH, metavar="DIR", help="New directory to write; not needed with --dry-run.")
@click.option("--dry-run", is_flag=True, help="Say what would change and how large it is; write nothing.")
def merge(base: str, adapter: Path, out: Path | None, dry_run: bool) -> None:
    """Fold an adapter into its base model, to serve it as any other model.

    Copies the base file by file and adds the adapter's part to every weight that it reaches, in float32. Names, types
    and files stay those of the base as it was released, which is what vLLM, SGLang and transformers load. Needs no GPU,
    and memory for one tensor and one layer's adapter. merge.json beside the weights says what was merged.

    The base is the one the adapter was trained for, but unquantised (bfloat16, not the 4 bits that training used). The
    merged model therefore answers like base and adapter together in bfloat16; against the 4-bit base of training it
    differs by what quantisation rounds off.

    Stops, with nothing written, when a tensor of the adapter has no home in the base, when shapes do not fit, when the
    base is quantised, or when the disk is too small. OUT appears when it is whole; killed and started again, it begins
    anew.

    \b
      triton-sft merge --base models/Trinity-Mini --adapter sft_output \\
                       --out models/Trinity-Mini-triton
      vllm serve models/Trinity-Mini-triton

    \b
    Exit code 0  merged
              1  the disk is full, or a merged weight is not finite
              2  usage or input; OUT is taken
    """
    from triton_sft_pipeline.progress import progress_bar
    from triton_sft_pipeline.training.merge import merge as run
    from triton_sft_pipeline.training.merge import plan_merge

    if dry_run:
        for line in _plan_lines(plan_merge(base, adapter), out):
            click.echo(line)
        return
    if not out:
        raise click.UsageError("Missing option '--out'.")
    with progress_bar("MiB merged") as progress:
        report = run(base, adapter, out, progress=progress)
    click.echo(f"merged   {report.updated} of {report.tensors} tensors changed")
    if report.unmoved:
        click.echo(
            f"note     {report.unmoved} of them kept their numbers: the adapter adds nothing\n"
            "         there, or less than the weight's type can hold"
        )
    click.echo(f"written  {out}")


def _plan_lines(plan: MergePlan, out: Path | None) -> list[str]:
    """What a merge would do, for a person."""
    from triton_sft_pipeline.training.merge import require_free, size_text
    from triton_sft_pipeline.training.updates import kinds

    names = max(len(name) for name in kinds(plan.updates))
    lines = [
        f"base     {plan.base}",
        f"adapter  {plan.adapter}",
        f"changes  {len(plan.updates)} of {plan.tensors} tensors",
        *(f"  {name:{names}}  {count:6,}" for name, count in sorted(kinds(plan.updates).items())),
        f"writes   {size_text(plan.size)} in {len(plan.shards) + len(plan.beside) + 1} files",
    ]
    if out:
        require_free(out)
        place = next(parent for parent in out.absolute().parents if parent.is_dir())
        lines.append(f"free     {size_text(shutil.disk_usage(place).free)} on the disk of {out}")
    return lines
