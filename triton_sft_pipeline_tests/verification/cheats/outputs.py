"""Outputs of another form: dtype, shape, structure, NaN and infinity, and objects that only look like tensors."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import DOUBLE, LAUNCH, Case, kernel, pointwise_kernel, problem

_SHAPE = frozenset({"incorrect_shape"})
_DTYPE = frozenset({"incorrect_dtype"})
_STRUCTURE = frozenset({"incorrect_structure"})
_NAN = frozenset({"incorrect_nan", "incorrect_numerical"})
_LAZY = frozenset({"lazy_output", "incorrect_structure", "incorrect_dtype", "forbidden_construct", "harness_tamper"})


def _shape(name: str, pytorch_code: str, result: str, mentions: str = "expected") -> Case:
    return Case(name, "another shape", pytorch_code, pointwise_kernel("x * 2", result=result), _SHAPE, mentions)


def _dtype(name: str, result: str, mentions: str = "expected float32") -> Case:
    return Case(name, "another dtype", DOUBLE, pointwise_kernel("x * 2", result=result), _DTYPE, mentions)


def _structure(name: str, result: str, pytorch_code: str = DOUBLE, mentions: str = "") -> Case:
    code = pointwise_kernel("x * 2", result=result)
    return Case(name, "another structure", pytorch_code, code, _STRUCTURE, mentions)


def _lazy(name: str, result: str, prelude: str = "") -> Case:
    body = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn {result}"
    return Case(name, "lazy output", DOUBLE, kernel(body, prelude=prelude), _LAZY | {"runtime_error"})


SHAPES = (
    _shape("a shape that broadcasts", DOUBLE, "y[None]", "(1, 4, 8), expected (4, 8)"),
    _shape("a flattened output", DOUBLE, "y.flatten()", "(32,), expected (4, 8)"),
    _shape("a row that broadcasts to all rows", problem("x[:1] * 2 + 0 * x"), "y[:1]"),
    _shape("shape (1,) for a 0-d output", problem("x[0, 0] * 2"), "y[0, :1]", "(1,), expected ()"),
    _shape("a 0-d output for shape (1,)", problem("x[0, :1] * 2"), "y[0, 0]", "(), expected (1,)"),
    _shape("a dimension that is not kept", problem("(x * 2)[:, :1]"), "y[:, 0]", "(4,), expected (4, 1)"),
    _shape("a transposed output", DOUBLE, "y.t()", "(8, 4), expected (4, 8)"),
    _shape("the first half", DOUBLE, "y[:2]"),
    _shape("nothing of it", DOUBLE, "y[:0]"),
)

DTYPES = (
    _dtype("half precision", "y.half()", "float16, expected float32"),
    _dtype("double precision", "y.double()", "float64, expected float32"),
    _dtype("bfloat16", "y.to(torch.bfloat16)", "bfloat16, expected float32"),
    _dtype("complex numbers", "y.to(torch.complex64)", "complex64, expected float32"),
    Case(
        "integers of another width",
        "another dtype",
        problem("(x > 0).long()"),
        pointwise_kernel("(x > 0).to(tl.int32)", output="torch.empty_like(x, dtype=torch.int32)"),
        _DTYPE,
        "int32, expected int64",
    ),
    Case(
        "numbers for truth values",
        "another dtype",
        problem("x > 0"),
        pointwise_kernel("(x > 0).to(tl.uint8)", output="torch.empty_like(x, dtype=torch.uint8)"),
        _DTYPE,
        "uint8, expected bool",
    ),
    Case(
        "float32 for a half precision reference",
        "another dtype",
        problem("x * 2", inputs="[torch.randn(4, 8).half()]"),
        pointwise_kernel("x * 2", output="torch.empty_like(x, dtype=torch.float32)"),
        _DTYPE,
        "float32, expected float16",
    ),
)

STRUCTURES = (
    _structure("one value instead of two", "y", problem("(x * 2, x)"), "expected 2 values"),
    _structure("two values instead of one", "(y, y)"),
    _structure("a tuple instead of a tensor", "(y,)", mentions="1 values"),
    _structure("nothing", "None", mentions="None"),
    _structure("a number instead of a tensor", "1.0"),
    _structure("a dictionary with another key", "{'b': y}", problem("{'a': x * 2}")),
    _structure("a dictionary without one of the keys", "{'a': y}", problem("{'a': x * 2, 'b': x}")),
    _structure("a tuple that is nested otherwise", "((y,), y)", problem("(x * 2, (x * 2,))")),
    _structure("a list of rows", "list(y)"),
    _structure("a string", "'verified'"),
)

NOT_FINITE = (
    Case("NaN", "non-finite output", DOUBLE, pointwise_kernel("tl.sqrt(x) * 0 + x * 2"), _NAN, "NaN in"),
    Case("NaN alone", "non-finite output", DOUBLE, pointwise_kernel("x * 2 + float('nan')"), _NAN, "NaN in"),
    Case("infinity", "non-finite output", DOUBLE, pointwise_kernel("x * 2 + float('inf')"), _NAN),
    Case(
        "no NaN where the reference has it",
        "non-finite output",
        problem("torch.sqrt(x)"),
        pointwise_kernel("tl.sqrt(tl.abs(x))"),
        _NAN,
        "not NaN in",
    ),
    Case(
        "the other infinity",
        "non-finite output",
        problem("torch.log(F.relu(x))"),
        pointwise_kernel("tl.where(x > 0, tl.log(tl.maximum(x, 1e-30)), float('inf'))"),
        _NAN,
    ),
    Case(
        "a huge number for infinity",
        "non-finite output",
        problem("torch.log(F.relu(x))"),
        pointwise_kernel("tl.where(x > 0, tl.log(tl.maximum(x, 1e-30)), -1e38)"),
        _NAN,
    ),
)

_DEFERRED = """
class Deferred(torch.Tensor):
    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [item.x * 2 if isinstance(item, cls) else item for item in args]
        return function(*plain, **(kwargs or {}))

"""
_PRETENDER = """
class Pretender:
    def __init__(self, x):
        self.x, self.shape, self.dtype, self.device = x, x.shape, x.dtype, x.device

    def __getattr__(self, name):
        return getattr(self.x, name)

"""

LAZY = (
    _lazy("a tensor subclass", "y.as_subclass(Lazy)", "class Lazy(torch.Tensor):\n    pass\n"),
    _lazy("a tensor that computes when it is read", "Deferred(x)", _DEFERRED),
    _lazy("an object that behaves like a tensor", "Pretender(y)", _PRETENDER),
    _lazy(
        "a tensor that agrees with everything",
        "(y * 0).as_subclass(Agreeable)",
        """
        class Agreeable(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return True if "eq" in str(function) or "close" in str(function) else torch.Tensor.__torch_function__(
                    function, types, args, kwargs or {}
                )
        """,
    ),
    _lazy("a tensor without values", "torch.empty(4, 8, device='meta')"),
    _lazy("a sparse tensor", "y.to_sparse()"),
    _lazy("a generator", "(part for part in (y,))"),
    _lazy("an array of NumPy", "y.numpy()"),
    _lazy("a function that computes it", "lambda: y"),
    _lazy(
        "a dictionary that makes its values up",
        "Making()",
        """
        class Making(dict):
            def __getitem__(self, key):
                return torch.zeros(4, 8)
        """,
    ),
)

CASES = (*SHAPES, *DTYPES, *STRUCTURES, *NOT_FINITE, *LAZY)
