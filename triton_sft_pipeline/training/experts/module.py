"""The routed experts of one layer: two 3-D parameters, packed in 4 bits or float, and the scales of the packed ones.

It stands where the architecture's own experts module stood, under the same names and called in the same way. Once
packed, a parameter keeps its name but becomes uint8 [E, out, in // 2]; the scales lie beside it as buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.experts import nf4
from triton_sft_pipeline.training.experts.math import experts
from triton_sft_pipeline.training.fast import twins

if TYPE_CHECKING:
    from collections.abc import Callable

    from triton_sft_pipeline.training.experts.layouts import ExpertLayout

PROJECTIONS = ("gate_up_proj", "down_proj")
"""The two parameters: gate rows above up rows in one, and the way back to the hidden size."""


@dataclass(frozen=True)
class ExpertStorage:
    """How experts are kept.

    Args:
        quant_type: "nf4" or "fp4".
        double: quantise the scales too.
        compute_dtype: the type of the weights that computing sees.
    """

    quant_type: str = "nf4"
    double: bool = True
    compute_dtype: torch.dtype = torch.bfloat16


class PackedExperts(nn.Module):
    """All E routed experts of one layer; frozen.

    Attributes:
        gate_up_proj: uint8 [E, 2 * I, H // 2] when packed, else float [E, 2 * I, H].
        down_proj: uint8 [E, H, I // 2] when packed, else float [E, H, I].
        gate_up_proj_absmax, gate_up_proj_nested, gate_up_proj_offset, and the same for down_proj: persistent buffers
            [E, nb], [E, nn] and [E], there when packed (the last two with double quantisation only).
        num_experts, hidden_dim, intermediate_dim: E, H and I.
        act_fn: the activation between the two projections.
        is_transposed: False: a weight is [out, in]. PEFT asks for it.
        quant_type, double_quant, compute_dtype: as in `ExpertStorage` (nn.Module has a method `double`).

    Args:
        num_experts: E.
        hidden_dim: H.
        intermediate_dim: I.
        act_fn: the activation.
        storage: how experts are kept.
        device: where the float parameters are made; "meta" makes none.
    """

    is_transposed = False

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        storage: ExpertStorage,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.act_fn = act_fn
        self.quant_type = storage.quant_type
        self.double_quant = storage.double
        self.compute_dtype = storage.compute_dtype
        for name in PROJECTIONS:
            empty = torch.empty(self.shape_of(name), dtype=storage.compute_dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_experts(cls, experts: nn.Module, storage: ExpertStorage) -> Self:
        """Take over the parameters of the architecture's own experts module, which may be on the meta device.

        Args:
            experts: a module such as transformers' `AfmoeExperts`.
            storage: how experts are to be kept. Nothing is packed here.

        Raises:
            PipelineError: its activation is not the one this project computes with.
        """
        if not _is_silu(experts.act_fn):
            raise PipelineError(
                f"the experts of this model use the activation {experts.act_fn}: only SwiGLU experts (silu) are known."
            )
        made = cls(
            int(experts.num_experts),
            int(experts.hidden_dim),
            int(experts.intermediate_dim),
            experts.act_fn,
            storage,
            device="meta",
        )
        for name in PROJECTIONS:
            made.register_parameter(name, experts.get_parameter(name).requires_grad_(False))
        return made.train(experts.training)

    @property
    def is_packed(self) -> bool:
        """Whether both parameters are in 4 bits."""
        return all(self._is_packed(name) for name in PROJECTIONS)

    def _is_packed(self, name: str) -> bool:
        return self.get_parameter(name).dtype == torch.uint8

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """(E, out, in) of the weights that `name` stands for, packed or not."""
        if name == "gate_up_proj":
            return self.num_experts, 2 * self.intermediate_dim, self.hidden_dim
        if name == "down_proj":
            return self.num_experts, self.hidden_dim, self.intermediate_dim
        raise KeyError(f"experts have {' and '.join(PROJECTIONS)}, not {name}")

    def weight(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weights of all experts, [E, out, in] in `compute_dtype`.

        Args:
            name: "gate_up_proj" or "down_proj".
            out: where packed weights are unpacked to, [E, out, in] in `compute_dtype`; None: a new tensor.

        Returns:
            `out` or a new tensor when packed; the parameter itself (cast when it must be) when not.
        """
        parameter = self.get_parameter(name)
        if not self._is_packed(name):
            return parameter.to(self.compute_dtype)
        scales = self.scales(name)
        return nf4.unpack(parameter.data, *scales, self.quant_type, self.compute_dtype, out)

    def scales(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """absmax [E, nb], nested [E, nn] and offset [E] of a packed parameter; the last two None without double."""
        absmax = self.get_buffer(f"{name}_absmax")
        if not self.double_quant:
            return absmax, None, None
        return absmax, self.get_buffer(f"{name}_nested"), self.get_buffer(f"{name}_offset")

    def install(self, name: str, expert: int, packed: nf4.Packed) -> None:
        """Put one packed expert in its place. The first one makes the packed parameter, on the device it lies on.

        Args:
            name: "gate_up_proj" or "down_proj".
            expert: its number.
            packed: the matrix [out, in] of `shape_of(name)`, packed.
        """
        if not self._is_packed(name):
            self._make_packed(name, packed.codes.device)
        self.get_parameter(name).data[expert] = packed.codes
        for buffer, value in zip(self.scales(name), (packed.absmax, packed.nested, packed.offset), strict=True):
            if buffer is not None and value is not None:
                buffer[expert] = value

    def _make_packed(self, name: str, device: torch.device) -> None:
        experts, rows, columns = self.shape_of(name)
        blocks = rows * columns // nf4.BLOCK
        codes = torch.empty((experts, rows, columns // 2), dtype=torch.uint8, device=device)
        self._take(name, nn.Parameter(codes, requires_grad=False))
        kind = torch.uint8 if self.double_quant else torch.float32
        self._keep(f"{name}_absmax", torch.empty((experts, blocks), dtype=kind, device=device))
        if self.double_quant:
            nested = math.ceil(blocks / nf4.NESTED_BLOCK)
            self._keep(f"{name}_nested", torch.empty((experts, nested), dtype=torch.float32, device=device))
            self._keep(f"{name}_offset", torch.empty((experts,), dtype=torch.float32, device=device))

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        # The mark by which transformers knows that it must not fill a tensor with random numbers after loading.
        parameter._is_hf_initialized = True
        self.register_parameter(name, parameter)

    def _keep(self, name: str, buffer: torch.Tensor) -> None:
        # Persistent, because transformers makes non-persistent buffers anew, and empty, once everything is loaded.
        buffer._is_hf_initialized = True
        self.register_buffer(name, buffer, persistent=True)

    def fill_random(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Become packed experts of random numbers, on the generator's device, without ever holding float ones.

        Codes are uniform, block scales vary by a fifth around a mean.

        Args:
            generator: where the numbers come from.
            std: standard deviation of the weights, about.
        """
        device = generator.device
        scale = std / float(twins.code_tables(self.quant_type, device)[0].square().mean().sqrt())
        for name in PROJECTIONS:
            self._make_packed(name, device)
            self.get_parameter(name).data.random_(0, 256, generator=generator)
            absmax, nested, offset = self.scales(name)
            if nested is None or offset is None:
                absmax.uniform_(0.8 * scale, 1.2 * scale, generator=generator)
                continue
            absmax.random_(0, 256, generator=generator)
            nested.fill_(0.2 * scale)
            offset.fill_(scale)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What the chosen experts make of each token, weighted and summed.

        Args:
            hidden_states: [N, H].
            top_k_index: [N, k], the experts chosen for each token.
            top_k_weights: [N, k], their weights.

        Returns:
            [N, H], in the type of `hidden_states`.
        """
        return experts(self, hidden_states, top_k_index, top_k_weights, None, None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Keep scales in float32 when a model is cast: 4-bit numbers mean nothing without them."""
        scales = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._keep(name, before.to(after.device))
        if not self._is_packed("gate_up_proj"):
            self.compute_dtype = self.get_parameter("gate_up_proj").dtype
        return self

    def extra_repr(self) -> str:
        kept = self.quant_type if self.is_packed else str(self.compute_dtype)
        return f"{self.num_experts} experts, {self.hidden_dim} -> {self.intermediate_dim}, {kept}"


def _is_silu(activation: object) -> bool:
    return activation is nn.functional.silu or type(activation).__name__ in {"SiLU", "SiLUActivation"}


def replace_experts(model: nn.Module, layout: ExpertLayout, storage: ExpertStorage) -> int:
    """Put a `PackedExperts` in the place of every routed experts module of a model, still float, sharing its weights.

    Args:
        model: the model, on any device (also meta).
        layout: how its architecture names them.
        storage: how experts are to be kept.

    Returns:
        How many were replaced.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ == layout.experts_class]
    for name, module in found:
        model.set_submodule(name, PackedExperts.from_experts(module, storage))
    return len(found)
