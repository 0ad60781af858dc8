"""The adapter reaches every layer that the original's did, on mixture-of-experts and dense models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training import lora as lora_module
from triton_sft_pipeline.training.lora import attach_lora, count_adapters, create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings

DENSE_AFMOE_LAYER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.gate_proj",
]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]


def adapted(model: Any) -> dict[str, Any]:
    """Name of each adapted layer or tensor -> its wrapper."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            name = name.removeprefix("base_model.model.model.").replace(".base_layer", "")
            found[f"{name}.{parameter}" if parameter else name] = module
    return found


def test_the_original_config_reaches_every_projection_of_an_afmoe(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    found = adapted(attach_lora(model, create_lora_config()))
    expected = {f"layers.{i}.{name}" for i in (0, 1) for name in DENSE_AFMOE_LAYER}
    expected |= {f"layers.0.mlp.{name}" for name in MLP} | {f"layers.1.mlp.shared_experts.{name}" for name in MLP}
    expected |= {"layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"}
    assert set(found) == expected
    assert len(found) == 18


def test_dropout_is_set_on_linear_layers_and_experts(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    for name, module in adapted(attach_lora(model, create_lora_config())).items():
        assert getattr(module.lora_dropout["default"], "p", 0.0) == 0.05, name


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_dropout_acts_in_training_and_not_in_evaluation(afmoe: ModelSettings, load_in_4bit: bool) -> None:
    import torch

    settings = afmoe.model_copy(update={"load_in_4bit": load_in_4bit})
    model = attach_lora(load_model_and_tokenizer(settings)[0], create_lora_config(LoraSettings(r=4, dropout=0.5)))
    layers = [module for name, module in adapted(model).items() if ".experts." not in name]
    assert len(layers) == 16
    torch.manual_seed(0)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        inputs = torch.randn(4, layer.in_features)
        with torch.no_grad():
            model.train()
            assert not torch.equal(layer(inputs), layer(inputs))
            model.eval()
            assert torch.equal(layer(inputs), layer(inputs))


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_dropout_acts_on_the_experts_alone_too(afmoe: ModelSettings, load_in_4bit: bool) -> None:
    import torch

    settings = afmoe.model_copy(update={"load_in_4bit": load_in_4bit})
    model = attach_lora(load_model_and_tokenizer(settings)[0], create_lora_config(LoraSettings(r=4, dropout=0.5)))
    layers = [module for name, module in adapted(model).items() if ".experts." in name]
    assert len(layers) == 2
    tokens = torch.arange(20, 60)[None]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        with torch.no_grad():
            model.train()
            assert not torch.equal(model(tokens).logits, model(tokens).logits)
            model.eval()
            assert torch.equal(model(tokens).logits, model(tokens).logits)
        torch.nn.init.zeros_(layer.lora_B["default"].weight)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_recomputing_activations_changes_no_gradient(afmoe: ModelSettings, load_in_4bit: bool) -> None:
    """With dropout: the backward pass draws the forward pass's masks again."""
    import torch

    settings = afmoe.model_copy(update={"load_in_4bit": load_in_4bit})
    tokens = torch.arange(20, 60)[None]
    found: list[dict[str, Any]] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = attach_lora(load_model_and_tokenizer(settings)[0], create_lora_config(LoraSettings(r=4, dropout=0.3)))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        if recompute:
            base = model.base_model.model
            enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            assert base.is_gradient_checkpointing
        torch.manual_seed(1)
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 2 * 18
    for name, gradient in found[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, found[1][name]), name


def test_a_disabled_adapter_gives_the_base(afmoe: ModelSettings) -> None:
    import torch

    tokens = torch.arange(20, 60)[None]
    base, _ = load_model_and_tokenizer(afmoe)
    with torch.no_grad():
        before = base(tokens).logits
        model = attach_lora(base, create_lora_config()).eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and ".experts." in name:
                torch.nn.init.normal_(parameter)
        assert not torch.equal(model(tokens).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, before)
        assert not torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_names_and_shapes_of_the_weights_are_those_of_stock_peft(afmoe: ModelSettings, load_in_4bit: bool) -> None:
    """Stock PEFT's, on the unquantised model, from the config that is saved."""
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    settings = afmoe.model_copy(update={"load_in_4bit": load_in_4bit})
    ours = attach_lora(load_model_and_tokenizer(settings)[0], create_lora_config(LoraSettings(r=4, expert_r=2)))
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(afmoe.base_model), ours.peft_config["default"])
    shapes = [
        {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
        for model in (ours, stock)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 2 * 18


def test_the_architectures_own_experts_are_replaced_where_loading_has_not(afmoe: ModelSettings) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(20, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(afmoe.base_model).eval()
    with torch.no_grad():
        before = base(tokens).logits
        model = attach_lora(base, create_lora_config())
        assert count_adapters(model) == 18
        torch.testing.assert_close(model.eval()(tokens).logits, before)


def test_experts_of_an_unknown_architecture_are_named() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    with pytest.raises(
        PipelineError, match=r"model.layers.0.mlp.experts.gate_up_proj, .*\(qwen3_moe\).* leave down_proj"
    ):
        attach_lora(Qwen3MoeForCausalLM(config), create_lora_config())


def test_a_new_adapter_changes_nothing_and_a_trained_one_reaches_every_layer(afmoe: ModelSettings) -> None:
    import torch

    tokens = torch.arange(20, 60)[None]
    base, _ = load_model_and_tokenizer(afmoe)
    with torch.no_grad():
        before = base(tokens).logits
        model = attach_lora(base, create_lora_config()).eval()
        assert torch.equal(model(tokens).logits, before)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
                assert not torch.equal(model(tokens).logits, before), name
                torch.nn.init.zeros_(parameter)


def test_ranks_and_scales_are_those_of_the_settings(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    found = adapted(attach_lora(model, create_lora_config(LoraSettings(r=16, alpha=32, expert_r=4))))
    for name, module in found.items():
        assert module.r["default"] == (4 if ".experts." in name else 16), name
        assert module.scaling["default"] == 2.0, name
    # PEFT keeps the factors of 8 experts side by side: 8 x 4.
    factors = {name: tuple(found[f"layers.1.mlp.experts.{name}"].lora_A["default"].weight.shape) for name in EXPERTS}
    assert factors == {"gate_up_proj": (32, 64), "down_proj": (32, 64)}


def test_without_an_expert_rank_experts_get_that_of_the_linear_layers(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    found = adapted(attach_lora(model, create_lora_config(LoraSettings(r=16, alpha=32))))
    assert {(module.r["default"], module.scaling["default"]) for module in found.values()} == {(16, 2.0)}


def test_the_callers_config_is_left_as_it_is(afmoe: ModelSettings) -> None:
    config = create_lora_config()
    before = config.to_dict()
    attach_lora(load_model_and_tokenizer(afmoe)[0], config)
    assert config.to_dict() == before


def test_only_the_adapter_is_trainable(afmoe: ModelSettings) -> None:
    peft_model = attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in peft_model.named_parameters())


def test_a_dense_model_keeps_pefts_own_config(llama: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(llama)
    peft_model = attach_lora(model, create_lora_config())
    assert count_adapters(peft_model) == 2 * 7
    config = peft_model.peft_config["default"]
    assert config.lora_dropout == 0.05
    assert not config.target_parameters
    assert set(config.target_modules) == set(LoraSettings().target_modules)


def test_attention_alone_leaves_the_experts_without_an_adapter(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    config = create_lora_config(LoraSettings(target_modules=("q_proj", "v_proj")))
    assert len(adapted(attach_lora(model, config))) == 4


def test_a_target_that_the_model_does_not_have_is_refused(llama: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(llama)
    with pytest.raises(PipelineError, match=r"lora.target_modules names query_key_value, but .*llama.* has no"):
        attach_lora(model, create_lora_config(LoraSettings(target_modules=("q_proj", "query_key_value"))))


@pytest.mark.parametrize("targets", ["all-linear", r".*q_proj", None])
def test_targets_that_are_not_a_list_of_names_are_refused(llama: ModelSettings, targets: str | None) -> None:
    model, _ = load_model_and_tokenizer(llama)
    config = create_lora_config()
    config.target_modules = targets
    with pytest.raises(PipelineError, match=r"must be a list of projection names"):
        attach_lora(model, config)


def test_half_of_a_fused_expert_tensor_is_refused(afmoe: ModelSettings) -> None:
    model, _ = load_model_and_tokenizer(afmoe)
    with pytest.raises(PipelineError, match=r"gate_proj without up_proj.*one tensor"):
        attach_lora(model, create_lora_config(LoraSettings(target_modules=("q_proj", "gate_proj"))))


def test_a_peft_that_drops_layers_is_found_out(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's rewrite as it is without our guard: it drops the attention gate, the shared experts and the dense MLP.
    monkeypatch.setattr(lora_module, "_targets_left_alone", lambda model: nullcontext())
    with pytest.raises(StepError, match=r"PEFT .*use the pinned version"):
        attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())


def test_an_adapter_too_few_is_found_out(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_sft_pipeline.training.experts import adapter

    monkeypatch.setattr(adapter, "wrap_experts", lambda *_: 0)
    with pytest.raises(StepError, match=r"PEFT attached 16 adapters .* calls for 18"):
        attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())


@pytest.fixture
def table() -> dict[str, Any]:
    """PEFT's private table of architectures whose targets it rewrites."""
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN

    assert "afmoe" in _MODEL_TO_CONVERSION_PATTERN
    return _MODEL_TO_CONVERSION_PATTERN


def test_pefts_table_is_put_back(afmoe: ModelSettings, table: dict[str, Any]) -> None:
    before = dict(table)
    attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())
    assert table == before


def test_pefts_table_is_put_back_when_attaching_fails(
    afmoe: ModelSettings, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    before, during = dict(table), []

    def fail(*_: Any) -> None:
        during.extend(table)
        raise RuntimeError("no adapter today")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    with pytest.raises(RuntimeError, match="no adapter today"):
        attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())
    assert table == before
    assert set(before) - set(during) == {"afmoe"}


def test_the_saved_config_asks_stock_peft_for_the_same_layers(afmoe: ModelSettings) -> None:
    """The spelling that PEFT's rewrite leaves alone: see the module's docstring."""
    model = attach_lora(load_model_and_tokenizer(afmoe)[0], create_lora_config())
    saved = model.peft_config["default"]
    assert set(saved.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sorted(saved.target_parameters) == [
        "down_proj.weight",
        "experts.down_proj",
        "experts.gate_up_proj",
        "gate_proj.weight",
        "up_proj.weight",
    ]
    assert saved.lora_dropout == 0.0
