"""Makes new inputs out of drawn ones: mixes two draws element by element, or shifts one so that it has negative values.

A kernel that remembers what it saw for an input meets values that it never saw, though each one was drawn by the
problem itself. Works on plain values of tensors (tuples, dictionaries, tensors, scalars), on any device. Knows nothing
of kernels, of references and of time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads neighbouring numbers over the whole range
_SEEDS = 1 << 63
_ZEROS = 0.25
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def mix(a: Any, b: Any, seed: int) -> Any:
    """A new value of the structure of `a` in which each element of a tensor is that of `a` or that of `b`.

    The choice follows from `seed` alone: two processes with the same kind of device make the same one. Shapes, strides
    and dtypes are those of `a`; nothing shares storage with `a` or `b`. Taken from `a` whole: scalars, tensors whose
    elements share storage (expanded ones), and tensors for which `b` has none of the same shape, dtype and device.
    """
    mixed = duplicate(a)
    refill(mixed, a, b, seed)
    return mixed


def refill(target: Any, a: Any, b: Any, seed: int) -> None:
    """Give the tensors of `target`, a `mix` or `duplicate` of `a`, the values of `mix(a, b, seed)`, in place.

    Whatever was written into them before is gone. Their storage stays where it is.
    """
    import torch

    with torch.no_grad():
        for index, (into, first, second) in enumerate(_triples(target, a, b)):
            mixable = _is_like(first, second) and not _overlaps(first)
            if not mixable or _span(first) != first.numel():
                _storage(into).copy_(_storage(first))
            if mixable:
                mask = _mask(first, seed, index)
                torch.where(mask, _as_bits(first), _as_bits(second), out=_as_bits(into))


def duplicate(value: Any) -> Any:
    """A copy of a plain value that shares no storage with it; strides are kept, and so are gaps between elements."""
    return _each(value, lambda tensor: _restrided(_storage(tensor.detach()).clone(), tensor))


def views(value: Any) -> Any:
    """The same storage in new tensor objects: what a callee does to an object (resizing it, say) stays there."""
    return _each(value, lambda tensor: tensor.detach())


def nbytes(value: Any) -> int:
    """Bytes that a `duplicate` of a plain value takes."""
    return sum(_span(tensor) * tensor.element_size() for tensor in _tensors(value))


def shift(inputs: Any) -> Any | None:
    """A copy of plain inputs in which each float tensor that is nowhere negative, and not constant, is moved down.

    The middle between its least and its greatest value is subtracted, rounded to a number with few binary digits, so
    that evenly spread values are about half negative. Tensors with NaN or infinite values stay as they are, and so do
    all others. None when no tensor qualifies.
    """
    found = [_middle(tensor) for tensor in _tensors(inputs)]
    if all(middle is None for middle in found):
        return None
    middles = iter(found)

    def moved(tensor: Any) -> Any:
        middle = next(middles)
        span = _storage(tensor.detach()).clone()
        return _restrided(span if middle is None else (_wide(span) - middle).to(span.dtype), tensor)

    return _each(inputs, moved)


def negate(inputs: Any) -> Any | None:
    """A copy of plain inputs in which each tensor that `shift` would move is negative; None when there is none."""
    if shift(inputs) is None:
        return None
    return _each(inputs, lambda tensor: -duplicate(tensor) if _middle(tensor) is not None else duplicate(tensor))


def sparse(inputs: Any, seed: int) -> Any | None:
    """A copy of plain inputs in which about a quarter of the elements of every float tensor are zero.

    None when there is no float tensor. Elements that share storage are zero together.
    """
    import torch

    if not any(tensor.is_floating_point() for tensor in _tensors(inputs)):
        return None
    generator = torch.Generator().manual_seed(seed)

    def thinned(tensor: Any) -> Any:
        span = _storage(tensor.detach()).clone()
        if tensor.is_floating_point():
            span[(torch.rand(span.numel(), generator=generator) < _ZEROS).to(span.device)] = 0.0
        return _restrided(span, tensor)

    return _each(inputs, thinned)


def _each(value: Any, change: Any) -> Any:
    """A plain value with `change` applied to each tensor, depth first."""
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return change(value) if _is_tensor(value) else value


def _triples(target: Any, a: Any, b: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The tensors of `target` and `a`, and what stands in their place in `b` (None where its structure differs)."""
    if isinstance(a, tuple):
        others = b if isinstance(b, tuple) and len(b) == len(a) else (None,) * len(a)
        for items in zip(target, a, others, strict=True):
            yield from _triples(*items)
    elif isinstance(a, dict):
        for key, item in a.items():
            yield from _triples(target[key], item, b.get(key) if isinstance(b, dict) else None)
    elif _is_tensor(a):
        yield target, a, b


def _tensors(value: Any) -> Iterator[Any]:
    return (first for first, _, _ in _triples(value, value, value))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr")


def _is_like(a: Any, b: Any) -> bool:
    return _is_tensor(b) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _span(tensor: Any) -> int:
    """Elements of storage from the first to the last one that the tensor reads."""
    if tensor.numel() == 0:
        return 0
    return int(1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))


def _storage(tensor: Any) -> Any:
    """The storage between a tensor's first and last element, gaps included, as one dimension."""
    return tensor.as_strided((_span(tensor),), (1,))


def _restrided(span: Any, like: Any) -> Any:
    return span.as_strided(like.shape, like.stride())


def _overlaps(tensor: Any) -> bool:
    """Whether two elements may share storage; never wrong when it says that none do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _mask(tensor: Any, seed: int, index: int) -> Any:
    """True where the element comes from the first draw; another one for each tensor of a value."""
    import torch

    generator = torch.Generator(device=tensor.device).manual_seed((seed + index * _GOLDEN) % _SEEDS)
    mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
    return mask.random_(0, 2, generator=generator)


def _as_bits(tensor: Any) -> Any:
    """The tensor as integers of its width: few operators take every dtype, and every value must survive, NaN too."""
    import torch

    if tensor.is_complex():
        return tensor
    return tensor.view(getattr(torch, _BITS[tensor.element_size()]))


def _wide(tensor: Any) -> Any:
    """Eight-bit floats have no arithmetic of their own."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _middle(tensor: Any) -> float | None:
    """What to subtract from a float tensor that is nowhere negative; None for every other tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    wide = _wide(tensor.detach())
    low, high = float(wide.amin()), float(wide.amax())
    if not (0 <= low < high < math.inf):
        return None
    # To an eighth of the range or less: the same for draws that hardly differ, and well inside the range.
    grid = 2.0 ** (math.floor(math.log2(high - low)) - 3)
    middle = low + (high - low) / 2
    return (round(middle / grid) * grid if grid else middle) or None
