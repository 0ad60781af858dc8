"""Linear layers unpacked for a while: the same numbers, and afterwards the same layers."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.training import unpacked
from triton_sft_pipeline.training.unpacked import unpacked_linears

CPU = frozenset({"cpu"})


@pytest.fixture
def model() -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layers = [
        Linear4bit(128, 64, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
        for bias in (True, False)
    ]
    # In training mode: answering, some CPUs re-pack the weights for kernels of their own.
    return torch.nn.ModuleDict({"a": layers[0].to("cpu"), "b": layers[1].to("cpu"), "plain": torch.nn.Linear(4, 4)})


def test_unpacked_layers_compute_the_same_and_are_themselves_again_afterwards(model: Any) -> None:
    import torch

    x = torch.randn(3, 128)
    before = {name: model[name](x) for name in ("a", "b")}
    packed = model["a"].weight.data.clone()
    with unpacked_linears(model, CPU) as count:
        inside = {name: model[name](x) for name in ("a", "b")}
        assert model["a"].forward.__name__ == "forward" and "forward" in vars(model["a"])
    assert count == 2
    for name in ("a", "b"):
        assert inside[name].dtype == before[name].dtype
        torch.testing.assert_close(inside[name], before[name], rtol=1e-2, atol=1e-2)
        assert "forward" not in vars(model[name])
    assert torch.equal(model["a"].weight.data, packed)
    assert torch.equal(model["a"](x), before["a"])


def test_an_error_inside_leaves_no_layer_unpacked(model: Any) -> None:
    with pytest.raises(RuntimeError), unpacked_linears(model, CPU):
        raise RuntimeError
    assert not any("forward" in vars(layer) for layer in model.values())


def test_without_the_room_nothing_is_unpacked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 2 * 128 * 64
    for free, expected in ((2 * needed - 1, 0), (2 * needed, 2)):
        monkeypatch.setattr(unpacked, "_free", lambda device, free=free: free)
        with unpacked_linears(model, CPU) as count:
            assert count == expected


def test_on_a_cpu_layers_stay_packed(model: Any) -> None:
    with unpacked_linears(model) as count:
        assert count == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 384])
def test_on_a_gpu_answers_are_those_of_packed_layers_up_to_rounding(model: Any, rows: int) -> None:
    """For few rows bitsandbytes has products of its own, which add in another order."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = model.to("cuda").eval()
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        before = model["b"](x)
        with unpacked_linears(model) as count:
            assert count == 2
            torch.testing.assert_close(model["b"](x), before, rtol=1e-2, atol=1e-2)
