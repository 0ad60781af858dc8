"""Loading in 4 bits: what is packed, from what, and how much of it is ever held whole."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import ModelSettings

if TYPE_CHECKING:
    import torch

LAYER = "model.layers.1.mlp.experts"
PROJECTIONS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def loaded(afmoe: ModelSettings) -> Any:
    """Tests share it: do not change it."""
    return load_model_and_tokenizer(afmoe)[0]


@pytest.fixture
def spoilt(afmoe: ModelSettings, tmp_path: Path) -> Callable[..., ModelSettings]:
    """A copy of the checkpoint with some tensors replaced, or left out where None."""

    def spoil(change: dict[str, Any]) -> ModelSettings:
        from safetensors.torch import load_file, save_file

        copied = Path(shutil.copytree(afmoe.base_model, tmp_path / "spoilt"))
        tensors = {**load_file(copied / "model.safetensors"), **change}
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, copied / "model.safetensors", {"format": "pt"})
        return afmoe.model_copy(update={"base_model": str(copied)})

    return spoil


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def test_routed_experts_are_uint8_and_router_head_embeddings_and_norms_are_not(loaded: Any) -> None:
    import torch

    kinds: dict[torch.dtype, set[str]] = {}
    for name, parameter in loaded.named_parameters():
        kinds.setdefault(parameter.dtype, set()).add(name)
    assert set(kinds) == {torch.uint8, torch.float32}
    assert {f"{LAYER}.{name}" for name in PROJECTIONS} <= kinds[torch.uint8]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.router.gate.weight"} < kinds[
        torch.float32
    ]
    assert "model.layers.1.mlp.expert_bias" in kinds[torch.float32]
    assert not any(name.endswith("_proj.weight") for name in kinds[torch.float32])
    assert {name for name in kinds[torch.float32] if "norm" in name} == {
        name for name, _ in loaded.named_parameters() if "norm" in name
    }


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_loaded_layer_holds_the_numbers_of_the_fused_reference_packed_expert_by_expert(
    afmoe: ModelSettings, double: bool, quant_type: str
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM

    model, _ = load_model_and_tokenizer(afmoe.model_copy(update={"double_quant": double, "quant_type": quant_type}))
    stock = AutoModelForCausalLM.from_pretrained(afmoe.base_model, dtype=torch.float32)
    for name in PROJECTIONS:
        found = model.get_submodule(LAYER).weight(name)
        for expert, weight in enumerate(stock.get_submodule(LAYER).get_parameter(name).data):
            codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=quant_type)
            assert torch.equal(found[expert], dequantize_4bit(codes, state))


def test_scales_survive_the_loader(loaded: Any) -> None:
    import torch

    experts = loaded.get_submodule(LAYER)
    for name in PROJECTIONS:
        absmax, nested, offset = experts.scales(name)
        assert absmax.unique().numel() > 50
        assert torch.isfinite(nested).all()
        assert (offset > 0).all()
        assert {f"{LAYER}.{name}_{part}" for part in ("absmax", "nested", "offset")} <= set(loaded.state_dict())


def test_packed_experts_are_frozen_and_the_model_counts_as_one_of_bitsandbytes(loaded: Any) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    assert not any(parameter.requires_grad for parameter in loaded.get_submodule(LAYER).parameters())
    assert loaded.is_loaded_in_4bit
    assert loaded.quantization_method == QuantizationMethod.BITS_AND_BYTES
    assert loaded.hf_quantizer.is_trainable
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "nf4_experts"


def test_loading_reads_one_expert_at_a_time(afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    from triton_sft_pipeline.training.experts import nf4

    alive: dict[int, int] = {}
    most = {"bytes": 0, "reads": 0}

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != (64, 64):
            return tensor
        alive[id(tensor)] = tensor.numel() * tensor.element_size()
        weakref.finalize(tensor, alive.pop, id(tensor))
        most["bytes"] = max(most["bytes"], sum(alive.values()))
        most["reads"] += 1
        return tensor

    spawn, pack = core_model_loading.spawn_materialize, nf4.pack

    def spawned(pool: Any, tensor: Any, *rest: Any, **options: Any) -> Any:
        job = spawn(pool, tensor, *rest, **options)
        assert callable(job), "transformers reads ahead"
        return lambda: watched(job())

    def packed(weight: torch.Tensor, *rest: Any) -> nf4.Packed:
        most["bytes"] = max(most["bytes"], sum(alive.values()) + weight.numel() * weight.element_size())
        return pack(weight, *rest)

    monkeypatch.setattr(core_model_loading, "spawn_materialize", spawned)
    monkeypatch.setattr(nf4, "pack", packed)
    load_model_and_tokenizer(afmoe)
    assert most["reads"] > 3 * 8
    gate_and_up = 2 * 64 * 64 * 4
    assert most["bytes"] == gate_and_up


def _halves(experts: int = 4) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(experts, 32, 64, generator=generator) for _ in range(2))
    return list(gate), list(up)


def _model_of_experts() -> Any:
    import torch

    from triton_sft_pipeline.training.experts.module import ExpertStorage, PackedExperts

    storage = ExpertStorage(compute_dtype=torch.float32)
    return torch.nn.ModuleDict({"experts": PackedExperts(4, 64, 32, torch.nn.SiLU(), storage, device="meta")})


def _future(tensor: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(tensor)
    return future


@pytest.mark.parametrize("kind", ["callables", "futures", "tensors"])
def test_tensors_are_packed_in_whichever_form_transformers_collects_them(kind: str) -> None:
    import torch

    from triton_sft_pipeline.training.experts import nf4
    from triton_sft_pipeline.training.experts.quantizer import PackConverter, PackExperts

    wrap: dict[str, Callable[[torch.Tensor], Any]] = {
        "callables": lambda tensor: lambda: tensor,
        "futures": _future,
        "tensors": lambda tensor: tensor,
    }
    sources = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    converter = PackConverter(list(sources), "experts.gate_up_proj", operations=[PackExperts("nf4", True)])
    gate, up = _halves()
    for expert in range(4):
        for source, half in zip(converter.source_patterns, (gate, up), strict=True):
            converter.add_tensor(
                "experts.gate_up_proj", source.replace("*", str(expert)), source, wrap[kind](half[expert])
            )
    model = _model_of_experts()
    made = converter.convert("experts.gate_up_proj", model=model, config=None)
    assert list(made) == ["experts.gate_up_proj"]
    assert made["experts.gate_up_proj"] is model["experts"].gate_up_proj
    assert not converter.collected_tensors
    codes = torch.stack([nf4.pack(torch.cat(parts)).codes for parts in zip(gate, up, strict=True)])
    assert torch.equal(model["experts"].gate_up_proj.data, codes)


def test_what_goes_wrong_while_packing_stops_the_loader_at_once(
    afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr("triton_sft_pipeline.training.experts.nf4.pack", broken)
    with pytest.raises(StepError, match=r"could not be packed in 4 bits: RuntimeError: the device is on fire"):
        load_model_and_tokenizer(afmoe)
    assert len(calls) == 1


def test_too_few_tensors_for_a_layer_are_counted_while_packing() -> None:
    from triton_sft_pipeline.training.experts.quantizer import LoadingFailed, PackExperts

    gate, up = _halves(3)
    with pytest.raises(LoadingFailed, match=r"made of 4 experts, but the checkpoint holds 3 tensors gate") as raised:
        PackExperts("nf4", True).convert(
            {"gate": list(gate), "up": list(up)},
            ["gate", "up"],
            ["experts.gate_up_proj"],
            full_layer_name="experts.gate_up_proj",
            model=_model_of_experts(),
        )
    assert isinstance(raised.value.__cause__, PipelineError)


def test_registering_twice_is_harmless(afmoe: ModelSettings) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from triton_sft_pipeline.training.experts import quantizer

    quantizer.register()
    quantizer.register()
    assert AUTO_QUANTIZER_MAPPING[quantizer.METHOD] is quantizer.PackedExpertsQuantizer


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_missing_expert_is_named_before_anything_is_loaded(
    spoilt: Callable[..., ModelSettings], load_in_4bit: bool
) -> None:
    settings = spoilt({f"{LAYER}.5.up_proj.weight": None}).model_copy(update={"load_in_4bit": load_in_4bit})
    with pytest.raises(PipelineError, match=rf"1 tensor missing: {LAYER}.5.up_proj.weight. Download it again"):
        load_model_and_tokenizer(settings)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_extra_and_misshapen_tensors_are_named_before_anything_is_loaded(spoilt: Callable[..., ModelSettings]) -> None:
    import torch

    settings = spoilt(
        {f"{LAYER}.8.up_proj.weight": torch.ones(64, 64), f"{LAYER}.3.down_proj.weight": torch.ones(64, 128)}
    )
    with pytest.raises(PipelineError) as raised:
        load_model_and_tokenizer(settings)
    assert f"1 tensor too many: {LAYER}.8.up_proj.weight" in str(raised.value)
    assert f"1 tensor of another shape: {LAYER}.3.down_proj.weight (64, 128) instead of (64, 64)" in str(raised.value)


def test_a_message_names_a_few_tensors_and_counts_the_rest(spoilt: Callable[..., ModelSettings]) -> None:
    settings = spoilt({f"{LAYER}.{expert}.up_proj.weight": None for expert in range(8)})
    with pytest.raises(PipelineError, match=r"8 tensors missing: (.*up_proj.weight, ){4}.*up_proj.weight and 3 more"):
        load_model_and_tokenizer(settings)


def test_a_buffer_that_old_checkpoints_hold_is_no_extra_tensor(spoilt: Callable[..., ModelSettings]) -> None:
    import torch

    load_model_and_tokenizer(spoilt({"model.rotary_emb.inv_freq": torch.ones(8)}))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_fused_checkpoint_is_refused_with_its_layout(spoilt: Callable[..., ModelSettings]) -> None:
    import torch

    change: dict[str, Any] = {
        f"{LAYER}.{expert}.{name}.weight": None for expert in range(8) for name in ("gate_proj", "up_proj", "down_proj")
    }
    change[f"{LAYER}.gate_up_proj"] = torch.ones(8, 128, 64)
    change[f"{LAYER}.down_proj"] = torch.ones(8, 64, 64)
    with pytest.raises(
        PipelineError, match=r"stores all experts.*experts.down_proj.*released layout.*experts.0.down_proj.weight"
    ):
        load_model_and_tokenizer(spoilt(change))


def test_a_fused_checkpoint_still_loads_in_float(spoilt: Callable[..., ModelSettings]) -> None:
    import torch

    change: dict[str, Any] = {
        f"{LAYER}.{expert}.{name}.weight": None for expert in range(8) for name in ("gate_proj", "up_proj", "down_proj")
    }
    change[f"{LAYER}.gate_up_proj"] = torch.full((8, 128, 64), 2.0)
    change[f"{LAYER}.down_proj"] = torch.full((8, 64, 64), 3.0)
    model, _ = load_model_and_tokenizer(spoilt(change).model_copy(update={"load_in_4bit": False}))
    assert (model.get_submodule(LAYER).weight("gate_up_proj") == 2.0).all()


@pytest.fixture
def sharded(afmoe: ModelSettings, tmp_path: Path) -> ModelSettings:
    """The same checkpoint in several files with an index."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "sharded"
    shutil.copytree(afmoe.base_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(afmoe.base_model).save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return afmoe.model_copy(update={"base_model": str(directory)})


def test_a_checkpoint_in_several_files_loads_the_same_numbers(sharded: ModelSettings, loaded: Any) -> None:
    import torch

    model, _ = load_model_and_tokenizer(sharded)
    for name in PROJECTIONS:
        assert torch.equal(model.get_submodule(LAYER).weight(name), loaded.get_submodule(LAYER).weight(name))


def test_a_file_that_is_missing_cut_short_or_damaged_is_named(
    sharded: ModelSettings, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("nothing_is_loaded")
    shard = sorted(Path(sharded.base_model).glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(PipelineError, match=rf"{shard.name} is cut short: [\d,]+ of [\d,]+ bytes"):
        load_model_and_tokenizer(sharded)
    for damaged in (b"", b"not a tensor in sight", whole[:8] + b"x" * 5000):
        shard.write_bytes(damaged)
        with pytest.raises(PipelineError, match=rf"{shard.name} is no safetensors file"):
            load_model_and_tokenizer(sharded)
    shard.unlink()
    with pytest.raises(PipelineError, match=rf"not whole: its index names 1 files that are not there: {shard.name}"):
        load_model_and_tokenizer(sharded)
    index = Path(sharded.base_model) / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(PipelineError, match=r"index.json is no index of a checkpoint"):
        load_model_and_tokenizer(sharded)


@pytest.fixture
def cached(sharded: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSettings, Path]:
    """A hub model that is only in the cache, as a download leaves it, and the directory of its files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--someone--tiny-mixture"
    snapshot = Path(shutil.copytree(sharded.base_model, model / "snapshots" / commit))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return sharded.model_copy(update={"base_model": "someone/tiny-mixture"}), snapshot


def test_a_hub_model_in_the_cache_is_checked_like_a_directory(cached: tuple[ModelSettings, Path]) -> None:
    settings, snapshot = cached
    assert load_model_and_tokenizer(settings)[0].get_submodule(LAYER).is_packed
    index = snapshot / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    # A shard that was not fetched yet counts by what the index says of it.
    gone = f"{LAYER}.2.up_proj.weight"
    (snapshot / values["weight_map"].pop(gone)).unlink()
    index.write_text(json.dumps(values))
    with pytest.raises(PipelineError, match=rf"someone/tiny-mixture does not fit.*1 tensor missing: {gone}"):
        load_model_and_tokenizer(settings)


def test_nothing_is_checked_of_a_checkpoint_without_a_list_of_tensors(
    cached: tuple[ModelSettings, Path], tmp_path: Path
) -> None:
    from triton_sft_pipeline.training.experts.checks import checkpoint_shapes

    assert checkpoint_shapes(str(tmp_path), None) is None
    assert checkpoint_shapes("someone/else", None) is None


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_unknown_mixture_of_experts_is_refused_before_loading(afmoe: ModelSettings, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    directory = Path(shutil.copytree(afmoe.base_model, tmp_path / "other"))
    Qwen3MoeConfig(vocab_size=320, hidden_size=64, num_hidden_layers=1, num_experts=4).save_pretrained(directory)
    with pytest.raises(PipelineError, match=r"architecture qwen3_moe.*mlp.experts.down_proj"):
        load_model_and_tokenizer(afmoe.model_copy(update={"base_model": str(directory)}))


def test_an_unpacked_expert_a_packed_router_and_a_packed_head_are_found_out(afmoe: ModelSettings) -> None:
    import torch

    from triton_sft_pipeline.training.experts.checks import check_packed

    model, _ = load_model_and_tokenizer(afmoe)
    check_packed(model)
    for module, name, value, said in [
        ("lm_head", "weight", torch.zeros(8, 1, dtype=torch.uint8), r"tiny: lm_head was quantised"),
        (
            "model.layers.1.mlp.router.gate",
            "weight",
            torch.zeros(8, 1, dtype=torch.uint8),
            r"tiny: model.layers.1.mlp.router.gate was quantised",
        ),
        (LAYER, "down_proj", torch.zeros(8, 64, 64), rf"the experts {LAYER}.down_proj were not packed.*float32"),
    ]:
        owner = model.get_submodule(module)
        before = owner.get_parameter(name)
        owner.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        with pytest.raises(StepError, match=said):
            check_packed(model, "tiny")
        owner.register_parameter(name, before)
    check_packed(model)


@pytest.fixture
def wide(afmoe: ModelSettings, tmp_path: Path) -> ModelSettings:
    """Two layers of experts as wide as they are worth measuring: a stack of them is 128 MiB in bfloat16."""
    import torch
    from transformers import AfmoeForCausalLM, AutoConfig

    directory = Path(
        shutil.copytree(afmoe.base_model, tmp_path / "wide", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    config = AutoConfig.from_pretrained(directory)
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_hidden_layers": 3}
    config.update({**sizes, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]})
    torch.manual_seed(0)
    AfmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="100MB")
    return afmoe.model_copy(update={"base_model": str(directory), "compute_dtype": "bfloat16"})


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TRITON_SFT_TEST_GPU"), reason="TRITON_SFT_TEST_GPU is not set")
def test_a_gpu_never_holds_a_stack_of_float_experts_and_ends_with_bitsandbytes_numbers(wide: ModelSettings) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = load_model_and_tokenizer(wide)
    final, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    stack = 64 * 1024 * 1024 * 2
    assert final > 2 * stack // 4
    assert peak - final < stack // 4, f"{peak} at most, {final} in the end"
    stock = AutoModelForCausalLM.from_pretrained(wide.base_model, dtype=torch.bfloat16)
    for name in PROJECTIONS:
        found = model.get_submodule(LAYER).weight(name)
        for expert in (0, 17, 63):
            weight = stock.get_submodule(LAYER).get_parameter(name).data[expert].cuda()
            codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            assert torch.equal(found[expert], dequantize_4bit(codes, state))
