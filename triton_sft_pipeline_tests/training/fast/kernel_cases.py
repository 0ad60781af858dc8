"""One comparison of a kernel with its twin for every fused operation, at a given size.

Used on a GPU at Trinity-Mini's sizes, and without one in two ways, each a process of its own that prints a JSON object
of what went wrong, "" for nothing: `TRITON_INTERPRET=1 python -m triton_sft_pipeline_tests.training.fast.kernel_cases
interpret` compares at small and odd sizes in Triton's interpreter, `... kernel_cases compile` compiles every kernel for
an H100 at Trinity-Mini's sizes."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import (
    kernels_blocks,
    kernels_factors,
    kernels_moe,
    kernels_nf4,
    kernels_norm,
    kernels_rows,
    twins,
)


@dataclass(frozen=True)
class Size:
    """A size to compare at. Names as in fast/ops.py; `inner` is I."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    chosen: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Reproducible normal numbers, made on the CPU."""
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
        return made.to(dtype or self.dtype).to(self.device)

    def index(self, seed: int = 0) -> Tensor:
        """k different experts for each token, int64 [N, k]."""
        scores = torch.rand(self.tokens, self.experts, generator=torch.Generator().manual_seed(seed))
        return scores.topk(self.chosen).indices.to(self.device)

    def columns(self, rows: int, width: int, seed: int) -> Tensor:
        """A view of the middle columns of a wider tensor."""
        return self.normal(rows, width + 32, seed=seed)[:, 16 : 16 + width]


def close(mine: Any, expected: Any, size: Size) -> None:
    """The same within a rounding or two of the type."""
    if isinstance(expected, tuple):
        for one, other in zip(mine, expected, strict=True):
            close(one, other, size)
        return
    if expected is None:
        assert mine is None
        return
    assert mine.shape == expected.shape and mine.dtype == expected.dtype
    if not expected.is_floating_point():
        assert torch.equal(mine, expected)
        return
    tolerance = 1e-5 if expected.dtype == torch.float32 and size.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine.float(), expected.float(), rtol=2 * tolerance, atol=tolerance)


EPS = 1e-5


def _fewer(size: Size) -> Size:
    """A program for each token: the interpreter needs no more of the same."""
    return replace(size, tokens=min(size.tokens, 9)) if size.device == "cpu" else size


def norms(size: Size) -> None:
    size = _fewer(size)
    x, dy, rest = (size.normal(size.tokens, size.hidden, seed=seed) for seed in range(3))
    w1, w2 = size.normal(size.hidden, seed=4), size.normal(size.hidden, seed=5)
    wide = size.columns(size.tokens, size.hidden, seed=6)
    close(kernels_norm.rms_norm(x, w1, EPS), twins.rms_norm(x, w1, EPS), size)
    close(kernels_norm.rms_norm(wide, w1, EPS), twins.rms_norm(wide, w1, EPS), size)
    rstd = twins.rms_norm(x, w1, EPS)[1]
    for add in (None, rest, wide):
        expected = twins.rms_norm_backward(dy, x, w1, rstd, add)
        close(kernels_norm.rms_norm_backward(dy, x, w1, rstd, add), expected, size)
    even = size.normal(size.tokens, 1).expand(-1, size.hidden)  # as the gradient of a sum
    close(kernels_norm.rms_norm_backward(even, x, w1, rstd), twins.rms_norm_backward(even, x, w1, rstd), size)
    close(kernels_norm.norm_add(x, w1, rest, EPS), twins.norm_add(x, w1, rest, EPS), size)
    close(kernels_norm.norm_add_norm(x, w1, rest, w2, EPS), twins.norm_add_norm(x, w1, rest, w2, EPS), size)


def _heads(size: Size, rope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    total = (2 * size.heads + 2 * size.kv_heads) * size.head_dim
    angles = torch.rand(size.tokens, size.head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    angles = torch.cat((angles, angles), -1).to(size.device)
    cos, sin = angles.cos().to(size.dtype), angles.sin().to(size.dtype)
    weights = size.normal(size.head_dim, seed=1), size.normal(size.head_dim, seed=2)
    return size.normal(size.tokens, total), *weights, *((cos, sin) if rope else (None, None))


def heads(size: Size) -> None:
    size = _fewer(size)
    for rope in (True, False):
        qkv, wq, wk, cos, sin = _heads(size, rope)
        shape = size.heads, size.kv_heads, size.head_dim
        expected = twins.qk_norm_rope(qkv, wq, wk, EPS, cos, sin, *shape)
        close(kernels_norm.qk_norm_rope(qkv, wq, wk, EPS, cos, sin, *shape), expected, size)
        dq = size.normal(size.tokens, size.heads, size.head_dim, seed=7)
        dk = size.normal(size.tokens, size.kv_heads, size.head_dim, seed=8)
        mine, out = torch.full_like(qkv, 3.0), torch.full_like(qkv, 3.0)
        for backend, to in ((kernels_norm, mine), (twins, out)):
            backend.qk_norm_rope_backward(dq, dk, qkv, wq, wk, *expected[2:], cos, sin, to)
        close(mine, out, size)


def gates(size: Size) -> None:
    width = size.heads * size.head_dim
    o, dy = size.normal(size.tokens, width), size.normal(size.tokens, width, seed=1)
    gate = size.columns(size.tokens, width, seed=2)
    close(kernels_rows.gate_mul(o, gate), twins.gate_mul(o, gate), size)
    mine, out = torch.zeros_like(gate), torch.zeros_like(gate)
    grad = kernels_rows.gate_mul_backward(dy, o, gate, mine)
    close(grad, twins.gate_mul_backward(dy, o, gate, out), size)
    close(mine, out, size)


def dropped_gates(size: Size) -> None:
    """Also a width that is no multiple of the eight lanes."""
    for width in (size.heads * size.head_dim, size.heads * size.head_dim + 3):
        o, dy, extra = (size.normal(size.tokens, width, seed=seed) for seed in range(3))
        gate = size.columns(size.tokens, width, seed=3)
        for p, seed in ((0.05, 2**31 - 1), (0.5, torch.tensor([2**40 + 3], device=size.device))):
            expected = twins.gate_mul_dropout(o, gate, p, seed)
            mine = kernels_rows.gate_mul_dropout(o, gate, p, seed)
            close(mine, expected, size)
            assert torch.equal(mine[1] == 0, expected[1] == 0), "another mask than the twin's"
            alone = kernels_rows.gate_mul_dropout(o, gate, p, seed, both=False)
            assert alone[0] is None and torch.equal(alone[1], mine[1])
            wide, out = torch.full_like(gate, 3.0), torch.full_like(gate, 3.0)
            grad = kernels_rows.gate_mul_dropout_backward(dy, extra, o, gate, wide, p, seed)
            close(grad, twins.gate_mul_dropout_backward(dy, extra, o, gate, out, p, seed), size)
            close(wide, out, size)


def swiglus(size: Size) -> None:
    rows = size.tokens * size.chosen
    u, add = size.normal(rows, 2 * size.inner), size.normal(rows, 2 * size.inner, seed=1)
    dh, weight = size.normal(rows, size.inner, seed=2), size.normal(rows, dtype=torch.float32)
    close(kernels_rows.swiglu(u), twins.swiglu(u), size)
    for row_weight in (None, weight):
        expected = twins.swiglu_backward(dh, u, row_weight)
        mine = kernels_rows.swiglu_backward(dh, u, row_weight)
        close(mine[:2], expected[:2], size)
        if row_weight is not None:  # a sum of I products: its rounding grows with them
            close(mine[2] / size.inner**0.5, expected[2] / size.inner**0.5, size)
    first, second = u.clone(), u.clone()
    close(kernels_rows.swiglu(first, add), twins.swiglu(second, add), size)
    close(first, second, size)
    wide = torch.full_like(u, 3.0)
    kernels_rows.swiglu(u, out=wide[:, : size.inner])
    close(wide[:, : size.inner], twins.swiglu(u), size)
    assert (wide[:, size.inner :] == 3).all()


def dropped_swiglus(size: Size) -> None:
    for tokens, inner in ((size.tokens, size.inner), (min(size.tokens, 7), size.inner + 3)):
        rows = tokens * size.chosen
        u, weight = size.columns(rows, 2 * inner, seed=1), size.normal(rows, seed=4, dtype=torch.float32)
        dh, extra = size.normal(rows, inner, seed=2), size.columns(rows, inner, seed=3)
        for p, seed in ((0.05, 2**31 - 1), (0.5, torch.tensor([2**40 + 3], device=size.device))):
            wide = torch.full((rows, inner + 5), 3.0, dtype=size.dtype, device=size.device)
            expected = twins.swiglu_dropout(u, p, seed)
            mine = kernels_rows.swiglu_dropout(u, p, seed, wide[:, :inner])
            close(mine, expected, size)
            close(kernels_rows.swiglu_dropout(u, p, seed), expected, size)
            assert torch.equal(mine[1] == 0, expected[1] == 0), "another mask than the twin's"
            assert (wide[:, inner:] == 3).all()
            arguments = dh, extra, u, weight, p, seed, 0.5
            du, dropped, drow = kernels_rows.swiglu_dropout_backward(*arguments)
            *rows_expected, sum_expected = twins.swiglu_dropout_backward(*arguments)
            close((du, dropped), tuple(rows_expected), size)
            close(drow / inner**0.5, sum_expected / inner**0.5, size)
            plain = dh, extra, u, None, p, seed, 0.5
            close(kernels_rows.swiglu_dropout_backward(*plain), twins.swiglu_dropout_backward(*plain), size)


def masks(size: Size) -> None:
    rows = size.tokens * size.chosen
    if size.device == "cpu":
        rows = min(rows, 140)  # two tiles at least
    for width in (size.hidden, size.inner, size.hidden + 3):
        x, add = size.normal(rows, width), size.normal(rows, width, seed=1)
        for p, seed, scale in ((0.05, 2**31 - 1, 0.5), (0.5, 1, 1.0), (0.0, 16, 2.0)):
            mine = kernels_rows.dropout(x, p, seed, None, scale)
            expected = twins.dropout(x, p, seed, None, scale)
            assert torch.equal(mine == 0, expected == 0), "another mask than the twin's"
            close(mine, expected, size)
            close(kernels_rows.dropout(x, p, seed, add, scale), twins.dropout(x, p, seed, add, scale), size)
            stored = torch.tensor([seed], device=size.device)
            for other in (stored, stored[0], stored.cpu()):
                assert torch.equal(kernels_rows.dropout(x, p, other, None, scale), mine), "another mask from memory"
        large = torch.tensor([0, 2**40 + 3, 0], device=size.device)[1:2]  # no 16-byte boundary, both words of the key
        assert torch.equal(kernels_rows.dropout(x, 0.5, large), kernels_rows.dropout(x, 0.5, 2**40 + 3))
        assert torch.equal(kernels_rows.dropout(x, 0.5, large) == 0, twins.dropout(x, 0.5, 2**40 + 3) == 0)


def gathers(size: Size) -> None:
    for width in (size.hidden, size.hidden + 3):
        x = size.normal(size.tokens, width)
        index = twins.sort_routes(size.index(), size.experts)[2]
        assert torch.equal(kernels_moe.gather(x, index), x[index])
        rows, dropped = kernels_moe.gather(x, index, 0.25, 77)
        assert torch.equal(rows, x[index])
        close(dropped, twins.dropout(x[index], 0.25, 77), size)
        again = kernels_moe.gather(x, index, 0.25, torch.tensor([77], device=size.device))
        assert torch.equal(again[0], rows) and torch.equal(again[1], dropped)
        for p in (0.0, 0.25):
            wide = torch.full((index.numel(), width + 5), 3.0, dtype=size.dtype, device=size.device)
            kernels_moe.gather(x, index, p, 77, wide[:, :width])
            assert torch.equal(wide[:, :width], x[index]) and (wide[:, width:] == 3).all()


def combines(size: Size) -> None:
    size = _fewer(size)
    index = size.index()
    inverse = twins.sort_routes(index, size.experts)[1]
    rows = index.numel()
    y, y2 = size.normal(rows, size.hidden), size.normal(rows, size.hidden, seed=1)
    weights = size.normal(*index.shape, dtype=torch.float32).abs()
    add = size.columns(size.tokens, size.hidden, seed=2)
    for arguments in ((weights,), (None,), (weights, add), (None, add, y2, 0.25), (weights, None, y2, 1.0)):
        close(kernels_moe.combine(y, inverse, *arguments), twins.combine(y, inverse, *arguments), size)
    for width in (size.hidden, size.hidden + 3, 3000):
        y, y2 = size.normal(rows, width), size.columns(rows, width, seed=1)
        for p, seed in ((0.05, 2**31 - 1), (0.5, torch.tensor([2**40 + 3], device=size.device))):
            mine = kernels_moe.combine_dropout(y, inverse, y2, p, seed)
            close(mine, twins.combine_dropout(y, inverse, y2, p, seed), size)


def factors(size: Size) -> None:
    """B of the experts, to the place beside the weights and back into PEFT's layout."""
    for rank in (3, 8, 17):
        stored = size.normal(size.hidden, rank * size.experts, seed=rank)
        b = stored.view(size.hidden, rank, size.experts).permute(2, 0, 1)
        padded = -(-rank // 8) * 8
        wide, expected = (
            torch.full((size.experts, size.hidden, padded + 16), 3.0, dtype=size.dtype, device=size.device)
            for _ in range(2)
        )
        kernels_moe.fill_b(b, wide[..., 8 : 8 + padded])
        twins.fill_b(b, expected[..., 8 : 8 + padded])
        assert torch.equal(wide, expected)
        assert torch.equal(kernels_moe.join_b(wide[..., 8 : 8 + rank]), stored)
        assert torch.equal(twins.join_b(b), stored)
        assert torch.equal(kernels_moe.join_b(b.contiguous()), stored)


def factor_products(size: Size) -> None:
    """With experts without rows, and with one that has more of them than a tile."""
    rows = size.tokens * size.chosen
    each = torch.arange(size.experts) % 3
    each = each * (rows // 2 // int(each.sum()))
    each[-2] += rows - int(each.sum())
    offsets = each.cumsum(0).to(torch.int32).to(size.device)
    for rank, width in ((8, size.hidden), (24, size.inner), (64, size.hidden + 8)):
        x = size.normal(rows, width, seed=rank)
        a, b = size.normal(size.experts, rank, width, seed=1), size.normal(size.experts, width, rank + 8, seed=2)
        turned, beside = a.transpose(1, 2), b[..., 8:]
        narrow, wide = size.normal(rows, rank, seed=3), size.normal(rows, width + rank, seed=4)
        for w in (turned, beside):
            expected, mine = (backend.shrink(x, w, offsets) for backend in (twins, kernels_factors))
            # Sums of as many products: their rounding grows with them.
            close(mine / width**0.5, expected / width**0.5, size)
            out = kernels_factors.shrink(x, w, offsets, 0.5, wide[:, width:])
            close(out / width**0.5, twins.shrink(x, w, offsets, 0.5) / width**0.5, size)
            assert torch.equal(out, wide[:, width:])
        assert torch.equal(wide[:, :width], size.normal(rows, width + rank, seed=4)[:, :width])
        for w in (a, beside.transpose(1, 2)):
            close(kernels_factors.expand(narrow, w, offsets) / 8, twins.expand(narrow, w, offsets) / 8, size)
        for one, other in ((wide[:, :width], narrow), (narrow, x)):
            expected = twins.outer(one, other, offsets)
            mine = kernels_factors.outer(one, other, offsets)
            close(mine / rows**0.5, expected / rows**0.5, size)
            assert torch.equal(mine[0], torch.zeros_like(mine[0]))


def windows(size: Size) -> None:
    """Blocks of attention: two rows of three blocks, v as columns of a wider tensor."""
    window = size.tokens // 4 if size.tokens >= 512 else 4
    shape, kv = (2, 3 * window, size.heads, size.head_dim), (2, 3 * window, size.kv_heads, size.head_dim)
    q, grad, out = (size.normal(*shape, seed=seed) for seed in range(3))
    k = size.normal(*kv, seed=3)
    v = size.columns(6 * window, size.kv_heads * size.head_dim, seed=4).unflatten(1, kv[2:]).unflatten(0, kv[:2])
    sums = size.normal(6, size.heads, window, seed=5, dtype=torch.float32)
    for late, log_sum in (((q,), None), ((grad, q, out), sums), ((grad, q), sums)):
        found = kernels_blocks.reverse_blocks(late, (k, v), window, log_sum)
        expected = twins.reverse_blocks(late, (k, v), window, log_sum)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and torch.equal(one, other)

    before = size.normal(4, window - 1, *shape[2:], seed=6)
    before_sum = size.normal(4, size.heads, window - 1, seed=7, dtype=torch.float32)
    before_sum[0, 0, 0], before_sum[1, 0, 0] = 200.0, -200.0
    mine, theirs, sums_before = q.clone(), q.clone(), sums.clone()
    merged = kernels_blocks.merge_blocks(mine, sums, before, before_sum)
    close(merged, twins.merge_blocks(theirs, sums, before, before_sum), size)
    close(mine, theirs, size)
    assert torch.equal(sums, sums_before)

    gradients = [(t.clone(), t.clone()) for t in (q, k, v.contiguous())]
    turned = twins.reverse_blocks((grad,), (k, v), window)
    kernels_blocks.add_reversed(*(pair[0] for pair in gradients), turned, window)
    twins.add_reversed(*(pair[1] for pair in gradients), turned, window)
    close(tuple(pair[0] for pair in gradients), tuple(pair[1] for pair in gradients), size)


def routers(size: Size) -> None:
    logits, bias = size.normal(size.tokens, size.experts), 0.1 * size.normal(size.experts)
    logits[1:, -1] = logits[1:, 0]
    bias[-1] = bias[0]  # a tie in most rows
    index = twins.router(logits, bias, size.chosen, 2.826)[1]
    grad = size.normal(*index.shape, dtype=torch.float32)
    close(*(b.router_backward(grad, logits, index, 2.826) for b in (kernels_moe, twins)), size)
    mine, expected = (backend.router(logits, bias, size.chosen, 2.826) for backend in (kernels_moe, twins))
    same = (mine[1] == expected[1]).all(1)
    # On a GPU the last bit of a sigmoid is another one, and two experts may change places.
    assert same.all() if size.device == "cpu" else same.float().mean() > 0.99
    close((mine[0][same], mine[1][same]), (expected[0][same], expected[1][same]), size)


def sorts(size: Size) -> None:
    index = size.index()
    for choices in (index, torch.zeros_like(index), index % 2, index[:1]):
        mine, expected = (b.sort_routes(choices, size.experts) for b in (kernels_moe, twins))
        for one, other in zip(mine, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _codes(size: Size, experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(rows + columns)
    blocks = rows * columns // 64
    codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=made, dtype=torch.uint8)
    absmax = torch.randint(0, 256, (experts, blocks), generator=made, dtype=torch.uint8)
    nested = torch.rand(experts, -(-blocks // 256), generator=made)
    offset = torch.rand(experts, generator=made)
    plain = torch.rand(experts, blocks, generator=made)
    return tuple(t.to(size.device) for t in (codes, absmax, nested, offset, plain))  # type: ignore[return-value]


def weights(size: Size) -> None:
    """Equal to the bit, for stacks and single matrices, with and without gaps between the rows."""
    stack = min(size.experts, 3 if size.device == "cpu" else 16)
    shapes = ((stack, 2 * size.inner, size.hidden), (stack, size.hidden, size.inner), (1, 5, 128))
    for experts, rows, columns in shapes:
        codes, absmax, nested, offset, plain = _codes(size, experts, rows, columns)
        for kind, scales, dtype in (
            ("nf4", (absmax, nested, offset), torch.bfloat16),
            ("nf4", (absmax, nested, offset), size.dtype),
            ("nf4", (plain, None, None), torch.bfloat16),
            ("fp4", (absmax, nested, offset), torch.float16),
        ):
            mine = torch.empty(experts, rows, columns + 64, dtype=dtype, device=size.device)[..., :columns]
            out = torch.empty(experts, rows, columns, dtype=dtype, device=size.device)
            expected = twins.dequantize(codes, *scales, kind, torch.empty_like(out))
            assert torch.equal(kernels_nf4.dequantize(codes, *scales, kind, out), expected)
            assert torch.equal(kernels_nf4.dequantize(codes, *scales, kind, mine), expected)
        one = torch.empty(rows, columns, dtype=torch.bfloat16, device=size.device)
        mine = kernels_nf4.dequantize(codes[-1], absmax[-1], nested[-1], offset[-1], "nf4", one)
        expected = twins.dequantize(codes[-1], absmax[-1], nested[-1], offset[-1], "nf4", torch.empty_like(one))
        assert torch.equal(mine, expected)


CASES: dict[str, Callable[[Size], None]] = {
    case.__name__: case
    for case in (
        norms,
        heads,
        gates,
        dropped_gates,
        swiglus,
        dropped_swiglus,
        masks,
        gathers,
        combines,
        factors,
        factor_products,
        windows,
        routers,
        sorts,
        weights,
    )
}

TRINITY = Size(
    tokens=16,
    hidden=2048,
    inner=1024,
    experts=128,
    chosen=8,
    heads=32,
    kv_heads=4,
    head_dim=128,
    dtype=torch.bfloat16,
)

SMALL = (
    Size(tokens=5, hidden=64, inner=64, experts=8, chosen=2, heads=4, kv_heads=2, head_dim=16),
    Size(tokens=131, hidden=64, inner=64, experts=8, chosen=2, heads=3, kv_heads=1, head_dim=24, dtype=torch.bfloat16),
    Size(tokens=3, hidden=192, inner=128, experts=5, chosen=3, heads=2, kv_heads=2, head_dim=32),
)


def _round_as_hardware_does() -> None:
    """Triton's interpreter cuts the low half of a float32 off where bfloat16 is asked for; a GPU rounds to nearest."""
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.primitive_bitwidth == 32 and target.is_bf16():
            wide = torch.from_numpy(value.reshape(-1).view("float32").copy())
            return wide.bfloat16().view(torch.int16).numpy().view("uint16").reshape(value.shape)
        return cut_off(value, source, target, rounding)

    interpreter._convert_float = convert


def _multiply_as_hardware_does() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 numbers as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(tensor: Any) -> Any:
        if not tensor.dtype.scalar.is_bf16():
            return tensor
        numbers = torch.from_numpy(tensor.data.view("int16").copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(numbers.float().numpy(), tl.float32)

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, left: Any, right: Any, *arguments: Any) -> Any:
        return plain(builder, widened(left), widened(right), *arguments)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _nothing(*_: Any) -> bool:
    return True


def interpret() -> dict[str, str]:
    """Every case at every small size: what failed, by "case-size"."""
    _round_as_hardware_does()
    _multiply_as_hardware_does()
    found = {}
    for name, case in CASES.items():
        for number, size in enumerate(SMALL):
            found[f"{name}-{number}"] = _failure(lambda case=case, size=size: case(size))  # type: ignore[misc]
    return found


def _failure(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception:
        return traceback.format_exc()
    return ""


class _Hopper:
    """Stands in for the driver of a machine with an H100 or H200."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


FORMS = 2
"""Launches of a kernel that are compiled: with and without dropout, say, in the order of the cases."""


def compile_all() -> dict[str, str]:
    """Every kernel that the cases launch, compiled and not run: what failed, by the kernel's name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Hopper())
    launch = JITFunction.run
    found: dict[str, str] = {}
    compiled: Counter[str] = Counter()

    def only_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        compiled[name] += 1
        # Six seconds each for the longest; what further forms would show is seen on a GPU.
        if compiled[name] <= FORMS:
            failure = _failure(lambda: launch(kernel, *arguments, grid=grid, warmup=True, **options))
            found[name] = found.get(name, "") or failure

    JITFunction.run = only_compile
    for case in CASES.values():
        _failure(lambda case=case: case(TRINITY))  # type: ignore[misc]
    return found


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        close = _nothing  # no kernel has run, so there is nothing to compare
        torch.equal = _nothing
    print(json.dumps({"compile": compile_all, "interpret": interpret}[sys.argv[1]]()))
