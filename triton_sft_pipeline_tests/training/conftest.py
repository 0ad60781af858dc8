"""Models small enough to train in a second: a two-layer AFMoE and a two-layer Llama with one tokenizer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.training.settings import ModelSettings
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.training.setups import WORDS, Setup, chat_row


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return [chat_row(word) for word in WORDS]


@pytest.fixture(scope="session")
def afmoe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense and one mixture-of-experts layer, 8 experts, untrained."""
    import torch

    from triton_sft_pipeline.training.tiny_base import Recipe, new_model, train_tokenizer

    torch.set_num_threads(1)
    turns = [turn["content"] for row in map(chat_row, WORDS) for turn in row["prompt"] + row["completion"]]
    tokenizer = train_tokenizer(turns, 320)
    directory = tmp_path_factory.mktemp("afmoe")
    new_model(tokenizer, Recipe(layers=2)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory, afmoe_dir: Path) -> Path:
    """A dense model, with the same tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(afmoe_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=12,
    )
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def afmoe(afmoe_dir: Path) -> ModelSettings:
    return ModelSettings(base_model=str(afmoe_dir), compute_dtype="float32")


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> ModelSettings:
    return ModelSettings(base_model=str(llama_dir), compute_dtype="float32")


@pytest.fixture(scope="session")
def setup(afmoe: ModelSettings, rows: list[dict[str, Any]]) -> Setup:
    import trl  # noqa: F401

    # The trainer collects garbage after every training: without the libraries' own million objects that takes no time.
    gc.collect()
    gc.freeze()
    return Setup(afmoe, {"train": rows[:6], "test": rows[6:]})


@pytest.fixture(scope="session")
def trained(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """What `setup` gives when nothing interrupts it. Tests share it: change neither the directory nor the model."""
    return setup.train(tmp_path_factory.mktemp("trained"))
