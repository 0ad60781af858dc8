"""A 4-bit model that answers: its linear layers unpacked once instead of at every token, where the GPU has the room.

bitsandbytes unpacks a weight whenever it is used and then multiplies: the same numbers, up to the order in which they
are added, as multiplying with a weight that was unpacked before. Routed experts stay packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHARE = 0.5
"""Of the GPU's free memory that unpacked weights may take: answers need the rest."""


@contextmanager
def unpacked_linears(model: Any, devices: frozenset[str] = frozenset({"cuda"})) -> Iterator[int]:
    """For the time of the block, have 4-bit linear layers multiply with weights that are unpacked once.

    The layers themselves, their packed weights and what an adapter sees of them stay as they are.

    Args:
        model: any model; its layers of bitsandbytes' `Linear4bit` are meant.
        devices: types of devices where this is done. Not on CPUs: on some of them bitsandbytes lays the packed weights
            out anew for kernels of its own.

    Yields:
        How many layers are unpacked: all, or none where they need more than `SHARE` of the free memory.
    """
    layers = [layer for layer in _packed_linears(model) if layer.weight.device.type in devices]
    if not layers or not _have_room(layers):
        yield 0
        return
    try:
        for layer in layers:
            layer.forward = _multiplying(layer)
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packed_linears(model: Any) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [
        module
        for module in model.modules()
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is not None
    ]


def _have_room(layers: list[Any]) -> bool:
    import torch

    needed: dict[Any, int] = {}
    for layer in layers:
        device, state = layer.weight.device, layer.weight.quant_state
        width = torch.finfo(layer.compute_dtype or state.dtype).bits // 8
        needed[device] = needed.get(device, 0) + state.shape.numel() * width
    return all(size <= SHARE * _free(device) for device, size in needed.items())


def _free(device: Any) -> float:
    """Bytes that torch can still give out on a device; no bound on a CPU."""
    import torch

    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _multiplying(layer: Any) -> Any:
    """What `Linear4bit.forward` computes, with the weight unpacked now."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)

    def forward(x: Any) -> Any:
        return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    return forward
