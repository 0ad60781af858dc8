"""Loading: what is quantised, what is not, and what is said when a model cannot be had."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training import model as model_module
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.progress import library_bars
from triton_sft_pipeline.training.settings import ModelSettings


def test_linear_layers_are_nf4_with_double_quantisation_and_router_and_head_are_not(afmoe: ModelSettings) -> None:
    import bitsandbytes as bnb
    import torch

    model, _ = load_model_and_tokenizer(afmoe)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    plain = {name for name, module in linears.items() if not isinstance(module, bnb.nn.Linear4bit)}
    assert plain == {"lm_head", "model.layers.1.mlp.router.gate"}
    for name in linears.keys() - plain:
        assert linears[name].weight.quant_type == "nf4"
        assert linears[name].weight.quant_state.nested, f"{name} is not double quantised"
        assert linears[name].compute_dtype == torch.float32
    assert not model.training


def test_the_model_is_left_whole_when_4_bits_are_switched_off(afmoe: ModelSettings) -> None:
    import bitsandbytes as bnb

    model, _ = load_model_and_tokenizer(afmoe.model_copy(update={"load_in_4bit": False}))
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def test_bitsandbytes_may_not_repack_weights_on_a_cpu(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    # What it finds on a CPU with AVX512-BF16.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, _ = load_model_and_tokenizer(afmoe)
    flags = [
        module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    assert flags
    assert not any(flags)


def test_a_missing_pad_token_is_set_to_the_end_of_turn(afmoe: ModelSettings, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(afmoe.base_model, tmp_path / "no_pad"))
    for name in ("tokenizer_config.json", "config.json"):
        values = json.loads((copied / name).read_text())
        values.pop("pad_token", None)
        values.pop("pad_token_id", None)
        (copied / name).write_text(json.dumps(values))
    model, tokenizer = load_model_and_tokenizer(afmoe.model_copy(update={"base_model": str(copied)}))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert model.config.pad_token_id == tokenizer.eos_token_id


def test_a_model_that_is_not_on_disk_is_named_with_the_fix() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(PipelineError, match=r"nobody/no-such-model.*hf download nobody/no-such-model.*HF_HUB_OFFLINE"):
        load_model_and_tokenizer(ModelSettings(base_model="nobody/no-such-model"))


@pytest.mark.parametrize("without", ["flash_attn", "a GPU"])
def test_flash_attention_that_cannot_run_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    import torch

    find = importlib.util.find_spec
    spec = None if without == "flash_attn" else find("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: spec if name == "flash_attn" else find(name, *rest)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fix = r"\[flash-attn\].*sdpa" if spec is None else "needs a CUDA device: set it to sdpa"
    with pytest.raises(PipelineError, match=fix):
        load_model_and_tokenizer(ModelSettings(base_model="nobody/none", attn_implementation="flash_attention_2"))


def test_a_model_with_no_layer_to_quantise_is_found_out(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "NOT_QUANTISED", ("lm_head", "router.gate", "proj"))
    with pytest.raises(StepError, match=r"no layer of .* was quantised: set it to false"):
        load_model_and_tokenizer(afmoe)


def test_a_quantised_router_is_found_out(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = model_module.quantisation

    def forgetful(*arguments: Any) -> Any:
        """A library that leaves the exceptions out."""
        config = asked(*arguments)
        config.llm_int8_skip_modules = ["lm_head"]
        return config

    monkeypatch.setattr(model_module, "quantisation", forgetful)
    with pytest.raises(StepError, match=r"router.gate was quantised to 4 bits"):
        load_model_and_tokenizer(afmoe)


def test_experts_that_a_library_left_whole_are_found_out(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = model_module.quantisation
    # What bitsandbytes does with experts when nobody helps it: nothing, without a word.
    monkeypatch.setattr(model_module, "quantisation", lambda settings, layout: asked(settings, None))
    with pytest.raises(StepError, match=r"experts model.layers.1.mlp.experts.gate_up_proj were not packed.*float32"):
        load_model_and_tokenizer(afmoe)


def test_experts_are_packed_and_a_dense_model_is_left_to_bitsandbytes(
    afmoe: ModelSettings, llama: ModelSettings
) -> None:
    from triton_sft_pipeline.training.experts.module import PackedExperts

    mixture, _ = load_model_and_tokenizer(afmoe)
    packed = [module.is_packed for module in mixture.modules() if isinstance(module, PackedExperts)]
    assert packed == [True]
    dense, _ = load_model_and_tokenizer(llama)
    assert not any(isinstance(module, PackedExperts) for module in dense.modules())
    assert dense.config.quantization_config.quant_method == "bitsandbytes"
    assert mixture.quantization_method == dense.quantization_method


def test_experts_left_in_float_are_the_same_numbers_in_the_same_module(afmoe: ModelSettings) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from triton_sft_pipeline.training.experts.module import PackedExperts

    model, _ = load_model_and_tokenizer(afmoe.model_copy(update={"load_in_4bit": False}))
    stock = AutoModelForCausalLM.from_pretrained(afmoe.base_model, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert not experts.is_packed
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(experts.weight(name), stock.model.layers[1].mlp.experts.get_parameter(name))


def test_a_dense_checkpoint_with_missing_extra_or_misshapen_tensors_is_refused_by_their_names(
    llama: ModelSettings, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    def spoilt(change: dict[str, Any]) -> ModelSettings:
        copied = Path(shutil.copytree(llama.base_model, tmp_path / str(len(list(tmp_path.iterdir())))))
        tensors = {**load_file(copied / "model.safetensors"), **change}
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, copied / "model.safetensors", {"format": "pt"})
        return llama.model_copy(update={"base_model": str(copied), "load_in_4bit": False})

    with pytest.raises(PipelineError, match=r"lacks model.layers.1.mlp.up_proj.weight\."):
        load_model_and_tokenizer(spoilt({"model.layers.1.mlp.up_proj.weight": None}))
    with pytest.raises(PipelineError, match=r"unknown to it: model.layers.1.mlp.side_proj.weight\."):
        load_model_and_tokenizer(spoilt({"model.layers.1.mlp.side_proj.weight": torch.ones(2)}))
    with pytest.raises(PipelineError, match=r"another shape: model.norm.weight\."):
        load_model_and_tokenizer(spoilt({"model.norm.weight": torch.ones(2)}))


@pytest.mark.parametrize("rank", [None, "3"])
def test_a_process_of_several_loads_onto_its_own_gpu(
    afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch, rank: str | None
) -> None:
    import torch

    asked: list[Any] = []

    def from_pretrained(*_: object, **options: Any) -> None:
        asked.append(options["device_map"])
        raise PipelineError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("triton_sft_pipeline.training.memory.free_memory", lambda: 1 << 30)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(PipelineError, match="far enough"):
        load_model_and_tokenizer(afmoe)
    assert asked == [{"": int(rank or 0)}]


def test_a_gpu_without_room_for_the_model_is_found_before_loading(
    afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("triton_sft_pipeline.training.memory.free_memory", lambda: 1000)
    monkeypatch.setattr("triton_sft_pipeline.training.memory.device_name", lambda: "a small card")
    with pytest.raises(StepError, match=r"Loading .* needs .* a small card has 0.0 GiB free"):
        load_model_and_tokenizer(afmoe)


@pytest.mark.parametrize("where", ["an expert", "a linear layer", "a linear layer of a dense model"])
def test_running_out_of_gpu_memory_inside_a_conversion_is_said(
    afmoe: ModelSettings, llama: ModelSettings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    place = "experts.nf4.pack" if where == "an expert" else ""
    target = (
        f"triton_sft_pipeline.training.{place}"
        if place
        else "transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert"
    )
    monkeypatch.setattr(target, full)
    dense = where.endswith("dense model")
    # transformers collects errors of its own conversions and tells in a report which they were.
    said = (
        r"could not be quantised.*if memory was out, free the GPU"
        if dense
        else r"does not fit on the CPU: free the GPU"
    )
    with pytest.raises(StepError, match=said):
        load_model_and_tokenizer(llama if dense else afmoe)


def test_importing_the_loader_loads_no_torch() -> None:
    code = "import sys, triton_sft_pipeline.training.model; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_switch_of_the_libraries_progress_bars_is_left_as_it_was() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    try:
        for was, shown in [(True, False), (False, True)]:
            (logging.enable_progress_bar if was else logging.disable_progress_bar)()
            with library_bars(shown):
                assert logging.is_progress_bar_enabled() is shown
            assert logging.is_progress_bar_enabled() is was
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_a_directory_without_an_adapter_is_named(afmoe: ModelSettings, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"holds no adapter.*adapter_config.json"):
        load_model_and_tokenizer(afmoe, adapter=tmp_path)
