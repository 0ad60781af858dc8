"""Turns what a module takes and returns into plain values: tensors, numbers, text, None, tuples and dictionaries.

Only plain values travel between processes, so that they can be read back with `torch.load(weights_only=True)`, which
runs no code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

_SCALARS = (bool, int, float, str, type(None))


class UnsupportedValueError(TypeError):
    """A value that cannot travel between the judge's processes."""


def to_plain(value: Any, on_tensor: Callable[[Any], Any]) -> Any:
    """Copy a nested value; lists become tuples, tensors become what `on_tensor` makes of them.

    Raises:
        UnsupportedValueError: an object that is none of these, a tensor of a subclass, or a sparse or quantised tensor.
    """
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_quantized:
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


def packed(tensor: Any) -> Any:
    """A dense copy on the CPU that shares no storage with anything, for writing results."""
    return tensor.cpu().contiguous().clone()


def on_cpu(tensor: Any) -> Any:
    """The tensor on the CPU with its strides and storage as they are, for writing inputs."""
    return tensor.cpu()


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
