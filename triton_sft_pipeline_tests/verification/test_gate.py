"""What is refused before anything runs."""

from __future__ import annotations

import textwrap
import warnings

import pytest

from triton_sft_pipeline.verification.gate import inspect_source
from triton_sft_pipeline_tests.verification.snippets import DOUBLE_KERNEL, HEADER, pointwise, pointwise_kernel, wrapper


def top(lines: str) -> str:
    """The doubling kernel with these lines at the end of its module."""
    return f"{DOUBLE_KERNEL}\n{textwrap.dedent(lines)}\n"


def inside(lines: str) -> str:
    """The doubling kernel with these lines in its wrapper."""
    return pointwise_kernel("x * 2", before=lines)


def match(pattern: str) -> str:
    """The doubling kernel with a pattern of these keywords in its wrapper."""
    return inside(f"match pointwise:\n    case object({pattern}):\n        pass")


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (None, "no_code"),
        ("", "no_code"),
        (" \n\t", "no_code"),
        ("...", "missing_wrapper"),
        ("def wrapper(x): pass", "missing_wrapper"),
        ("class A:\n    def triton_kernel_wrapper(self): pass", "missing_wrapper"),
        ("if __name__ == '__main__':\n    def triton_kernel_wrapper(x): pass", "missing_wrapper"),
        ("def triton_kernel_wrapper(x)", "syntax_error"),
        ("x = '\0'", "syntax_error"),
        ("x = '\ud800'", "syntax_error"),
        ("(" * 10_000, "syntax_error"),
        (top("x = " + "+".join(["1"] * 900)), "forbidden_construct"),
        (HEADER + wrapper("return x * 2"), "no_kernel_launch"),
        ("class ModelNew: pass", "no_kernel_launch"),
        ("triton_kernel_wrapper = lambda x: x", "no_kernel_launch"),
    ],
)
def test_code_that_cannot_be_judged_is_refused_unread(code: str | None, verdict: str) -> None:
    found = inspect_source(code)
    assert found is not None and found.verdict == verdict


@pytest.mark.parametrize(
    "code",
    [
        pointwise("x") + "def triton_kernel_wrapper(x): pass",
        pointwise("x") + "class ModelNew: pass",
        pointwise("x") + "triton_kernel_wrapper = lambda x: x",
        pointwise("x") + "if True:\n    def triton_kernel_wrapper(x): pass",
        "try:\n    from no_such_library import triton_kernel_wrapper\nexcept ImportError:\n    pass",
    ],
)
def test_code_that_defines_either_contract_passes(code: str) -> None:
    assert inspect_source(code) is None


# name: (verdict, what the sentence must mention, code)
REFUSED = {
    "open": ("sandbox_violation", "open", inside("open('x').read()")),
    "open at import": ("sandbox_violation", "open", top("text = open('x').read()")),
    "open as a value": ("sandbox_violation", "open", inside("list(map(open, ['x']))")),
    "open under another name": ("sandbox_violation", "open", inside("read = open\nread('x')")),
    "open before a local of the module hides it": ("sandbox_violation", "open", top("open('x')\nopen = 1")),
    "open in a kernel": ("sandbox_violation", "open", pointwise_kernel("open('x')")),
    "open in a lambda": ("sandbox_violation", "open", top("f = lambda name: open(name)")),
    "open as the first iterable": ("sandbox_violation", "open", inside("[open for open in open('x')]")),
    "open made global": ("sandbox_violation", "open", inside("global open\nopen('x')\nopen = 1")),
    "pathlib": ("sandbox_violation", "pathlib", inside("from pathlib import Path")),
    "shutil": ("sandbox_violation", "shutil", inside("import shutil as s")),
    "os.remove": ("sandbox_violation", "os.remove", inside("import os\nos.remove('x')")),
    "os.system by an import from": ("sandbox_violation", "os.system", top("from os import system as cdiv")),
    "os in torch": ("sandbox_violation", "torch.os.system", inside("torch.os.system('true')")),
    "os in random": ("sandbox_violation", "random._os", top("import random\nrandom._os.remove('x')")),
    "os by getattr": ("sandbox_violation", "os.system", inside("import os\ngetattr(os, 'system')('true')")),
    "the whole environment": ("sandbox_violation", "os.environ", inside("import os\nstolen = dict(os.environ)")),
    "a secret variable": ("sandbox_violation", "environment", inside("import os\nos.environ.get('HF_TOKEN')")),
    "a computed variable": ("sandbox_violation", "environment", inside("import os\nos.getenv('HF_' + 'TOKEN')")),
    "subprocess": ("sandbox_violation", "subprocess", inside("import subprocess")),
    "socket": ("sandbox_violation", "socket", inside("import socket")),
    "ctypes": ("sandbox_violation", "ctypes", inside("import ctypes")),
    "pickle": ("sandbox_violation", "pickle", inside("import pickle")),
    "torch.save": ("sandbox_violation", "torch.save", inside("torch.save(x, 'x')")),
    "torch.load from torch": ("sandbox_violation", "torch.load", top("from torch import load")),
    "a C++ extension": ("sandbox_violation", "cpp_extension", top("from torch.utils.cpp_extension import load_inline")),
    "a library of operators": ("sandbox_violation", "load_library", inside("torch.ops.load_library('x.so')")),
    "sys.exit": ("early_exit", "sys.exit", inside("import sys\nsys.exit(0)")),
    "sys.exit by an import from": ("early_exit", "sys.exit", top("from sys import exit as done\ndone()")),
    "os._exit": ("early_exit", "os._exit", inside("import os\nos._exit(0)")),
    "exit": ("early_exit", "exit", inside("exit()")),
    "quit at import": ("early_exit", "quit", top("quit()")),
    "SystemExit": ("early_exit", "SystemExit", inside("raise SystemExit")),
    "KeyboardInterrupt": ("early_exit", "KeyboardInterrupt", inside("raise KeyboardInterrupt")),
    "gc.get_objects": ("reference_access", "gc.get_objects", inside("import gc\ngc.get_objects()")),
    "inspect": ("reference_access", "inspect", inside("import inspect")),
    "sys._getframe": ("reference_access", "sys._getframe", inside("import sys\nsys._getframe(1)")),
    "frames of an exception": ("reference_access", "__traceback__", inside("e = ValueError().__traceback__")),
    "f_back": ("reference_access", "f_back", inside("x.f_back")),
    "f_locals by getattr": ("reference_access", "f_locals", inside("getattr(x, 'f_locals')")),
    "__globals__": ("reference_access", "__globals__", inside("triton_kernel_wrapper.__globals__")),
    "__globals__ of torch": ("reference_access", "__globals__", inside("torch.rand_like.__globals__['x']")),
    "__code__": ("reference_access", "__code__", inside("triton_kernel_wrapper.__code__")),
    "__subclasses__": ("reference_access", "__subclasses__", inside("object.__subclasses__()")),
    "__dict__ of a module": ("harness_tamper", "__dict__", inside("torch.__dict__['allclose'] = None")),
    "__builtins__": ("reference_access", "__builtins__", inside("__builtins__['open']")),
    "globals": ("reference_access", "globals", inside("globals()['x'] = 1")),
    "vars of a module": ("harness_tamper", "vars", inside("vars(torch)")),
    "the main module": ("reference_access", "__main__", inside("import __main__")),
    "the judge": ("reference_access", "triton_sft_pipeline", inside("from triton_sft_pipeline import verification")),
    "sys.modules": ("harness_tamper", "sys.modules", inside("import sys\nsys.modules['torch'] = None")),
    "attrgetter": ("reference_access", "attrgetter", top("import operator\noperator.attrgetter('a.b')")),
    "getattr with a computed name": ("forbidden_construct", "computed", inside("getattr(x, '__cla' + 'ss__')")),
    "getattr on a module": ("forbidden_construct", "computed", inside("name = 'l'\ngetattr(torch, name)")),
    "getattr under another name": ("sandbox_violation", "torch.load", inside("get = getattr\nget(torch, 'load')")),
    "getattr as a value": ("forbidden_construct", "getattr", inside("list(map(getattr, [x], ['a']))")),
    "builtins": ("harness_tamper", "builtins", inside("import builtins")),
    "torch.allclose replaced": ("harness_tamper", "torch.allclose", inside("torch.allclose = lambda *a: True")),
    "several at once": ("harness_tamper", "torch.equal", inside("a = torch.equal = None")),
    "a module under another name": ("harness_tamper", "torch.allclose", inside("t = torch\nt.allclose = None")),
    "a module under two names": ("harness_tamper", "torch.cpu", top("import torch as t\nu = t\nu.cpu = None")),
    "a module in a list": ("harness_tamper", "passing torch", inside("for t in [torch]:\n    t.allclose = None")),
    "a module as an argument": ("harness_tamper", "passing torch", inside("f = lambda m: m\nf(torch)")),
    "a module in a class": ("harness_tamper", "passing torch.cuda", top("class A:\n    where = torch.cuda")),
    "a method of Tensor": ("harness_tamper", "torch.Tensor", inside("torch.Tensor.add = None")),
    "a class as an argument": ("harness_tamper", "torch.Tensor", inside("f = lambda c: c\nf(torch.Tensor)")),
    "the class of a tensor": ("harness_tamper", "class", inside("type(x).add = None")),
    "the class by its attribute": ("harness_tamper", "class", inside("x.__class__.add = None")),
    "setattr on torch": ("harness_tamper", "setattr", inside("setattr(torch, 'equal', None)")),
    "nn.Module.__call__": ("harness_tamper", "__call__", inside("torch.nn.Module.__call__ = None")),
    "del": ("harness_tamper", "torch.nn.Linear", inside("del torch.nn.Linear")),
    "a loop variable": ("harness_tamper", "torch.equal", inside("for torch.equal in [None]: pass")),
    "the kernel's run": ("harness_tamper", "kernel pointwise", inside("pointwise.run = None")),
    "the kernel's function under another name": ("harness_tamper", ".fn", inside("same = pointwise\nsame.fn = None")),
    "the kernel's function in a list": ("harness_tamper", ".fn", inside("for [pointwise][0].fn in [None]: pass")),
    "a module in an element of a list": ("harness_tamper", "passing torch", inside("[torch][0].equal = None")),
    "a module that was chosen": ("harness_tamper", "passing torch", inside("(x or torch).os.system('x')")),
    "a module that a walrus names": ("harness_tamper", "passing torch", inside("[t := torch for _ in x]\nt.cpu()")),
    "a module of Python in a list": ("harness_tamper", "passing os", inside("import os\n[os][0].system('x')")),
    "getattr of an element of a list": ("harness_tamper", "passing torch", inside("getattr([torch][0], 'os')")),
    "an import in a class": ("harness_tamper", "importing", top("class A:\n    import torch as where")),
    "an import for the module": (
        "harness_tamper",
        "importing",
        inside("global t\nimport torch as t\nt.os.remove('x')"),
    ),
    "an import from for the function around": (
        "harness_tamper",
        "importing",
        inside("t = 1\ndef f():\n    nonlocal t\n    from torch import cuda as t"),
    ),
    "a module renamed for the module": (
        "harness_tamper",
        "passing torch",
        inside("global t\nt = torch\nt.os.remove('x')"),
    ),
    "a module between brackets": ("harness_tamper", "passing torch", inside("Own = dict\nOwn()[torch]")),
    "a module in a comparison": ("harness_tamper", "passing torch", inside("x == torch")),
    "a pattern that reads a frame": ("reference_access", ".f_back", match("f_back=frame")),
    "a pattern that reads globals": ("reference_access", ".__globals__", match("fn=object(__globals__=found)")),
    "a pattern that reads a private name": ("harness_tamper", "._C", match("_C=found")),
    "a pattern that reads the class": ("harness_tamper", ".__class__", match("__class__=found")),
    "a pattern that reads a module": ("harness_tamper", ".sys", match("sys=object(modules=found)")),
    "a pattern that reads the list of modules": ("harness_tamper", ".modules", match("modules=found")),
    "a pattern that reads a way out": ("early_exit", "._exit", match("_exit=found")),
    "a pattern that reads the host's values": ("forbidden_construct", ".numpy", match("numpy=found")),
    "isinstance rebound": ("harness_tamper", "isinstance", top("def isinstance(x, c): return True")),
    "__name__ rebound": ("harness_tamper", "__name__", top("__name__ = '__main__'")),
    "the environment changed": ("harness_tamper", "environ", inside("import os\nos.environ['TRITON_X'] = '1'")),
    "sys.settrace": ("harness_tamper", "sys.settrace", inside("import sys\nsys.settrace(None)")),
    "signal": ("forbidden_construct", "signal", inside("import signal")),
    "triton.runtime.jit": ("harness_tamper", "runtime.jit", top("from triton.runtime.jit import JITFunction")),
    "triton.knobs": ("harness_tamper", "triton.knobs", inside("triton.knobs.runtime.interpret = True")),
    "Triton's driver": ("harness_tamper", "set_active", inside("triton.runtime.driver.set_active(None)")),
    "torch._C": ("harness_tamper", "torch._C", inside("torch._C._jit_clear_class_registry()")),
    "the dispatch mode": ("harness_tamper", "_python_dispatch", top("import torch.utils._python_dispatch as d")),
    "torch.library": ("harness_tamper", "torch.library", top("lib = torch.library.Library('aten', 'IMPL')")),
    "torch.overrides": ("harness_tamper", "torch.overrides", top("from torch.overrides import TorchFunctionMode")),
    "time replaced": ("timing_tamper", "time.perf_counter", top("import time\ntime.perf_counter = lambda: 0.0")),
    "events replaced": ("timing_tamper", "torch.cuda.Event", inside("torch.cuda.Event = None")),
    "an event's method": ("timing_tamper", "elapsed_time", top("torch.cuda.Event.elapsed_time = None")),
    "synchronize replaced": ("timing_tamper", "synchronize", inside("torch.cuda.synchronize = lambda *a: None")),
    "torch.compile": ("torch_fallback", "torch.compile", top("@torch.compile\ndef f(x): return x")),
    "torch.jit": ("torch_fallback", "torch.jit.script", inside("torch.jit.script(x)")),
    "a tensor subclass": ("lazy_output", "subclass", top("class Lazy(torch.Tensor): pass")),
    "a tensor subclass under another name": (
        "lazy_output",
        "subclass",
        top("from torch import Tensor\nBase = Tensor\nclass Lazy(Base): pass"),
    ),
    "__torch_function__": (
        "lazy_output",
        "__torch_function__",
        top("class A:\n    def __torch_function__(self): pass"),
    ),
    "as_subclass": ("lazy_output", "as_subclass", inside("x.as_subclass(object)")),
    "eval": ("forbidden_construct", "eval", inside("eval('1')")),
    "exec": ("forbidden_construct", "exec", top("exec('')")),
    "compile": ("forbidden_construct", "compile", inside("compile('1', '', 'eval')")),
    "__import__": ("forbidden_construct", "__import__", inside("__import__('os')")),
    "importlib": ("forbidden_construct", "importlib", inside("import importlib")),
    "code in text": ("forbidden_construct", "Timer", inside("torch.utils.benchmark.Timer('1')")),
    "type with three arguments": ("forbidden_construct", "type()", inside("type('A', (), {})")),
    "a metaclass": ("forbidden_construct", "metaclass", top("class A(metaclass=type): pass")),
    "threading": ("forbidden_construct", "threading", inside("import threading")),
    "multiprocessing": ("forbidden_construct", "multiprocessing", inside("import torch.multiprocessing")),
    "a module of Python that no kernel needs": ("forbidden_construct", "sched", inside("import sched")),
    "an installed library": ("forbidden_construct", "pytest", inside("import pytest")),
    "all names of a module": ("forbidden_construct", "import *", "from torch import *\n" + DOUBLE_KERNEL),
    "__del__": ("forbidden_construct", "__del__", top("class A:\n    def __del__(self): pass")),
    "numpy()": ("forbidden_construct", "numpy", inside("x.cpu().numpy()")),
    "tolist()": ("forbidden_construct", "tolist", inside("x.tolist()")),
    "apply_": ("forbidden_construct", "apply_", inside("x.apply_(lambda value: value * 2)")),
    "map_": ("forbidden_construct", "map_", inside("x.map_(x, lambda value, other: value + other)")),
    "tolist of the class": ("forbidden_construct", "tolist", inside("torch.Tensor.tolist(x)")),
    "computing in NumPy": ("forbidden_construct", "numpy.matmul", "import numpy as np\n" + inside("np.matmul(x, x)")),
    "a CUDA graph": ("forbidden_construct", "CUDAGraph", top("g = torch.cuda.CUDAGraph()")),
    "a relative import": ("import_error", "relative", inside("from . import helper")),
    "a function that only the wrapper calls": (
        "early_exit",
        "exit",
        inside("helper()") + "\ndef helper():\n    exit()\n",
    ),
    "a function that a decorator gets": ("early_exit", "exit", top("@print\ndef helper():\n    exit()")),
    "a function by a constant name": ("early_exit", "exit", top("names = ['helper']\ndef helper():\n    exit()")),
    "a default value": ("early_exit", "exit", top("def helper(x=exit()): pass")),
    "beside the main block": ("early_exit", "exit", top("if __name__ == '__main__':\n    pass\nelse:\n    exit()")),
    "a block that is no main block": ("early_exit", "exit", top("if __name__ != '__main__':\n    exit()")),
    "a method": ("early_exit", "exit", top("class A:\n    def f(self):\n        exit()")),
    "a module's __getattr__": ("early_exit", "exit", top("def __getattr__(name):\n    exit()")),
    "a name of the class only": ("early_exit", "exit", top("class A:\n    exit = 1\n    def f(self):\n        exit()")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_an_attack_needs_is_refused_by_name(case: str) -> None:
    verdict, mentioned, code = REFUSED[case]
    found = inspect_source(code)
    assert found is not None and found.verdict == verdict, found
    assert mentioned in found.detail
    assert found.detail.startswith("Line ") and found.detail.endswith(".")


def test_the_first_refused_line_is_named() -> None:
    found = inspect_source(inside("a = 1\nimport sys\nsys.exit()\nopen('x')"))
    lines = inside("a = 1\nimport sys\nsys.exit()\nopen('x')").splitlines()
    assert found is not None and found.detail.startswith(
        f"Line {lines.index('    sys.exit()') + 1}: sys.exit is refused"
    )


def test_parsing_prints_no_warning_about_the_kernels_escapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_source(DOUBLE_KERNEL + '\npattern = "\\d"\nif 1 is 1:\n    pass\n') is None
