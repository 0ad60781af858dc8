"""Packing: the numbers are those of bitsandbytes, for each expert as if it were alone."""

from __future__ import annotations

import pytest
import torch

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training import memory
from triton_sft_pipeline.training.experts import nf4
from triton_sft_pipeline.training.experts.module import ExpertStorage, PackedExperts
from triton_sft_pipeline.training.fast import twins
from triton_sft_pipeline_tests.training.experts.packed import pack_in_place

EXPERTS, ROWS, COLUMNS = 5, 96, 192


@pytest.fixture
def weights() -> torch.Tensor:
    """Experts of very different size, so that a scale borrowed from a neighbour would show."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 0.01, 3.0, 0.2, 40.0])[:, None, None]
    return torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator) * size


def _stacked(packed: list[nf4.Packed]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    nested = [each.nested for each in packed if each.nested is not None]
    offset = [each.offset for each in packed if each.offset is not None]
    return (
        torch.stack([each.codes for each in packed]),
        torch.stack([each.absmax for each in packed]),
        torch.stack(nested) if nested else None,
        torch.stack(offset) if offset else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_packed_experts_hold_the_numbers_bitsandbytes_gives_each_expert_alone(
    weights: torch.Tensor, double: bool, quant_type: str, dtype: torch.dtype
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = weights.to(dtype)
    packed = [nf4.pack(expert, quant_type, double) for expert in weights]
    found = nf4.unpack(*_stacked(packed), quant_type, dtype)
    assert found.dtype == dtype
    for expert in range(EXPERTS):
        codes, state = quantize_4bit(weights[expert], blocksize=64, compress_statistics=double, quant_type=quant_type)
        assert torch.equal(packed[expert].codes.reshape(-1), codes.reshape(-1))
        assert torch.equal(found[expert], dequantize_4bit(codes, state))


def test_unpacking_writes_where_it_is_told(weights: torch.Tensor) -> None:
    stacked = _stacked([nf4.pack(expert) for expert in weights])
    room = torch.full((EXPERTS, ROWS, 2 * COLUMNS), 7.0)
    out = room[..., :COLUMNS]
    found = nf4.unpack(*stacked, "nf4", torch.float32, out)
    assert found.data_ptr() == room.data_ptr()
    assert torch.equal(out, nf4.unpack(*stacked, "nf4", torch.float32))
    assert (room[..., COLUMNS:] == 7.0).all()


def test_unpacking_in_double_precision_gives_the_single_precision_numbers(weights: torch.Tensor) -> None:
    stacked = _stacked([nf4.pack(expert) for expert in weights])
    found = nf4.unpack(*stacked, "nf4", torch.float64)
    assert found.dtype == torch.float64
    assert torch.equal(found, nf4.unpack(*stacked, "nf4", torch.float32).double())


def test_a_nested_block_never_spans_two_experts(weights: torch.Tensor) -> None:
    # 288 blocks an expert: one nested block of 256 and one of 32.
    packed = [nf4.pack(expert) for expert in weights]
    assert packed[0].absmax.shape == (ROWS * COLUMNS // 64,) == (288,)
    assert packed[0].nested is not None
    assert packed[0].nested.shape == (2,)
    changed = weights.clone()
    changed[1] *= 1000
    again = [nf4.pack(expert) for expert in changed]
    for expert in (0, 2, 3, 4):
        for name in ("codes", "absmax", "nested", "offset"):
            assert torch.equal(getattr(packed[expert], name), getattr(again[expert], name))
    before, after = (nf4.unpack(*_stacked(each), "nf4", torch.float32) for each in (packed, again))
    assert torch.equal(before[[0, 2, 3, 4]], after[[0, 2, 3, 4]])
    assert not torch.equal(before[1], after[1])


def test_the_first_number_of_a_pair_is_in_the_high_half_of_its_byte() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = 1.0, -1.0
    codes = nf4.pack(weight, double=False).codes
    table = twins.code_tables("nf4", weight.device)[0]
    assert table[int(codes[0, 0]) >> 4] == 1.0
    assert table[int(codes[0, 0]) & 15] == -1.0


def test_rows_that_blocks_do_not_divide_are_refused_with_the_fix() -> None:
    with pytest.raises(PipelineError, match=r"8 x 96 cannot be packed.*multiple of 64.*load_in_4bit to false"):
        nf4.pack(torch.ones(8, 96))


@pytest.mark.parametrize("double", [True, False])
def test_the_bytes_foretold_are_the_bytes_taken(weights: torch.Tensor, double: bool) -> None:
    stacked = _stacked([nf4.pack(expert, double=double) for expert in weights])
    taken = sum(each.numel() * each.element_size() for each in stacked if each is not None)
    assert EXPERTS * memory.quantised_bytes(ROWS, COLUMNS, double) == taken


def _experts(double: bool = True) -> PackedExperts:
    torch.manual_seed(0)
    storage = ExpertStorage(double=double, compute_dtype=torch.float32)
    module = PackedExperts(4, 128, 64, torch.nn.SiLU(), storage)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("double", [True, False])
def test_a_module_packed_in_place_gives_back_its_weights_expert_by_expert(double: bool) -> None:
    module = _experts(double)
    before = {name: module.weight(name).clone() for name in ("gate_up_proj", "down_proj")}
    assert not module.is_packed
    pack_in_place(module)
    assert module.is_packed
    assert not any(parameter.requires_grad for parameter in module.parameters())
    for name, weight in before.items():
        assert module.get_parameter(name).shape == (*weight.shape[:2], weight.shape[2] // 2)
        assert module.shape_of(name) == weight.shape == module.weight(name).shape
        for expert in range(4):
            alone = nf4.unpack(*_stacked([nf4.pack(weight[expert], double=double)]), "nf4", torch.float32)
            assert torch.equal(module.weight(name)[expert], alone[0])


def test_casting_a_model_leaves_codes_and_scales_as_they_are() -> None:
    module = _experts()
    pack_in_place(module)
    before = {name: module.weight(name) for name in ("gate_up_proj", "down_proj")}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.nn.Sequential(module).to(torch.bfloat16)
    assert {name: value.dtype for name, value in module.state_dict().items()} == {
        name: value.dtype for name, value in state.items()
    }
    for name, weight in before.items():
        assert torch.equal(module.weight(name), weight)


def test_float_experts_compute_in_the_type_they_were_cast_to() -> None:
    module = _experts().double()
    assert module.weight("down_proj") is module.down_proj
    assert module.weight("down_proj").dtype == torch.float64


@pytest.mark.parametrize("double", [True, False])
def test_random_packed_experts_have_the_spread_that_was_asked_for(double: bool) -> None:
    storage = ExpertStorage(double=double, compute_dtype=torch.float32)
    module = PackedExperts(4, 128, 64, torch.nn.SiLU(), storage, device="meta")
    module.fill_random(torch.Generator().manual_seed(3), std=0.05)
    assert module.is_packed
    for name in ("gate_up_proj", "down_proj"):
        weight = module.weight(name)
        assert weight.shape == module.shape_of(name)
        assert 0.045 < weight.std().item() < 0.055
        assert not torch.equal(weight[0], weight[1])
    again = PackedExperts(4, 128, 64, torch.nn.SiLU(), storage, device="meta")
    again.fill_random(torch.Generator().manual_seed(3), std=0.05)
    assert torch.equal(again.weight("down_proj"), module.weight("down_proj"))
