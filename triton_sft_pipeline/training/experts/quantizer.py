"""Loading a model in 4 bits with its routed experts too: a quantisation method of this project, known to transformers
by the name `nf4_experts`.

Everything that bitsandbytes can do is left to it. What is added: the experts, which an architecture keeps as one 3-D
parameter a projection and bitsandbytes passes by, are packed one by one while they are read. A tensor of the released
checkpoint is read when its turn comes, goes to the device, is packed there and let go, so that neither the device nor
the host ever holds a float stack of experts.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.experts import nf4
from triton_sft_pipeline.training.experts.layouts import known_layout
from triton_sft_pipeline.training.experts.module import PROJECTIONS, ExpertStorage, PackedExperts, replace_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    Deferred: TypeAlias = torch.Tensor | Future[torch.Tensor] | Callable[[], torch.Tensor]

METHOD = "nf4_experts"
"""Name of the quantisation method."""


class PackedExpertsConfig(BitsAndBytesConfig):
    """What `BitsAndBytesConfig` says in 4 bits, for routed experts too. Takes the same options."""

    def __init__(self, **options: Any) -> None:
        options.pop("quant_method", None)
        super().__init__(**{"load_in_4bit": True, **options})
        # Set last: this is the name by which transformers finds the quantizer.
        self.quant_method = METHOD


class PackedExpertsQuantizer(Bnb4BitHfQuantizer):
    """Loads linear layers as bitsandbytes does and routed experts as `PackedExperts`."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, *arguments, **options)
        layout = known_layout(model.config)
        if layout is None:
            raise PipelineError(f"{METHOD} knows no experts of the architecture {model.config.model_type}.")
        settings = self.quantization_config
        replace_experts(
            model,
            layout,
            ExpertStorage(
                settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype
            ),
        )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether a parameter will be in 4 bits; transformers also plans memory by it."""
        module, _, name = param_name.rpartition(".")
        if name in PROJECTIONS and isinstance(model.get_submodule(module), PackedExperts):
            return True
        return bool(super().param_needs_quantization(model, param_name, **options))

    def update_weight_conversions(self, weight_conversions: list[Any], *arguments: Any) -> list[Any]:
        """Put lazy packing in the place of transformers' own stacking of experts.

        Args:
            weight_conversions: what transformers would do with the checkpoint's tensors.
            arguments: the model, since transformers 5.20 or so; not needed.
        """
        kept = [each for each in weight_conversions if not _makes_experts(each)]
        inherited: list[Any] = super().update_weight_conversions(kept, *arguments)
        return inherited + [self._lazy(each) for each in weight_conversions if _makes_experts(each)]

    def _lazy(self, conversion: Any) -> PackConverter:
        """The same tensors to the same parameter, packed instead of stacked."""
        settings = self.quantization_config
        made = PackConverter(
            # As they were given, in lists of our own: `source_patterns` have been rewritten in place by now.
            list(getattr(conversion, "_original_source_patterns", conversion.source_patterns)),
            list(getattr(conversion, "_original_target_patterns", conversion.target_patterns)),
            operations=[PackExperts(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)],
        )
        for name in ("scope_prefix", "base_model_prefix"):
            if hasattr(conversion, name):
                setattr(made, name, getattr(conversion, name))
        return made

    def get_quantize_ops(self) -> ConversionOps:
        """bitsandbytes' quantisation of a linear layer; packed experts pass."""
        return QuantizeLinears(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **options) or model
        # Linear layers are bitsandbytes': transformers, TRL and accelerate must treat the model as one of its.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return model


def _makes_experts(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and all(
        pattern.endswith(tuple(f"experts.{name}" for name in PROJECTIONS)) for pattern in conversion.target_patterns
    )


class LoadingFailed(BaseException):
    """Carries an error, its cause, out of transformers' loader, which collects every `Exception` of a conversion, goes
    on with the other tensors, and says in the end that there were some. For that reason it is not an `Exception`.
    """


@contextmanager
def _stopping() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LoadingFailed(str(error)) from error


class PackConverter(WeightConverter):
    """A conversion whose tensors are not read before its operation asks for them."""

    __slots__ = ()

    def materialize_tensors(self) -> dict[str, list[Deferred]]:
        """Hand over what was collected for each source pattern: as callables that read a tensor, as futures of a
        reading thread, or as tensors, whichever transformers collected. Nothing is read here.
        """
        collected = {pattern: list(tensors) for pattern, tensors in self.collected_tensors.items()}
        self.collected_tensors.clear()
        return collected


class PackExperts(ConversionOps):
    """Reads, packs and lets go one expert after the other.

    Args:
        quant_type: "nf4" or "fp4".
        double: quantise the scales too.
    """

    # Plain values only: transformers copies an operation, deeply, for every parameter that it makes.
    def __init__(self, quant_type: str, double: bool) -> None:
        self.quant_type = quant_type
        self.double = double

    def convert(
        self,
        input_dict: dict[str, list[Deferred]],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        full_layer_name: str = "",
        model: Any = None,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """Pack the experts of one layer and projection into their `PackedExperts`.

        Args:
            input_dict: for each source pattern (gate above up), one tensor for each expert, in their order.
            source_patterns: the patterns, in the order in which their rows stand.
            target_patterns: the pattern of the parameter, alone.
            full_layer_name: the parameter's full name.
            model: the model being loaded.
            options: what else transformers passes.

        Returns:
            The packed parameter under its pattern; its scales have been put into the module.

        Raises:
            LoadingFailed: whatever went wrong, as its cause: an expert is missing, or memory is out.
        """
        with _stopping():
            self._pack(input_dict, source_patterns, full_layer_name, model)
        return {target_patterns[0]: model.get_parameter(full_layer_name)}

    def _pack(
        self, input_dict: dict[str, list[Deferred]], source_patterns: Sequence[str], full_layer_name: str, model: Any
    ) -> None:
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        columns = [input_dict.pop(pattern, []) for pattern in source_patterns]
        for pattern, column in zip(source_patterns, columns, strict=True):
            if len(column) != module.num_experts:
                raise PipelineError(
                    f"{full_layer_name} is made of {module.num_experts} experts, but the checkpoint holds "
                    f"{len(column)} tensors {pattern}."
                )
        for expert in range(module.num_experts):
            # Taken out of the lists: a tensor must not live on in a future, or in the list itself.
            parts = []
            for column in columns:
                deferred, column[expert] = column[expert], None  # type: ignore[call-overload]
                parts.append(_read(deferred))
                del deferred
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]
            del parts
            module.install(name, expert, nf4.pack(weight, self.quant_type, self.double))
            del weight
        # Initialised: transformers must not fill it with random numbers.
        module._is_hf_initialized = True


def _read(deferred: Deferred) -> torch.Tensor:
    if isinstance(deferred, torch.Tensor):
        return deferred
    return deferred.result() if isinstance(deferred, Future) else deferred()


class QuantizeLinears(Bnb4bitQuantize):
    """bitsandbytes' quantisation on loading, which must not see experts: those are packed already."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Quantise linear layers, pass packed experts on.

        Raises:
            LoadingFailed: whatever went wrong, as its cause: memory is out, or experts have come as one float stack, as
                only a checkpoint in fused layout holds them.
        """
        with _stopping():
            return self._quantise(input_dict, options)

    def _quantise(self, input_dict: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        experts = [name for name in input_dict if name.rpartition(".")[2] in PROJECTIONS]
        if not experts:
            quantised: dict[str, Any] = super().convert(input_dict, **options)
            return quantised
        for name in experts:
            value = input_dict[name][0] if isinstance(input_dict[name], list) else input_dict[name]
            if value.dtype != torch.uint8:
                raise PipelineError(f"{name} is a stack of float experts: not the released checkpoint's layout.")
        return input_dict


def register() -> None:
    """Make transformers know the quantisation method. Harmless when it does already."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedExpertsConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedExpertsQuantizer)
