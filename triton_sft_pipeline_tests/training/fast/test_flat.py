"""Weights joined to long tensors: every update is that of the weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from triton_sft_pipeline.training.fast import flat
from triton_sft_pipeline.training.fast.flat import FlatWeights, can_be_flat, place_of

SHAPES = ((64, 128), (32, 256), (2, 48, 128))


def weights(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def gradients(step: int, like: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in like]


def assert_equal_steps(steps: int, *sides: tuple[list[nn.Parameter], torch.optim.Optimizer]) -> None:
    """Both sides' weights are equal to the bit after as many steps with the same gradients."""
    for step in range(steps):
        for several, optimiser in sides:
            for p, gradient in zip(several, gradients(step, several), strict=True):
                p.grad = gradient
            optimiser.step()
    for a, b in zip(sides[0][0], sides[1][0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("longest", [flat.LONGEST, 9000], ids=["one tensor", "several"])
def test_steps_are_those_of_the_weights_alone(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "LONGEST", longest)
    alone, joined = weights(), weights()
    together = FlatWeights(joined)
    assert len(together.parameters) == (1 if longest == flat.LONGEST and longest > 9000 else 3)
    one = torch.optim.AdamW(alone, lr=0.1, foreach=False)
    other = torch.optim.AdamW(together.parameters, lr=0.1, foreach=False)
    together.before_each_step(other)
    assert_equal_steps(3, (alone, one), (joined, other))


def test_a_weight_stays_the_same_object_with_the_same_numbers() -> None:
    several, before = weights(), [p.detach().clone() for p in weights()]
    FlatWeights(several)
    for p, old in zip(several, before, strict=True):
        assert torch.equal(p, old) and p.shape == old.shape and p.is_contiguous()


def test_gradients_that_are_in_their_places_are_not_copied() -> None:
    several = weights()
    together = FlatWeights(several)
    for p, gradient in zip(several, gradients(0, several), strict=True):
        place_of(p).copy_(gradient)
        p.grad = place_of(p)
    together.gather()
    expected = torch.cat([g.flatten() for g in gradients(0, several)])
    assert torch.equal(torch.cat([p.grad for p in together.parameters if p.grad is not None]), expected)


def test_a_weight_without_a_gradient_counts_as_zero_and_not_as_the_last_step() -> None:
    several = weights()
    together = FlatWeights(several)
    for p, gradient in zip(several, gradients(0, several), strict=True):
        p.grad = gradient
    together.gather()
    for p in several:
        p.grad = None
    together.gather()
    assert not any(p.grad.any() for p in together.parameters if p.grad is not None)


def test_a_weight_that_was_loaded_since_is_taken_over() -> None:
    several = weights()
    together = FlatWeights(several)
    several[1].data = torch.full(SHAPES[1], 7.0)
    together.gather()
    assert int((together.parameters[0] == 7.0).sum()) == several[1].numel()
    together.parameters[0].data.zero_()
    assert not several[1].any()


def test_only_weights_of_whole_blocks_in_one_type_can_be_joined() -> None:
    assert can_be_flat(weights())
    assert not can_be_flat([*weights(), nn.Parameter(torch.zeros(4100))])
    assert not can_be_flat([*weights(), nn.Parameter(torch.zeros(2048))])
    assert not can_be_flat([*weights(), *weights(torch.bfloat16)])
    assert not can_be_flat([])


def test_a_weight_of_no_long_tensor_gets_a_place_of_its_own() -> None:
    (p, *_) = weights()
    assert place_of(p).shape == p.shape and not place_of(p).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("paged", [False, True], ids=["8-bit", "paged 8-bit"])
def test_eight_bit_steps_are_those_of_the_weights_alone(paged: bool) -> None:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    from triton_sft_pipeline.training.sft import without_waiting

    make = PagedAdamW8bit if paged else AdamW8bit
    alone, joined = weights(torch.bfloat16, "cuda"), weights(torch.bfloat16, "cuda")
    together = FlatWeights(joined)
    one, other = make(alone, lr=0.01), without_waiting(make)(together.parameters, lr=0.01)
    together.before_each_step(other)
    assert_equal_steps(5, (alone, one), (joined, other))
