"""Loading the base model in 4 bits, alone or with a trained adapter, on a GPU or a CPU.

Knows nothing of data, prompts or training. What the device is, is found out here: CUDA when there is one, else the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.experts.layouts import NOT_QUANTISED, ExpertLayout, known_layout
from triton_sft_pipeline.training.memory import device_name
from triton_sft_pipeline.training.progress import library_bars
from triton_sft_pipeline.training.settings import ModelSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model_and_tokenizer(
    settings: ModelSettings, adapter: Path | None = None, *, progress: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the base model and its tokenizer, and put a trained adapter on it when one is given.

    Linear layers and routed experts become NF4 with double quantisation (unless `settings` says otherwise); embeddings,
    head, routers and norms do not. Experts are packed one at a time while they are read: the device never holds more
    than the loaded model and a few tensors. Under torchrun a process loads onto the GPU of its LOCAL_RANK.

    Args:
        settings: which model, and how.
        adapter: an adapter directory that `train` wrote. Its weights keep the type they were saved in, so that logits
            are bit for bit those that training ended with. None: the base model alone.
        progress: show a bar while weights load.

    Returns:
        The model in evaluation mode (a `PreTrainedModel`, or a `PeftModel` with an adapter) and its tokenizer, whose
        pad token is set.

    Raises:
        PipelineError: the model, revision or adapter is not there; its checkpoint has missing or extra tensors, which
            are named; its experts are stored or named in a way that is not known; or flash attention was asked for
            where it cannot be had.
        StepError: the model does not fit the device, or something else is in 4 bits than what should be.
    """
    _check_attention(settings)
    tokenizer = _load_tokenizer(settings)
    with library_bars(progress):
        model = _load_base(settings)
    _check_quantisation(model, settings)
    _keep_cpu_weights_unpacked(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if adapter is not None:
        # Imported here: lora.py is about adapters alone and must not know how models are loaded.
        from triton_sft_pipeline.training.lora import load_adapter

        model = load_adapter(model, adapter)
    return model.eval(), tokenizer


def _check_attention(settings: ModelSettings) -> None:
    import torch

    if settings.attn_implementation != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise PipelineError(
            "model.attn_implementation is flash_attention_2, but flash-attn is not installed: "
            "pip install 'triton-sft-pipeline[flash-attn]', or set it to sdpa."
        )
    if not torch.cuda.is_available():
        raise PipelineError(
            "model.attn_implementation is flash_attention_2, which needs a CUDA device: set it to sdpa."
        )


def _load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _missing_model_explained(settings):
        tokenizer = AutoTokenizer.from_pretrained(settings.base_model, revision=settings.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(settings: ModelSettings) -> Any:
    """The config of the base model, as transformers reads it. Loads no weights.

    Raises:
        PipelineError: the model or revision is not there.
    """
    from transformers import AutoConfig

    with _missing_model_explained(settings):
        return AutoConfig.from_pretrained(settings.base_model, revision=settings.revision)


def _load_base(settings: ModelSettings) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, settings.compute_dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    config = base_config(settings)
    layout = known_layout(config)
    _check_before_loading(settings, config, layout)
    if settings.load_in_4bit:
        options["quantization_config"] = quantisation(settings, layout)
    options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() else {"": "cpu"}
    with _failures_explained(settings), _missing_model_explained(settings):
        model, found = AutoModelForCausalLM.from_pretrained(
            settings.base_model,
            revision=settings.revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_tensors(found, settings)
    if layout is not None and not settings.load_in_4bit:
        from triton_sft_pipeline.training.experts.module import ExpertStorage, replace_experts

        replace_experts(model, layout, ExpertStorage(compute_dtype=dtype))
    return model


def quantisation(settings: ModelSettings, layout: ExpertLayout | None) -> Any:
    """The quantisation config that transformers takes for these settings.

    Args:
        settings: which numbers to use.
        layout: how the architecture names its experts; None: a dense model, whose linear layers are all there is.

    Returns:
        A `PackedExpertsConfig`, or a `BitsAndBytesConfig` for a dense model.
    """
    import torch
    from transformers import BitsAndBytesConfig

    made: type = BitsAndBytesConfig
    if layout is not None:
        from triton_sft_pipeline.training.experts import quantizer

        quantizer.register()
        made = quantizer.PackedExpertsConfig
    return made(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype),
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )


def _check_before_loading(settings: ModelSettings, config: Any, layout: ExpertLayout | None) -> None:
    from triton_sft_pipeline.training.experts.checks import check_checkpoint
    from triton_sft_pipeline.training.experts.layouts import empty_model, require_known_experts
    from triton_sft_pipeline.training.memory import require_memory

    if layout is not None:
        check_checkpoint(settings.base_model, settings.revision, config, layout, packed=settings.load_in_4bit)
    elif settings.load_in_4bit:
        require_known_experts(empty_model(config), config, settings.base_model)
    require_memory(settings, config=config)


def _check_tensors(found: dict[str, Any], settings: ModelSettings) -> None:
    """Fail on what transformers only warns of: missing tensors would be random numbers, extra ones a part left out."""
    kinds = {
        "lacks": found["missing_keys"],
        "has tensors unknown to it:": found["unexpected_keys"],
        "has tensors of another shape:": [str(each[0]) for each in found["mismatched_keys"]],
    }
    for kind, names in kinds.items():
        if names:
            first = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise PipelineError(
                f"{settings.base_model}: by the architecture of its config.json, the checkpoint {kind} {first}{more}. "
                "Download it again, or name the directory of a whole one."
            )


@contextmanager
def _failures_explained(settings: ModelSettings) -> Iterator[None]:
    """Say which of the ways to fail while weights are loaded it was; transformers hides some of them."""
    import torch

    from triton_sft_pipeline.training.experts.quantizer import LoadingFailed

    try:
        yield
    except LoadingFailed as failed:
        error = failed.__cause__
        if isinstance(error, PipelineError):
            raise error from None
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise _does_not_fit(settings) from error
        raise StepError(
            f"{settings.base_model} could not be packed in 4 bits: {type(error).__name__}: {_first_line(failed)}"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise _does_not_fit(settings) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise StepError(
            f"{settings.base_model} could not be quantised while it was loaded on {device_name()}. The report above "
            "names the tensors and why; if memory was out, free the GPU, take a larger one, or choose a smaller preset."
        ) from error


def _does_not_fit(settings: ModelSettings) -> StepError:
    return StepError(
        f"{settings.base_model} does not fit on {device_name()}: free the GPU, take a larger one, or choose a smaller "
        "preset."
    )


@contextmanager
def _missing_model_explained(settings: ModelSettings) -> Iterator[None]:
    """Turn the ways in which a hub model or directory can be missing into one message."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and Path(settings.base_model).is_dir():
            raise
        where = f"model.base_model {settings.base_model}" + (
            f" (revision {settings.revision})" if settings.revision else ""
        )
        raise PipelineError(
            f"{where} cannot be loaded: it is neither a directory with a model nor in the local cache, and could not "
            f"be fetched. Download it first with `hf download {settings.base_model}`, unset HF_HUB_OFFLINE, or name a "
            f"directory. ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_quantisation(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Fail when the quantiser did something else than was asked: it never says so itself."""
    if not settings.load_in_4bit:
        return
    import bitsandbytes as bnb

    quantised = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not quantised:
        raise StepError(
            f"model.load_in_4bit is true, but no layer of {settings.base_model} was quantised: set it to false."
        )
    if wrong := [name for name in quantised if name.endswith(NOT_QUANTISED)]:
        raise StepError(
            f"{settings.base_model}: {wrong[0]} was quantised to 4 bits, although heads and routers must not be."
        )
    if known_layout(model.config) is not None:
        from triton_sft_pipeline.training.experts.checks import check_packed

        check_packed(model, settings.base_model)


def _keep_cpu_weights_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from re-packing weights on CPUs with AVX512-BF16.

    There it packs them when a module is first used in evaluation mode. Small layers then fail, and, worse, training
    goes on after an evaluation through an operator without a gradient: the loss drifts and nothing says why.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
