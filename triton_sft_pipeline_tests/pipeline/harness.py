"""The real pipeline with a recorded GPU: real definitions, instance, filter, dataset, gates, artifacts and report;
training and generation are recorded.

What is not real is written out here by hand, so that a test of staleness takes seconds. The end-to-end test trains for
real.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.config import Config, data_dir, load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.files import write_json
from triton_sft_pipeline.refresh import Outcome, refresh, stale_assets
from triton_sft_pipeline.resources import GPUResource, JudgeResource
from triton_sft_pipeline.storage import ArtifactStore
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline.verification import JudgeItem, Verdict


def sample_traces() -> list[dict[str, Any]]:
    return json.loads((data_dir() / "reasoning_traces.json").read_text())


class RecordedGPU(GPUResource):
    """Writes an adapter whose weights are a function of what it was given, as real training's are."""

    loss: float = 0.5

    def train(self, config: Config, dataset: Path, output: Path, on_log: Any) -> TrainingRun:
        seen = (
            (dataset / "train.parquet").read_bytes()
            + config.training.model_dump_json().encode()
            + config.lora.model_dump_json().encode()
        )
        output.mkdir(parents=True, exist_ok=True)
        (output / "adapter_model.safetensors").write_bytes(hashlib.sha256(seen).digest())
        write_json(output / "adapter_config.json", {"base_model_name_or_path": config.model.base_model})
        (output / "checkpoint-5").mkdir(exist_ok=True)
        log = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": self.loss}]
        for entry in log:
            on_log(entry["step"], {"loss": entry["loss"]})
        return TrainingRun(
            adapter_dir=output,
            log_history=log,
            train_loss=(2.0, self.loss),
            eval_loss=(2.0, 1.0),
            steps=5,
            seconds=0.1,
            resumed_from=None,
            adapters=1,
            trainable_parameters=32,
            model=None,
        )

    @contextmanager
    def model(self, config: Config, adapter: Path | None = None) -> Iterator[tuple[Any, Any]]:
        yield object(), object()


class RecordedAsker:
    """Answers nothing, or with the same kernel every time, and remembers what it was asked.

    Attributes:
        asked: (model, prompt, seed) of every answer that was given.
        text: the answer.
        dies_after: answers until it breaks off; None: never.
    """

    models = ("base", "tuned")

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.text = "<think>\nno idea"
        self.dies_after: int | None = None

    def ask(self, model: str, requests: Any, on_completion: Any, on_tokens: Any = None) -> None:
        for request in requests:
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise BrokenOff
            self.asked.append((model, request.prompt, request.seed))
            on_completion(Completion(request.index, request.sample, self.text, 10, 3, "eos", 0.1))

    def facts(self) -> dict[str, Any]:
        return {"asked": "by a recording"}


class BrokenOff(Exception):
    """An error that nothing in the pipeline knows."""


class AgreeingJudge(JudgeResource):
    """Verifies everything that it is shown."""

    @contextmanager
    def open(self, config: Config, models: Sequence[str] = ()) -> Iterator[Any]:
        yield self

    @property
    def backend(self) -> str:
        return "interpreter"

    def verify_many(self, items: Any) -> Iterator[Verdict]:
        for item in items:
            yield verified(item)


def verified(item: JudgeItem) -> Verdict:
    return Verdict.from_dict(
        {
            "key": item.key,
            "verdict": "verified",
            "correctness": True,
            "fast_0": True,
            "fast_1": None,
            "fast_2": None,
            "speedup": None,
            "reference_time_ms": None,
            "kernel_time_ms": None,
            "contract": "name",
            "device": "cpu",
            "backend": "interpreter",
            "isolation": "process",
            "trials": 1,
            "detail": "It holds.",
            "wall_s": 0.0,
            "versions": {},
        }
    )


class Pipeline:
    """One user: a traces file that can be edited, a store, an instance, and `refresh`."""

    def __init__(self, directory: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance = instance
        self.store = ArtifactStore(directory / "storage")
        self.traces = directory / "traces.json"
        self.said: list[str] = []
        self.resources: dict[str, Any] = {"gpu": RecordedGPU(), "judge": AgreeingJudge()}
        self.config = load_config()
        self.asker = RecordedAsker()
        monkeypatch.setattr("triton_sft_pipeline.evaluation.LocalAsker", lambda *_, **__: self.asker)
        monkeypatch.setenv("TRITON_SFT_HOME", str(self.store.root))
        monkeypatch.setenv("TRITON_SFT_TRACES", str(self.traces))
        self.write(sample_traces())

    def write(self, traces: list[dict[str, Any]]) -> None:
        self.traces.write_text(json.dumps(traces))

    def configure(self, **overrides: Any) -> None:
        self.config = load_config(overrides={name.replace("__", "."): value for name, value in overrides.items()})

    @property
    def definitions(self) -> dg.Definitions:
        return build_definitions(self.config)

    def refresh(self, **options: Any) -> Outcome:
        return refresh(
            self.instance,
            self.definitions,
            self.config,
            self.store,
            say=self.said.append,
            resources=self.resources,
            **options,
        )

    def stale(self) -> dict[str, str]:
        return stale_assets(self.instance, self.definitions, self.config, self.store)

    def current(self, key: str) -> str:
        return self.store.require(key).path.name
