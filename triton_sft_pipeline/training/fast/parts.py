"""What the fused decoder layer needs to know of an AFMoE layer, read once from its modules and the adapters on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from triton_sft_pipeline.training.experts.adapter import ExpertAdapter, factors_of, parameters_of
from triton_sft_pipeline.training.experts.module import PackedExperts
from triton_sft_pipeline.training.fast.linear import Group, Member, group, is_readable

SEEDS = 6
"""Dropout masks of a layer: attention's input and output projection, the MLP's (or the shared experts'), and the two
tensors of the routed experts."""


class UnsupportedLayerError(Exception):
    """A layer has something that the fused one does not compute; the message says what."""


@dataclass(frozen=True)
class RoutedPart:
    """Router and routed experts.

    Attributes:
        router: its linear layer.
        bias: [E], added to the scores when experts are chosen.
        module: what stands at `mlp.experts`: the experts, or the adapters around them.
        experts: the experts themselves.
        chosen: k.
        route_scale: what the weights of a token add up to.
        scales: alpha / r of gate_up_proj and of down_proj; None where there is no adapter.
        dropouts: of the two.
    """

    router: nn.Module
    bias: Tensor
    module: nn.Module
    experts: PackedExperts
    chosen: int
    route_scale: float
    scales: tuple[float | None, float | None]
    dropouts: tuple[float, float]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer.

    Attributes:
        number: its place in the model.
        norms: before attention, after attention, before the MLP, after the MLP.
        q_norm, k_norm: over a head of queries and of keys.
        eps: of all norms.
        groups: the linear layers: q, k, v and gate of attention; its output projection; gate and up of the dense MLP
            or of the shared experts; the down projection of the same.
        places: where each group's factors stand among `parameters`.
        heads, kv_heads, head_dim: of attention.
        window: tokens that one sees at most, itself included; None: all before it, and then no RoPE either.
        routed: None in a dense layer.
    """

    number: int
    norms: tuple[nn.Module, nn.Module, nn.Module, nn.Module]
    q_norm: nn.Module
    k_norm: nn.Module
    eps: float
    groups: tuple[Group, Group, Group, Group]
    places: tuple[slice, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    routed: RoutedPart | None

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass in training draws masks."""
        rates = [g.dropout for g in self.groups] + list(self.routed.dropouts if self.routed else ())
        return any(rates)

    def parameters(self) -> list[Tensor | None]:
        """The adapters' weights: A and B of every adapted linear layer, then A, B, A, B of the routed experts."""
        found: list[Tensor | None] = [p for g in self.groups for p in g.parameters()]
        return found + list(parameters_of(self.routed.module)) if self.routed else found


def read_layer(layer: Any) -> LayerParts:
    """The parts of an AfmoeDecoderLayer.

    Raises:
        UnsupportedLayerError: with what stands in the way.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if attention.attention_dropout:
        raise UnsupportedLayerError("attention weights have dropout")
    if attention.head_dim % 8 or attention.head_dim > 256:
        raise UnsupportedLayerError(f"flash attention has no head_dim {attention.head_dim}")
    config, moe = attention.config, bool(layer.moe_enabled)
    if config.hidden_act != "silu":
        raise UnsupportedLayerError(f"the activation is {config.hidden_act}, not silu")
    if moe and not config.num_shared_experts:
        raise UnsupportedLayerError("there are no shared experts")
    dense = mlp.shared_experts if moe else mlp
    groups = (
        _group(attention, "attention_in", ("q_proj", "k_proj", "v_proj", "gate_proj")),
        _group(attention, "attention_out", ("o_proj",)),
        _group(dense, "mlp_in", ("gate_proj", "up_proj")),
        _group(dense, "mlp_out", ("down_proj",)),
    )
    ends = list(accumulate((len(g.parameters()) for g in groups), initial=0))
    return LayerParts(
        number=int(layer.layer_idx),
        norms=(
            layer.input_layernorm,
            layer.post_attention_layernorm,
            layer.pre_mlp_layernorm,
            layer.post_mlp_layernorm,
        ),
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        eps=_eps(layer),
        groups=groups,
        places=tuple(slice(*span) for span in pairwise(ends)),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        window=int(attention.sliding_window) if attention.is_local_attention else None,
        routed=_routed(mlp) if moe else None,
    )


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every adapter of a model, on linear layers and on experts."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _eps(layer: Any) -> float:
    norms = (layer.input_layernorm, layer.post_attention_layernorm, layer.pre_mlp_layernorm, layer.post_mlp_layernorm)
    values = {float(n.variance_epsilon) for n in (*norms, layer.self_attn.q_norm, layer.self_attn.k_norm)}
    if len(values) > 1:
        raise UnsupportedLayerError(f"norms differ in eps: {sorted(values)}")
    return values.pop()


def _group(parent: nn.Module, role: str, names: tuple[str, ...]) -> Group:
    members, rates = [], set()
    for name in names:
        module = parent.get_submodule(name)
        member, rate = _member(module, name)
        members.append(member)
        if member.a is not None:
            rates.add(rate)
    if len(rates) > 1:
        raise UnsupportedLayerError(f"adapters of {', '.join(names)} differ in dropout: {sorted(rates)}")
    return group(role, members, rates.pop() if rates else 0.0)


def _member(module: Any, name: str) -> tuple[Member, float]:
    """A linear layer with what its adapter adds, and the adapter's dropout."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if not is_readable(base) or base.bias is not None:
        raise UnsupportedLayerError(f"{name} is {type(base).__name__}, or has a bias, or another block size than 64")
    if not isinstance(module, LoraLayer):
        return Member(base), 0.0
    active = _active(module, name)
    if active is None:
        return Member(base), 0.0
    a, b = module.lora_A[active], module.lora_B[active]
    if active in module.lora_variant or b.bias is not None:
        raise UnsupportedLayerError(f"the adapter of {name} is more than two factors")
    return Member(base, a, b, float(module.scaling[active])), float(getattr(module.lora_dropout[active], "p", 0.0))


def _active(module: LoraLayer, name: str) -> str | None:
    if module.disable_adapters or module.merged:
        raise UnsupportedLayerError(f"the adapter of {name} is switched off or merged")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1:
        raise UnsupportedLayerError(f"{name} has {len(active)} active adapters")
    return str(active[0]) if active else None


def _routed(mlp: Any) -> RoutedPart:
    if not isinstance(mlp.experts, ExpertAdapter | PackedExperts):
        raise UnsupportedLayerError(f"experts are {type(mlp.experts).__name__}")
    if isinstance(mlp.experts, ExpertAdapter):
        _active(mlp.experts, "experts")
    if type(mlp.router.gate) is not nn.Linear or mlp.router.gate.bias is not None:
        raise UnsupportedLayerError(f"the router is {type(mlp.router.gate).__name__}")
    # Asking for the factors of training draws seeds, which is not for reading a model to do.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        experts, *factors = factors_of(mlp.experts, training=True)
    return RoutedPart(
        router=mlp.router.gate,
        bias=mlp.expert_bias,
        module=mlp.experts,
        experts=experts,
        chosen=int(mlp.router.top_k),
        route_scale=float(mlp.router.route_scale),
        scales=(factors[0].scale if factors[0] else None, factors[1].scale if factors[1] else None),
        dropouts=(factors[0].dropout if factors[0] else 0.0, factors[1].dropout if factors[1] else 0.0),
    )
