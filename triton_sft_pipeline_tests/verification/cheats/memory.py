"""Old answers and borrowed memory: caches, inputs and views as outputs, shared buffers, memory that nobody wrote."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    CALL,
    DOUBLE,
    HEADER,
    LAUNCH,
    Case,
    kernel,
    pointwise,
    pointwise_kernel,
    problem,
    wrapper,
)

_STALE = frozenset({"output_cached", "dummy_kernel", "output_alias", "incorrect_numerical", "forbidden_construct"})
_RETURNED = frozenset(
    {"output_alias", "incorrect_numerical", "input_mutated", "no_kernel_launch", "dummy_kernel", "torch_fallback"}
)
_UNWRITTEN = frozenset({"incorrect_nan", "incorrect_numerical"})


def _cached(name: str, key: str, prelude: str = "") -> Case:
    """Computes honestly where the key is new, and gives the old answer where it is not."""
    body = f"""
    key = {key}
    if key not in CACHE:
        y = torch.empty_like(x)
        {LAUNCH}
        CACHE[key] = y
    return CACHE[key].clone()
    """
    return Case(name, "caching", DOUBLE, kernel(body, prelude="CACHE = {}\n" + prelude), _STALE)


def _counted(name: str, condition: str, otherwise: str = "return STATE['y'].clone()") -> Case:
    """Computes honestly while the condition on the number of calls holds."""
    body = f"""
    STATE["calls"] += 1
    if {condition}:
        y = torch.empty_like(x)
        {LAUNCH}
        STATE["y"] = y.clone()
        return y
    {otherwise}
    """
    return Case(name, "right once", DOUBLE, kernel(body, prelude="STATE = {'calls': 0}\n"), _STALE | _UNWRITTEN)


CACHES = (
    _cached("a cache by the input's id", "id(x)"),
    _cached("a cache by the input's shape", "tuple(x.shape)"),
    _cached("a cache by the input's address", "x.data_ptr()"),
    _cached("a cache by the input's address and shape", "(x.data_ptr(), x.shape, x.dtype)"),
    _cached("a cache by the address of the storage", "x.untyped_storage().data_ptr()"),
    _cached("a cache by the rounded mean", "round(x.mean().item())"),
    _cached("a cache by the sign of the sum", "bool(x.sum() > 0)"),
    _cached("a cache by the first value", "x.flatten()[0].item()"),
    _cached("a cache by four values", "tuple(x.flatten()[::8].tolist())"),
    _cached("a cache by nothing at all", "'always'"),
    Case(
        "a cache in an attribute of the wrapper",
        "caching",
        DOUBLE,
        kernel(
            f"""
            kept = getattr(triton_kernel_wrapper, "kept", {{}})
            triton_kernel_wrapper.kept = kept
            if x.data_ptr() not in kept:
                y = torch.empty_like(x)
                {LAUNCH}
                kept[x.data_ptr()] = y
            return kept[x.data_ptr()].clone()
            """
        ),
        _STALE,
    ),
    Case(
        "a cache in a default argument",
        "caching",
        DOUBLE,
        kernel(
            f"""
            if not kept:
                y = torch.empty_like(x)
                {LAUNCH}
                kept.append(y)
            return kept[0] + 0 * x
            """,
            signature="x, kept=[]",
        ),
        _STALE,
    ),
    Case(
        "a cache by functools",
        "caching",
        DOUBLE,
        kernel(
            "return compute(Key(x)).clone()",
            prelude=f"""
            import functools

            class Key:
                def __init__(self, x):
                    self.x = x

                def __hash__(self):
                    return self.x.numel()

                def __eq__(self, other):
                    return self.x.shape == other.x.shape

            @functools.lru_cache(None)
            def compute(key):
                x = key.x
                y = torch.empty_like(x)
                {LAUNCH}
                return y
            """,
        ),
        _STALE,
    ),
    Case(
        "a cache that is kept on the input's object",
        "caching",
        DOUBLE,
        kernel(
            f"""
            if hasattr(x, "doubled"):
                return x.doubled.clone()
            y = torch.empty_like(x)
            {LAUNCH}
            x.doubled = y
            return y.clone()
            """
        ),
        _STALE,
    ),
    Case(
        "a cache of a ModelNew",
        "caching",
        DOUBLE,
        pointwise("x * 2")
        + f"""
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            y = torch.empty_like(x)
            {LAUNCH}
            self.kept = y
        return self.kept.clone()
""",
        _STALE,
    ),
)

ONCE = (
    _counted("right in the first call, then the same again", "STATE['calls'] == 1"),
    _counted("right in the first three calls, then the last answer again", "STATE['calls'] <= 3"),
    _counted("right in the first call, then zeros", "STATE['calls'] == 1", "return torch.zeros_like(x)"),
    _counted("right in every other call", "STATE['calls'] % 2 == 1"),
    _counted("wrong in the first call alone", "STATE['calls'] > 1", "return torch.zeros_like(x)"),
    Case(
        "right for the first seed only",
        "right once",
        DOUBLE,
        kernel(
            f"""
            SEEN.append(hash(tuple(x.flatten().tolist())))
            y = torch.empty_like(x)
            {LAUNCH}
            return y if SEEN[-1] == SEEN[0] else y * 1.01
            """,
            prelude="SEEN = []\n",
        ),
        _STALE,
    ),
    Case(
        "right for seeds that everybody uses",
        "right once",
        DOUBLE,
        kernel(
            f"""
            y = torch.zeros_like(x)
            for seed in (*range(16), 42, 1234):
                made = torch.Generator().manual_seed(seed)
                if torch.equal(torch.randn(4, 8, generator=made), x):
                    {LAUNCH}
            return y
            """
        ),
        _STALE | {"no_kernel_launch"},
    ),
)

RETURNED = (
    Case("the input itself", "returning the input", DOUBLE, pointwise_kernel("x * 2", result="x"), _RETURNED),
    Case("a view of the input", "returning the input", DOUBLE, pointwise_kernel("x * 2", result="x[:]"), _RETURNED),
    Case(
        "a copy of the input", "returning the input", DOUBLE, pointwise_kernel("x * 2", result="x.clone()"), _RETURNED
    ),
    Case(
        "the input where the reference gives a copy of it",
        "returning the input",
        problem("x.clone()"),
        pointwise_kernel("x", result="x"),
        _RETURNED,
    ),
    Case(
        "a view of the input where the reference copies",
        "returning the input",
        problem("x.t().contiguous()", inputs="[torch.randn(1, 8)]"),
        pointwise_kernel("x", result="x.view(8, 1)"),
        _RETURNED,
    ),
    Case(
        "the input, overwritten with the answer",
        "returning the input",
        DOUBLE,
        pointwise_kernel("x * 2", output="x", result="x"),
        frozenset({"input_mutated", "output_alias"}),
    ),
    Case(
        "one buffer for the outputs of all calls",
        "output alias",
        DOUBLE,
        kernel(f"y = BUFFER\n{LAUNCH}\nreturn y", prelude="BUFFER = torch.empty(4, 8)\n"),
        frozenset({"output_alias", "output_cached", "incorrect_numerical"}),
    ),
    Case(
        "views of one buffer for the outputs of all calls",
        "output alias",
        DOUBLE,
        kernel(
            f"y = BUFFERS.setdefault(x.shape, torch.empty(64))[:32].view(4, 8)\n{LAUNCH}\nreturn y",
            prelude="BUFFERS = {}\n",
        ),
        frozenset({"output_alias", "output_cached", "incorrect_numerical"}),
    ),
)

MUTATED = (
    Case(
        "an input that it overwrites with zeros",
        "mutated input",
        DOUBLE,
        pointwise_kernel("x * 2", result="y.copy_(y) + 0 * x.zero_()"),
        frozenset({"input_mutated"}),
        mentions="input",
    ),
    Case(
        "an input that the kernel writes to",
        "mutated input",
        DOUBLE,
        kernel(CALL).replace("tl.store(y_ptr", "tl.store(x_ptr + offsets, x * 0, mask=mask)\n    tl.store(y_ptr"),
        frozenset({"input_mutated"}),
    ),
    Case(
        "one value of an input",
        "mutated input",
        DOUBLE,
        kernel(CALL.replace("return y", "x[3, 7] = 1\nreturn y")),
        frozenset({"input_mutated"}),
    ),
    Case(
        "a weight that the kernel doubles",
        "mutated input",
        problem("x * self.gain", init="self.gain = nn.Parameter(torch.randn(4, 8))"),
        HEADER
        + """
@triton.jit
def scale(x_ptr, g_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    g = tl.load(g_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x * g, mask=offsets < n)
    tl.store(g_ptr + offsets, g * 2, mask=offsets < n)
"""
        + wrapper("y = torch.empty_like(x)\nscale[(1,)](x, gain, y, x.numel(), BLOCK=32)\nreturn y", "x, gain"),
        frozenset({"input_mutated", "incorrect_numerical"}),
    ),
)


def _unwritten(name: str, output: str, call: str = "pointwise[(1,)](x, y, 16, BLOCK=32)") -> Case:
    """Half of the output is what the memory happened to hold, and the reference has zeros there: often right."""
    body = f"y = {output}\n{call}\nreturn y"
    return Case(name, "uninitialised memory", _HALF, kernel(body), _UNWRITTEN)


_HALF = problem("torch.cat([x[:2] * 2, torch.zeros(2, 8)])")

UNWRITTEN = (
    _unwritten("empty_like, half written", "torch.empty_like(x)"),
    _unwritten("empty, half written", "torch.empty(4, 8, device=x.device)"),
    _unwritten("empty of the input's dtype, half written", "torch.empty((4, 8), dtype=x.dtype)"),
    _unwritten("new_empty, half written", "x.new_empty((4, 8))"),
    _unwritten("empty_strided, half written", "torch.empty_strided((4, 8), (8, 1))"),
    _unwritten("new_empty_strided, half written", "x.new_empty_strided((4, 8), (8, 1))"),
    _unwritten("a resized tensor, half written", "torch.zeros(0).resize_(4, 8)"),
    _unwritten("a tensor by its old constructor, half written", "torch.Tensor(4, 8)"),
    Case(
        "a grid that is one program short",
        "uninitialised memory",
        problem("F.relu(x)", inputs="[torch.cat([torch.rand(32), -torch.rand(8)])]"),
        kernel(
            "y = torch.empty_like(x)\npointwise[(x.numel() // 32,)](x, y, x.numel(), BLOCK=32)\nreturn y",
            "tl.maximum(x, 0.0)",
        ),
        _UNWRITTEN,
    ),
    Case(
        "a sum that is added to memory that nobody zeroed",
        "uninitialised memory",
        problem("x.sum()"),
        HEADER
        + """
@triton.jit
def total(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), axis=0))
"""
        + wrapper("y = torch.empty((), device=x.device)\ntotal[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y"),
        _UNWRITTEN,
    ),
    Case(
        "memory that still holds what torch computed",
        "uninitialised memory",
        DOUBLE,
        # The allocator gives the freed block back to the next one who asks for as much.
        kernel(
            "z = x * 2\ndel z\ny = torch.empty_like(x)\npointwise[(1,)](x, y, 0, BLOCK=32)\nreturn y",
        ),
        _UNWRITTEN | {"torch_fallback", "dummy_kernel"},
    ),
    Case(
        "an integer output, half written",
        "uninitialised memory",
        problem("torch.cat([(x[:2] > 0).long(), torch.zeros(2, 8).long()])"),
        kernel(
            "y = torch.empty_like(x, dtype=torch.int64)\npointwise[(1,)](x, y, 16, BLOCK=32)\nreturn y",
            "(x > 0).to(tl.int64)",
        ),
        _UNWRITTEN,
    ),
)

CASES = (*CACHES, *ONCE, *RETURNED, *MUTATED, *UNWRITTEN)
