"""Fused element-wise and data-moving operations of one decoder layer, forward and backward.

Each runs as one Triton kernel on a CUDA tensor and as its plain twin (twins.py) elsewhere; the environment variable
TRITON_SFT_PLAIN=1 makes every one of them the twin, to compare. The kernels' sides never wait for the device and copy
nothing to it, so that a CUDA graph can capture them after one call to compile them and to make dequantize's tables.

Notation: N tokens, H hidden size, E experts, k experts chosen for a token, S = N * k rows sorted by expert, I the
experts' inner size, D head size. Outputs are new tensors unless said; the last dimension of every input is contiguous,
rows may lie further apart. Sums are in float32, values that the stock model rounds to its own type are rounded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import twins


def plain() -> bool:
    """Whether TRITON_SFT_PLAIN=1 asks for plain torch everywhere."""
    return os.environ.get("TRITON_SFT_PLAIN") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernels serve this tensor: on CUDA, not float64, and not switched off."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and not plain()


@cache
def _kernels(name: str) -> ModuleType:
    """Imported at the first use: a process without a GPU never loads Triton."""
    from triton_sft_pipeline.training.fast import (
        kernels_blocks,
        kernels_factors,
        kernels_moe,
        kernels_nf4,
        kernels_norm,
        kernels_rows,
    )

    return {
        "blocks": kernels_blocks,
        "factors": kernels_factors,
        "norm": kernels_norm,
        "rows": kernels_rows,
        "moe": kernels_moe,
        "nf4": kernels_nf4,
    }[name]


# -- norms ---------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): y [N, H] = weight * x * rstd with rstd float32 [N] = 1 / sqrt(mean(x^2) + eps), as AfmoeRMSNorm."""
    return (_kernels("norm") if use_triton(x) else twins).rms_norm(x, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    """dx [N, H] of rms_norm, plus `add` [N, H] when given. The weight is frozen and gets no gradient."""
    return (_kernels("norm") if use_triton(x) else twins).rms_norm_backward(dy, x, weight, rstd, add)


def norm_add(branch: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + rms_norm(branch), rstd of branch), [N, H] and float32 [N]."""
    return (_kernels("norm") if use_triton(branch) else twins).norm_add(branch, weight, residual, eps)


def norm_add_norm(
    branch: Tensor, w1: Tensor, residual: Tensor, w2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, y, rstd of branch, rstd of sum): sum = residual + rms_norm(branch, w1), y = rms_norm(sum, w2)."""
    return (_kernels("norm") if use_triton(branch) else twins).norm_add_norm(branch, w1, residual, w2, eps)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [N, heads, D], k [N, kv_heads, D], rstd_q float32 [N, heads], rstd_k float32 [N, kv_heads]).

    Columns of qkv [N, C]: q (heads * D), k (kv_heads * D), then whatever follows. Every head is normalised over D;
    with cos and sin [N, D] (halves duplicated) it is rotated too, as transformers' rotate_half does."""
    backend = _kernels("norm") if use_triton(qkv) else twins
    return backend.qk_norm_rope(qkv, q_weight, k_weight, eps, cos, sin, heads, kv_heads, head_dim)


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
) -> None:
    """Write the gradient of qk_norm_rope into the q and k columns of `out` [N, C]; dq [N, heads, D] and
    dk [N, kv_heads, D] are contiguous."""
    backend = _kernels("norm") if use_triton(qkv) else twins
    backend.qk_norm_rope_backward(dq, dk, qkv, q_weight, k_weight, rstd_q, rstd_k, cos, sin, out)


# -- gates ---------------------------------------------------------------------------------------------------------


def gate_mul(o: Tensor, gate: Tensor) -> Tensor:
    """o * sigmoid(gate), [N, heads * D]; the gate may be a view of some columns."""
    return (_kernels("rows") if use_triton(o) else twins).gate_mul(o, gate)


def gate_mul_backward(dy: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor) -> Tensor:
    """The gradient of gate_mul for `o`; the one for the gate is written into `dgate_out`, maybe a view of columns."""
    return (_kernels("rows") if use_triton(o) else twins).gate_mul_backward(dy, o, gate, dgate_out)


def gate_mul_dropout(
    o: Tensor, gate: Tensor, p: float, seed: int | Tensor, both: bool = True
) -> tuple[Tensor | None, Tensor]:
    """(y, dropout(y, p, seed)) for y = gate_mul(o, gate) in one pass; without `both` None in place of y."""
    return (_kernels("rows") if use_triton(o) else twins).gate_mul_dropout(o, gate, p, seed, both)


def gate_mul_dropout_backward(
    dy: Tensor, extra: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor, p: float, seed: int | Tensor
) -> Tensor:
    """`gate_mul_backward` where the output went another way, too, through dropout: for the gradient dy +
    dropout(extra, p, seed), dy and extra [N, heads * D]."""
    backend = _kernels("rows") if use_triton(o) else twins
    return backend.gate_mul_dropout_backward(dy, extra, o, gate, dgate_out, p, seed)


def swiglu(u: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """h [M, I] = silu(u[:, :I]) * u[:, I:] for u [M, 2I], in `out` when given. With `add` [M, 2I], u += add happens
    first, in place."""
    return (_kernels("rows") if use_triton(u) else twins).swiglu(u, add, out)


def swiglu_backward(dh: Tensor, u: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(du [M, 2I], h [M, I], drow float32 [M] or None) of row_weight * swiglu(u), where dh [M, I] is the gradient of
    that weighted output's rows before the weight: drow = rowsum(dh * h), and du belongs to row_weight * dh."""
    return (_kernels("rows") if use_triton(u) else twins).swiglu_backward(dh, u, row_weight)


def swiglu_dropout(u: Tensor, p: float, seed: int | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(h, dropout(h, p, seed)) for h [M, I] = swiglu(u) in one pass, h in `out` when given."""
    return (_kernels("rows") if use_triton(u) else twins).swiglu_dropout(u, p, seed, out)


def swiglu_dropout_backward(
    dh: Tensor, extra: Tensor, u: Tensor, row_weight: Tensor | None, p: float, seed: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """`swiglu_backward` where h went another way, too, through dropout: in one pass (du [M, 2I], dropout(h, p, seed)
    [M, I], drow float32 [M] or None) for the gradient dh + dropout(extra, p, seed, scale=scale), both [M, I]."""
    backend = _kernels("rows") if use_triton(u) else twins
    return backend.swiglu_dropout_backward(dh, extra, u, row_weight, p, seed, scale)


# -- blocks of attention -------------------------------------------------------------------------------------------
# Tensors are [rows, tokens, heads, D], cut into blocks of `window` tokens. A pair is two blocks of a row, one after the
# other; there are P. Of the later all tokens but the last take part, of the earlier all but the first, both backwards.


def reverse_blocks(
    late: Sequence[Tensor], early: Sequence[Tensor], window: int, log_sum: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Of each of `late` (one to three alike) the later blocks of all pairs backwards, of each of `early` (two alike)
    the earlier ones, [P, window - 1, heads, D]; with log_sum float32 [rows * blocks, heads, window] also the later
    blocks of that, [P, heads, window - 1]."""
    return (_kernels("blocks") if use_triton(late[0]) else twins).reverse_blocks(late, early, window, log_sum)


def merge_blocks(own: Tensor, own_sum: Tensor, before: Tensor, before_sum: Tensor) -> Tensor:
    """Put two halves of a softmax together: what each token of `own`, contiguous, got from its own block, and what it
    got from the block before, [P, window - 1, heads, D] backwards. The sums are the logarithms of their denominators,
    [rows * blocks, heads, window] and [P, heads, window - 1]. Changes `own` and returns that of the whole, like
    own_sum."""
    return (_kernels("blocks") if use_triton(own) else twins).merge_blocks(own, own_sum, before, before_sum)


def add_reversed(dq: Tensor, dk: Tensor, dv: Tensor, turned: Sequence[Tensor], window: int) -> None:
    """Add `turned`, three [P, window - 1, heads, D] backwards, to the later blocks of dq and the earlier ones of dk and
    dv, all contiguous and in place."""
    (_kernels("blocks") if use_triton(dq) else twins).add_reversed(dq, dk, dv, turned, window)


# -- rows ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, seed: int | Tensor, add: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """mask * x / (1 - p) * scale (+ add), [M, C]. The mask is a function of seed, row, column and C alone, the same on
    every device (twins.dropout_mask); p is honoured in steps of 2^-16. The seed is a number, or an int64 tensor of one
    element on x's device that is read when the kernel runs: a CUDA graph would keep a number for ever."""
    return (_kernels("rows") if use_triton(x) else twins).dropout(x, p, seed, add, scale)


def gather(x: Tensor, index: Tensor, p: float = 0.0, seed: int | Tensor = 0, out: Tensor | None = None) -> Any:
    """Rows x[index], [S, H], in `out` when given. With p > 0 a pair: the rows, and dropout(rows, p, seed), the seed as
    there."""
    return (_kernels("moe") if use_triton(x) else twins).gather(x, index, p, seed, out)


def combine_dropout(y: Tensor, inverse: Tensor, y2: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """out[n] = sum over j of (y + dropout(y2, p, seed))[inverse[n, j]], [N, H] in y's type for y and y2 [S, H]; summed
    in float32, as in `combine`."""
    return (_kernels("moe") if use_triton(y) else twins).combine_dropout(y, inverse, y2, p, seed)


def combine(
    y: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
    scale2: float = 1.0,
) -> Tensor:
    """out[n] = sum over j of weights[n, j] * (y + scale2 * y2)[inverse[n, j]] (+ add[n]), [N, H] in y's type.

    The sum is in float32 and in the order of j, so it is the same every time; it is rounded before `add`, as where the
    stock model adds the shared experts."""
    return (_kernels("moe") if use_triton(y) else twins).combine(y, inverse, weights, add, y2, scale2)


# -- experts' adapters ---------------------------------------------------------------------------------------------


def fill_b(b: Tensor, out: Tensor) -> None:
    """Write B [E, o, r], of any strides, into `out` [E, o, R], maybe a view of columns, and zeros behind the r-th. As
    fast as it can be where b is a view of PEFT's factor [o, r * E], whose experts lie side by side."""
    (_kernels("moe") if use_triton(out) and b.dtype == out.dtype else twins).fill_b(b, out)


def join_b(b: Tensor) -> Tensor:
    """B [E, o, r] as PEFT stores it, [o, r * E]: column i * E + e is column i of expert e."""
    return (_kernels("moe") if use_triton(b) else twins).join_b(b)


def shrink(x: Tensor, w: Tensor, offsets: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * x w_e for the rows of every expert e, [S, r] in `out` when given, rounded once. x [S, K] is sorted by
    expert, each one's rows end at offsets int32 [E]; w [E, K, r] has strides of any kind."""
    return (_kernels("factors") if _narrow(x, w.shape[2]) else twins).shrink(x, w, offsets, scale, out)


def expand(t: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """t w_e for the rows of every expert e, [S, n] for t [S, r] and w [E, r, n]; rows as in `shrink`."""
    return (_kernels("factors") if _narrow(t, w.shape[1]) else twins).expand(t, w, offsets)


def outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x_e^T y_e over the rows of every expert e, [E, m, n] for x [S, m] and y [S, n], zeros for an expert without
    rows; rows as in `shrink`. Made for one of them a few columns wide."""
    return (_kernels("factors") if _narrow(x, min(x.shape[1], y.shape[1])) else twins).outer(x, y, offsets)


NARROW = 64
"""Columns up to which a factor counts as narrow. For 8 and for 64 the kernels were the faster ones on an H200, for 64
by a sixth at least; wider ones were not measured."""


def _narrow(tensor: Tensor, rank: int) -> bool:
    """Whether the kernels for factors take these. In float32 their tiles are too large for most GPUs."""
    return use_triton(tensor) and tensor.element_size() == 2 and rank <= NARROW


# -- routing -------------------------------------------------------------------------------------------------------


def router(logits: Tensor, bias: Tensor, k: int, route_scale: float) -> tuple[Tensor, Tensor]:
    """(weights float32 [N, k], index int64 [N, k]) as AfmoeTokenChoiceRouter: the k highest sigmoid(logits) + bias in
    descending order, ties to the lower expert; weights are their sigmoids over the sum of them, times route_scale."""
    return (_kernels("moe") if use_triton(logits) else twins).router(logits, bias, k, route_scale)


def router_backward(dweights: Tensor, logits: Tensor, index: Tensor, route_scale: float) -> Tensor:
    """dlogits [N, E] in the logits' type from dweights float32 [N, k]."""
    return (_kernels("moe") if use_triton(logits) else twins).router_backward(dweights, logits, index, route_scale)


def sort_routes(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the S = N * k choices of index [N, k] by expert, stably: (order int64 [S], the flat position token * k + j
    of each sorted row; inverse int64 [N, k], the sorted row of each choice; tokens int64 [S]; offsets int32 [E], the
    row after each expert's last)."""
    return (_kernels("moe") if use_triton(index) else twins).sort_routes(index, num_experts)


# -- four bits -----------------------------------------------------------------------------------------------------


def dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, quant_type: str, out: Tensor
) -> Tensor:
    """Write the weights of bitsandbytes' 4-bit codes (blocks of 64, the high nibble first) into `out` and return it.

    codes uint8 [E, o, i / 2] or [o, i / 2]; out [E, o, i] or [o, i] in bfloat16, float16 or float32, its rows may lie
    further apart. absmax uint8 [E, nb] with nested float32 [E, ceil(nb / 256)] and offset float32 [E], or float32
    [E, nb] with nested and offset None (no leading E, and a scalar offset, for one matrix). Bit-equal to bitsandbytes:
    w = code16[c] * (code8[absmax] * nested + offset), each operation rounded for itself."""
    return (_kernels("nf4") if use_triton(codes) else twins).dequantize(codes, absmax, nested, offset, quant_type, out)
