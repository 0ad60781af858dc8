"""What honest kernels do passes the gate: one snippet for each habit, and the kernels of real traces."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.verification.gate import inspect_source
from triton_sft_pipeline_tests.verification.snippets import DOUBLE_KERNEL, HEADER, pointwise, wrapper
from triton_sft_pipeline_tests.verification.test_gate import inside, top

SAMPLE = Path(__file__).parents[2] / "data" / "reasoning_traces.json"
REAL_TRACES = "TRITON_SFT_REAL_TRACES"

MODEL = """
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Optional, Tuple, Union
import torch.nn as nn
import torch.nn.functional as F

TensorPair = Tuple[torch.Tensor, Optional[torch.Tensor]]

@dataclass(frozen=True)
class Blocks:
    m: int = 32
    names: list = field(default_factory=list)

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.shape = x.shape
        return triton_kernel_wrapper(x)

class ModelNew(nn.Module):
    def __init__(self, channels, *args, **kwargs):
        super(ModelNew, self).__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.conv.weight.data = torch.zeros_like(self.conv.weight)
        self.gain: nn.Parameter = nn.Parameter(torch.ones(channels))
        for index in range(3):
            setattr(self, f"layer{index}", nn.Linear(channels, channels))

    def forward(self, input: torch.Tensor, vars=None) -> Union[torch.Tensor, None]:
        if not isinstance(input, (torch.Tensor, nn.Parameter)):
            raise TypeError(f"{type(input).__name__}: {self.__class__.__name__}")
        hidden = [getattr(self, f"layer{index}") for index in range(3)]
        return Double.apply(F.pad(input, (1, 1)) * math.sqrt(self.gain.numel()))
"""

SELF_TEST = """
def main():
    import subprocess, time
    torch.manual_seed(0)
    x = torch.rand(8, device="cuda")
    compiled = torch.compile(torch.relu)
    torch.testing.assert_close(triton_kernel_wrapper(x), x * 2)
    check()

def check():
    exit(0)

if __name__ == "__main__":
    import sys
    main()
    open("result.txt", "w").write("fine")
    sys.exit(0)
"""

ACCEPTED = {
    "the plain kernel": DOUBLE_KERNEL,
    "a ModelNew with layers, helper dataclasses and autograd": DOUBLE_KERNEL + MODEL,
    "self-tests that never run": DOUBLE_KERNEL + SELF_TEST,
    "a main block written the other way round": top("if '__main__' == __name__:\n    exit()"),
    "parameters named like builtins": pointwise("x * 2") + wrapper("return input + id", "input, vars, dir, id, open"),
    "locals named like builtins": inside("compile, vars = 1, 2\nexit = compile + vars\nfor open in range(exit): pass"),
    "a kernel with such names": top(
        "@triton.jit\ndef k(open, exit, B: tl.constexpr):\n    compile = tl.load(open)\n    tl.store(exit, compile)"
    ),
    "locals named like modules": "import torch.nn.functional as F\n"
    + inside("N, F = x.shape\nnn = F\nprint(N, F, nn)"),
    "a comprehension's variable named like a builtin": inside("[open + 1 for open in range(3) if open]"),
    "autotune and heuristics": pointwise(
        "x * 2",
        decorators="@triton.autotune(configs=[triton.Config({'BLOCK': 32}, num_warps=4)], key=['n'])\n"
        "@triton.heuristics({'EVEN': lambda args: args['n'] % 2 == 0})\n",
    )
    + wrapper("return x"),
    "jit as a call": HEADER + "def k(x): pass\nk = triton.jit(k)\n" + wrapper("k[(1,)](x)"),
    "jit from triton": "from triton import jit\nimport torch\n@jit\ndef k(x): pass\n" + wrapper("k[(1,)](x)"),
    "jit with options": HEADER + "@triton.jit(do_not_specialize=['n'])\ndef k(x, n): pass\n" + wrapper("k[(1,)](x, 1)"),
    "gluon": "from triton.experimental import gluon\nfrom triton.experimental.gluon import language as gl\n"
    "@gluon.jit\ndef k(x): pass\n" + wrapper("k[(1,)](x)"),
    "libdevice with a fallback": top(
        "try:\n    from triton.language.extra import libdevice\n"
        "except ImportError:\n    from triton.language.extra.cuda import libdevice\n"
        "HAS = libdevice is not None\n@triton.jit\ndef k(x):\n    return libdevice.tanh(x)"
    ),
    "tl under other names": top(
        "import triton.language.math as tlm\nmath = tl.math\n@triton.jit\ndef k(x): tlm.exp(x)"
    ),
    "experimental descriptors": top("@triton.jit\ndef k(d): return tl._experimental_descriptor_load(d, [0], [1], 1)"),
    "inline assembly": top("@triton.jit\ndef k(x): return tl.inline_asm_elementwise('', '', [x], tl.int32, True, 1)"),
    "tensor descriptors": top("from triton.tools.tensor_descriptor import TensorDescriptor"),
    "properties of the device": inside(
        "from triton.runtime import driver\n"
        "driver.active.utils.get_device_properties(torch.cuda.current_device())\n"
        "triton.runtime.driver.active.get_active_torch_device()\n"
        "torch.cuda.get_device_properties(x.device).multi_processor_count"
    ),
    "occupancy by a warm-up": inside("k = pointwise.warmup(x, grid=(1,))\nk._init_handles()\nk.metadata.shared"),
    "a context on the device": inside("with torch.cuda.device(x.device), torch.no_grad():\n    pass"),
    "streams and events": inside(
        "s = torch.cuda.Stream()\nwith torch.cuda.stream(s):\n    pass\ntorch.cuda.synchronize()\n"
        "e = torch.cuda.Event(enable_timing=True)\ne.record()"
    ),
    "data_ptr": inside("aligned = x.data_ptr() % 16 == 0"),
    "item": inside("scale = x.max().item()"),
    "getattr with a constant name": inside("hasattr(x, 'scale') and getattr(x, 'scale', None)\ngetattr(tl, 'float32')"),
    "a dict of dtypes": top("TYPES = {torch.float16: tl.float16, torch.float32: tl.float32}"),
    "a dict of functions": top("import torch.nn.functional as F\nACT = {'relu': F.relu, 'tanh': torch.tanh}"),
    "functional under another name": inside("F = torch.nn.functional\ny = F.pad(x, (1, 1))"),
    "layers as values": top("def block(norm=torch.nn.BatchNorm2d): return norm(3)"),
    "lru_cache": top("import functools\n@functools.lru_cache(maxsize=None)\ndef blocks(n): return n"),
    "contextlib": top("from contextlib import contextmanager, nullcontext\n@contextmanager\ndef quiet():\n    yield"),
    "warnings": top("import warnings\nwarnings.filterwarnings('ignore')"),
    "logging": top("import logging\nlogger = logging.getLogger(__name__)"),
    "print to stderr": inside("import sys\nprint('slow', file=sys.stderr)"),
    "settings of libraries": top(
        "import os\nDEBUG = os.environ.get('DEBUG', '0')\nF32 = os.getenv('TRITON_F32')\nDEVICE = os.environ['CUDA_X']"
    ),
    "time": top("import time\nSTART = time.perf_counter()"),
    "traceback.print_exc": inside("import traceback\ntry:\n    pass\nexcept Exception:\n    traceback.print_exc()"),
    "gc.collect": inside("import gc\ngc.collect()"),
    "sizes in NumPy": "import numpy as np\n" + inside("n = int(np.prod(x.shape)) * np.sqrt(2.0)"),
    "TF32": top("torch.backends.cuda.matmul.allow_tf32 = True\ntorch.backends.cudnn.allow_tf32 = True"),
    "state on a function": inside("if not hasattr(helper, 'cache'):\n    helper.cache = {}") + "\ndef helper(): pass\n",
    "seeds": inside("torch.manual_seed(0)\ng = torch.Generator(device=x.device)\ng.manual_seed(1)"),
    "an enum and an abstract class": top(
        "import abc, enum\nclass A(abc.ABC): pass\nclass B(metaclass=abc.ABCMeta): pass\nclass C(enum.Enum):\n    D = 1"
    ),
    "operators of a class": top("class A:\n    def __call__(self, x): return x\n    def __repr__(self): return 'A'"),
    "attributes of tensors and modules": inside("y = x.detach()\ny.requires_grad = False\ny.grad = None"),
    "typing in every place": top(
        "from typing import List\ndef f(x: List[torch.Tensor], *y: 'int') -> torch.Tensor: pass"
    ),
    "a type comparison": inside("assert type(x) is torch.Tensor or type(x) == torch.nn.Parameter"),
    "the module of layers' helpers": top(
        "from torch.nn.modules.utils import _pair\nfrom torch.nn.modules.module import Module"
    ),
    "a version": inside("print(torch.__version__, triton.__version__)"),
    "compiler.disable": top("@torch.compiler.disable\ndef f(x): return x"),
    "a missing library in try": top(
        "try:\n    import no_such_library\nexcept ImportError:\n    no_such_library = None"
    ),
    "lambda and nested functions": inside(
        "def grid(meta):\n    return (triton.cdiv(8, meta['B']),)\nh = lambda open: open"
    ),
    "a pattern of plain attributes": inside(
        "match x:\n    case object(shape=shape, dtype=torch.float32, ndim=2):\n        print(shape)"
    ),
    "comparisons with modules and classes": inside("ok = triton is not None and type(x) == torch.Tensor != None"),
    "a setting of the module that a function changes": top(
        "CACHE = None\ndef f(y):\n    global CACHE\n    CACHE = y\n    return CACHE"
    ),
    "an import in a method": top("class A:\n    def f(self):\n        import math\n        return math.pi"),
    "a function of torch in a class": top("class A(torch.nn.Module):\n    act = staticmethod(torch.relu)"),
    "a missing library that is None": top("try:\n    import triton.testing as t\nexcept ImportError:\n    t = None"),
    "a type between brackets": inside("kinds = dict[str, torch.Tensor], list[torch.Tensor]"),
    "an attribute of an object of its own": inside("triton_kernel_wrapper.calls = 1\nx.kept = x"),
    "match": inside("match x.dim():\n    case 1 as open:\n        print(open)\n    case _:\n        pass"),
    "a bare except": inside("try:\n    pass\nexcept Exception as exit:\n    print(exit)"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_honest_kernels_do_is_accepted(case: str) -> None:
    assert inspect_source(ACCEPTED[case]) is None


def _kernels(file: Path) -> list[tuple[str, str]]:
    """Name and code of the kernels in a file of traces that are labelled correct."""
    kernels = []
    for trace in json.loads(file.read_text(encoding="utf-8")):
        turns: list[dict[str, Any]] = trace.get("turns") or [trace]
        for number, turn in enumerate(turns):
            if (turn.get("result") or {}).get("correctness"):
                kernels.append((f"{trace['sample_key']} {number}", turn["triton_code"]))
    return kernels


def test_every_correct_kernel_of_the_sample_is_accepted() -> None:
    kernels = _kernels(SAMPLE)
    assert len(kernels) == 31
    assert {name: found for name, code in kernels if (found := inspect_source(code))} == {}


@pytest.mark.skipif(not os.environ.get(REAL_TRACES), reason=f"{REAL_TRACES} names no folder of traces")
def test_every_correct_kernel_of_real_traces_is_accepted() -> None:
    files = sorted(Path(os.environ[REAL_TRACES]).glob("*_turn.json"))
    kernels = [kernel for file in files for kernel in _kernels(file)]
    assert kernels, "no trace is labelled correct"
    assert {name: found for name, code in kernels if (found := inspect_source(code))} == {}
