"""Linear layers with LoRA as plain functions, forwards and backwards; layers that read the same input run as one.

The four projections of attention, or a gate and an up projection, are one `Group`: their frozen weights are unpacked
below each other into one matrix, their LoRA inputs go through one dropout mask, and their A factors are one matrix.
With D the mask and s = alpha / r, for input x [N, in]:

    t = (D x) A^T        [N, R]
    y = x W^T + s t B^T  [N, out]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triton_sft_pipeline.training.fast import ops

if TYPE_CHECKING:
    from triton_sft_pipeline.training.fast.scratch import Scratch

_BLOCK, _NESTED_BLOCK = 64, 256
"""Numbers that share a scale, and scales that share a scale, in bitsandbytes' 4-bit weights."""


@dataclass(frozen=True)
class Member:
    """One linear layer, and the two linear layers of its adapter if it has one.

    Attributes:
        base: nn.Linear or bitsandbytes' Linear4bit, without bias, frozen.
        a, b: the adapter's factors, `weight` [r, in] and [out, r].
        scale: alpha / r.
    """

    base: nn.Module
    a: nn.Linear | None = None
    b: nn.Linear | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Group:
    """Linear layers of one input.

    Attributes:
        role: under which name scratch memory holds the weights; groups of one role never need theirs at once.
        members: the layers, in the order of their columns in the output.
        dropout: of the adapters' input while training.
        columns: output columns up to each member's end, beginning with 0.
        ranks: columns of t up to each member's end, beginning with 0.
        width: input columns.
    """

    role: str
    members: tuple[Member, ...]
    dropout: float
    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    width: int

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every member that has an adapter, in turn."""
        return [layer.weight for m in self.members for layer in (m.a, m.b) if layer is not None]


@dataclass(frozen=True)
class Projection:
    """A group made ready for one pass: the weight is there.

    Attributes:
        weight: [out, in], in scratch memory or the layer's own.
        a: [R, in], all A below each other; None without adapters.
        parts: of each adapter its columns of the output, its columns of t, B [out, r] and its scale.
        dropout, seed: of the mask; dropout 0.0 for none.
    """

    weight: Tensor
    a: Tensor | None
    parts: tuple[tuple[slice, slice, Tensor, float], ...]
    dropout: float
    seed: int | Tensor

    @property
    def drops(self) -> bool:
        """Whether adapters see their input through a mask."""
        return self.a is not None and self.dropout > 0


def group(role: str, members: Sequence[Member], dropout: float) -> Group:
    """Put layers of one input together."""
    columns, ranks = [0], [0]
    for member in members:
        columns.append(columns[-1] + int(member.base.out_features))
        ranks.append(ranks[-1] + (member.a.weight.shape[0] if member.a is not None else 0))
    width = int(members[0].base.in_features)
    return Group(role, tuple(members), dropout, tuple(columns), tuple(ranks), width)


def dense_weight(linear: nn.Module, out: Tensor) -> Tensor:
    """The weight [out, in] of a linear layer in the type of `out`, written there.

    Args:
        linear: nn.Linear, or bitsandbytes' Linear4bit with its scales quantised or not.
        out: [out, in], where to; whole rows may lie apart.
    """
    state: Any = getattr(linear.weight, "quant_state", None)
    if state is None:
        return out.copy_(linear.weight)
    codes = linear.weight.data.view(out.shape[0], -1)
    nested = state.state2.absmax if state.nested else None
    offset = state.offset if state.nested else None
    return ops.dequantize(codes, state.absmax, nested, offset, state.quant_type, out)


def is_readable(linear: nn.Module) -> bool:
    """Whether `dense_weight` knows this kind of layer and its layout."""
    if type(linear).__name__ == "Linear4bit":
        state: Any = getattr(linear.weight, "quant_state", None)
        if state is None or state.blocksize != _BLOCK or linear.in_features % _BLOCK:
            return False
        return not state.nested or bool(state.state2.blocksize == _NESTED_BLOCK)
    return type(linear) is nn.Linear


def load(layers: Group, factors: Sequence[Tensor], scratch: Scratch, like: Tensor, seed: int | Tensor) -> Projection:
    """Make a group ready: unpack its weights and put its A factors together.

    Args:
        factors: A and B of every member that has an adapter, in turn, as `Group.parameters` lists them.
        like: a tensor of the type and the device to compute in and on.
        seed: of the dropout mask.
    """
    members, dtype = layers.members, like.dtype
    only = members[0].base.weight
    if len(members) == 1 and only.dtype == dtype:
        weight = only.data
    else:
        weight = scratch.take(layers.role, (layers.columns[-1], layers.width), dtype, like.device)
        for i, member in enumerate(members):
            dense_weight(member.base, weight[layers.columns[i] : layers.columns[i + 1]])
    parts, firsts, left = [], [], list(factors)
    for i, member in enumerate(members):
        if member.a is None:
            continue
        firsts.append(left.pop(0).to(dtype))
        columns = slice(layers.columns[i], layers.columns[i + 1])
        parts.append((columns, slice(layers.ranks[i], layers.ranks[i + 1]), left.pop(0).to(dtype), member.scale))
    a = None if not firsts else firsts[0] if len(firsts) == 1 else torch.cat(firsts)
    return Projection(weight, a, tuple(parts), layers.dropout, seed)


def reduce(
    projection: Projection, x: Tensor | None, dropped: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """D x [N, in] and t = (D x) A^T [N, R]; None and None without adapters.

    Args:
        x: [N, in]; not looked at where `dropped` is there.
        dropped: D x, where it is known already.
    """
    if projection.a is None:
        return None, None
    if dropped is None:
        assert x is not None
        dropped = ops.dropout(x, projection.dropout, projection.seed) if projection.dropout else x
    return dropped, torch.mm(dropped, projection.a.t())


def forward(
    projection: Projection, x: Tensor, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [N, out] of x [N, in], and what `reduce` returns; `dropped` as there."""
    y = torch.mm(x, projection.weight.t())
    dropped, t = reduce(projection, x, dropped)
    if t is not None:
        for columns, ranks, b, scale in projection.parts:
            y[:, columns].addmm_(t[:, ranks], b.t(), alpha=scale)
    return y, dropped, t


def input_gradient(projection: Projection, dy: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The gradient of x [N, in], given that of y, and that of t [N, R].

    Args:
        add: [N, in], a gradient that x has from elsewhere; overwritten.
    """
    dx, extra, dt = input_gradients(projection, dy, add)
    if extra is not None:
        dx = ops.dropout(extra, projection.dropout, projection.seed, add=dx)
    return dx, dt


def input_gradients(
    projection: Projection, dy: Tensor, add: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `input_gradient`, but in between the gradient of D x [N, in] for itself: with the mask D, it is missing in
    that of x. None where there is no mask."""
    dx = torch.mm(dy, projection.weight) if add is None else add.addmm_(dy, projection.weight)
    if projection.a is None:
        return dx, None, None
    dt = dy.new_empty(dy.shape[0], projection.a.shape[0])
    for columns, ranks, b, scale in projection.parts:
        part = dt[:, ranks]
        torch.addmm(part, dy[:, columns], b, beta=0, alpha=scale, out=part)
    if not projection.dropout:
        return dx.addmm_(dt, projection.a), None, dt
    return dx, torch.mm(dt, projection.a), dt


def factor_gradients(
    projection: Projection, dy: Tensor, dt: Tensor | None, dropped: Tensor | None, t: Tensor | None
) -> list[Tensor]:
    """The gradients of A and B of every member that has an adapter, in turn.

    Args:
        dy: [N, out], the gradient of y.
        dt: from `input_gradient`.
        dropped, t: from `forward` or `reduce`.
    """
    if dt is None or dropped is None or t is None:
        return []
    da = torch.mm(dt.t(), dropped)
    gradients = []
    for columns, ranks, b, scale in projection.parts:
        db = torch.empty_like(b)
        torch.addmm(db, dy[:, columns].t(), t[:, ranks], beta=0, alpha=scale, out=db)
        gradients += [da[ranks], db]
    return gradients
