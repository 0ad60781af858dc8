"""How much GPU memory a training takes, worked out from the model's configuration and the settings alone.

No weight is read: the model is built on the meta device, where a tensor has a shape and no memory. What is there all
along (weights, adapter, gradients, optimiser) is exact up to rounding; what a step needs on top is `activations`' part.
Knows nothing of data or of how training works.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.training.activations import Activations
from triton_sft_pipeline.training.experts.layouts import NOT_QUANTISED, empty_model
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30

_BYTES = {"bfloat16": 2, "float32": 4}
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale of their own (bitsandbytes' double quantisation)."""
_USABLE = 0.95
"""Share of the free memory that a preset may need to be recommended: allocators leave gaps."""
_SMALLEST_8BIT, _OPTIMISER_BLOCK = 4096, 256
"""bitsandbytes keeps the state of smaller tensors in float32; in larger ones this many numbers share a float32."""


@dataclass(frozen=True)
class Counts:
    """How many numbers a model holds: routed experts, linear layers that are quantised, everything else."""

    experts: int
    linears: int
    others: int

    @property
    def total(self) -> int:
        return self.experts + self.linears + self.others


@dataclass(frozen=True)
class Footprint:
    """Bytes of GPU memory, by what they are for.

    Attributes:
        experts: routed experts as they lie there (4 bits and their scales, or `compute_dtype`).
        linears: every other linear layer but head and routers.
        others: embeddings, head, routers and norms, never quantised.
        adapter: LoRA weights.
        gradients: one number for each of the adapter; three with several GPUs.
        optimiser: AdamW's two moments of each.
        paged: whether the driver may move the optimiser's state to the host while a step needs the room.
        kept: what each layer keeps for its backward pass.
        scratch: one layer's weights, dequantised.
        layer: what recomputing one layer and going back through it needs on top.
        head: a tile of logits, and the loss's gradient.
        adapter_parameters: numbers in the adapter.
    """

    experts: int = 0
    linears: int = 0
    others: int = 0
    adapter: int = 0
    gradients: int = 0
    optimiser: int = 0
    paged: bool = False
    kept: int = 0
    scratch: int = 0
    layer: int = 0
    head: int = 0
    adapter_parameters: int = 0

    @property
    def loaded(self) -> int:
        """The base model alone."""
        return self.experts + self.linears + self.others

    @property
    def total(self) -> int:
        """The most that is needed at once. The loss and a layer's backward pass never run at the same time, and what a
        paged optimiser needs can give way to either."""
        step = self.kept + self.scratch + max(self.layer, self.head)
        resting = self.loaded + self.adapter + self.gradients
        return resting + (max(step, self.optimiser) if self.paged else step + self.optimiser)

    def parts(self) -> dict[str, int]:
        """The parts that are there, in words."""
        paged = " (paged: it can give way)" if self.paged else ""
        parts = {
            "routed experts": self.experts,
            "linear layers": self.linears,
            "embeddings, head, routers and norms": self.others,
            "adapter": self.adapter,
            "its gradients": self.gradients,
            f"optimiser state{paged}": self.optimiser,
            "kept for the backward pass": self.kept,
            "dequantised weights": self.scratch,
            "one layer's recomputation, or the loss": max(self.layer, self.head),
        }
        return {name: size for name, size in parts.items() if size}


def footprint(
    config: PretrainedConfig,
    lora: LoraSettings | None = None,
    training: TrainingSettings | None = None,
    model: ModelSettings | None = None,
) -> Footprint:
    """What a training takes on each GPU; without `training` and `lora`, what the loaded model takes.

    Args:
        config: the base model's transformers configuration.
        training: a sample is counted with `max_length` tokens and a forward pass with `per_device_batch_size` samples.
        model: quantisation and `compute_dtype`; default: the default settings.
    """
    model = model or ModelSettings()
    empty, width = _empty_model(config), _BYTES[model.compute_dtype]
    base = _base(empty, model)
    if lora is None or training is None:
        return base
    tensors = list(_adapter_tensors(empty, lora))
    numbers = sum(tensors)
    tokens = training.per_device_batch_size * training.max_length
    linears, experts = _quantised_linears(empty), _experts(empty)
    step = Activations.of(config, linears, experts, tokens, width, lora.expert_r or lora.r)
    return replace(
        base,
        adapter=numbers * width,
        # Several GPUs: what a process adds up, what is exchanged, and the places that its graphs write to.
        gradients=numbers * width * (1 if training.gpus == 1 else 3),
        optimiser=sum(_optimiser_state(size, training.optim, width) for size in tensors),
        paged=training.optim.startswith("paged"),
        kept=step.kept() if training.gradient_checkpointing else step.layers * step.layer(),
        scratch=step.scratch() if model.load_in_4bit else 0,
        # The factors of one layer are laid out anew, and so are their gradients.
        layer=step.layer() + 2 * numbers * width // step.layers,
        head=step.head(),
        adapter_parameters=numbers,
    )


def count(config: PretrainedConfig) -> Counts:
    """How many numbers the model of `config` holds."""
    return _count(_empty_model(config))


def _count(empty: Any) -> Counts:
    experts = sum(p.numel() for _, p in _experts(empty))
    linears = sum(layer.weight.numel() for _, layer in _quantised_linears(empty))
    return Counts(experts, linears, sum(p.numel() for p in empty.parameters()) - experts - linears)


def require_memory(
    model: ModelSettings,
    lora: LoraSettings | None = None,
    training: TrainingSettings | None = None,
    config: PretrainedConfig | None = None,
) -> Footprint | None:
    """Fail before anything is loaded when the GPU has too little free memory. Does nothing without a CUDA device.

    Args:
        lora, training: what will be trained; without them, room for the loaded model alone is asked for.
        config: the base model's configuration; None: it is read from `model.base_model`.

    Returns:
        What is needed; None without a CUDA device, or when the configuration is none of a language model (loading will
        say why).

    Raises:
        StepError: it does not fit. The message says what is needed, part by part, what there is, and which shipped
            preset of the same base model fits.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    if (config := config or _read_config(model)) is None:
        return None
    try:
        needed, free = footprint(config, lora, training, model), free_memory()
    except ValueError:  # transformers has no causal language model of this architecture.
        return None
    if needed.total <= free:
        return needed
    what = "Training on" if training else "Loading"
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.parts().items())
    raise StepError(
        f"{what} {model.base_model} with these settings needs {_gib(needed.total)} GiB of GPU memory, and "
        f"{device_name()} has {_gib(free)} GiB free. In GiB: {parts}. {advice(model.base_model, config, free)}"
    )


def device_name() -> str:
    """The device at hand and how much memory it has, for messages."""
    import torch

    if not torch.cuda.is_available():
        return "the CPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name} ({properties.total_memory / GIB:.0f} GiB)"


def free_memory() -> int:
    """Bytes that this process can still have on its CUDA device: what is free there, and what PyTorch holds without
    using it, within the share of the device that the process was allowed."""
    import torch

    device = int(os.environ.get("LOCAL_RANK", 0))
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return min(free, int(share * total) - used)


def advice(base_model: str, config: PretrainedConfig, free: int) -> str:
    """One sentence: which shipped preset of the same base model fits into `free` bytes, the most capable one first."""
    # A directory is known by its last part: nobody needs a model's weights to be told which preset fits.
    of_this_model = {
        name: footprint(config, lora, training, model).total
        for name, (model, lora, training) in shipped_presets().items()
        if Path(model.base_model).name.lower() == Path(base_model).name.lower()
    }
    fitting = {name: needed for name, needed in of_this_model.items() if needed <= _USABLE * free}
    if fitting:
        best = max(fitting, key=lambda name: fitting[name])
        return f"The preset {best} fits: it needs {_gib(fitting[best])} GiB (TRITON_SFT_PRESET={best})."
    return (
        "No shipped preset of this base model fits: free the GPU, take a larger one, or lower lora.expert_r, lora.r "
        "or training.max_length."
    )


def shipped_presets() -> dict[str, tuple[ModelSettings, LoraSettings, TrainingSettings]]:
    """Name -> settings of the presets that ship with the package."""
    import yaml

    found = {}
    for path in sorted((Path(__file__).resolve().parents[1] / "presets").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        found[path.stem] = (
            ModelSettings(**values.get("model") or {}),
            LoraSettings(**values.get("lora") or {}),
            TrainingSettings(**values.get("training") or {}),
        )
    return found


def quantised_bytes(rows: int, columns: int, double: bool) -> int:
    """One matrix in 4 bits: two weights a byte, a scale for every 64 weights (float32; with double quantisation a byte,
    a float32 for every 256 of these and one more for their mean)."""
    blocks = math.ceil(rows * columns / _BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 if double else 4 * blocks
    return math.ceil(rows * columns / 2) + scales


def _base(empty: Any, model: ModelSettings) -> Footprint:
    return Footprint(
        experts=sum(p.shape[0] * _stored(p.shape[1:], model) for _, p in _experts(empty)),
        linears=sum(_stored(layer.weight.shape, model) for _, layer in _quantised_linears(empty)),
        others=_count(empty).others * _BYTES[model.compute_dtype],
    )


def _stored(shape: Any, model: ModelSettings) -> int:
    rows, columns = shape
    if model.load_in_4bit:
        return quantised_bytes(rows, columns, model.double_quant)
    return rows * columns * _BYTES[model.compute_dtype]


def _adapter_tensors(empty: Any, lora: LoraSettings) -> Iterator[int]:
    """Numbers in each tensor of the adapter: two factors a linear layer, two a fused expert tensor."""
    from triton_sft_pipeline.training.lora import FUSED_EXPERTS

    for name, layer in _quantised_linears(empty):
        if name.rsplit(".", 1)[-1] in lora.target_modules:
            yield from (lora.r * columns for columns in layer.weight.shape)
    for name, parameter in _experts(empty):
        if FUSED_EXPERTS[name.rsplit(".", 1)[-1]][0] in lora.target_modules:
            number, *sides = parameter.shape
            yield from (number * (lora.expert_r or lora.r) * columns for columns in sides)


def _optimiser_state(numbers: int, optim: str, width: int) -> int:
    """Two moments: in the adapter's own type, or in 8 bits with a float32 scale for each block."""
    if "8bit" not in optim or numbers < _SMALLEST_8BIT:
        return 2 * numbers * (4 if "8bit" in optim else width)
    return 2 * (numbers + 4 * math.ceil(numbers / _OPTIMISER_BLOCK))


def _empty_model(config: PretrainedConfig) -> Any:
    config = copy.deepcopy(config)
    # That of a loaded model says how it was quantised, which is asked for anew here.
    config.__dict__.pop("quantization_config", None)
    return empty_model(config)


def _experts(empty: Any) -> list[tuple[str, Any]]:
    from triton_sft_pipeline.training.lora import FUSED_EXPERTS

    return [
        (name, parameter)
        for name, parameter in empty.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in FUSED_EXPERTS and ".experts." in name
    ]


def _quantised_linears(empty: Any) -> list[tuple[str, Any]]:
    from torch import nn

    return [
        (name, module)
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(NOT_QUANTISED)
    ]


def _read_config(model: ModelSettings) -> PretrainedConfig | None:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.base_model, revision=model.revision)
    except (OSError, ValueError):
        return None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
