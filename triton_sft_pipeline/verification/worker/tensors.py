"""Turns what modules and kernels take and return into plain values, and plain values into bytes and back.

Used in child processes, where torch is loaded; the judge itself handles `wire.Array`s only. Knows nothing of problems
or kernels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from triton_sft_pipeline.verification.wire import ITEM_SIZE, Array, Value

_SCALARS = (bool, int, float, str, type(None))
# A view that spans more than this many times its own elements travels without the gaps.
_MAX_GAPS = 4
_SLICE = 1 << 26


class UnsupportedValueError(TypeError):
    """A value that cannot travel between the judge's processes."""


def to_plain(value: Any, on_tensor: Callable[[Any], Any]) -> Any:
    """Copy a nested value; lists become tuples, tensors become what `on_tensor` makes of them.

    Raises:
        UnsupportedValueError: an object that is none of these, a tensor of a subclass, or a sparse or quantised tensor.
    """
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_quantized or _name(value.dtype) not in ITEM_SIZE:
            raise UnsupportedValueError(f"a {value.layout} tensor of {value.dtype}")
        return on_tensor(value.detach())
    if isinstance(value, torch.Tensor):
        raise UnsupportedValueError(f"a tensor of the subclass {type(value).__name__}")
    if type(value) in _SCALARS:
        return value
    if isinstance(value, list | tuple):
        return tuple(to_plain(item, on_tensor) for item in value)
    if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        return {key: to_plain(item, on_tensor) for key, item in value.items()}
    raise UnsupportedValueError(f"an object of type {type(value).__name__}")


def tensors_in(value: Any) -> Iterator[Any]:
    """Every tensor in a plain value, depth first."""
    if isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "data_ptr"):
        yield value


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a plain value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def same(value: Any) -> Any:
    """For `to_plain`: the tensor itself, without its history."""
    return value


def clone(value: Any) -> Any:
    """A copy of a plain value whose tensors share no storage with it and keep their strides."""
    return to_plain(value, _clone_tensor)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two plain values of one structure hold tensors of the same bits, NaN or not."""
    import torch

    def bits(tensor: Any) -> Any:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    pairs = zip(tensors_in(left), tensors_in(right), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def in_slices(*tensors: Any) -> Iterator[tuple[Any, ...]]:
    """The elements of tensors of one shape, flat and side by side, a bounded number at a time.

    What is calculated of a slice in float64 stays small, however large the tensors are.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _SLICE):
        yield tuple(tensor[start : start + _SLICE] for tensor in flat)


def to_wire(value: Any) -> Value:
    """A nested value with every tensor as dense bytes, for answers.

    Raises:
        UnsupportedValueError: see `to_plain`.
    """
    return to_plain(value, _dense)


def to_wire_strided(value: Any) -> Value:
    """A nested value with every tensor's strides kept, for inputs and weights: kernels meet them as modules do.

    Raises:
        UnsupportedValueError: see `to_plain`.
    """
    return to_plain(value, _strided)


def picked(tensor: Any, positions: Any) -> Any:
    """The elements at these places of the tensor as one dimension."""
    return tensor.reshape(-1)[positions.to(tensor.device)]


def from_wire(value: Value, device: str) -> Any:
    """The reverse of both: a plain value with tensors on `device` that share no storage."""
    if isinstance(value, Array):
        return _tensor(value, device)
    if isinstance(value, tuple):
        return tuple(from_wire(item, device) for item in value)
    if isinstance(value, dict):
        return {key: from_wire(item, device) for key, item in value.items()}
    return value


def _dense(tensor: Any) -> Array:
    dense = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return Array(_name(tensor.dtype), tuple(tensor.shape), _bytes(dense))


def _strided(tensor: Any) -> Array:
    import torch

    tensor = tensor.resolve_conj().resolve_neg()
    span = _span(tensor.shape, tensor.stride())
    if tensor.is_contiguous() or span > _MAX_GAPS * tensor.numel():
        return _dense(tensor)
    flat = torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()).cpu()
    return Array(_name(tensor.dtype), tuple(tensor.shape), _bytes(flat), tuple(tensor.stride()))


def _clone_tensor(tensor: Any) -> Any:
    import torch

    if tensor.is_contiguous():
        return tensor.clone()
    flat = torch.as_strided(tensor, (_span(tensor.shape, tensor.stride()),), (1,), tensor.storage_offset()).clone()
    return torch.as_strided(flat, tensor.shape, tensor.stride())


def _tensor(array: Array, device: str) -> Any:
    import torch

    dtype = getattr(torch, array.dtype)
    elements = _span(array.shape, array.stride) if array.stride is not None else math.prod(array.shape)
    # Made where it belongs: a copy on the way would take as long as the way itself.
    flat = torch.empty(elements, dtype=dtype, device=device)
    if elements:
        flat.view(torch.uint8).copy_(torch.frombuffer(array.data, dtype=torch.uint8))
    return flat.view(array.shape) if array.stride is None else torch.as_strided(flat, array.shape, array.stride)


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _span(shape: Any, stride: Any) -> int:
    """Elements from the first to the last that a strided view reads."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
