"""Layers that are recorded once and replayed compute what they compute layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import install
from triton_sft_pipeline.training.fast.graphs import LENGTHS, MakeCalls, StackGraphs, rounded_length
from triton_sft_pipeline.training.fast.install import fused_passes, make_fast
from triton_sft_pipeline.training.fast.layer import decoder_layer
from triton_sft_pipeline_tests.training.fast.models import assert_equal, gradients, tiny_model, tokens

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("longest", [1, 63, 64, 65, 640, 4096, 5000, 16384])
def test_lengths_are_rounded_up_to_a_few(longest: int) -> None:
    lengths = {tokens: rounded_length(tokens, longest) for tokens in range(1, longest + 1)}
    assert all(rounded >= tokens and rounded % 64 == 0 for tokens, rounded in lengths.items())
    assert len(set(lengths.values())) <= LENGTHS
    assert max(lengths.values()) < longest + LENGTHS * 64


def test_a_rounded_length_stays_what_it_is() -> None:
    assert all(rounded_length(rounded_length(n, 4096), 4096) == rounded_length(n, 4096) for n in range(1, 4097))


class Unrecorded:
    """Runs the layers one by one where graphs would be replayed."""

    def __init__(
        self, parameters: Any, make_calls: MakeCalls, seeds_shape: Any, longest: int, device: torch.device
    ) -> None:
        self.make_calls, self.shapes = make_calls, list[tuple[int, ...]]()

    def run(self, x: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        self.shapes.append(tuple(x.shape[:2]))
        for call in self.make_calls(x.shape[0], x.shape[1], torch.tensor(seeds, device=x.device)):
            x = decoder_layer(x, call)
        return x

    def release(self) -> None:
        pass


@pytest.mark.parametrize(("rows", "length"), [(1, 9), (2, 13), (1, 64)])
def test_tokens_that_are_added_behind_change_nothing(rows: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "StackGraphs", Unrecorded)
    model = tiny_model(torch.float64)
    make_fast(model, force=True)
    expected = gradients(model, tokens(rows, length))
    make_fast(model, force=True, longest=64)
    assert_equal(gradients(model, tokens(rows, length)), expected, 1e-12)
    assert fused_passes(model) == 1


def test_a_row_longer_than_was_announced_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "StackGraphs", None)
    model = tiny_model(torch.float64)
    make_fast(model, force=True, longest=8)
    gradients(model, tokens(1, 9))
    assert fused_passes(model) == 1


@pytest.fixture
def on_gpu() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 64}
    return tiny_model(torch.bfloat16, dropout=0.1, **sizes).cuda()


@pytest.mark.gpu
@on_a_gpu[1]
def test_replayed_layers_give_what_the_same_layers_give_one_by_one(on_gpu: Any) -> None:
    def both_lengths() -> list[dict[str, Tensor]]:
        torch.manual_seed(5)
        return [gradients(on_gpu, tokens(1, length, seed=length)) for length in (640, 200, 640, 300, 200)]

    make_fast(on_gpu, longest=640)
    replayed = both_lengths()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "StackGraphs", Unrecorded)
        make_fast(on_gpu, longest=640)
        expected = both_lengths()
    for one, other in zip(replayed, expected, strict=True):
        assert all(value.isfinite().all() for value in one.values())
        assert_equal(one, other, 1e-3)


@pytest.mark.gpu
@on_a_gpu[1]
def test_gradients_of_replayed_layers_add_up(on_gpu: Any) -> None:
    make_fast(on_gpu, longest=128)

    def add(ids: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(5)
        on_gpu(input_ids=ids.cuda(), labels=ids.cuda(), use_cache=False).loss.backward()
        return {name: p.grad.float().clone() for name, p in on_gpu.named_parameters() if p.requires_grad}

    first, second = tokens(1, 128, seed=1), tokens(1, 70, seed=2)
    on_gpu.zero_grad()
    one = add(first)
    both = add(second)
    on_gpu.zero_grad()
    other = add(second)
    assert_equal(both, {name: one[name] + other[name] for name in one}, 2e-2)


@pytest.mark.gpu
@on_a_gpu[1]
def test_a_backward_pass_whose_activations_are_gone_is_refused(on_gpu: Any) -> None:
    make_fast(on_gpu, longest=64)
    ids = tokens(1, 64).cuda()
    early = on_gpu(input_ids=ids, labels=ids, use_cache=False).loss
    on_gpu(input_ids=ids, labels=ids, use_cache=False)
    with pytest.raises(RuntimeError, match="activations are gone"):
        early.backward()


@pytest.mark.gpu
@on_a_gpu[1]
def test_weights_that_were_put_elsewhere_are_found(on_gpu: Any) -> None:
    make_fast(on_gpu, longest=64)
    before = gradients(on_gpu, tokens(1, 64))["logits"]
    for name, parameter in on_gpu.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.zeros_like(parameter)
    after = logits(on_gpu, tokens(1, 64))
    assert not torch.equal(before, after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "StackGraphs", Unrecorded)
        make_fast(on_gpu, longest=64)
        torch.testing.assert_close(after, logits(on_gpu, tokens(1, 64)), rtol=1e-2, atol=1e-2)


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids.cuda(), use_cache=False).logits
    return found.detach().float().cpu()


def test_the_stand_in_takes_what_graphs_take() -> None:
    assert Unrecorded.__init__.__code__.co_varnames[:6] == StackGraphs.__init__.__code__.co_varnames[:6]
