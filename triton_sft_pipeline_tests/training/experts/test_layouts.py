"""What an architecture calls its experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.experts.layouts import (
    AFMOE,
    empty_model,
    known_layout,
    released_shapes,
    require_known_experts,
)

TINY = Path(__file__).parents[3] / "data" / "tiny_base"


def _config(**changes: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(TINY)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _mixtral() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, intermediate_size=64,
    )  # fmt: skip


def test_the_released_names_are_those_of_a_checkpoint_with_a_tensor_for_each_expert() -> None:
    from safetensors import safe_open

    config = _config()
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert known_layout(config) is AFMOE
    assert released_shapes(config, AFMOE) == found
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in found


def test_a_head_tied_to_the_embeddings_is_no_tensor_of_its_own() -> None:
    names = set(released_shapes(_config(tie_word_embeddings=True), AFMOE))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_trinity_mini_has_the_tensors_and_the_numbers_it_was_released_with() -> None:
    from transformers import AfmoeConfig

    config = AfmoeConfig(
        vocab_size=200192, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=1024, num_hidden_layers=32,
        num_dense_layers=2, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, num_shared_experts=1, tie_word_embeddings=False,
    )  # fmt: skip
    shapes = released_shapes(config, AFMOE)
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    assert len(experts) == 30 * 128 * 3
    assert experts["model.layers.2.mlp.experts.127.down_proj.weight"] == (2048, 1024)
    assert sum(rows * columns for rows, columns in experts.values()) == 24_159_191_040


def test_an_architecture_nobody_knows_has_no_layout() -> None:
    assert known_layout(_mixtral()) is None
    assert known_layout(object()) is None


def test_an_unknown_mixture_of_experts_names_its_parameters() -> None:
    config = _mixtral()
    with pytest.raises(PipelineError) as raised:
        require_known_experts(empty_model(config), config, "some/mixture")
    message = str(raised.value)
    assert message.startswith("some/mixture (architecture qwen3_moe) has 6 parameters of stacked experts")
    assert "model.layers.*.mlp.experts.gate_up_proj (4, 64, 64)" in message
    assert "model.layers.*.mlp.experts.down_proj (4, 64, 32)" in message
    assert "(afmoe)" in message
    assert "load_in_4bit to false" in message


def test_known_experts_dense_models_and_convolutions_pass() -> None:
    import torch

    config = _config()
    require_known_experts(empty_model(config), config, "tiny")
    require_known_experts(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3), torch.nn.Linear(2, 2)), object(), "dense")


def test_the_tiny_base_is_of_the_known_architecture() -> None:
    assert json.loads((TINY / "config.json").read_text())["model_type"] == AFMOE.model_type
