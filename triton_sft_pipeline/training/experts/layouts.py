"""How an architecture names its routed experts: in memory, and in the checkpoint that its authors released."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


NOT_QUANTISED = ("lm_head", "router.gate")
"""Modules that stay in `compute_dtype`: the head, because the trainer's loss multiplies by its weight directly, and the
routers, because a rounding error there sends a token to another expert."""


@dataclass(frozen=True)
class ExpertLayout:
    """One architecture's routed experts.

    Args:
        model_type: what config.json calls the architecture.
        experts_class: the class of transformers that holds the fused parameters [E, out, in].
        released: for each fused parameter, the per-expert matrices of the released checkpoint that it is made of, in
            the order in which their rows stand in it.
    """

    model_type: str
    experts_class: str
    released: Mapping[str, tuple[str, ...]]

    def source_name(self, parameter: str, source: str, expert: int) -> str:
        """The name in the released checkpoint of one expert's matrix.

        Args:
            parameter: full name of the fused parameter, such as `model.layers.2.mlp.experts.gate_up_proj`.
            source: one of `released` of that parameter, such as `up_proj`.
            expert: its number.
        """
        return f"{parameter.rpartition('.')[0]}.{expert}.{source}.weight"


AFMOE = ExpertLayout("afmoe", "AfmoeExperts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
LAYOUTS = {layout.model_type: layout for layout in (AFMOE,)}


def known_layout(config: Any) -> ExpertLayout | None:
    """How the architecture of this model config names its routed experts; None when it has none that are known."""
    return LAYOUTS.get(getattr(config, "model_type", ""))


def require_known_experts(model: nn.Module, config: Any, name: str) -> None:
    """Fail on a model that has experts nobody here knows how to pack: they would stay whole without a word.

    Args:
        model: the model as its architecture makes it, which may be on the meta device.
        config: its config.
        name: what the user calls it.

    Raises:
        PipelineError: it has stacked parameters, 3-D and floating-point, that no known layout names. They are named,
            those of the layers once.
    """
    layout = known_layout(config)
    known = layout.released if layout is not None else {}
    stacked = {
        parameter: tuple(value.shape)
        for parameter, value in model.named_parameters()
        if value.dim() == 3
        and value.is_floating_point()
        and parameter.rpartition(".")[2] not in known
        # A convolution has a 3-D weight too, and is small.
        and not type(model.get_submodule(parameter.rpartition(".")[0])).__module__.startswith("torch.nn.")
    }
    if not stacked:
        return
    kinds = sorted({f"{re.sub(r'[.][0-9]+[.]', '.*.', each)} {shape}" for each, shape in stacked.items()})
    raise PipelineError(
        f"{name} (architecture {config.model_type}) has {len(stacked)} parameters of stacked experts that nobody here "
        f"knows how to pack in 4 bits: {', '.join(kinds)}. Choose one of the known mixtures of experts "
        f"({', '.join(sorted(LAYOUTS))}) or a dense model, or set model.load_in_4bit to false."
    )


def released_shapes(config: Any, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the released checkpoint, with one matrix for each expert.

    Args:
        config: the model's config.
        layout: its architecture's layout.
    """
    model = empty_model(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        sources = layout.released.get(name.rpartition(".")[2])
        if sources is None or value.dim() != 3:
            shapes[name] = tuple(value.shape)
            continue
        experts, rows, columns = value.shape
        for expert in range(experts):
            for source in sources:
                shapes[layout.source_name(name, source, expert)] = (rows // len(sources), columns)
    return shapes


def empty_model(config: Any) -> Any:
    """The model of a config with every tensor on the meta device: names and shapes, no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
