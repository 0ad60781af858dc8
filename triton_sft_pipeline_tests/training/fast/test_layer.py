"""The fused decoder layer gives what the stock layers with PEFT's adapters give, forwards and backwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from triton_sft_pipeline.training.experts import math
from triton_sft_pipeline.training.experts.adapter import ExpertAdapter
from triton_sft_pipeline.training.experts.math import Factors
from triton_sft_pipeline.training.fast import ops, twins
from triton_sft_pipeline.training.fast.install import fused_passes, make_fast, make_plain
from triton_sft_pipeline.training.fast.parts import SEEDS
from triton_sft_pipeline_tests.training.experts.packed import pack_in_place
from triton_sft_pipeline_tests.training.fast.models import (
    assert_equal,
    double_precision,
    gradients,
    tiny_model,
    tokens,
    with_adapters,
)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="dense-and-experts"),
        pytest.param({"num_dense_layers": 3}, id="mostly-dense"),
        pytest.param({"global_attn_every_n_layers": 1}, id="full-attention-only"),
        pytest.param({"num_key_value_heads": 4, "num_experts_per_tok": 1}, id="a-key-head-a-query-head"),
        pytest.param({"targets": ("q_proj", "v_proj", "up_proj", "gate_proj")}, id="adapters-on-some"),
        pytest.param({"targets": ("down_proj", "o_proj", "k_proj")}, id="adapters-on-the-others"),
    ],
)
def test_logits_and_every_gradient_are_those_of_the_stock_layers(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    double_precision(monkeypatch)
    model = tiny_model(**changes)
    expected = gradients(model, tokens(2, 11))

    assert len(make_fast(model, force=True)) == 6
    actual = gradients(model, tokens(2, 11))

    assert fused_passes(model) == 1
    assert_equal(actual, expected, 1e-9)


def test_single_precision_agrees_as_far_as_it_goes() -> None:
    model = tiny_model(torch.float32)
    expected = gradients(model, tokens(1, 17))
    make_fast(model, force=True)
    assert_equal(gradients(model, tokens(1, 17)), expected, 1e-4)


def test_dropout_masks_are_the_same_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd through the stock layers, given the very masks that the fused ones drew."""
    double_precision(monkeypatch)
    model = tiny_model(dropout=0.5)
    ids = tokens(2, 9)
    make_fast(model, force=True)
    torch.manual_seed(7)
    actual = gradients(model, ids)
    make_plain(model)

    torch.manual_seed(7)
    seeds = torch.randint(2**31, (4, SEEDS)).tolist()
    _give_masks(model, seeds, monkeypatch)
    assert_equal(actual, gradients(model, ids), 1e-9)

    make_fast(model, force=True)
    torch.manual_seed(8)
    assert not torch.allclose(gradients(model, ids)["logits"], actual["logits"])


def test_documents_in_one_row_are_trained_on_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    double_precision(monkeypatch)
    model = tiny_model()
    first, second, third = tokens(1, 9, 1), tokens(1, 5, 2), tokens(1, 1, 3)
    alone = [gradients(model, ids) for ids in (first, second, third)]
    summed = {
        name: torch.cat([one[name] for one in alone], 1) if name in ("logits", "input") else sum(a[name] for a in alone)
        for name in alone[0]
    }

    make_fast(model, force=True)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in (first, second, third)])[None]
    together = gradients(model, torch.cat([first, second, third], 1), position_ids=positions)

    assert fused_passes(model) == 1
    assert_equal(together, summed, 1e-9)  # type: ignore[arg-type]


def test_attention_computed_twice_gives_what_kept_attention_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    double_precision(monkeypatch)
    model = tiny_model(dropout=0.5)
    found = []
    for options in ({}, {"keep_branch": False}, {"kept_tokens": 0}):
        make_fast(model, force=True, **options)
        torch.manual_seed(3)
        found.append((gradients(model, tokens(2, 9)), _kept_numbers(model)))
    (kept, most), (half, less), (again, least) = found
    assert_equal(half, kept, 1e-12)
    assert_equal(again, kept, 1e-12)
    # o and a, of 32 numbers a token each, and the log-sum of 4 heads.
    assert (most - less, less - least) == (4 * 18 * 32, 4 * 18 * (32 + 4))


def test_activations_of_the_layers_are_not_kept() -> None:
    """Per token and layer: the input, attention's output and its projection, the MLP's output, and the routing."""
    model = tiny_model(torch.float32, dropout=0.5)
    make_fast(model, force=True)
    hidden, heads, experts, chosen = 32, 4 * 8, 6, 2
    routing = 2 * chosen + experts + 3 * chosen
    assert _kept_numbers(model) / 18 <= 4 * (3 * hidden + heads + 4 + 1 + routing) + 6 + 4 * experts


def test_gradients_of_several_passes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    double_precision(monkeypatch)
    model = tiny_model()
    make_fast(model, force=True)
    each = [gradients(model, tokens(1, 6, seed)) for seed in (1, 2)]
    model.zero_grad()
    for seed in (1, 2):
        logits = model(input_ids=tokens(1, 6, seed), use_cache=False).logits
        weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(2)).to(logits.dtype)
        (logits * weights).tanh().sum().backward()
    summed = {n: each[0][n] + each[1][n] for n in each[0] if n not in ("logits", "input")}
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, summed, 1e-12)


def test_autocast_changes_nothing_inside() -> None:
    model = tiny_model(torch.float32)
    make_fast(model, force=True)
    expected = gradients(model, tokens(1, 8))
    hidden = _hidden(model, tokens(1, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_hidden(model, tokens(1, 8)), hidden)
        actual = gradients(model, tokens(1, 8))
    # What autocast does to the head outside of the layers is a bfloat16 rounding.
    assert_equal(actual, expected, 3e-2)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
        ),
    ],
)
def test_in_bfloat16_it_is_as_close_to_float32_as_the_stock_layers_are(device: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    model = tiny_model(torch.bfloat16, **sizes)
    exact = tiny_model(torch.float32, **sizes)
    exact.load_state_dict(model.state_dict())
    reference = gradients(exact, tokens(2, 24))
    model = model.to(device)

    stock = gradients(model, tokens(2, 24))
    make_fast(model, force=device == "cpu")
    fused = gradients(model, tokens(2, 24))

    assert fused_passes(model) == 1
    for name, value in reference.items():
        theirs, ours = ((found[name].float() - value).norm() / value.norm() for found in (stock, fused))
        # A token that rounding sends to another expert is another 0.1 in some gradients.
        assert ours < 2 * theirs + 0.1, f"{name} is off by {ours:.3f}, that of the stock layers by {theirs:.3f}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernels_with_dropout_are_as_close_to_float32_as_their_twins_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two blocks of attention's window. Every token goes to every expert: rounding has no choice to change.
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 64}
    model, exact = (
        tiny_model(dtype, dropout=0.5, sliding_window=64, num_experts_per_tok=6, **sizes)
        for dtype in (torch.bfloat16, torch.float32)
    )
    exact.load_state_dict(model.state_dict())
    make_fast(exact, force=True)
    torch.manual_seed(3)
    reference = gradients(exact, tokens(2, 128))
    model = model.to("cuda")
    make_fast(model)
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(ops, "use_triton", lambda tensor: False)
        torch.manual_seed(3)
        found.append(gradients(model, tokens(2, 128)))
    for name, value in reference.items():
        ours, theirs = ((one[name].float().cpu() - value).norm() / value.norm() for one in found)
        # Another mask would be off by the whole of it.
        assert ours < 1.5 * theirs + 0.02, f"{name} is off by {ours:.3f}, that of the twins by {theirs:.3f}"


@pytest.mark.parametrize("double", [False, True], ids=["plain-scales", "quantised-scales"])
def test_four_bit_weights_agree_with_the_stock_path(double: bool) -> None:
    model = _in_four_bits(double=double)
    expected = gradients(model, tokens(2, 9))

    assert make_fast(model, force=True)
    actual = gradients(model, tokens(2, 9))

    assert fused_passes(model) == 1
    assert_equal(actual, expected, 1e-5)


def test_four_bit_weights_with_dropout_agree_with_the_stock_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts' weights that are unpacked have the adapter's second factors beside them."""
    widths: list[int] = []
    up = math.up_again

    def recorded(x: Tensor, routes: Any, w1: Tensor, lora: Any) -> Any:
        widths.append(w1.shape[-1] - x.shape[-1])
        return up(x, routes, w1, lora)

    monkeypatch.setattr(math, "up_again", recorded)
    model = _in_four_bits(dropout=0.5)
    make_fast(model, force=True)
    torch.manual_seed(7)
    actual = gradients(model, tokens(2, 9))
    # Layers with experts, forwards and backwards; ranks of no whole 16 bytes are filled up.
    assert widths == [4] * 6
    make_plain(model)

    torch.manual_seed(7)
    _give_masks(model, torch.randint(2**31, (4, SEEDS)).tolist(), monkeypatch)
    assert_equal(actual, gradients(model, tokens(2, 9)), 1e-5)


def _in_four_bits(*, double: bool = True, dropout: float = 0.0) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model(torch.float32, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, head_dim=16)
    base = model.unload()
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and "router" not in name and "lm_head" not in name:
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.float32,
                compress_statistics=double,
                quant_type="nf4",
            )
            packed.load_state_dict(module.state_dict())
            base.set_submodule(name, packed.to("cpu"))
    for layer in base.model.layers[1:]:
        layer.mlp.experts.double_quant = double
        pack_in_place(layer.mlp.experts)
    base.is_loaded_in_4bit = True
    return with_adapters(base, torch.float32, dropout)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _kept_numbers(model: Any) -> int:
    """Numbers that the layers keep for the backward pass of 18 tokens, without the adapters themselves."""
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    embedded = model.get_input_embeddings()(tokens(2, 9)).requires_grad_()
    decoder = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(inputs_embeds=embedded, use_cache=False)
    # The last norm keeps its input as well.
    return sum(kept.values()) - 18 * 33


def _give_masks(model: Any, seeds: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the dropout of the stock path by the masks of given seeds."""

    class Masked(nn.Module):
        def __init__(self, p: float, seed: int) -> None:
            super().__init__()
            self.p, self.seed = p, seed

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            mask = twins.dropout_mask(*flat.shape, self.p, self.seed)
            return (flat * mask / (1 - self.p)).view(x.shape)

    places = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    experts: dict[int, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        if isinstance(module, ExpertAdapter):
            experts[id(module)] = seeds[layer][4 if module.parameter_name == "gate_up_proj" else 5]
            continue
        place = 0 if "self_attn.gate_proj" in name else places[name.rsplit(".", 1)[-1]]
        module.lora_dropout["default"] = Masked(0.5, seeds[layer][place])
    plain = ExpertAdapter.factors

    def factors(self: ExpertAdapter, *args: Any, **kwargs: Any) -> Factors | None:
        found = plain(self, *args, **kwargs)
        return dataclasses.replace(found, seed=experts[id(self)]) if found else None

    monkeypatch.setattr(ExpertAdapter, "factors", factors)
