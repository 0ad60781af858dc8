"""LoRA on packed experts: PEFT's own adapter on a 3-D parameter, with its names and shapes, but computed from factors.

PEFT's `ParamWrapper` adds the delta weight to the parameter before the experts run: for that it must be float, the
whole delta is made, and dropout is impossible. `ExpertAdapter` keeps everything of it that a file or another part of
PEFT can see and hands the factors to `experts.math` instead. Two of them are nested around a `PackedExperts`, the one
for gate_up_proj inside and the one for down_proj outside, which is the order that PEFT's own injection has.

PEFT stores the factors of E experts side by side: A as [r * E, in] with row `e * r + i`, B as [out, r * E] with column
`i * E + e`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.experts.math import Factors, experts
from triton_sft_pipeline.training.experts.module import PROJECTIONS, PackedExperts

if TYPE_CHECKING:
    from peft import LoraConfig


class ExpertAdapter(ParamWrapper):  # type: ignore[misc]  # PEFT is untyped here
    """PEFT's adapter of one fused expert tensor, on experts in 4 bits or float.

    Args:
        base_layer: a `PackedExperts`, or the adapter of its other tensor.
        adapter_name: PEFT's name of the adapter.
        parameter_name: "gate_up_proj" or "down_proj".
        config: its `lora_dropout` is honoured, for each (token, expert) row.
        r: rank for each expert.
        lora_alpha: the scale is `lora_alpha / r`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
    ) -> None:
        # PEFT refuses dropout because it cannot have any here.
        without_dropout = copy.copy(config)
        without_dropout.lora_dropout = 0.0
        super().__init__(base_layer, adapter_name, parameter_name, config=without_dropout, r=r, lora_alpha=lora_alpha)
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(p=config.lora_dropout)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # In the order of the parameter's own shape, as the inherited one: `update_layer` swaps them.
        self.num_experts, rows, columns = self.get_base_layer().shape_of(self.parameter_name)
        self._param_ndim = 3
        return rows, columns

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but the first weights are drawn where the experts lie: two billion numbers at rank 64 take a CPU
        half a minute."""
        with self.get_param().device:
            super().update_layer(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The inherited one goes by the parameter's type, which is uint8 once packed.
        base = self.get_base_layer()
        device = device or self.get_param().device
        for layers in (self.lora_A, self.lora_B):
            if adapter_name in layers and layers[adapter_name].weight.device.type != "meta":
                layers[adapter_name] = layers[adapter_name].to(device, dtype=base.compute_dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **options: Any) -> Tensor:
        """The experts' output [N, H] with the adapters of both tensors, whichever is nested around which."""
        self._check_forward_args(hidden_states, **options)
        module, gate_up, down = _factors(self, self.training, contiguous=False)
        return experts(module, hidden_states, top_k_index, top_k_weights, gate_up, down)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the adapter into float experts, as PEFT does.

        Raises:
            StepError: the experts are in 4 bits, where a small change is lost in rounding.
        """
        self._require_float()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The delta weight [E, out, in] of float experts. Nothing here ever needs it but `merge`.

        Raises:
            StepError: the experts are in 4 bits.
        """
        self._require_float()
        delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
        return delta

    def _require_float(self) -> None:
        if self.get_base_layer().is_packed:
            raise StepError(
                f"An adapter cannot be merged into {self.parameter_name} in 4 bits: merge it into the unquantised base "
                "model with `triton-sft merge`."
            )

    def factors(self, training: bool, *, contiguous: bool = True) -> Factors | None:
        """The active adapter as factors, None when there is none or it is switched off. In training with dropout every
        call draws another seed, from the CPU's generator: checkpointing and resuming restore that one."""
        name = self._active_name()
        if name is None:
            return None
        b = self.lora_B[name].weight
        dropout = float(getattr(self.lora_dropout[name], "p", 0.0)) if training else 0.0
        return Factors(
            a=split_a(self.lora_A[name].weight, self.num_experts),
            b=split_b(b, self.num_experts) if contiguous else view_b(b, self.num_experts),
            scale=float(self.scaling[name]),
            dropout=dropout,
            seed=int(torch.randint(2**31, ())) if dropout else 0,
        )

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """A [r * E, in] and B [out, r * E] of the active adapter, as PEFT stores them; None when there is none or it is
        switched off."""
        name = self._active_name()
        return (None, None) if name is None else (self.lora_A[name].weight, self.lora_B[name].weight)

    def _active_name(self) -> str | None:
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) > 1:
            raise PipelineError(f"Experts take one adapter at a time, not {len(names)}: activate one of {names}.")
        return names[0] if names else None


def factors_of(experts_module: nn.Module, training: bool) -> tuple[PackedExperts, Factors | None, Factors | None]:
    """The experts under an adapter nest (or bare), and the factors of gate_up_proj and of down_proj.

    Factors are differentiable in the adapter's weights, `a` [E, r, in] a view and `b` [E, out, r] a contiguous copy.

    Args:
        experts_module: what stands at `mlp.experts`.
        training: whether dropout applies; each call then draws new seeds.
    """
    return _factors(experts_module, training, contiguous=True)


def parameters_of(experts_module: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The adapter's weights as PEFT stores them, A and B of gate_up_proj and A and B of down_proj; None where there is
    no adapter or it is switched off."""
    _, nest = _nest(experts_module)
    first, second = (nest[name].weights() if name in nest else (None, None) for name in PROJECTIONS)
    return *first, *second


def split_a(weight: Tensor, num_experts: int) -> Tensor:
    """[r * E, in] as PEFT stores it -> [E, r, in], a view."""
    return weight.reshape(num_experts, -1, weight.shape[-1])


def split_b(weight: Tensor, num_experts: int) -> Tensor:
    """[out, r * E] as PEFT stores it -> [E, out, r], contiguous."""
    return view_b(weight, num_experts).contiguous()


def view_b(weight: Tensor, num_experts: int) -> Tensor:
    """As `split_b` without the copy: what a backward pass keeps is then the parameter itself."""
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def join_a(a: Tensor) -> Tensor:
    """[E, r, in] -> [r * E, in]: the inverse of `split_a`."""
    return a.reshape(-1, a.shape[-1])


def wrap_experts(model: nn.Module, config: LoraConfig, adapter_name: str) -> int:
    """Put adapters around the packed experts of `model`, on each tensor that `config.target_parameters` names.

    Ranks and scales are those of `config`, `rank_pattern` and `alpha_pattern` included; adapters are made in the type
    that the experts compute in, and train.

    Args:
        model: the model, or the PeftModel that PEFT made of it. Changed in place.
        config: its `target_parameters` are ends of names, such as "experts.gate_up_proj".
        adapter_name: PEFT's name of the adapter.

    Returns:
        How many adapters were made: one a tensor.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    made = 0
    for name, module in found:
        wrapped: nn.Module = module
        for parameter in PROJECTIONS:
            key = f"{name}.{parameter}"
            if not any(key == target or key.endswith(f".{target}") for target in config.target_parameters or ()):
                continue
            rank, alpha = _rank_and_alpha(config, key)
            wrapped = ExpertAdapter(wrapped, adapter_name, parameter, config, r=rank, lora_alpha=alpha)
            made += 1
        if wrapped is not module:
            model.set_submodule(name, wrapped.train(module.training))
    return made


def _rank_and_alpha(config: LoraConfig, key: str) -> tuple[int, float]:
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
    return rank, alpha


def _factors(
    experts_module: nn.Module, training: bool, *, contiguous: bool
) -> tuple[PackedExperts, Factors | None, Factors | None]:
    module, nest = _nest(experts_module)
    first, second = (
        nest[name].factors(training, contiguous=contiguous) if name in nest else None for name in PROJECTIONS
    )
    return module, first, second


def _nest(experts_module: nn.Module) -> tuple[PackedExperts, dict[str, ExpertAdapter]]:
    nest: dict[str, ExpertAdapter] = {}
    module = experts_module
    while isinstance(module, ExpertAdapter):
        nest[module.parameter_name] = module
        module = module.base_layer
    if not isinstance(module, PackedExperts):
        raise StepError(f"{type(module).__name__} holds no packed experts: their adapters must be attached here.")
    return module, nest
