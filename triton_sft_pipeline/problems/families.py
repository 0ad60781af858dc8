"""What kind of operator a problem is about: the family that its report is broken down by. Executes nothing.

The families of heavy operators are those of `operators`; what has none of them is a reduction, element-wise, or other
(data that is moved, looked up or left as it is).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from triton_sft_pipeline.problems.loading import parse_module
from triton_sft_pipeline.problems.operators import (
    WEIGHT,
    children,
    imported_paths,
    last_name,
    layer_family,
    path_of,
    target_names,
    walk,
    work_of,
)

REDUCTION, ELEMENT_WISE, OTHER = "reduction", "element-wise", "other"

_DEAREST = ("attention", "recurrent network", "convolution", "matrix product")
"""Families whose arithmetic outweighs the rest, the most particular first: an LSTM ends in a linear layer, and is no
matrix product for it.
"""
FAMILIES = (*_DEAREST, *(family for family in WEIGHT if family not in _DEAREST), REDUCTION, ELEMENT_WISE, OTHER)
"""Every family, in the order in which one goes before another."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_INPUT_FUNCTIONS = frozenset({"get_inputs", "get_init_inputs"})
_REDUCTIONS = _words(
    """
    sum mean prod var std var_mean std_mean amax amin aminmax max min argmax argmin all any median nanmedian nansum
    nanmean quantile mode count_nonzero norm vector_norm matrix_norm normalize pairwise_distance dist trace dot vdot
    bincount histc
    """
)
_REDUCING_CLASSES = frozenset({"PairwiseDistance"})
# Of two tensors they are element-wise.
_EITHER = frozenset({"max", "min"})
_ELEMENT_WISE = _words(
    """
    abs absolute acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not
    bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide dropout
    dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout elu eq erf erfc erfinv exp exp2 expm1
    fake_quantize_per_tensor_affine float_power floor floor_divide fmax fmin fmod frac gelu ge glu gt hardshrink
    hardsigmoid hardswish hardtanh heaviside hypot isclose isfinite isinf isnan le leaky_relu lerp lgamma log log10
    log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill
    maximum minimum mish mul multiply nan_to_num ne neg negative polygamma positive pow prelu rad2deg reciprocal relu
    relu6 remainder round rrelu rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    sqrt square sub subtract tan tanh tanhshrink threshold true_divide trunc where xlogy
    """
)
_ELEMENT_WISE_CLASSES = _words(
    """
    AlphaDropout CELU Dropout Dropout1d Dropout2d Dropout3d ELU FeatureAlphaDropout GELU GLU Hardshrink Hardsigmoid
    Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign
    Tanh Tanhshrink Threshold
    """
)
# What stands in the brackets of these is a shape or a place, and arithmetic there is none on the data.
_SHAPED = _words(
    """
    view reshape expand repeat permute transpose size unsqueeze squeeze narrow zeros ones empty full arange linspace
    range len int chunk split unfold pad roll unflatten flatten new_zeros new_ones new_empty new_full
    """
)
_ARITHMETIC = (ast.BinOp, ast.AugAssign, ast.Compare)


def family_of(pytorch_code: str) -> str:
    """The operator family of a module, one of `FAMILIES`: that of the heaviest operators which its code holds.

    A contraction (attention, recurrent network, convolution, matrix product, in this order) outweighs what passes over
    the data several times (pooling, normalisation, softmax, ...: the family with the most calls, and of equals the
    first), that a reduction over a dimension, and that element-wise operators. An operator counts wherever the module's
    classes and functions name it, also where a branch may leave it out, and a layer that is built counts once when
    nothing calls it by name. Code that is no Python is "other".
    """
    try:
        tree = parse_module(pytorch_code)
        body = [node for node in tree.body if not _is_left_out(node)]
        return _family(body, imported_paths(walk(tree)))
    # The last three: a null byte, or an expression nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return OTHER


def _family(body: list[ast.stmt], paths: dict[str, str]) -> str:
    nodes = list(walk(*body))
    calls = work_of(nodes, paths, built_counts=True).calls
    # A layer that is derived from does its base's work: `class CausalConv(nn.Conv1d)`.
    bases = [base for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
    calls.update(family for base in bases if (family := layer_family(path_of(base, paths))))
    if calls:
        heaviest = max(WEIGHT[family] for family in calls)
        known = [family for family in FAMILIES if calls[family] and WEIGHT[family] == heaviest]
        return known[0] if known[0] in _DEAREST else max(known, key=lambda family: calls[family])
    if any(_reduces(node, paths) for node in nodes):
        return REDUCTION
    return ELEMENT_WISE if any(_computes(node, paths) for node in _on_data(body)) else OTHER


def _is_left_out(node: ast.stmt) -> bool:
    """The inputs, and the script part."""
    if isinstance(node, ast.If):
        return any(isinstance(part, ast.Name) and part.id == "__name__" for part in walk(node.test))
    return isinstance(node, ast.FunctionDef) and node.name in _INPUT_FUNCTIONS


def _reduces(node: ast.AST, paths: dict[str, str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = last_name(node.func)
    if _is_layer(node, paths):
        return name in _REDUCING_CLASSES
    if not _is_operator(node.func, paths) or name not in _REDUCTIONS:
        return False
    return name not in _EITHER or not _takes_two_tensors(node, paths)


def _takes_two_tensors(node: ast.Call, paths: dict[str, str]) -> bool:
    """`torch.max(x, y)` and `x.max(y)`, but not `torch.max(x, 1)`, `x.max(dim)` or `x.max(-1)`."""
    if any(keyword.arg in ("dim", "axis") for keyword in node.keywords):
        return False
    if any(keyword.arg == "other" for keyword in node.keywords):
        return True
    second = node.args[1:] if _is_function(node.func, paths) else node.args
    if not second:
        return False
    first = second[0].operand if isinstance(second[0], ast.UnaryOp) else second[0]
    name = last_name(first).lower()
    return not (isinstance(first, ast.Constant) or "dim" in name or "axis" in name)


def _computes(node: ast.AST, paths: dict[str, str]) -> bool:
    """Whether a node is an element-wise operator."""
    if isinstance(node, _ARITHMETIC) or (isinstance(node, ast.UnaryOp) and _negates(node)):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = last_name(node.func)
    if _is_layer(node, paths):
        return name in _ELEMENT_WISE_CLASSES
    return _is_operator(node.func, paths) and name.removesuffix("_") in _ELEMENT_WISE | _EITHER


def _negates(node: ast.UnaryOp) -> bool:
    return isinstance(node.op, ast.USub | ast.Invert) and not isinstance(node.operand, ast.Constant)


def _on_data(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What a module does with its data: not the arithmetic of shapes, indices and branches, and of `__init__` the
    layers that it builds alone.
    """
    waiting: list[ast.AST] = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (part for part in walk(*node.body) if isinstance(part, ast.Call))
            continue
        yield node
        waiting += _below(node)


def _below(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Subscript):
        return [node.value]
    if isinstance(node, ast.Call) and last_name(node.func) in _SHAPED:
        return [node.func]
    if isinstance(node, ast.If | ast.While):
        return [*node.body, *node.orelse]
    if isinstance(node, ast.Assert | ast.Raise):
        return []
    if isinstance(node, ast.Assign) and any(name.isupper() for target in node.targets for name in target_names(target)):
        return []
    return children(node)


def _is_layer(node: ast.Call, paths: dict[str, str]) -> bool:
    """`nn.ReLU(...)`."""
    path = path_of(node.func, paths)
    return path.startswith("torch.nn.") and path.rpartition(".")[2][:1].isupper()


def _is_function(function: ast.expr, paths: dict[str, str]) -> bool:
    return path_of(function, paths).startswith("torch.")


def _is_operator(function: ast.expr, paths: dict[str, str]) -> bool:
    """A function of PyTorch's, or a method of what may be a tensor; not `self.norm(x)`, `math.exp(1)`, `max(a, b)`."""
    if _is_function(function, paths):
        return True
    if not isinstance(function, ast.Attribute):
        return False
    root = function.value
    return not (isinstance(root, ast.Name) and (root.id == "self" or root.id in paths))
