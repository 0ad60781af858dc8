"""What the normal form of code is blind to, what it still sees, and that no text breaks it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.problems.normalise import blurred, kernel_tokens, module_tokens, shingles, tokens_hash

KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def _scale(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x * factor, mask=mask)


def triton_kernel_wrapper(x, factor=2.0):
    out = torch.empty_like(x)
    n = x.numel()
    _scale[(triton.cdiv(n, 1024),)](x, out, n, factor, BLOCK=1024)
    return out
"""

RESPELLED = '''"""A kernel."""
from torch import empty_like
import triton
from triton import language as tl

# Tuned on a quiet machine.
@triton.jit
def kernel(src,                # input
           dst, count: int, alpha,
           SIZE: "tl.constexpr"):
    """Multiply."""
    block: int = tl.program_id(0)
    where = (block * SIZE) + tl.arange(0, SIZE)
    inside = where < count
    value = tl.load(src + where, mask=inside)
    tl.store(dst + where, value * alpha, mask=inside)

def triton_kernel_wrapper(data: torch.Tensor, alpha: float = 2.0) -> torch.Tensor:
    result = empty_like(data); total = data.numel()
    kernel[(triton.cdiv(total, 1024),)](data, result, total, alpha, SIZE=1024)
    return result

if __name__ == "__main__":
    print(triton_kernel_wrapper(torch.ones(3)))
'''

MODULE = """
import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return torch.relu(torch.abs(x) * self.weight)
"""


def changed(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


def module_with(forward: str, top: str = "") -> str:
    body = forward.replace("\n", "\n        ")
    return f"""
import torch
import torch.nn as nn
import torch.nn.functional as F
{top}

class Model(nn.Module):
    def forward(self, x):
        {body}
"""


def test_a_kernel_under_other_names_layout_and_imports_is_the_same() -> None:
    assert kernel_tokens(RESPELLED) == kernel_tokens(KERNEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * factor", "x + factor"),
        ("x * factor", "factor * x"),
        ("offs < n", "offs <= n"),
        ("program_id(0)", "program_id(1)"),
        ("BLOCK=1024", "BLOCK=512"),
        ("factor=2.0", "factor=3.0"),
        ("mask=mask)\n    tl", "mask=mask, other=0.0)\n    tl"),
        ("(x, out, n, factor", "(out, x, n, factor"),
        ("@triton.jit", "@triton.autotune([], key=[])\n@triton.jit"),
        ("    return out", "    return x"),
        ("tl.load(", "tl.atomic_add("),
    ],
)
def test_a_kernel_that_computes_something_else_is_another(old: str, new: str) -> None:
    assert kernel_tokens(changed(KERNEL, old, new)) != kernel_tokens(KERNEL)


def test_names_are_told_apart_in_each_function_alone() -> None:
    shared_names = re.sub(r"\bx_ptr\b", "x", re.sub(r"\bx\b(?= [*=])", "loaded", KERNEL))
    assert kernel_tokens(shared_names) == kernel_tokens(KERNEL)


def test_what_the_wrapper_does_not_reach_does_not_count() -> None:
    unused = KERNEL + "\n\nclass Reference(torch.nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    assert kernel_tokens(unused) == kernel_tokens(KERNEL)
    used = changed(unused, "    return out\n", "    return out + Reference()(x)\n")
    assert "class" in kernel_tokens(used)


def test_a_file_without_a_wrapper_counts_as_a_whole() -> None:
    one, other = "def f(x):\n    return x\n", "def f(x):\n    return x\n\n\ndef g(x):\n    return x + 1\n"
    assert kernel_tokens(one) != kernel_tokens(other)


def test_the_name_of_a_keyword_of_somebody_elses_function_counts() -> None:
    other = changed(KERNEL, "torch.empty_like(x)", "torch.empty_like(x, device=x.device)")
    assert "=device" in kernel_tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("return torch.abs(x) + 1", "return x.abs() + 1"),
        ("return torch.relu(x)", "return F.relu(x)"),
        ("return torch.add(x, 1)", "return x + 1"),
        ("return torch.matmul(x, x)", "return x @ x"),
        ("return x.mul(x)", "return x * x"),
        ("y = torch.abs(x)\nreturn y + 1", "return torch.abs(x) + 1"),
        ("x = torch.abs(x)\nx = x + 1\nreturn x", "return torch.abs(x) + 1"),
        ("x = x + 1\nreturn x * x", "x += 1\nreturn x * x"),
        ("total: float = x.sum()\nreturn x / total", "return x / x.sum()"),
        ("assert True, 'a'\nreturn x", 'assert (True), "a"\nreturn (x)'),
    ],
)
def test_two_ways_to_write_the_same_module_are_one(one: str, other: str) -> None:
    assert module_tokens(module_with(one)) == module_tokens(module_with(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("y = torch.abs(x)\nreturn y + y", "return torch.abs(x)"),
        ("return x - x.mean()", "return x.mean() - x"),
        ("return x.sum(dim=0)", "return x.sum(dim=1)"),
        ("y = x\nx = x + 1\nreturn y", "x = x + 1\nreturn x"),
        ("a = x.sum()\nb = a + 1\nx = x * 2\nreturn b + x + x", "x = x * 2\nreturn x.sum() + 1 + x + x"),
        ("y = x.sum()\nx[0] = 1\nreturn y", "x[0] = 1\nreturn x.sum()"),
        ("y = x.sum()\nx.add_(1)\nreturn y + x", "x.add_(1)\nreturn x.sum() + x"),
        ("y = x + 1\nx = x * 2\nreturn x * y", "x = x * 2\nreturn x * (x + 1)"),
        ("y = x + 1\nfor _ in range(3):\n    x = x * y\nreturn x", "for _ in range(3):\n    x = x * (x + 1)\nreturn x"),
    ],
)
def test_modules_that_compute_different_things_are_two(one: str, other: str) -> None:
    assert module_tokens(module_with(one)) != module_tokens(module_with(other))


def test_inputs_class_names_and_an_empty_constructor_are_no_part_of_a_module() -> None:
    plain = module_with("return torch.relu(x)")
    dressed = changed(plain, "class Model(nn.Module):", "class Relu(torch.nn.Module):\n    '''Clips.'''")
    dressed = changed(
        dressed, "    def forward", "    def __init__(self):\n        super(Relu, self).__init__()\n\n    def forward"
    )
    dressed += "\n\nbatch = 16\n\n\ndef get_inputs():\n    return [torch.rand(batch)]\n"
    assert module_tokens(dressed) == module_tokens(plain)


def test_attributes_are_known_by_where_they_are_set() -> None:
    renamed = re.sub("weight", "scale", MODULE)
    assert module_tokens(renamed) == module_tokens(MODULE)
    other = changed(MODULE, "* self.weight", "* self.bias")
    assert module_tokens(other) != module_tokens(MODULE)


def test_a_helper_that_the_module_calls_is_part_of_it() -> None:
    helper = "def helper(x):\n    return x {sign} 1\n"
    one = module_with("return helper(x)", helper.format(sign="+"))
    other = module_with("return helper(x)", helper.format(sign="-"))
    assert module_tokens(one) != module_tokens(other)


def test_a_variable_of_an_enclosing_function_is_known_by_its_place_and_not_by_its_name() -> None:
    code = (
        "def triton_kernel_wrapper(x):\n    scale = 2\n    def inner(y):\n        return {} * y\n    return inner(x)\n"
    )
    renamed = code.format("factor").replace("scale", "factor")
    assert kernel_tokens(renamed) == kernel_tokens(code.format("scale")) != kernel_tokens(code.format("other"))


def test_a_parameter_that_is_called_like_a_library_is_not_the_library() -> None:
    code = "import numpy as np\n\n\ndef triton_kernel_wrapper({0}):\n    return {0}.load(1)\n"
    assert kernel_tokens(code.format("np")) == kernel_tokens(code.format("x"))


@pytest.mark.parametrize("parameters", ["*a", "**a", "*, a", "a=1", "a, b"])
def test_how_a_function_takes_its_parameters_counts(parameters: str) -> None:
    code = "def triton_kernel_wrapper({}):\n    return a\n"
    assert kernel_tokens(code.format(parameters)) != kernel_tokens(code.format("a"))


def test_code_that_does_not_parse_is_split_into_words_without_its_comments() -> None:
    assert kernel_tokens("def f(x:  # broken\n  return 'a # b' + x1\n") == [
        *("def", "f", "(", "x", ":", "return", "'a # b'", "+", "x1"),
    ]
    assert kernel_tokens("") == []
    assert kernel_tokens("x = " + "(" * 5000 + ")" * 5000)[:4] == ["x", "=", "(", "("]
    assert len(kernel_tokens("x = 1" + " + 1" * 5000)) == 10_003


def test_code_longer_than_any_kernel_is_known_by_its_words_alone_and_not_parsed() -> None:
    one, other = "x = 1\n" * 200_000, "x  =  1\n\n" * 200_000
    assert kernel_tokens(one) == kernel_tokens(other) == module_tokens(one)
    assert len(kernel_tokens(one)) == 1 and kernel_tokens(one + "y = 1") != kernel_tokens(one)


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=200) | st.text(alphabet="()[]{}:=#'\"\\\n\tdefxlamb0.,@*", max_size=200))
def test_no_text_breaks_the_normal_form(text: str) -> None:
    for tokens in (kernel_tokens(text), module_tokens(text)):
        assert len(tokens_hash(tokens)) == 64
        assert len(shingles(blurred(tokens))) <= max(len(tokens), 1)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 25), min_size=12, max_size=12, unique=True))
def test_any_consistent_renaming_leaves_a_kernel_what_it_was(letters: list[int]) -> None:
    own = ("_scale", "x_ptr", "out_ptr", "n", "factor", "BLOCK", "pid", "offs", "mask", "x", "out", "unused")
    names = {name: f"name_{chr(97 + letter)}" for name, letter in zip(own, letters, strict=True)}
    # The keyword `mask=` of tl.load is not ours to rename.
    code = re.sub(r"\b(\w+)\b(?!=mask)", lambda found: names.get(found[0], found[0]), KERNEL)
    assert kernel_tokens(code) == kernel_tokens(KERNEL)


def test_blurred_tokens_lose_numbers_of_names_and_sizes_of_blocks() -> None:
    assert blurred(["%3", "@0", ".@12", "=@1", "1024", "16", "8", "48", "1.0", "1.5", "torch.abs", "'%3'"]) == [
        *("%", "@", ".@", "=@", "2**n", "2**n", "8", "48", "1", "1.5", "torch.abs", "'%3'"),
    ]


def test_n_grams_are_a_sorted_set_of_hashes_that_are_the_same_everywhere() -> None:
    tokens = ["a", "b", "c", "d", "e", "f"]
    grams = shingles(tokens)
    assert grams.tolist() == sorted(set(grams.tolist())) and len(grams) == 2
    assert sorted([int(shingles(tokens[:5])[0]), int(shingles(tokens[1:])[0])]) == grams.tolist()
    assert len(shingles(["a"] * 50)) == 1
    assert len(shingles(["a", "b"])) == 1 and len(shingles([])) == 0
    assert shingles(["a", "b"]).tolist() != shingles(["b", "a"]).tolist()
    assert int(shingles(tokens[:5])[0]) == PINNED


PINNED = 10896205109987235110
