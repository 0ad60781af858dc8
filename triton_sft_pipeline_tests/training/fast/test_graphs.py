"""Layers that are recorded once and replayed compute what they compute layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import install
from triton_sft_pipeline.training.fast.graphs import LENGTHS, MakeCalls, StackGraphs, _Recorded, rounded_length
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


class Unreplayed:
    """Stands for a graph: computes again what would be replayed."""

    def __init__(self, replay: Any) -> None:
        self.replay = torch.no_grad()(replay)


def unreplayed(self: StackGraphs, shape: tuple[int, int], like: Tensor) -> Any:
    """Places as recorded graphs have them, which nothing but a replay writes to."""
    calls, saved = self._make_calls(*shape, self._seeds), list[Any]()
    x, out, grad, dx = (torch.zeros((*shape, like.shape[-1]), dtype=like.dtype) for _ in range(4))

    def forward() -> None:
        result, saved[:] = self._forward(calls, x)
        out.copy_(result)

    def backward() -> None:
        dx.copy_(self._backward(calls, grad, list(saved)))

    first: Any = Unreplayed(forward)
    second: Any = Unreplayed(backward)
    return _Recorded(first, second, x, out, grad, dx, calls)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """A model whose layers are "replayed" on the CPU, and how many weights each pass told autograd of."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(StackGraphs, "_record", unreplayed)
    told: list[int] = []
    choose = StackGraphs._differentiated

    def watched(self: StackGraphs, x: Tensor) -> Sequence[Tensor]:
        chosen = choose(self, x)
        told.append(len(chosen))
        return chosen

    monkeypatch.setattr(StackGraphs, "_differentiated", watched)
    return tiny_model(torch.float64), told


def loss_of(model: Any, ids: Tensor, trained_input: bool = False) -> Tensor:
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_(trained_input)
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).tanh().sum()


def accumulated(model: Any, trained_input: bool) -> list[dict[str, Tensor]]:
    """The gradients after each pass of three optimiser steps: two passes, one, and one after gradients that were set
    from elsewhere."""
    found = []
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step, seeds in enumerate([(1, 2), (3,), (4,)]):
        model.zero_grad()
        if step == 2:
            for number, p in enumerate(parameters.values()):
                p.grad = torch.full_like(p, 0.5) if number % 2 else None
        for seed in seeds:
            loss_of(model, tokens(1, 9 + seed, seed), trained_input).backward()
            found.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
    return found


@pytest.mark.parametrize("trained_input", [False, True])
def test_gradients_of_replayed_layers_are_those_of_autograd(
    replayed: tuple[Any, list[int]], trained_input: bool
) -> None:
    model, told = replayed
    make_fast(model, force=True)
    expected = accumulated(model, trained_input)
    assert told == []
    make_fast(model, force=True, longest=64)
    found = accumulated(model, trained_input)
    # One weight has autograd call the backward pass where the input does not.
    assert told == [0 if trained_input else 1] * 4
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 40
        assert_equal(one, other, 1e-12)


def test_processes_that_exchange_gradients_have_autograd_see_all_of_them(
    replayed: tuple[Any, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = replayed
    make_fast(model, force=True)
    expected = accumulated(model, False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    make_fast(model, force=True, longest=64)
    found = accumulated(model, False)
    assert told == [sum(p.requires_grad for p in model.parameters())] * 4
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other, 1e-12)


def test_gradients_that_are_cleared_between_the_two_passes_are_gone(replayed: tuple[Any, list[int]]) -> None:
    model, _ = replayed
    make_fast(model, force=True, longest=64)
    found = []
    for seed in (1, 2, 2):
        loss = loss_of(model, tokens(1, 9, seed))
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert_equal(found[1], found[2], 1e-12)
    make_fast(model, force=True)
    model.zero_grad()
    loss_of(model, tokens(1, 9, 2)).backward()
    assert_equal(found[1], {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, 1e-12)


def test_gradients_stay_in_their_places_from_pass_to_pass(replayed: tuple[Any, list[int]]) -> None:
    model, _ = replayed
    make_fast(model, force=True, longest=64)
    places = []
    for seed in (1, 2, 3):
        loss_of(model, tokens(1, 9, seed)).backward()
        places.append([p.grad.data_ptr() for p in model.parameters() if p.requires_grad])
        if seed == 2:
            model.zero_grad()
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("moved", ["lora_A", "lora_B"])
def test_weights_that_move_between_two_passes_are_found(
    replayed: tuple[Any, list[int]], moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = replayed
    shapes: list[tuple[int, int]] = []

    def counted(self: StackGraphs, shape: tuple[int, int], like: Tensor) -> Any:
        shapes.append(shape)
        return unreplayed(self, shape, like)

    monkeypatch.setattr(StackGraphs, "_record", counted)
    make_fast(model, force=True, longest=64)
    for _ in range(2):
        loss_of(model, tokens(1, 9)).backward()
    assert shapes == [(1, 64)]
    (*_, last) = (p for name, p in model.named_parameters() if moved in name)
    last.data = last.data.clone()
    loss_of(model, tokens(1, 9)).backward()
    assert shapes == [(1, 64)] * 2


@pytest.fixture
def on_gpu() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 64}
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
