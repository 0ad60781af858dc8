"""An adapter is put next to a base model by names and shapes, and what differs is said before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json, write_json
from triton_sft_pipeline.training.adapter_fit import check_adapter_fits, recorded_base, same_model
from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings

Changed = Callable[..., ModelSettings]


def saved(model: ModelSettings, directory: Path, **lora: Any) -> Path:
    """An adapter as training writes it."""
    loaded, _ = load_model_and_tokenizer(model.model_copy(update={"load_in_4bit": False}))
    attach_lora(loaded, create_lora_config(LoraSettings(**{"r": 4, "alpha": 8, **lora}))).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def dense(llama: ModelSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def mixture(afmoe: ModelSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(afmoe, tmp_path_factory.mktemp("mixture"), expert_r=2)


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A base like another one but for some values of its config; without any weights, which nobody may read."""

    def make(model: ModelSettings, **values: Any) -> ModelSettings:
        config = read_json(Path(model.base_model) / "config.json") | values
        # Lists with one entry a layer follow from the number of layers.
        config.pop("layer_types", None)
        (tmp_path / "changed").mkdir()
        write_json(tmp_path / "changed" / "config.json", config)
        return model.model_copy(update={"base_model": str(tmp_path / "changed")})

    return make


def refusal(adapter: Path, model: ModelSettings) -> dict[str, str]:
    """Label -> what differs, as the message says it."""
    with pytest.raises(PipelineError) as caught:
        check_adapter_fits(adapter, model)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{adapter} does not fit the base model {model.base_model}:"
    assert "--preset" in last and all(line.startswith("  ") for line in lines)
    assert caught.value.exit_code == 2
    rows: dict[str, str] = {}
    for line in lines:
        label, _, text = line.strip().partition("  ")
        if text:
            rows[label] = text.strip()
        else:
            rows[next(reversed(rows))] += " " + label
    return rows


def test_an_adapter_fits_the_model_that_it_was_trained_on(
    llama: ModelSettings, afmoe: ModelSettings, dense: Path, mixture: Path
) -> None:
    assert check_adapter_fits(dense, llama) is None
    assert check_adapter_fits(mixture, afmoe) is None


def test_an_adapter_on_some_projections_alone_fits_too(llama: ModelSettings, tmp_path: Path) -> None:
    assert check_adapter_fits(saved(llama, tmp_path / "a", target_modules=("q_proj", "v_proj")), llama) is None


def test_a_base_of_another_width_differs_in_every_kind_of_layer(
    llama: ModelSettings, dense: Path, changed: Changed
) -> None:
    said = refusal(dense, changed(llama, hidden_size=96, head_dim=24))
    assert said["trained on"] == llama.base_model
    assert said["q_proj"] == "64 to 64 in the adapter, 96 to 96 in the base"
    assert said["down_proj"] == "128 to 64 in the adapter, 128 to 96 in the base"
    assert set(said) == {"trained on", *(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))}


@pytest.mark.parametrize("layers", [1, 5])
def test_a_base_with_more_or_fewer_layers_differs_in_them_alone(
    llama: ModelSettings, dense: Path, changed: Changed, layers: int
) -> None:
    said = refusal(dense, changed(llama, num_hidden_layers=layers))
    assert said == {"trained on": llama.base_model, "layers": f"2 in the adapter, {layers} in the base"}


def test_a_base_with_other_experts_differs_in_them(afmoe: ModelSettings, mixture: Path, changed: Changed) -> None:
    said = refusal(mixture, changed(afmoe, num_experts=3))
    assert set(said) == {"trained on", "experts"} and "3 x 128 x 64 and 3 x 64 x 64 in the base" in said["experts"]


def test_experts_of_another_width_are_found(afmoe: ModelSettings, mixture: Path, changed: Changed) -> None:
    said = refusal(mixture, changed(afmoe, moe_intermediate_size=48))
    assert "8 x 96 x 64 and 8 x 64 x 48 in the base" in said["experts"]


def test_a_mixture_of_experts_and_a_dense_model_differ_in_their_modules(
    llama: ModelSettings, afmoe: ModelSettings, dense: Path, mixture: Path
) -> None:
    said = refusal(mixture, llama)
    assert "model.layers.*.mlp.experts (1)" in said["adapter only"]
    assert "model.layers.*.mlp.gate_proj (1)" in said["base only"]
    said = refusal(dense, afmoe)
    assert "model.layers.*.mlp.gate_proj (1)" in said["adapter only"]
    assert "model.layers.*.mlp.shared_experts.gate_proj (1)" in said["base only"]


def edited(adapter: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    change(tensors)
    save_file(tensors, str(to / "adapter_model.safetensors"))
    (to / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return to


def test_a_layer_that_the_adapter_forgot_is_named(llama: ModelSettings, dense: Path, tmp_path: Path) -> None:
    def forget(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "layers.1.self_attn.k_proj" in n]:
            del tensors[name]

    said = refusal(edited(dense, tmp_path / "a", forget), llama)
    assert said == {"trained on": llama.base_model, "base only": "model.layers.*.self_attn.k_proj (1)"}


def test_half_a_pair_and_what_is_no_factor_are_named(llama: ModelSettings, dense: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if "layers.0.self_attn.k_proj.lora_B" in n)
        tensors["base_model.model.lm_head.weight"] = tensors.pop(name)

    said = refusal(edited(dense, tmp_path / "a", spoil), llama)
    assert "base_model.model.lm_head.weight (1)" in said["adapter only"]
    assert "model.layers.*.self_attn.k_proj.lora_A (1)" in said["adapter only"]


def test_factors_of_two_ranks_are_damage(llama: ModelSettings, dense: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if "layers.0.self_attn.k_proj.lora_A" in n)
        tensors[name] = tensors[name][:3].clone()

    said = refusal(edited(dense, tmp_path / "a", cut), llama)
    assert said["k_proj"] == "lora_A has rank 3 and lora_B rank 4: the adapter is damaged"


def test_every_line_of_the_message_fits_80_columns_but_for_names(
    llama: ModelSettings, mixture: Path, changed: Changed
) -> None:
    with pytest.raises(PipelineError) as caught:
        check_adapter_fits(mixture, changed(llama, num_hidden_layers=2))
    lines = [line for line in str(caught.value).splitlines() if "/" not in line]
    assert len(lines) > 5 and max(map(len, lines)) <= 80


def test_another_name_with_the_same_shapes_is_told_and_not_refused(
    llama: ModelSettings, dense: Path, tmp_path: Path
) -> None:
    (tmp_path / "Base-Instruct").mkdir()
    config = (Path(llama.base_model) / "config.json").read_bytes()
    (tmp_path / "Base-Instruct" / "config.json").write_bytes(config)
    told = check_adapter_fits(dense, llama.model_copy(update={"base_model": str(tmp_path / "Base-Instruct")}))
    assert told and f"trained on {llama.base_model}, not on {tmp_path / 'Base-Instruct'}" in told


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("arcee-ai/Trinity-Mini", "/models/Trinity-Mini", True),
        ("/old/data/tiny_base", "/new/data/tiny_base/", True),
        ("a/Llama", "a/Llama-Instruct", False),
    ],
)
def test_a_local_copy_is_the_model_that_its_hub_name_means(one: str, other: str, same: bool) -> None:
    assert same_model(one, other) is same


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_a_damaged_configuration_is_an_error_for_a_person(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(PipelineError, match=r"adapter_config\.json: not an adapter's configuration"):
        recorded_base(tmp_path)


def test_a_directory_without_an_adapter_or_without_its_weights_is_named(llama: ModelSettings, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no adapter there"):
        check_adapter_fits(tmp_path, llama)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    with pytest.raises(PipelineError, match=r"adapter_model\.safetensors is missing"):
        check_adapter_fits(tmp_path, llama)


def test_a_base_model_that_cannot_be_had_is_named(llama: ModelSettings, dense: Path) -> None:
    with pytest.raises(PipelineError, match=r"model\.base_model nobody/nothing cannot be loaded"):
        check_adapter_fits(dense, llama.model_copy(update={"base_model": "nobody/nothing"}))
