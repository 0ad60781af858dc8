"""What a kernel's syntax tree says: wrappers, launches, fallbacks; and that honest kernels are let through."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from triton_sft_pipeline.traces.schemas import LONGEST_CODE
from triton_sft_pipeline.traces.static import fallback_of, kernel_facts, module_work
from triton_sft_pipeline_tests.verification.honest import HONEST

HEADER = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

"""
LAUNCH = "kernel[(1,)](x, y, x.numel(), B=1024)"
MODULE = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n"


def wrapper(*lines: str, head: str = "def triton_kernel_wrapper(x, w=None):") -> str:
    body = "\n    ".join(("y = torch.empty_like(x)", *lines, "return y"))
    return f"{HEADER}\n{head}\n    {body}\n"


def module(*forward: str, init: str = "pass") -> str:
    """A module: what it builds and what it does."""
    body = "\n        ".join(forward)
    return (
        f"{MODULE}class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n        {init}\n\n"
        f"    def forward(self, x, w=None):\n        {body}\n\n\n"
        "def get_inputs():\n    return [torch.rand(4, 4) @ torch.eye(4)]\n"
    )


def fallback(code: str, pytorch_code: str) -> str | None:
    return fallback_of(kernel_facts(code), module_work(pytorch_code))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:\n", "line 1: "),
        ("x = 1\n  y = 2", "line 2: unexpected indent"),
        ("x = '\x00'", "null byte"),
        ("(" * 500, "line 1: "),
        ("-" * 200_000 + "1", ""),
    ],
)
def test_what_is_no_python_is_said_with_its_line(code: str, said: str) -> None:
    found = kernel_facts(code).syntax_error
    assert found and said in found


@pytest.mark.parametrize(
    "code",
    [
        "def triton_kernel_wrapper(x): ...",
        "async def triton_kernel_wrapper(x): ...",
        "triton_kernel_wrapper = run",
        "triton_kernel_wrapper: object = run",
        "from here import run as triton_kernel_wrapper",
        "class ModelNew: ...",
        "try:\n    pass\nexcept Exception:\n    def triton_kernel_wrapper(x): ...",
        "if True:\n    class ModelNew: ...",
    ],
)
def test_a_wrapper_may_be_bound_in_any_way(code: str) -> None:
    assert kernel_facts(code).has_wrapper


@pytest.mark.parametrize(
    "code",
    [
        "",
        "def run(x): ...",
        "class A:\n    def triton_kernel_wrapper(self): ...",
        "if __name__ == '__main__':\n    def triton_kernel_wrapper(x): ...",
        "def outer():\n    def triton_kernel_wrapper(x): ...",
        "# def triton_kernel_wrapper(x): ...",
    ],
)
def test_a_wrapper_that_nobody_can_call_is_none(code: str) -> None:
    assert not kernel_facts(code).has_wrapper


LAUNCHED = {
    "by the wrapper": wrapper(LAUNCH),
    "under autotune": wrapper(LAUNCH).replace("@triton.jit", "@triton.autotune(configs=[], key=['n'])\n@triton.jit"),
    "with options": wrapper(LAUNCH).replace("@triton.jit", "@triton.jit(noinline=True)"),
    "under another name of triton": wrapper(LAUNCH)
    .replace("import triton\n", "import triton as t\n")
    .replace("@triton.", "@t."),
    "with jit imported": wrapper(LAUNCH)
    .replace("import triton\n", "from triton import jit\n")
    .replace("@triton.jit", "@jit"),
    "as gluon": wrapper(LAUNCH)
    .replace("@triton.jit", "@gluon.jit")
    .replace("import triton\n", "from triton.experimental import gluon\n"),
    "by run": wrapper("kernel.run(x, y, grid=(1,), warmup=False)"),
    "through a helper": wrapper("helper(x, y)") + f"\ndef helper(x, y):\n    {LAUNCH}\n",
    "through two": wrapper("helper(x, y)")
    + f"\ndef helper(x, y):\n    other(x, y)\n\ndef other(x, y):\n    {LAUNCH}\n",
    "handed to a launcher": wrapper("launch(kernel, x, y)") + "\ndef launch(k, x, y):\n    k[(1,)](x, y, 1, B=1)\n",
    "by an autograd function": wrapper("y = Op.apply(x)")
    + "\nclass Op(torch.autograd.Function):\n    @staticmethod\n"
    + f"    def forward(ctx, x):\n        y = x\n        {LAUNCH}\n",
    "by a module": HEADER
    + f"\nclass ModelNew(nn.Module):\n    def forward(self, x):\n        y = x\n        {LAUNCH}\n",
    "by a module that the wrapper builds": wrapper("y = Layer()(x)")
    + f"\nclass Layer(nn.Module):\n    def forward(self, x):\n        y = x\n        {LAUNCH}\n",
    "defined inside the wrapper": "import triton\ndef triton_kernel_wrapper(x):\n"
    "    @triton.jit\n    def k(p): pass\n    k[(1,)](x)\n",
    "from a table": wrapper("TABLE['a'][(1,)](x, y, 1, B=1)") + "\nTABLE = {'a': kernel}\n",
    "jit called as a function": wrapper("fast[(1,)](x, y)") + "\ndef plain(x, y): pass\n\nfast = triton.jit(plain)\n",
    "jit called in passing": wrapper("triton.jit(plain)[(1,)](x, y)") + "\ndef plain(x, y): pass\n",
    "by a lambda": HEADER + f"\ntriton_kernel_wrapper = lambda x, y: {LAUNCH}\n",
    "looked up by name": wrapper("globals()['ker' + 'nel'][(1,)](x, y, 1, B=1)"),
    "under a condition": wrapper(f"if x.is_cuda:\n        {LAUNCH}"),
}


@pytest.mark.parametrize("how", LAUNCHED)
def test_a_launch_is_seen_however_it_is_written(how: str) -> None:
    found = kernel_facts(LAUNCHED[how])
    assert found.has_wrapper and found.has_kernel and found.launches


@pytest.mark.parametrize(
    "code",
    [
        wrapper("y = x + 1"),
        wrapper("y = x + 1") + f"\ndef never_called(x, y):\n    {LAUNCH}\n",
        wrapper("y = x + 1") + f"\nif __name__ == '__main__':\n    {LAUNCH}\n",
        wrapper("y = x + 1") + "\n@triton.jit\ndef outer(x):\n    kernel(x, x, 1, 1)\n",
        wrapper("y = x + 1") + "\ndef plain(x, y): pass\n\nfast = triton.jit(plain)\n",
        wrapper("y = x + 1  # kernel[(1,)](x)", "'kernel'"),
    ],
)
def test_a_kernel_that_the_wrapper_never_uses_is_not_launched(code: str) -> None:
    found = kernel_facts(code)
    assert found.has_kernel and not found.launches


def test_without_a_kernel_there_is_nothing_to_launch() -> None:
    found = kernel_facts("import torch\n\n\ndef triton_kernel_wrapper(x):\n    return torch.relu(x)\n")
    assert not found.has_kernel and not found.launches


CONV = module("return F.relu(self.conv(x))", init="self.conv = nn.Conv2d(3, 8, 3)")
MATMUL = module("return x @ w")
SOFTMAX = module("return torch.softmax(x, -1)")
MODEL_NEW = """
class ModelNew(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        {line}
        y = torch.empty_like(x)
        kernel[(1,)](x, y, x.numel(), B=1024)
        return y
"""

LEFT_TO_PYTORCH = {
    "a functional convolution": (wrapper("x = F.conv2d(x, w)", LAUNCH), CONV, "torch.nn.functional.conv2d"),
    "a module called at once": (wrapper("x = nn.Conv2d(3, 8, 3)(x)", LAUNCH), CONV, "torch.nn.Conv2d"),
    "a module called later": (wrapper("c = nn.Conv2d(3, 8, 3)", "x = c(x)", LAUNCH), CONV, "torch.nn.Conv2d"),
    "a module of a ModelNew": (HEADER + MODEL_NEW.format(line="x = self.conv(x)"), CONV, "torch.nn.Conv2d"),
    "a helper's": (
        wrapper("x = helper(x, w)", LAUNCH) + "\ndef helper(x, w):\n    return F.conv2d(x, w)\n",
        CONV,
        "torch.nn",
    ),
    "a product by an operator": (wrapper("x = x @ w", LAUNCH), MATMUL, "@ does the module's matrix product"),
    "a product by a method": (wrapper("x = x.matmul(w)", LAUNCH), MATMUL, ".matmul"),
    "a product in place": (wrapper("x @= w", LAUNCH), MATMUL, "@"),
    "a product by einsum": (wrapper("x = torch.einsum('ij,jk->ik', x, w)", LAUNCH), MATMUL, "torch.einsum"),
    "a product under another name": (
        wrapper("x = mm(x, w)", LAUNCH).replace("import torch\n", "import torch\nfrom torch import mm\n"),
        MATMUL,
        "torch.mm",
    ),
    "a renamed function": (wrapper("x = f(x, w)", LAUNCH) + "\nf = F.linear\n", MATMUL, "torch.nn.functional.linear"),
    "a product below aten": (wrapper("x = torch.ops.aten.mm(x, w)", LAUNCH), MATMUL, "torch.ops.aten.mm"),
    "a softmax": (wrapper("x = torch.softmax(x, -1)", LAUNCH), SOFTMAX, "torch.softmax"),
    "a softmax by a method": (wrapper("x = x.softmax(-1)", LAUNCH), SOFTMAX, ".softmax"),
    "a softmax by a module": (wrapper("x = nn.Softmax(-1)(x)", LAUNCH), SOFTMAX, "torch.nn.Softmax"),
    "two of three layers": (
        wrapper("x = F.linear(x, w)", "x = F.linear(x, w)", LAUNCH),
        module(
            "return self.c(self.b(self.a(x)))",
            init="self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)",
        ),
        "torch.nn.functional.linear",
    ),
    "a compiler": (wrapper("y = torch.compile(lambda v: v + 1)(x)", LAUNCH), module("return x + 1"), "torch.compile"),
    "a compiler as a decorator": (
        wrapper(LAUNCH, head="@torch.compile\ndef triton_kernel_wrapper(x):"),
        module("return x + 1"),
        "torch.compile",
    ),
    "a script": (wrapper("y = torch.jit.script(f)(x)", LAUNCH), module("return x + 1"), "torch.jit.script"),
}


@pytest.mark.parametrize("what", LEFT_TO_PYTORCH)
def test_the_modules_heavy_work_may_not_be_left_to_pytorch(what: str) -> None:
    code, pytorch_code, said = LEFT_TO_PYTORCH[what]
    found = fallback(code, pytorch_code)
    assert found and said in found


FAIR = {
    "nothing of PyTorch's": (wrapper(LAUNCH), MATMUL),
    "allocation and movement": (wrapper("x = x.contiguous().view(-1)", "y = torch.zeros_like(x)", LAUNCH), CONV),
    "an element-wise helper": (wrapper("x = torch.relu(x) + 1", LAUNCH), CONV),
    "a last sum": (wrapper(LAUNCH, "y = y.sum() / y.numel()"), module("return F.mse_loss(x, w)")),
    "a small softmax behind a convolution": (
        wrapper(LAUNCH, "y = torch.softmax(y, -1)"),
        module("return torch.softmax(self.conv(x), -1)", init="self.conv = nn.Conv2d(3, 8, 3)"),
    ),
    "a product that the module does not have": (wrapper("w = w @ w", LAUNCH), SOFTMAX),
    "one of two layers": (
        wrapper("x = F.linear(x, w)", LAUNCH),
        module("return self.b(self.a(x))", init="self.a = nn.Linear(4, 4)\n        self.b = nn.Linear(4, 4)"),
    ),
    "a product beside a kernel that multiplies": (
        wrapper("w = w @ w", LAUNCH).replace("tl.load(x_ptr", "tl.dot(x_ptr"),
        MATMUL,
    ),
    "the way for a CPU": (wrapper("if not x.is_cuda:\n        return x @ w", LAUNCH), MATMUL),
    "the way for another device": (wrapper("if x.device.type == 'cpu':\n        return x @ w", LAUNCH), MATMUL),
    "the way without Triton": (wrapper("if not HAS_TRITON:\n        return x @ w", LAUNCH), MATMUL),
    "the way after an error": (wrapper(f"try:\n        {LAUNCH}\n    except Exception:\n        y = x @ w"), MATMUL),
    "a reference that only a test calls": (
        wrapper(LAUNCH)
        + "\ndef reference(x, w):\n    return x @ w\n\nif __name__ == '__main__':\n    print(reference(1, 2))\n",
        MATMUL,
    ),
    "a module that only holds its weights": (
        HEADER + MODEL_NEW.format(line="w = self.conv.weight"),
        CONV,
    ),
    "a product inside the kernel": (wrapper(LAUNCH).replace("tl.load(x_ptr", "tl.load(x_ptr @ x_ptr"), MATMUL),
    "a guard that may not run": (
        wrapper("if w.shape != x.shape:\n        w = F.interpolate(w, x.shape)", LAUNCH),
        module("if w.shape != x.shape:\n            w = F.interpolate(w, x.shape)", "return x - w"),
    ),
    "a function of its own by that name": (
        wrapper("x = linear(x)", LAUNCH) + "\ndef linear(x):\n    return x\n",
        MATMUL,
    ),
    "a method of its own by that name": (
        wrapper(LAUNCH) + "\nclass A:\n    def f(self):\n        return self.mm(1)\n",
        MATMUL,
    ),
    "a list that is sorted": (wrapper("names = sorted(['b', 'a'])", LAUNCH), module("return torch.sort(x)[0]")),
    "a word of mathematics": (
        wrapper("n = math.log(2)", LAUNCH).replace("import torch\n", "import math\nimport torch\n"),
        MATMUL,
    ),
    "compilers that are told to leave it alone": (
        wrapper(LAUNCH, head="@torch.compiler.disable\ndef triton_kernel_wrapper(x):"),
        MATMUL,
    ),
    "a module that is no Python": (wrapper("x = x @ w", LAUNCH), "def forward(:"),
}


@pytest.mark.parametrize("what", FAIR)
def test_what_a_wrapper_may_do_beside_its_kernel_is_no_fallback(what: str) -> None:
    code, pytorch_code = FAIR[what]
    assert kernel_facts(code).syntax_error is None and kernel_facts(code).launches
    assert fallback(code, pytorch_code) is None


def test_the_inputs_of_a_module_are_not_its_work() -> None:
    assert not module_work(module("return x + 1")).calls


def test_code_that_no_model_writes_is_not_parsed() -> None:
    code = wrapper(LAUNCH) + "# " + "x" * LONGEST_CODE
    assert "characters are more than any kernel has" in (kernel_facts(code).syntax_error or "")
    assert not module_work(MATMUL + "# " + "x" * LONGEST_CODE).calls


def test_layers_in_a_list_count_once_each() -> None:
    init = "self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()])"
    work = module_work(module("for layer in self.layers:", "    x = layer(x)", "return x", init=init))
    assert work.calls == {"matrix product": 2}


def test_layers_in_a_sequence_count_where_it_is_called() -> None:
    init = "self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))"
    assert module_work(module("return self.net(x)", init=init)).calls == {"matrix product": 2}


def test_code_that_is_nested_too_deep_to_be_walked_is_not_refused() -> None:
    found = kernel_facts("def triton_kernel_wrapper(x):\n    return x" + " + x" * 3000)
    assert found.syntax_error is None or "nested" in found.syntax_error or "recursion" in found.syntax_error


def test_no_kernel_that_the_judge_must_accept_is_refused() -> None:
    assert len(HONEST) > 100
    for case in HONEST:
        facts = kernel_facts(case.triton_code)
        assert facts.syntax_error is None and facts.has_wrapper and facts.has_kernel and facts.launches, case.name
        assert fallback_of(facts, module_work(case.pytorch_code)) is None, case.name


@pytest.mark.skipif("TRITON_SFT_REAL_TRACES" not in os.environ, reason="TRITON_SFT_REAL_TRACES names no folder")
def test_no_real_kernel_that_ran_and_matched_is_refused() -> None:
    path = Path(os.environ["TRITON_SFT_REAL_TRACES"]) / "gpt_oss_120b_single_turn.json"
    for record in json.loads(path.read_text("utf-8")):
        facts = kernel_facts(record["triton_code"])
        assert facts.syntax_error is None and facts.has_wrapper and facts.launches, record["sample_key"]
        assert fallback_of(facts, module_work(record["pytorch_code"])) is None, record["sample_key"]
