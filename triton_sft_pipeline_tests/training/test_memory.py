"""What a training takes is known before it begins: exact where it can be, said in full when there is too little."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.training import memory
from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
from triton_sft_pipeline.training.memory import (
    GIB,
    Footprint,
    advice,
    count,
    footprint,
    free_memory,
    require_memory,
    shipped_presets,
)
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings

PRESETS = shipped_presets()
TARGETS = {"trinity-mini": 34, "trinity-mini-24gb": 21, "trinity-mini-16k": 40}
"""GiB that each preset may take at most."""


@pytest.fixture(scope="module")
def trinity() -> Any:
    """The released model's configuration (the library's defaults are those of another one)."""
    from transformers import AfmoeConfig

    return AfmoeConfig(
        vocab_size=200192,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=1024,
        num_hidden_layers=32,
        num_dense_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        num_shared_experts=1,
        sliding_window=2048,
        global_attn_every_n_layers=4,
        mup_enabled=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=12,
    )


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Any:
    """An empty model of 11,000 parts takes a second to build: once for each configuration is enough."""
    patch, build = pytest.MonkeyPatch(), memory._empty_model
    built: dict[str, Any] = {}

    def once(config: Any) -> Any:
        key = config.to_json_string()
        if key not in built:
            built[key] = build(config)
        return built[key]

    patch.setattr(memory, "_empty_model", once)
    yield
    patch.undo()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the free, total, allocated and reserved GiB of a GPU that is not there."""
    # Libraries that look for a GPU when they are imported must not find this one.
    import bitsandbytes  # noqa: F401
    import torch

    def pretend(free: float, total: float = 24, allocated: float = 0, reserved: float = 0, share: float = 1) -> None:
        properties = SimpleNamespace(name="NVIDIA RTX 4090", total_memory=int(total * GIB))
        for name, value in {
            "is_available": True,
            "mem_get_info": (int(free * GIB), int(total * GIB)),
            "memory_allocated": int(allocated * GIB),
            "max_memory_allocated": int(allocated * GIB),
            "memory_reserved": int(reserved * GIB),
            "get_per_process_memory_fraction": share,
            "get_device_properties": properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value, raising=False)

    return pretend


def taken(trinity: Any, preset: str, **changes: Any) -> Footprint:
    model, lora, training = PRESETS[preset]
    return footprint(trinity, lora, training.model_copy(update=changes), model)


def test_the_parameters_of_trinity_mini_are_counted_exactly(trinity: Any) -> None:
    counts = count(trinity)
    assert counts.total == 26_123_974_400
    assert counts.experts == 24_159_191_040
    assert counts.linears == 1_136_656_384
    # Embeddings and head, routers, expert biases; four norms a layer, two on the heads, and the last one.
    norms = 32 * (4 * 2048 + 2 * 128) + 2048
    assert counts.others == 2 * 200192 * 2048 + 30 * (128 * 2048 + 128) + norms


def test_the_adapter_of_trinity_mini_is_counted_exactly(trinity: Any) -> None:
    linears = 64 * (32 * (3 * (2048 + 4096) + 2 * (2048 + 512)) + 30 * 3 * (2048 + 1024) + 2 * 3 * (2048 + 6144))
    fused = 30 * 128 * (2048 + 2048 + 1024 + 2048)
    assert taken(trinity, "trinity-mini").adapter_parameters == linears + 64 * fused
    assert taken(trinity, "trinity-mini-24gb").adapter_parameters == linears + 8 * fused
    # The original's per-expert layers have factors of their own for gate and up.
    assert linears + 64 * 30 * 128 * 3 * (2048 + 1024) == 2_333_999_104


def test_a_weight_in_four_bits_takes_what_its_scales_take_too(trinity: Any) -> None:
    loaded = footprint(trinity)
    assert loaded.experts / 24_159_191_040 == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-5)
    assert loaded.loaded / 1e9 == pytest.approx(14.70, abs=0.01)
    assert loaded.total == loaded.loaded
    plain = footprint(trinity, model=ModelSettings(double_quant=False))
    assert plain.experts == 24_159_191_040 * (0.5 + 4 / 64)
    whole = footprint(trinity, model=ModelSettings(load_in_4bit=False))
    assert whole.loaded == 2 * 26_123_974_400


@pytest.mark.parametrize("preset", TARGETS)
def test_a_preset_fits_where_it_promises_to(trinity: Any, preset: str) -> None:
    # A twentieth is left for what the allocator cannot use.
    assert taken(trinity, preset).total < 0.95 * TARGETS[preset] * GIB


@pytest.mark.parametrize("which", ["afmoe", "llama"])
@pytest.mark.parametrize("four_bits", [True, False])
def test_the_count_is_that_of_the_model_that_is_loaded(
    which: str, four_bits: bool, request: pytest.FixtureRequest
) -> None:
    settings = request.getfixturevalue(which).model_copy(update={"load_in_4bit": four_bits})
    lora, training = LoraSettings(r=4, expert_r=2), TrainingSettings(max_length=64)
    loaded, _ = load_model_and_tokenizer(settings)
    expected = footprint(loaded.config, lora, training, settings)
    assert expected.loaded == pytest.approx(stored_bytes(loaded), rel=0.01)
    peft_model = attach_lora(loaded, create_lora_config(lora))
    parameters = [p.numel() for name, p in peft_model.named_parameters() if ".lora_" in name]
    assert expected.adapter_parameters == sum(parameters)


def stored_bytes(model: Any) -> int:
    """What the tensors of a model take, scales of quantised weights included, the tables of codes left out."""
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" in name:
            continue
        total += tensor.numel() * tensor.element_size()
        if (state := getattr(tensor, "quant_state", None)) is not None:
            total += state.absmax.numel() + 4 * state.state2.absmax.numel() + 4
    return total


@pytest.mark.parametrize(
    ("optim", "state"),
    [
        ("adamw_torch", 2 * 2 * 1_830_682_624),
        ("adamw_8bit", 2 * 1_830_682_624 * (1 + 4 / 256)),
        ("paged_adamw_8bit", 2 * 1_830_682_624 * (1 + 4 / 256)),
    ],
)
def test_the_optimiser_state_is_that_of_the_optimiser(trinity: Any, optim: str, state: float) -> None:
    assert taken(trinity, "trinity-mini", optim=optim).optimiser == pytest.approx(state, rel=1e-4)


def test_a_paged_optimiser_takes_only_the_room_that_a_step_leaves() -> None:
    there = {"experts": 10, "optimiser": 5, "kept": 2, "scratch": 1, "layer": 4, "head": 3}
    assert Footprint(**there).total == 22
    assert Footprint(**there, paged=True).total == 17
    assert Footprint(**{**there, "optimiser": 9}, paged=True).total == 19


def test_several_gpus_hold_the_gradients_three_times(trinity: Any) -> None:
    one, two = taken(trinity, "trinity-mini-24gb"), taken(trinity, "trinity-mini-24gb", gpus=2)
    assert two.gradients == 3 * one.gradients == 3 * 2 * one.adapter_parameters
    assert two.total - one.total == 2 * one.gradients


def test_more_tokens_take_more_for_activations_alone(trinity: Any) -> None:
    short, long = taken(trinity, "trinity-mini"), taken(trinity, "trinity-mini", max_length=16384)
    many = taken(trinity, "trinity-mini", per_device_batch_size=4)
    assert (long.adapter, long.loaded, long.scratch) == (short.adapter, short.loaded, short.scratch)
    assert many == long
    # Layer input, attention's output and its projection, the MLP's output, and the routing; long sequences keep two.
    routing = 8 * (4 + 4 * 8) + 128 * 2
    assert short.kept == 32 * 4096 * (2 * (3 * 2048 + 4096) + routing)
    assert long.kept == 32 * 16384 * (2 * 2 * 2048 + routing)
    assert taken(trinity, "trinity-mini", gradient_checkpointing=False).kept > 9 * short.kept


def test_attention_is_counted_as_kept_for_as_many_tokens_as_it_is() -> None:
    from triton_sft_pipeline.training import activations
    from triton_sft_pipeline.training.fast import install

    assert activations.KEPT_TOKENS == install.KEPT_TOKENS


def test_too_little_memory_names_need_have_and_the_preset_that_fits(trinity: Any, gpu: Any) -> None:
    gpu(22.9)
    need = taken(trinity, "trinity-mini")
    fits = taken(trinity, "trinity-mini-24gb")
    with pytest.raises(StepError) as caught:
        require_memory(*PRESETS["trinity-mini"], trinity)
    message = str(caught.value)
    assert message.startswith(
        f"Training on arcee-ai/Trinity-Mini with these settings needs {need.total / GIB:.1f} GiB of GPU memory, and "
        "NVIDIA RTX 4090 (24 GiB) has 22.9 GiB free. In GiB: routed experts 11.6, "
    )
    for part in ("linear layers 0.5", "adapter 3.4", "its gradients 3.4", "optimiser state 3.5", "dequantised weights"):
        assert part in message
    assert message.endswith(
        f"The preset trinity-mini-24gb fits: it needs {fits.total / GIB:.1f} GiB (TRITON_SFT_PRESET=trinity-mini-24gb)."
    )


def test_what_fits_passes_and_says_what_it_takes(trinity: Any, gpu: Any) -> None:
    gpu(22.9)
    assert require_memory(*PRESETS["trinity-mini-24gb"], trinity) == taken(trinity, "trinity-mini-24gb")


def test_where_no_preset_fits_that_is_said(trinity: Any, gpu: Any) -> None:
    gpu(11.5, total=12)
    with pytest.raises(StepError, match=r"has 11\.5 GiB free.*No shipped preset of this base model fits: free the GPU"):
        require_memory(*PRESETS["trinity-mini-24gb"], trinity)
    with pytest.raises(StepError, match=r"^Loading arcee-ai/Trinity-Mini with these settings needs 13\.7 GiB"):
        require_memory(PRESETS["trinity-mini"][0], config=trinity)


def test_the_most_capable_preset_that_fits_is_named(trinity: Any) -> None:
    assert "preset trinity-mini-16k fits" in advice("arcee-ai/Trinity-Mini", trinity, 44 * GIB)
    assert "preset trinity-mini fits" in advice("/models/trinity-mini", trinity, 31 * GIB)
    # What just fits would not in the end.
    tight = taken(trinity, "trinity-mini-24gb").total
    assert "No shipped preset" in advice("arcee-ai/Trinity-Mini", trinity, tight)
    assert "preset trinity-mini-24gb fits" in advice("arcee-ai/Trinity-Mini", trinity, int(tight / 0.94))
    assert "No shipped preset" in advice("somebody/else", trinity, 44 * GIB)


def test_memory_that_pytorch_holds_without_using_it_is_free(gpu: Any) -> None:
    gpu(10, total=24, allocated=3, reserved=5)
    assert free_memory() == 12 * GIB


def test_a_share_of_the_device_is_all_there_is(gpu: Any) -> None:
    gpu(120, total=140, allocated=2, reserved=2, share=0.1)
    assert free_memory() == pytest.approx(12 * GIB, abs=1)


def test_without_a_gpu_nothing_is_asked(trinity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert require_memory(*PRESETS["trinity-mini"], trinity) is None


def test_a_model_that_cannot_be_read_is_left_to_the_loader(gpu: Any, afmoe: ModelSettings) -> None:
    gpu(0.0001)
    _, lora, training = PRESETS["tiny"]
    assert require_memory(ModelSettings(base_model="nobody/no-such-model"), lora, training) is None
    from transformers import ViTConfig

    assert require_memory(afmoe, lora, training, ViTConfig()) is None
    with pytest.raises(StepError, match=rf"Training on {re.escape(afmoe.base_model)} .* No shipped preset"):
        require_memory(afmoe, lora, training)


def test_the_shipped_presets_are_read_as_the_configuration_reads_them() -> None:
    from triton_sft_pipeline.config import load_config, preset_names

    assert (
        sorted(PRESETS)
        == preset_names()
        == ["smollm2-135m", "tiny", "trinity-mini", "trinity-mini-16k", "trinity-mini-24gb"]
    )
    for name, (_, lora, training) in PRESETS.items():
        config = load_config(name, environ={})
        assert (config.lora, config.training) == (lora, training)


def test_the_presets_for_trinity_mini_differ_where_they_say_so() -> None:
    _, lora, training = PRESETS["trinity-mini"]
    assert (lora.r, lora.expert_r, lora.dropout, training.optim, training.max_length) == (
        64,
        None,
        0.05,
        "adamw_8bit",
        4096,
    )
    _, small_lora, small = PRESETS["trinity-mini-24gb"]
    assert small_lora == lora.model_copy(update={"expert_r": 8})
    assert small == training.model_copy(update={"optim": "paged_adamw_8bit"})
    _, long_lora, long = PRESETS["trinity-mini-16k"]
    assert long_lora == lora
    assert long == training.model_copy(update={"optim": "paged_adamw_8bit", "max_length": 16384})


def test_the_table_in_the_documentation_is_what_is_worked_out_here(trinity: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:] for cells in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    }
    sizes = {name: taken(trinity, name) for name in ("trinity-mini-24gb", "trinity-mini", "trinity-mini-16k")}
    expected: dict[str, list[str]] = {}
    for part in ("experts", "linears", "others", "adapter", "gradients", "optimiser", "kept", "scratch"):
        expected[part] = [f"{getattr(size, part) / GIB:.1f}" for size in sizes.values()]
    expected["step"] = [f"{max(size.layer, size.head) / GIB:.1f}" for size in sizes.values()]
    expected["total"] = [f"{size.total / GIB:.1f}" for size in sizes.values()]
    for values in expected.values():
        assert values in [list(row) for row in rows.values()], f"{values} is not a row of the table"
