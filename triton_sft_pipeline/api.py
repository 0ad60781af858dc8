"""The Python API: the functions of the original training script, each a few lines over the rooms.

`from triton_sft_pipeline import ...` takes them from here, lazily. Nothing here needs Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.adapters import adapter_settings
from triton_sft_pipeline.config import (
    TRACES_SETTING,
    Config,
    load_config,
    storage_root,
    traces_location,
)
from triton_sft_pipeline.errors import GateError, PipelineError, StepError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from peft import LoraConfig
    from trl import SFTConfig

    from triton_sft_pipeline.evaluation.infer import Inference
    from triton_sft_pipeline.progress import Progress
    from triton_sft_pipeline.traces import Trace
    from triton_sft_pipeline.training.trainer import TrainingRun

OUTPUT = "sft_output"
"""Directory under the storage root that `main` and a training without an output directory write to."""


def load_and_filter_traces(
    path: str | Path | None = None,
    require_correctness: bool = True,
    require_fast_0: bool = True,
    require_fast_1: bool = False,
    require_fast_2: bool = False,
    min_speedup: float | None = None,
) -> list[dict[str, Any]]:
    """Read traces and keep those whose labels pass; prints what was kept and why the rest was not.

    These filters alone, no other step of the pipeline: nothing is said about reasoning, duplicates or held-out
    problems.

    Args:
        path: traces: a file (.json, .jsonl, also .gz or .zst, or .parquet), a folder, a pattern, or hf://owner/name;
            default TRITON_SFT_TRACES, else the shipped sample.
        require_correctness: the kernel's output matched PyTorch.
        require_fast_0: the same bar, by its own flag.
        require_fast_1: speedup > 1.0.
        require_fast_2: speedup >= 2.0.
        min_speedup: speedup >= this.

    Returns:
        The kept records, as they stood in the file.

    Raises:
        PipelineError: nothing can be read there.
    """
    from triton_sft_pipeline.traces import FilterSettings, describe, filter_location

    settings = FilterSettings(
        require_correctness=require_correctness,
        require_fast_0=require_fast_0,
        require_fast_1=require_fast_1,
        require_fast_2=require_fast_2,
        min_speedup=min_speedup,
    )
    origin = None if path else TRACES_SETTING
    filtered = filter_location(path or traces_location(), settings, keep_raw=True, origin=origin)
    print(describe(filtered))
    return filtered.raw


def prepare_dataset(traces: Iterable[Mapping[str, Any]], test_size: float = 0.1) -> DatasetDict:
    """Turn raw traces into prompt and completion, and split them by problem.

    The split depends on the set of problems alone: it is the same in any order, and all traces of one problem are on
    one side.

    Args:
        traces: raw records; the reasoning is `model_reasoning`, else `reasoning`, else `thinking`.
        test_size: share of the problems that goes to the test split; at least one problem when there are two or more.

    Returns:
        {"train", "test"} with columns prompt, completion (conversational) and sample_key.

    Raises:
        PipelineError: a record has no code, no kernel or no reasoning, or there are none.
    """
    from datasets import Dataset, DatasetDict, Features, List, Value

    from triton_sft_pipeline.chat.dataset import messages_of, split_problems
    from triton_sft_pipeline.traces.record import Malformed, RawRecord, parse_record
    from triton_sft_pipeline.traces.schemas import is_code

    parsed = [
        parse_record(RawRecord("prepare_dataset(traces)", i, 0, dict(t) if isinstance(t, Mapping) else t, ""))
        for i, t in enumerate(traces)
    ]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    good = []
    for index, trace in enumerate(parsed):
        if isinstance(trace, Malformed):
            raise PipelineError(
                f"trace {index}: {trace.detail}. Filter the traces first: load_and_filter_traces(path)."
            )
        if not is_code(trace.triton_code):
            raise PipelineError(
                f"trace {index} ({trace.sample_key}): triton_code is missing. "
                "Filter the traces first: load_and_filter_traces(path)."
            )
        if not trace.reasoning:
            raise PipelineError(
                f"trace {index} ({trace.sample_key}): no model_reasoning, reasoning or thinking to train on."
            )
        good.append(trace)
    if not good:
        raise PipelineError("prepare_dataset was given no traces.")
    test = split_problems((t.problem for t in good), test_size)
    for trace in sorted(good, key=lambda t: (t.sample_key, t.version)):
        prompt, completion = messages_of(trace.pytorch_code, trace.reasoning or "", trace.triton_code)
        row = {"prompt": prompt, "completion": completion, "sample_key": trace.sample_key}
        rows["test" if trace.problem in test else "train"].append(row)
    messages = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": messages, "completion": messages, "sample_key": Value("string")})
    # By column: `from_list` refuses a split without rows.
    columns = {split: {name: [row[name] for row in found] for name in features} for split, found in rows.items()}
    return DatasetDict({split: Dataset.from_dict(found, features=features) for split, found in columns.items()})


def load_model_and_tokenizer(
    model_name: str | None = None, adapter: str | Path | None = None, *, preset: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """Load a base model in 4 bits (NF4, double quantisation, bf16 compute) and its tokenizer.

    Args:
        model_name: hub id or directory; default the preset's.
        adapter: directory of an adapter to put on it.
        preset: default TRITON_SFT_PRESET, else tiny.
        **settings: any field of `ModelSettings`, such as attn_implementation="flash_attention_2".

    Raises:
        PipelineError: an unknown preset or setting, or a model that cannot be had.
    """
    from triton_sft_pipeline.training.model import load_model_and_tokenizer as load

    named = {"base_model": model_name} if model_name else {}
    config = load_config(preset=preset, overrides={f"model.{k}": v for k, v in {**settings, **named}.items()})
    return load(config.model, Path(adapter) if adapter else None)


def create_lora_config(preset: str | None = None, **settings: Any) -> LoraConfig:
    """The LoRA configuration: r 64, alpha 128, dropout 0.05, on q, k, v, o, gate, up and down projections.

    Args:
        preset: take that preset's values instead of the original ones.
        **settings: any field of `LoraSettings`.
    """
    from triton_sft_pipeline.training.lora import create_lora_config as create

    return create(_section("lora", preset, settings))


def create_training_config(
    output_dir: str | Path | None = None, preset: str | None = None, **settings: Any
) -> SFTConfig:
    """The training configuration: lr 2e-4, cosine, warm-up 0.1, weight decay 0.01, batch 1 x 8, 3 epochs, 4096 tokens,
    checkpointing.

    Args:
        output_dir: where adapter, checkpoints and TensorBoard logs go; default `sft_output` under the storage root.
        preset: take that preset's values instead of the original ones.
        **settings: any field of `TrainingSettings`.
    """
    from triton_sft_pipeline.training.config import create_training_config as create

    return create(_section("training", preset, settings), Path(output_dir) if output_dir else storage_root() / OUTPUT)


def train(
    model: Any,
    tokenizer: Any,
    dataset: Mapping[str, Any],
    training_config: SFTConfig | None = None,
    lora_config: LoraConfig | None = None,
) -> TrainingRun:
    """Fine-tune with TRL's SFTTrainer and save adapter, tokenizer and TensorBoard logs to the configuration's output
    directory.

    Args:
        model, tokenizer: from `load_model_and_tokenizer`.
        dataset: {"train", "test"} from `prepare_dataset`.
        training_config: default `create_training_config()`.
        lora_config: default `create_lora_config()`.

    Returns:
        What the training left behind: `adapter_dir`, losses, and the trained model itself.

    Raises:
        PipelineError: a sample over the token budget; nothing is cut.
        StepError: out of memory, or a full disk.
    """
    from triton_sft_pipeline.progress import on_a_terminal
    from triton_sft_pipeline.training.trainer import train as run

    return run(
        model,
        tokenizer,
        dataset,
        training_config or create_training_config(),
        lora_config or create_lora_config(),
        progress=on_a_terminal(),
    )


def inference(
    pytorch_code: str,
    adapter: str | Path | None = None,
    *,
    best_of: int = 1,
    temperature: float | None = None,
    device: str | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> str:
    """Ask the tuned model for a kernel.

    Args:
        pytorch_code: a PyTorch module; for several answers a whole problem, with `get_inputs()`.
        adapter: directory of an adapter; default the current `lora_adapter`.
        best_of: answers to generate. Of several the judge chooses the fastest correct kernel; one is not judged.
        temperature: 0 takes the likeliest tokens; default the preset's, and 0.7 for several answers.
        device: where several answers are judged: "cuda", "cpu" (Triton's interpreter, without speeds: the first correct
            one is chosen) or "auto"; default the preset's.
        on_text: called with the pieces of a single answer as they are generated.
        progress: called with (steps done, steps in all); each of several answers is two steps.

    Returns:
        `<think>...</think>` and `<triton>...</triton>`, as the model wrote it. `answer` returns the same with the
        kernel, its verdict and the other candidates.

    Raises:
        PipelineError: the code is no Python, or for several answers no whole problem; there is no adapter, or its base
            model cannot be had.
        StepError: of several answers none held, with the verdict on each; or memory is out.
    """
    found = answer(
        pytorch_code,
        adapter,
        best_of=best_of,
        temperature=temperature,
        device=device,
        on_text=on_text,
        progress=progress,
    )
    if found.candidates and found.code is None:
        verdicts = ", ".join(f"answer {c.sample + 1} {c.verdict.verdict}" for c in found.candidates)
        raise StepError(f"none of {best_of} answers holds a correct kernel: {verdicts}.")
    return found.text


def answer(
    pytorch_code: str,
    adapter: str | Path | None = None,
    *,
    best_of: int = 1,
    temperature: float | None = None,
    device: str | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Inference:
    """`inference` with everything that is known about the answer: the kernel, its verdict, all candidates.

    That none of several answers held is no error here: `code` and `verdict` are None, and `candidates` says why.

    Raises:
        PipelineError, StepError: as `inference`.
    """
    from contextlib import nullcontext

    from triton_sft_pipeline.evaluation.infer import infer, infer_settings, open_judge, require_python
    from triton_sft_pipeline.problems.loading import require_problem
    from triton_sft_pipeline.progress import on_a_terminal
    from triton_sft_pipeline.training.adapter_fit import check_adapter_fits
    from triton_sft_pipeline.training.model import load_model_and_tokenizer as load

    require_python(pytorch_code)
    if best_of > 1:
        require_problem(pytorch_code)
    config, path = adapter_settings(Path(adapter) if adapter else None)
    settings = infer_settings(config.evaluation, best_of, temperature)
    check_adapter_fits(path, config.model)
    with open_judge(settings, device, [pytorch_code]) if best_of > 1 else nullcontext() as judge:
        model, tokenizer = load(config.model, path, progress=on_a_terminal())
        return infer(
            model, tokenizer, pytorch_code, settings, best_of=best_of, judge=judge, on_text=on_text, progress=progress
        )


def main(
    traces: str | Path | None = None, output_dir: str | Path | None = None, preset: str | None = None
) -> TrainingRun:
    """The whole training as a plain program, without Dagster: filter, chat dataset, QLoRA, adapter.

    Args:
        traces: default TRITON_SFT_TRACES, else the shipped sample.
        output_dir: default `sft_output` under the storage root; the dataset is written to `dataset` inside it.
        preset: default TRITON_SFT_PRESET, else tiny.

    Raises:
        PipelineError: unreadable traces or configuration.
        GateError: too few traces are kept.
        StepError: out of memory, or a full disk.
    """
    config = load_config(preset=preset)
    run = train_from_traces(config, traces or traces_location(), Path(output_dir or storage_root() / OUTPUT))
    return run if run.model is not None else _with_model(run, config)


def _with_model(run: TrainingRun, config: Config) -> TrainingRun:
    """The run with its model, which the processes that trained it have taken with them."""
    import dataclasses

    from triton_sft_pipeline.training.model import load_model_and_tokenizer as load

    return dataclasses.replace(run, model=load(config.model, run.adapter_dir)[0])


def train_from_traces(config: Config, traces: str | Path, output_dir: Path) -> TrainingRun:
    """`main` under a given configuration."""
    from triton_sft_pipeline.filtering import filter_with_progress

    filtered = filter_with_progress(config, traces)
    if filtered.kept_count < config.filter.min_traces:
        raise GateError(
            f"{traces}: {filtered.kept_count} traces are kept, filter.min_traces wants {config.filter.min_traces}.",
            "min_traces",
        )
    dataset = write_chat_dataset(config, filtered.kept, output_dir / "dataset", filtered.directory)
    return train_adapter(config, dataset, output_dir)


def write_chat_dataset(config: Config, kept: Iterable[Trace], directory: Path, filtered: Path | None = None) -> Path:
    """Build the chat dataset of kept traces into `directory`, under the same gates as the asset.

    Args:
        filtered: the filter's output directory, whose funnel the dataset card tells.

    Raises:
        PipelineError: there are no traces, or one is over the budget and that is to fail.
        GateError: a gate does not hold; nothing is written.
    """
    from triton_sft_pipeline.chat.make import make_dataset
    from triton_sft_pipeline.config import held_out_fingerprints
    from triton_sft_pipeline.progress import progress_bar

    with progress_bar("counting tokens") as progress:
        made = make_dataset(
            kept,
            directory,
            config.dataset,
            base_model=config.model.base_model,
            revision=config.model.revision,
            max_length=config.training.max_length,
            held_out=held_out_fingerprints(config),
            filtered=filtered,
            progress=progress,
        )
    for left_out in made.over_budget:
        print(f"left out {left_out.sample_key}: {left_out.detail}")
    print(f"chat dataset  {len(made.split('train'))} train, {len(made.split('test'))} test  {directory}")
    return directory


def train_adapter(config: Config, dataset: Path, output_dir: Path) -> TrainingRun:
    """Train on a dataset directory and say where the adapter is.

    Raises:
        GateError: a loss is not a number.
    """
    from triton_sft_pipeline.progress import on_a_terminal
    from triton_sft_pipeline.training.run import train_on_dataset
    from triton_sft_pipeline.training.trainer import losses_finite

    run = train_on_dataset(config.model, config.lora, config.training, dataset, output_dir, progress=on_a_terminal())
    if not losses_finite(run.log_history):
        raise GateError("a logged loss is not a number: lower training.learning_rate.", "loss_finite")
    if run.resumed_from is not None:
        print(f"went on from the checkpoint of step {run.resumed_from}")
    print(
        f"adapter       {run.steps} steps, loss {run.train_loss[0]:.3g} -> {run.train_loss[1]:.3g}  {run.adapter_dir}"
    )
    return run


def _section(name: str, preset: str | None, settings: Mapping[str, Any]) -> Any:
    """A section of a preset, or the original script's values, with settings on top."""
    if preset is not None:
        return getattr(load_config(preset=preset, overrides={f"{name}.{k}": v for k, v in settings.items()}), name)
    defaults = Config.model_fields[name].default.model_dump()
    return getattr(load_config(overrides={f"{name}.{k}": v for k, v in {**defaults, **settings}.items()}), name)
