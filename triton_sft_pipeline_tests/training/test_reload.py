"""The adapter on disk is the one that was trained, for this project and for anybody's PEFT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.reload import Reloaded, probe_loss, reload_adapter
from triton_sft_pipeline.training.settings import ModelSettings
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.training.setups import Setup, adapter_weights


@pytest.fixture
def copied(trained: TrainingRun, tmp_path: Path) -> Path:
    """A trained adapter that a test may break."""
    ignore = shutil.ignore_patterns("checkpoint-*", "runs")
    return Path(shutil.copytree(trained.adapter_dir, tmp_path / "adapter", ignore=ignore))


def assert_same_logits(run: TrainingRun, settings: ModelSettings) -> None:
    import torch

    reloaded, tokenizer = load_model_and_tokenizer(settings, adapter=run.adapter_dir)
    tokens = torch.tensor([tokenizer("def kernel(): softmax of rows")["input_ids"]])
    assert not reloaded.training
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())
    with torch.no_grad():
        logits = reloaded(tokens).logits
        assert torch.equal(logits, run.model(tokens).logits)
        with reloaded.disable_adapter():
            assert (reloaded(tokens).logits - logits).abs().max() > 0.1


def test_the_reloaded_model_is_the_trained_one_to_the_bit(setup: Setup, trained: TrainingRun) -> None:
    # TRL alone would have made it bfloat16, beside a base model in float32.
    assert {str(value.dtype) for value in adapter_weights(trained.adapter_dir).values()} == {"torch.float32"}
    assert_same_logits(trained, setup.model)
    check = reload_adapter(trained.adapter_dir, setup.model)
    assert check.recorded == check.reloaded
    assert check.agrees


def test_every_tensor_of_the_adapter_moves(setup: Setup, trained: TrainingRun) -> None:
    from peft import get_peft_model_state_dict
    from transformers import set_seed

    set_seed(setup.training.seed)
    first = attach_lora(load_model_and_tokenizer(setup.model)[0], create_lora_config(setup.lora))
    before, after = get_peft_model_state_dict(first), adapter_weights(trained.adapter_dir)
    assert before.keys() == after.keys()
    assert len(after) == 2 * 18
    for name, value in after.items():
        assert (value - before[name]).abs().max() > 1e-3, name


def test_the_experts_were_trained_in_4_bits_with_dropout(trained: TrainingRun) -> None:
    from triton_sft_pipeline.training.experts.adapter import ExpertAdapter

    wrappers = [module for module in trained.model.modules() if isinstance(module, ExpertAdapter)]
    assert [wrapper.lora_dropout["default"].p for wrapper in wrappers] == [0.1, 0.1]
    assert all(wrapper.get_base_layer().is_packed for wrapper in wrappers)
    saved = json.loads((trained.adapter_dir / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0.0
    assert json.loads((trained.adapter_dir / "training_log.json").read_text())["dropout"] == 0.1


def test_a_bfloat16_adapter_is_reloaded_to_the_bit(setup: Setup, tmp_path: Path) -> None:
    setup = setup.but(model={"compute_dtype": "bfloat16"})
    run = setup.train(tmp_path)
    assert {str(value.dtype) for value in adapter_weights(tmp_path).values()} == {"torch.bfloat16"}
    assert_same_logits(run, setup.model)


def test_a_dense_adapter_is_reloaded_to_the_bit(setup: Setup, llama: ModelSettings, tmp_path: Path) -> None:
    assert_same_logits(setup.but(model=llama.model_dump()).train(tmp_path), llama)


def test_an_adapter_that_changed_on_disk_does_not_agree(setup: Setup, copied: Path) -> None:
    from safetensors.torch import save_file

    nothing = {name: value * 0 for name, value in adapter_weights(copied).items()}
    save_file(nothing, str(copied / "adapter_model.safetensors"))
    assert not reload_adapter(copied, setup.model).agrees


def test_the_probe_is_taken_in_evaluation_mode_and_leaves_the_mode_as_it_was(setup: Setup, copied: Path) -> None:
    import torch

    model, _ = load_model_and_tokenizer(setup.model, adapter=copied)
    probe = json.loads((copied / "training_log.json").read_text())["probe"]
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    model.train()
    assert probe_loss(model, probe["input_ids"]) == probe["loss"]
    assert model.training


def test_a_loss_that_is_no_number_does_not_agree() -> None:
    assert Reloaded(recorded=1.0, reloaded=1.005).agrees
    assert not Reloaded(recorded=1.0, reloaded=1.1).agrees
    assert not Reloaded(recorded=float("nan"), reloaded=float("nan")).agrees


def test_a_directory_that_training_did_not_write_is_named(setup: Setup, copied: Path) -> None:
    (copied / "training_log.json").unlink()
    with pytest.raises(PipelineError, match=r"training_log.json is missing"):
        reload_adapter(copied, setup.model)


def test_an_adapter_without_weights_is_named(setup: Setup, copied: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"adapter_model.safetensors is missing: the adapter is incomplete"):
        load_model_and_tokenizer(setup.model, adapter=copied)


def test_an_adapter_that_lost_a_tensor_is_named(setup: Setup, copied: Path) -> None:
    from safetensors.torch import save_file

    weights = adapter_weights(copied)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, str(copied / "adapter_model.safetensors"))
    with pytest.raises(PipelineError, match=rf"1 adapter tensors are on one side only, the first is {lost}"):
        load_model_and_tokenizer(setup.model, adapter=copied)


def test_an_adapter_of_another_shape_is_named(setup: Setup, copied: Path) -> None:
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(PipelineError, match=r"lora_A.weight is \(4, 64\), the base model needs \(8, 64\)"):
        load_model_and_tokenizer(setup.model, adapter=copied)


def test_an_adapter_of_a_mixture_of_experts_is_refused_on_a_dense_model(
    trained: TrainingRun, llama: ModelSettings
) -> None:
    with pytest.raises(PipelineError, match=r"trained on a mixture of experts, which .*llama.* is not"):
        load_model_and_tokenizer(llama, adapter=trained.adapter_dir)


STOCK_RELOAD = """
import sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
for adapter in map(Path, sys.argv[1:]):
    assert AutoTokenizer.from_pretrained(adapter).pad_token == "<|pad|>"
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    probe = torch.load(adapter / "probe.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(probe["tokens"]).logits, probe["logits"], atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            assert (model(probe["tokens"]).logits - probe["logits"]).abs().max() > 0.1
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(probe["tokens"]).logits, probe["logits"], atol=1e-5, rtol=1e-4)
    print("same", adapter.name)
assert not [name for name in sys.modules if name.startswith("triton_sft_pipeline")]
"""


@pytest.mark.slow
def test_stock_peft_loads_the_adapters_with_the_logits_that_training_saw(
    setup: Setup, trained: TrainingRun, llama: ModelSettings, tmp_path: Path
) -> None:
    """In a process that never imports this project, alone and merged. With dropout and another rank on the experts; on
    MLPs alone; dense; and trained on NF4 weights (there the base is the numbers that those weights stand for)."""
    import torch

    whole = setup.but(model={"load_in_4bit": False})
    cases = {
        "experts": whole,
        "mlps": whole.but(lora={"target_modules": ("gate_proj", "up_proj", "down_proj")}),
        "dense": whole.but(model={"base_model": llama.base_model}),
    }
    runs = {name: case.train(tmp_path / name) for name, case in cases.items()}
    ignore = shutil.ignore_patterns("checkpoint-*", "runs")
    shutil.copytree(trained.adapter_dir, tmp_path / "quantised", ignore=ignore)
    move_to_dequantised_base(tmp_path / "quantised", setup.model, tmp_path / "base")
    tokens = torch.arange(20, 60)[None]
    for name, run in {**runs, "quantised": trained}.items():
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": run.model(tokens).logits}, tmp_path / name / "probe.pt")
    names = [*runs, "quantised"]
    command = [sys.executable, "-c", STOCK_RELOAD, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n") == [*(f"same {name}" for name in names), ""], done.stderr


def move_to_dequantised_base(adapter: Path, quantised: ModelSettings, base_dir: Path) -> None:
    """Write the base model with every NF4 weight replaced by its value, and make `adapter` one of that base."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    from triton_sft_pipeline.training.experts.module import PROJECTIONS, PackedExperts

    base = AutoModelForCausalLM.from_pretrained(quantised.base_model)
    replaced = []
    with torch.no_grad():
        for name, module in load_model_and_tokenizer(quantised)[0].named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                base.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
            elif isinstance(module, PackedExperts):
                assert module.is_packed
                replaced.append(name)
                for parameter in PROJECTIONS:
                    base.get_submodule(name).get_parameter(parameter).copy_(module.weight(parameter))
    assert replaced == ["model.layers.1.mlp.experts"]
    base.save_pretrained(base_dir)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base_dir)}))
