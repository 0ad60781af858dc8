"""How fast Trinity-Mini is trained here, and in how much memory.

A model of its exact shape, with random weights made directly in 4 bits, goes
through the project's own trainer: LoRA on every linear layer and every expert,
TRL's loss, the preset's optimiser. Sequences are full and every token counts
unless --prompt-share says otherwise.

parts (each in a process of its own; --out is written after every one):
  step      --warmup and --steps optimiser steps; --steps 0 leaves it out
  profile   (--profile) where the time of one micro-batch goes
  plain     (--plain) a few steps of the plain layers that the fused ones replace
  curves    (--compare-curves STEPS) the losses of fused and plain layers on the
            same data and seed, beside plain ones with another dropout seed
  loop      (--baseline loop, all) one expert after the other, as the model was
            trained before, LoRA on q, k, v and o only
  stock     (--baseline stock, all) the stock libraries with bfloat16 experts

The share of the GPU counts 4 (W + V) + 6 L + 3 A operations a token, with W the
frozen weights that a token meets, V the head's, L its adapters' and A those of
attention's scores; train_step_models.work_a_token has the details.

examples:
  python benchmarks/train_step.py --preset trinity-mini-24gb --cap-gib 22.3 \\
      --steps 45 --profile --out result.json
  python benchmarks/train_step.py --steps 0 --baseline all
  python benchmarks/train_step.py --steps 0 --compare-curves 50 --layers 8 --seq 1024
  python benchmarks/train_step.py --preset tiny --shape tiny --seq 64 --steps 3

Exit code 0: every target was met. 1: one was missed, or a part failed. 2: usage.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_step_measure as measure
from train_step_report import compared, rows, table

from triton_sft_pipeline.config import preset_names
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import write_json

PLAIN = "TRITON_SFT_PLAIN"
PLAIN_WARMUP, PLAIN_STEPS = 2, 5
SEED, OTHER_SEED = 42, 43


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_args()
    job = job_of(arguments)
    try:
        check(arguments, job)
    except PipelineError as error:
        parser.error(str(error))
    if arguments.only:
        return work(arguments.only, job, arguments.out)
    # Ended from outside, it still ends the part that is running, which has a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result: dict[str, Any] = {"options": options_of(arguments), "about": measure.about()}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        for part in parts_of(arguments):
            say(f"{part} ...")
            started = time.monotonic()
            result[part] = run_part(part, arguments, Path(folder))
            result[part]["part_seconds"] = time.monotonic() - started
            if {"curve_fast", "curve_plain", "curve_other"} <= result.keys() and "curves" not in result:
                result["curves"] = curves_of(result)
            result["seconds"] = time.monotonic() - began
            say(f"{part}: {result[part]['part_seconds']:.0f} s {result[part].get('failed', '')}")
            if arguments.out:
                write_json(arguments.out, result)
    lines = rows(result)
    result["table"] = table(lines, result)
    if arguments.out:
        write_json(arguments.out, result)
    print(result["table"])
    return 1 if any(row.met is False for row in lines) else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="trinity-mini-24gb", choices=preset_names(), help="default trinity-mini-24gb")
    add("--shape", default="trinity-mini", choices=("trinity-mini", "tiny"), help="tiny: to try this program anywhere")
    add("--layers", type=positive, help="only the first so many layers")
    add("--seq", type=positive, default=4096, help="tokens of a sequence (default 4096)")
    add("--batch", type=positive, default=1, help="sequences of a micro-batch (default 1)")
    add("--accumulation", type=positive, default=2, help="micro-batches of an optimiser step on each GPU (default 2)")
    add("--steps", type=natural, default=20, help="optimiser steps that are measured (default 20)")
    add("--warmup", type=positive, default=5, help="optimiser steps before those (default 5)")
    add("--prompt-share", type=share, default=0.0, help="share of a sequence that the loss leaves out (default 0)")
    add("--cap-gib", type=float, help="GiB of the GPU that `step` may take, such as 22.3")
    add("--baseline", choices=("none", "loop", "stock", "all"), default="none", help="yardsticks (default none)")
    add("--profile", action="store_true", help="take one micro-batch apart")
    add("--plain", action="store_true", help="measure the plain layers too")
    add("--compare-curves", type=positive, metavar="STEPS", help="losses of fused and plain layers")
    add("--gpus", type=positive, default=1, help="GPUs of this machine; more than one: measured on one too")
    add("--part-timeout", type=positive, default=900, help="seconds a part may take (default 900)")
    add("--out", type=Path, help="JSON file for every figure")
    add("--only", help=argparse.SUPPRESS)
    return parser


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise ValueError
    return float(text)


def job_of(arguments: argparse.Namespace) -> measure.Job:
    names = ("preset", "shape", "layers", "seq", "batch", "accumulation", "steps", "warmup", "cap_gib", "prompt_share")
    return measure.Job(**{name: getattr(arguments, name) for name in names}, curve_steps=arguments.compare_curves or 1)


def check(arguments: argparse.Namespace, job: measure.Job) -> None:
    """Refuse what cannot be measured before anything heavy is imported.

    Raises:
        PipelineError: nothing was asked for, or the sequence is too short to have a labelled token.
    """
    if not arguments.only and not parts_of(arguments):
        raise PipelineError("--steps 0 and no other part: there is nothing to measure.")
    if job.seq < 16 or int(job.seq * job.prompt_share) >= job.seq - 1:
        raise PipelineError(f"--seq {job.seq}: too short to be trained on; take at least 16 tokens.")
    if arguments.cap_gib is not None and arguments.cap_gib <= 0:
        raise PipelineError("--cap-gib must be more than 0.")
    job.config()


def parts_of(arguments: argparse.Namespace) -> list[str]:
    """The parts in the order in which they run: what matters most first."""
    asked = {
        "step": arguments.steps > 0,
        "one_gpu": arguments.steps > 0 and arguments.gpus > 1,
        "profile": arguments.profile,
        "plain": arguments.plain,
        "curve_fast": arguments.compare_curves,
        "curve_plain": arguments.compare_curves,
        "curve_other": arguments.compare_curves,
        "loop": arguments.baseline in ("loop", "all"),
        "stock": arguments.baseline in ("stock", "all"),
    }
    return [part for part, wanted in asked.items() if wanted]


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: value for name, value in vars(arguments).items() if name not in ("only", "out")}
    return options | {PLAIN: os.environ.get(PLAIN, "")}


def run_part(part: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one part in processes of its own.

    Returns:
        Its figures; `failed` and a sentence when it left none.
    """
    out = folder / f"{part}.json"
    environment = os.environ | {"TMPDIR": str(folder)}
    if part in ("plain", "curve_plain", "curve_other"):
        environment[PLAIN] = "1"
    command = [*launcher(part, arguments.gpus), str(Path(__file__).resolve()), *own_arguments()]
    command += ["--only", part, "--out", str(out)]
    log = folder / f"{part}.log"
    with log.open("wb") as stream:
        # A session of its own, so that whatever it started ends with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        try:
            process.wait(timeout=arguments.part_timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"did not end within {arguments.part_timeout} s (--part-timeout)"}
        finally:
            end(process)
    if out.is_file():
        figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return figures
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return {"failed": f"ended with code {process.returncode} and no result: {text[-1500:]}"}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and what it started; nothing happens when it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launcher(part: str, gpus: int) -> list[str]:
    """How a part's process is started: under torchrun when it trains on several GPUs."""
    if part == "step" and gpus > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    return [sys.executable]


def own_arguments() -> list[str]:
    """This process's arguments without --out, which is another one's in a part."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def work(part: str, job: measure.Job, out: Path) -> int:
    """Do one part in this process and leave its figures in `out`."""
    try:
        figures = figures_of(part, job)
    # What went wrong is a result like any other: the report names it, and the other parts go on.
    except Exception as error:
        import traceback

        figures = {"failed": measure.described(error), "traceback": traceback.format_exc()}
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(out, figures)
    return 0


def figures_of(part: str, job: measure.Job) -> dict[str, Any]:
    from dataclasses import replace

    import train_step_profile
    import train_step_yardsticks

    if part not in ("step", "one_gpu"):
        # The cap is there to find out whether the project fits a smaller card; what it is compared with need not.
        job = replace(job, cap_gib=None)
    if part == "plain":
        job = replace(job, warmup=PLAIN_WARMUP, steps=PLAIN_STEPS)
    if part in ("step", "one_gpu", "plain"):
        return measure.measure(job)
    if part.startswith("curve_"):
        return measure.loss_curve(job, OTHER_SEED if part == "curve_other" else SEED)
    if part == "profile":
        return train_step_profile.profile(job)
    return train_step_yardsticks.loop(job) if part == "loop" else train_step_yardsticks.stock(job)


def curves_of(result: dict[str, Any]) -> dict[str, Any]:
    """The three loss curves side by side; `failed` when one of them is not whole."""
    curves = {name: result[f"curve_{name}"] for name in ("fast", "plain", "other")}
    for name, found in curves.items():
        if "failed" in found:
            return {"failed": f"curve_{name}: {found['failed']}"}
    losses = {name: found["losses"] for name, found in curves.items()}
    return {
        "steps": len(losses["fast"]),
        "compared": compared(losses["fast"], losses["plain"], losses["other"]),
        "fused": curves["fast"]["fused"],
        **losses,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
