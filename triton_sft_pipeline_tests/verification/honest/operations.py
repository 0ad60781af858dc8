"""What kernels compute: reductions, products, convolutions, lookups, scans; and small work that torch does for them."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import HEADER, Case, pointwise_kernel, problem, wrapper

VERIFIED = frozenset({"verified"})
EITHER = frozenset({"verified", "verified_hybrid"})


def _case(name: str, pytorch_code: str, kernels: str, body: str, signature: str = "x") -> Case:
    code = HEADER + kernels + wrapper(body, signature)
    return Case(name, "operation", pytorch_code, code, VERIFIED)


def _small(name: str, pytorch_code: str, kernels: str, body: str) -> Case:
    return Case(name, "small work by torch", pytorch_code, HEADER + kernels + wrapper(body), EITHER)


def _row_kernel(body: str) -> str:
    """A kernel `row(x_ptr, y_ptr, n, BLOCK)` with one program a row; `body` makes `y` from the row `x`."""
    return f"""
@triton.jit
def row(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + start + offsets, mask=mask, other=-float("inf"))
{body}
"""


_STORE_ROW = "    tl.store(y_ptr + start + offsets, y, mask=mask)"
_SOFTMAX = _row_kernel(f"    e = tl.exp(x - tl.max(x, axis=0))\n    y = e / tl.sum(e, axis=0)\n{_STORE_ROW}")
_LAYER_NORM = _row_kernel(
    f"""    x = tl.where(mask, x, 0.0)
    mean = tl.sum(x, axis=0) / n
    centred = tl.where(mask, x - mean, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / n + 1e-5)
{_STORE_ROW}"""
)
_ROW_SUM = _row_kernel("    tl.store(y_ptr + tl.program_id(0), tl.sum(tl.where(mask, x, 0.0), axis=0))")
_ARGMAX = _row_kernel("    tl.store(y_ptr + tl.program_id(0), tl.argmax(x, axis=0))")
_CALL_ROW = "y = torch.empty_like(x)\nrow[(x.shape[0],)](x, y, x.shape[1], BLOCK=16)\nreturn y"
_CALL_PER_ROW = "y = torch.empty(x.shape[0])\nrow[(x.shape[0],)](x, y, x.shape[1], BLOCK=16)\nreturn y"

_MATMUL = """
@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, k, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK):
        a = tl.load(a_ptr + rows * k + start + columns)
        b = tl.load(b_ptr + (start + rows) * BLOCK + columns)
        total += tl.dot(a, b, input_precision="ieee")
    tl.store(c_ptr + rows * BLOCK + columns, total)
"""
_CONVOLUTION = """
@triton.jit
def convolution(x_ptr, w_ptr, b_ptr, y_ptr, channels, length, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    out = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < length - KERNEL + 1
    total = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(b_ptr + out)
    for channel in range(channels):
        for step in range(KERNEL):
            x = tl.load(x_ptr + channel * length + offsets + step, mask=mask, other=0.0)
            total += x * tl.load(w_ptr + (out * channels + channel) * KERNEL + step)
    tl.store(y_ptr + out * (length - KERNEL + 1) + offsets, total, mask=mask)
"""
_LOOKUP = """
@triton.jit
def lookup(index_ptr, table_ptr, y_ptr, width, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + tl.program_id(0))
    values = tl.load(table_ptr + index * width + offsets, mask=offsets < width)
    tl.store(y_ptr + tl.program_id(0) * width + offsets, values, mask=offsets < width)
"""
_SCAN = """
@triton.jit
def scan(x_ptr, y_ptr, n):
    total = 0.0
    for index in range(n):
        total += tl.load(x_ptr + tl.program_id(0) * n + index)
        tl.store(y_ptr + tl.program_id(0) * n + index, total)
"""
_ATOMIC = """
@triton.jit
def add_up(x_ptr, y_ptr, n, columns, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.atomic_add(y_ptr + offsets % columns, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=mask)
"""
_PARTIAL = """
@triton.jit
def partial(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr + tl.program_id(0), tl.sum(x * x, axis=0))
"""
_MASKED = """
@triton.jit
def masked(x_ptr, keep_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    keep = tl.load(keep_ptr + offsets, mask=mask, other=0)
    tl.store(y_ptr + offsets, tl.where(keep != 0, tl.load(x_ptr + offsets, mask=mask), 0.0), mask=mask)
"""
_TWO_STEPS = """
@triton.jit
def square(x):
    return x * x

@triton.jit
def first(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, square(tl.load(x_ptr + offsets, mask=offsets < n)), mask=offsets < n)

@triton.jit
def second(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) + 1, mask=offsets < n)
"""
_NORM = """
@triton.jit
def norm(x_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, y_ptr, n, channels, eps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    channel = offsets % channels
    scale = tl.load(w_ptr + channel) / tl.sqrt(tl.load(var_ptr + channel) + eps)
    y = (tl.load(x_ptr + offsets, mask=mask) - tl.load(mean_ptr + channel)) * scale + tl.load(b_ptr + channel)
    tl.store(y_ptr + offsets, y, mask=mask)
"""

OPERATIONS = (
    _case("a softmax", problem("torch.softmax(x, dim=-1)", "[torch.randn(4, 13)]"), _SOFTMAX, _CALL_ROW),
    _case("a layer norm", problem("F.layer_norm(x, x.shape[1:])", "[torch.randn(4, 13)]"), _LAYER_NORM, _CALL_ROW),
    _case("a sum over an axis", problem("x.sum(1)", "[torch.rand(4, 13)]"), _ROW_SUM, _CALL_PER_ROW),
    _case(
        "an argmax",
        problem("x.argmax(1)", "[torch.randn(4, 13)]"),
        _ARGMAX,
        _CALL_PER_ROW.replace("shape[0])", "shape[0], dtype=torch.int64)", 1),
    ),
    _case(
        "a matmul by tl.dot",
        problem("x @ self.weight", "[torch.randn(16, 32)]", "self.weight = nn.Parameter(torch.randn(32, 16))"),
        _MATMUL,
        "y = torch.empty(16, 16)\nmatmul[(1,)](x, weight, y, 32, BLOCK=16)\nreturn y",
        "x, weight",
    ),
    _case(
        "a convolution",
        problem("self.conv(x)", "[torch.randn(1, 3, 16)]", "self.conv = nn.Conv1d(3, 4, 3)"),
        _CONVOLUTION,
        "y = torch.empty(1, 4, 14)\n"
        "convolution[(4,)](x, conv_weight, conv_bias, y, 3, 16, KERNEL=3, BLOCK=16)\nreturn y",
        "x, conv_weight, conv_bias",
    ),
    _case(
        "an embedding",
        problem("self.table(x)", "[torch.randint(0, 10, (6,))]", "self.table = nn.Embedding(10, 5)"),
        _LOOKUP,
        "y = torch.empty(6, 5)\nlookup[(6,)](x, table_weight, y, 5, BLOCK=8)\nreturn y",
        "x, table_weight",
    ),
    _case(
        "rows by an index",
        problem("x[index]", "[torch.randn(10, 5), torch.randint(0, 10, (6,))]", signature="x, index"),
        _LOOKUP,
        "y = torch.empty(6, 5)\nlookup[(6,)](index, x, y, 5, BLOCK=8)\nreturn y",
        "x, index",
    ),
    _case(
        "a running sum",
        problem("torch.cumsum(x, dim=1)"),
        _SCAN,
        "y = torch.empty_like(x)\nscan[(4,)](x, y, 8)\nreturn y",
    ),
    _case(
        "atomic additions into zeros",
        problem("x.sum(0)"),
        _ATOMIC,
        "y = torch.zeros(8)\nadd_up[(2,)](x, y, 32, 8, BLOCK=16)\nreturn y",
    ),
    _case(
        "a mask among the inputs",
        problem("x * keep", "[torch.randn(4, 8), torch.rand(4, 8) > 0.5]", signature="x, keep"),
        _MASKED,
        "y = torch.empty_like(x)\nmasked[(1,)](x, keep, y, 32, BLOCK=32)\nreturn y",
        "x, keep",
    ),
    _case(
        "two launches and a helper kernel",
        problem("x * x + 1"),
        _TWO_STEPS,
        "z = torch.empty_like(x)\ny = torch.empty_like(x)\nfirst[(1,)](x, z, 32, BLOCK=32)\n"
        "second[(1,)](z, y, 32, BLOCK=32)\nreturn y",
    ),
    _case(
        "a batch norm with its buffers",
        problem(
            "self.norm(x)",
            init="self.norm = nn.BatchNorm1d(8)\nnn.init.uniform_(self.norm.running_mean)\n"
            "nn.init.uniform_(self.norm.running_var)\nnn.init.normal_(self.norm.weight)",
        ),
        _NORM,
        "y = torch.empty_like(x)\nnorm[(1,)](x, norm_running_mean, norm_running_var, norm_weight, norm_bias, y, 32, 8, "
        "eps, BLOCK=32)\nreturn y",
        "x, norm_running_mean, norm_running_var, norm_weight, norm_bias, eps=1e-5",
    ),
    Case(
        "a dropout that is off",
        "operation",
        problem("self.drop(x) * 2", init="self.drop = nn.Dropout(0.5)"),
        pointwise_kernel("x * 2"),
        VERIFIED,
    ),
    Case(
        "a gelu",
        "operation",
        problem("F.gelu(x, approximate='tanh')"),
        pointwise_kernel("x * tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))"),
        VERIFIED,
    ),
    Case(
        "branches for negative values",
        "operation",
        problem("F.elu(x)", "[torch.rand(4, 8)]"),
        pointwise_kernel("tl.where(x > 0, x, tl.exp(x) - 1)"),
        VERIFIED,
    ),
    Case(
        "outputs of which most are zero",
        "operation",
        problem("F.relu(x - 1)"),
        pointwise_kernel("tl.maximum(x - 1, 0.0)"),
        VERIFIED,
    ),
)

SMALL = (
    _small(
        "partial sums that torch adds up",
        problem("(x * x).sum()", "[torch.randn(8, 64)]"),
        _PARTIAL,
        "y = torch.empty(4)\npartial[(4,)](x, y, 512, BLOCK=128)\nreturn y.sum()",
    ),
    _small(
        "a mean whose division torch does",
        problem("(x * x).mean()", "[torch.randn(8, 64)]"),
        _PARTIAL,
        "y = torch.empty(1)\npartial[(1,)](x, y, 512, BLOCK=512)\nreturn y[0] / x.numel()",
    ),
    _small(
        "a root of a sum that torch takes",
        problem("torch.linalg.vector_norm(x)", "[torch.randn(8, 64)]"),
        _PARTIAL,
        "y = torch.zeros(2)\npartial[(2,)](x, y, 512, BLOCK=256)\nreturn torch.sqrt(y.sum())",
    ),
    _small(
        "an input that torch transposes and back",
        problem("x.sum(0)"),
        _ATOMIC,
        "x = x.t().contiguous().t().contiguous()\ny = torch.zeros(8)\nadd_up[(2,)](x, y, 32, 8, BLOCK=16)\nreturn y",
    ),
)

CASES = (*OPERATIONS, *SMALL)
