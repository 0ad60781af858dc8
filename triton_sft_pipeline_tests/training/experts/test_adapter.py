"""An adapter on packed experts is PEFT's adapter to the eye, and to the number, but honours dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.experts.adapter import (
    ExpertAdapter,
    factors_of,
    join_a,
    parameters_of,
    split_a,
    split_b,
    wrap_experts,
)
from triton_sft_pipeline.training.experts.module import PackedExperts
from triton_sft_pipeline.training.fast import ops
from triton_sft_pipeline_tests.training.experts.test_math import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    assert_close,
    new_experts,
    new_input,
    stock_experts,
)

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Layer(nn.Module):
    """Something that has experts where a decoder layer has them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts

    def forward(self, *inputs: Tensor) -> Any:
        return self.mlp.experts(*inputs)


def new_config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": TARGETS, **options})


def adapted(module: PackedExperts, **options: Any) -> Layer:
    """`module` in a layer, with a random adapter."""
    layer = Layer(module)
    config = new_config(**options)
    assert wrap_experts(layer, config, "default") == len(config.target_parameters)
    torch.manual_seed(4)
    for parameter in adapter_parameters(layer).values():
        nn.init.normal_(parameter, std=0.2)
    return layer


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if ".lora_" in name}


def stock_adapted(layer: Layer) -> Any:
    """Stock PEFT on transformers' own experts with the same numbers, base and adapter."""
    stock = get_peft_model(Layer(stock_experts(packed_in(layer))), new_config()).base_model.model
    theirs = adapter_parameters(stock)
    for name, parameter in adapter_parameters(layer).items():
        theirs[name].data = parameter.detach().to(theirs[name].dtype, copy=True)
    return stock


def packed_in(layer: Layer) -> PackedExperts:
    return factors_of(layer.mlp.experts, training=False)[0]


def gradients(layer: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    out = layer(*inputs)
    named = adapter_parameters(layer)
    found = torch.autograd.grad(out, list(named.values()), torch.randn(out.shape).to(out.dtype))
    return dict(zip(named, found, strict=True))


def test_names_shapes_and_trainability_are_those_of_stock_peft() -> None:
    ours = adapter_parameters(adapted(new_experts(packed=True)))
    theirs = adapter_parameters(get_peft_model(Layer(stock_experts(new_experts())), new_config()).base_model.model)
    shapes = [{name: (tuple(p.shape), p.requires_grad) for name, p in both.items()} for both in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert shapes[0]["mlp.experts.base_layer.lora_B.default.weight"] == ((2 * INTERMEDIATE, 2 * EXPERTS), True)


def test_a_new_adapter_has_pefts_first_weights_and_changes_nothing() -> None:
    module, inputs = new_experts(packed=True), new_input()
    before, layer = module(*inputs), Layer(module)
    torch.manual_seed(0)
    wrap_experts(layer, new_config(), "default")
    torch.manual_seed(0)
    stock = get_peft_model(Layer(stock_experts(module)), new_config()).base_model.model
    theirs = adapter_parameters(stock)
    # Drawn in the same order, the inner adapter first.
    for name, parameter in adapter_parameters(layer).items():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.equal(layer(*inputs), before)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
def test_outputs_and_gradients_are_those_of_stock_peft_on_a_float_copy(packed: bool) -> None:
    layer, inputs = adapted(new_experts(packed=packed)), new_input()
    stock = stock_adapted(layer)
    assert_close(layer(*inputs), stock(*inputs), 1e-5)
    ours, theirs = gradients(layer, inputs), gradients(stock, inputs)
    assert len(ours) == 4
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, 1e-4)


def test_in_bfloat16_gradients_are_within_a_percent_of_stock_peft_on_a_float_copy() -> None:
    layer = adapted(new_experts(torch.bfloat16, packed=True))
    reference = stock_adapted(layer).float()
    x, index, weights = new_input()
    ours = gradients(layer, (x.bfloat16(), index, weights))
    for name, gradient in gradients(reference, (x.bfloat16().float(), index, weights)).items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name].float() - gradient).norm() < 0.01 * gradient.norm(), name


def test_the_delta_of_the_factors_is_pefts_delta_weight() -> None:
    layer = adapted(new_experts(packed=True))
    stock = stock_adapted(layer)
    _, *factors = factors_of(layer.mlp.experts, training=False)
    for ours, wrapper in zip(factors, (stock.mlp.experts.base_layer, stock.mlp.experts), strict=True):
        assert type(wrapper) is ParamWrapper
        assert ours is not None
        assert (ours.scale, ours.dropout) == (3.0, 0.0)
        assert_close(ours.scale * ours.b @ ours.a, wrapper.get_delta_weight("default"), 1e-6)


def test_factors_and_stored_weights_are_each_others_inverse() -> None:
    a, b = torch.randn(2 * EXPERTS, HIDDEN), torch.randn(INTERMEDIATE, 2 * EXPERTS)
    assert split_a(a, EXPERTS).shape == (EXPERTS, 2, HIDDEN)
    assert split_b(b, EXPERTS).shape == (EXPERTS, INTERMEDIATE, 2)
    assert split_b(b, EXPERTS).is_contiguous()
    assert torch.equal(join_a(split_a(a, EXPERTS)), a)
    assert torch.equal(ops.join_b(split_b(b, EXPERTS)), b)


def test_the_weights_of_a_nest_are_the_parameters_in_pefts_order() -> None:
    layer = adapted(new_experts(packed=True))
    named = adapter_parameters(layer)
    prefixes = ("mlp.experts.base_layer.", "mlp.experts.")
    names = [f"{prefix}lora_{factor}.default.weight" for prefix in prefixes for factor in "AB"]
    for ours, name in zip(parameters_of(layer.mlp.experts), names, strict=True):
        assert ours is named[name]
    assert parameters_of(new_experts()) == (None, None, None, None)


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    layer, inputs = adapted(new_experts(packed=True), lora_dropout=0.5), new_input()
    plain = adapted(new_experts(packed=True))
    layer.train()
    assert not torch.equal(layer(*inputs), layer(*inputs))
    layer.eval()
    assert torch.equal(layer(*inputs), layer(*inputs))
    assert torch.equal(layer(*inputs), plain(*inputs))


def test_dropout_follows_the_random_state_and_differs_between_the_two_tensors() -> None:
    layer, inputs = adapted(new_experts(packed=True), lora_dropout=0.5), new_input()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(layer(*inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    _, gate_up, down = factors_of(layer.mlp.experts, training=True)
    assert gate_up is not None
    assert down is not None
    assert (gate_up.dropout, down.dropout) == (0.5, 0.5)
    assert gate_up.seed != down.seed
    _, again, _ = factors_of(layer.mlp.experts, training=True)
    assert again is not None
    assert again.seed != gate_up.seed


def test_without_dropout_no_random_number_is_drawn() -> None:
    layer, inputs = adapted(new_experts(packed=True)), new_input()
    before = torch.random.get_rng_state()
    layer.train()(*inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_mean_over_masks_is_the_output_without_dropout() -> None:
    """On the tensor that comes last, where dropout is linear."""
    options = {"target_parameters": TARGETS[1:]}
    inputs = new_input()
    whole = adapted(new_experts(), **options)(*inputs)
    layer = adapted(new_experts(), lora_dropout=0.5, **options)
    mean = torch.stack([layer(*inputs) for _ in range(400)]).mean(0)
    assert (mean - whole).norm() < 0.1 * whole.norm()
    assert (layer(*inputs) - whole).norm() > 0.2 * whole.norm()


def test_the_adapters_weights_are_kept_for_the_backward_pass_as_they_are() -> None:
    """Not as copies in another order: at rank 64 those of one layer of Trinity-Mini take 67 MB."""
    layer = adapted(new_experts(packed=True))
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*new_input())
    stored = {p.untyped_storage().data_ptr() for p in adapter_parameters(layer).values()}
    assert len(stored) == 4
    assert stored <= kept


def test_checkpointing_on_and_off_agree_with_dropout() -> None:
    results = []
    for checkpointed in (False, True):
        layer = adapted(new_experts(packed=True), lora_dropout=0.4)
        x, index, weights = new_input()
        inputs = (x.requires_grad_(), index, weights.requires_grad_())
        torch.manual_seed(0)
        # The second call draws other masks than the first, and both are drawn again in the backward pass.
        out = inputs[0]
        for _ in range(2):
            call = (out, *inputs[1:])
            out = checkpoint(layer, *call, use_reentrant=False) if checkpointed else layer(*call)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        found = {name: p.grad for name, p in adapter_parameters(layer).items()}
        results.append({**found, "out": out, "x": x.grad, "weights": weights.grad})
    assert len(results[0]) == 7
    for name, value in results[0].items():
        assert value is not None
        assert torch.equal(value, results[1][name]), name


def test_a_disabled_adapter_gives_the_base() -> None:
    module, inputs = new_experts(packed=True), new_input()
    base = module(*inputs)
    layer = adapted(module, lora_dropout=0.5)
    assert not torch.equal(layer(*inputs), base)
    for wrapper in layer.modules():
        if isinstance(wrapper, ExpertAdapter):
            wrapper.enable_adapters(False)
    assert torch.equal(layer(*inputs), base)
    assert factors_of(layer.mlp.experts, training=True)[1:] == (None, None)
    assert parameters_of(layer.mlp.experts) == (None, None, None, None)


@pytest.mark.parametrize("target", TARGETS)
def test_one_tensor_alone_can_have_an_adapter(target: str) -> None:
    layer, inputs = adapted(new_experts(packed=True), target_parameters=[target]), new_input()
    assert len(adapter_parameters(layer)) == 2
    _, *factors = factors_of(layer.mlp.experts, training=False)
    assert [factor is not None for factor in factors] == [target == name for name in TARGETS]
    assert not torch.equal(layer(*inputs), packed_in(layer)(*inputs))
    assert all(gradient.any() for gradient in gradients(layer, inputs).values())


def test_every_tensor_gets_a_gradient() -> None:
    layer = adapted(new_experts(packed=True), lora_dropout=0.1)
    found = gradients(layer, new_input())
    assert len(found) == 4
    assert all(gradient.any() for gradient in found.values())


def test_ranks_and_scales_come_from_the_patterns() -> None:
    config = new_config(
        rank_pattern={r"experts\.gate_up_proj": 4}, alpha_pattern={r"experts\.gate_up_proj": 2}, r=3, lora_alpha=6
    )
    layer = Layer(new_experts(packed=True))
    wrap_experts(layer, config, "default")
    _, gate_up, down = factors_of(layer.mlp.experts, training=False)
    assert gate_up is not None
    assert down is not None
    assert (gate_up.a.shape[1], gate_up.scale) == (4, 0.5)
    assert (down.a.shape[1], down.scale) == (3, 2.0)


def test_adapters_are_made_in_the_type_that_the_experts_compute_in() -> None:
    layer = adapted(new_experts(torch.bfloat16, packed=True))
    assert {parameter.dtype for parameter in adapter_parameters(layer).values()} == {torch.bfloat16}


def test_an_adapter_of_another_type_than_the_experts_is_cast_and_keeps_its_gradients_type() -> None:
    layer, inputs = adapted(new_experts(torch.bfloat16, packed=True)), new_input(torch.bfloat16)
    single = copy.deepcopy(layer)
    for parameter in adapter_parameters(single).values():
        parameter.data = parameter.data.float()
    assert torch.equal(layer(*inputs), single(*inputs))
    assert {gradient.dtype for gradient in gradients(single, inputs).values()} == {torch.float32}


def test_merging_into_float_experts_gives_the_same_output() -> None:
    layer, inputs = adapted(new_experts()), new_input()
    before = layer(*inputs)
    for wrapper in (layer.mlp.experts.base_layer, layer.mlp.experts):
        wrapper.merge()
    assert_close(layer(*inputs), before, 1e-5)
    assert_close(packed_in(layer)(*inputs), before, 1e-5)


def test_merging_into_packed_experts_is_refused() -> None:
    layer = adapted(new_experts(packed=True))
    with pytest.raises(StepError, match=r"down_proj in 4 bits: merge it into the unquantised .*triton-sft merge"):
        layer.mlp.experts.merge()
    with pytest.raises(StepError, match=r"gate_up_proj in 4 bits"):
        layer.mlp.experts.base_layer.get_delta_weight("default")


def test_two_active_adapters_are_refused() -> None:
    layer = adapted(new_experts(packed=True))
    wrapper = layer.mlp.experts
    wrapper.update_layer("other", 2, lora_alpha=4, config=new_config())
    wrapper.set_adapter(["default", "other"])
    with pytest.raises(PipelineError, match=r"one adapter at a time, not 2"):
        layer(*new_input())
    wrapper.set_adapter("other")
    _, _, down = factors_of(wrapper, training=False)
    assert down is not None
    assert down.scale == 2.0


def test_experts_that_are_not_packed_experts_are_named() -> None:
    with pytest.raises(StepError, match=r"AfmoeExperts holds no packed experts"):
        factors_of(stock_experts(new_experts()), training=False)
