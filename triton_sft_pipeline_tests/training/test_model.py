"""Loading: what is quantised, what is not, and what is said when a model cannot be had."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
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
    from transformers import BitsAndBytesConfig

    class Forgetful(BitsAndBytesConfig):
        """A library that leaves the exceptions out."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "llm_int8_skip_modules": ["lm_head"]})

    monkeypatch.setattr("transformers.BitsAndBytesConfig", Forgetful)
    with pytest.raises(StepError, match=r"router.gate was quantised to 4 bits"):
        load_model_and_tokenizer(afmoe)


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
