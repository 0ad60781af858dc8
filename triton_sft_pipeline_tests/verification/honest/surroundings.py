"""What real kernels have around them: devices, streams, prints, imports, docstrings, autotuning, odd layouts."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    CALL,
    DOUBLE,
    DOUBLE_KERNEL,
    HEADER,
    LAUNCH,
    Case,
    kernel,
    pointwise,
    pointwise_kernel,
    problem,
    wrapper,
)

VERIFIED = frozenset({"verified"})

_TUNED = """@triton.autotune(
    configs=[triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"]
)
"""
_HEURISTIC = """@triton.heuristics({"BLOCK": lambda arguments: 32})
"""
_TUNED_CALL = (
    "y = torch.empty_like(x)\npointwise[lambda meta: (triton.cdiv(32, meta['BLOCK']),)](x, y, x.numel())\nreturn y"
)


def _case(name: str, code: str, pytorch_code: str = DOUBLE, kind: str = "surroundings") -> Case:
    return Case(name, kind, pytorch_code, code, VERIFIED)


_INSISTENT = """
assert x.is_cuda and x.device.type == "cuda" and torch.cuda.is_available()
x = x.cuda()
with torch.cuda.device(x.device):
    torch.cuda.synchronize()
assert triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"] > 0
"""
_LEARNED = '''
"""
A kernel that doubles. It never calls torch.mul, os._exit(0) or sys.exit(), and does not patch torch.cuda.synchronize.

while True: pass
"""
# eval(exec(open('/proc/self/environ').read()))
NOTE = "import os; os.system('true'); torch.matmul(a, b)"
'''

CASES = (
    _case("autotune", pointwise("x * 2", decorators=_TUNED) + wrapper(_TUNED_CALL), kind="autotune"),
    _case("heuristics", pointwise("x * 2", decorators=_HEURISTIC) + wrapper(_TUNED_CALL), kind="autotune"),
    _case(
        "autotune with a reset of the output",
        pointwise("x * 2", decorators=_TUNED.replace('key=["n"]', 'key=["n"], reset_to_zero=["y_ptr"]'))
        + wrapper(_TUNED_CALL),
        kind="autotune",
    ),
    _case(
        "code that insists on a GPU",
        pointwise_kernel("x * 2", output='torch.empty_like(x, device="cuda")', before=_INSISTENT.strip()),
    ),
    _case(
        "a device by name",
        pointwise_kernel(
            "x * 2", output='torch.empty(x.shape, device="cuda", dtype=x.dtype)', before='x = x.to("cuda:0")'
        ),
    ),
    _case(
        "a device as an object",
        pointwise_kernel(
            "x * 2", "torch.empty(x.shape, device=torch.device('cuda'))", before="torch.cuda.current_device()"
        ),
    ),
    _case("a wait for the GPU", pointwise_kernel("x * 2", result="(y, torch.cuda.synchronize())[0]")),
    _case(
        "the current stream",
        kernel(
            f"stream = torch.cuda.current_stream()\nwith torch.cuda.stream(stream):\n    y = torch.empty_like(x)\n"
            f"    {LAUNCH}\nstream.synchronize()\nreturn y"
        ),
    ),
    _case(
        "another stream that is waited for",
        kernel(
            "side = torch.cuda.Stream()\nside.wait_stream(torch.cuda.current_stream())\ny = torch.empty_like(x)\n"
            f"with torch.cuda.stream(side):\n    {LAUNCH}\ntorch.cuda.current_stream().wait_stream(side)\nreturn y"
        ),
    ),
    _case(
        "another stream and a wait for all of them",
        kernel(
            "side = torch.cuda.Stream()\nside.wait_stream(torch.cuda.current_stream())\ny = torch.empty_like(x)\n"
            f"with torch.cuda.stream(side):\n    {LAUNCH}\ntorch.cuda.synchronize()\nreturn y"
        ),
    ),
    _case(
        "prints at import and in the wrapper", kernel(f"print('called', x.shape)\n{CALL}", prelude="print('loaded')\n")
    ),
    _case(
        "a flood of harmless output",
        kernel(f"print('x' * 100000)\n{CALL}"),
    ),
    _case("words that a gate might trip over", kernel(CALL, prelude=_LEARNED)),
    _case(
        "the usual imports",
        kernel(
            CALL,
            prelude="import functools\nimport itertools\nimport math\nimport os\nimport warnings\n"
            "from dataclasses import dataclass\nfrom typing import Any, Optional, Tuple\n\nimport numpy as np\n"
            "import torch.nn as nn\nimport torch.nn.functional as F\nwarnings.filterwarnings('ignore')\n",
        ),
    ),
    _case(
        "types and a dataclass",
        kernel(
            CALL.replace("BLOCK=32", "BLOCK=Settings().block"),
            prelude="from dataclasses import dataclass\n\n@dataclass\nclass Settings:\n    block: int = 32\n",
        ),
    ),
    _case(
        "a kernel inside an if",
        HEADER
        + "if True:\n"
        + "\n".join("    " + line for line in pointwise("x * 2").removeprefix(HEADER).splitlines())
        + "\n"
        + wrapper(CALL),
    ),
    _case(
        "a kernel and a wrapper with docstrings",
        DOUBLE_KERNEL.replace(
            "    offsets =", '    """Doubles.\n\n    torch.mul(x, 2)\n    """\n    offsets ='
        ).replace("(x):\n", '(x):\n    """Doubles `x`, as torch.mul does."""\n'),
    ),
    _case(
        "a test below a main guard",
        DOUBLE_KERNEL
        + "\nif __name__ == '__main__':\n    x = torch.randn(4, 8)\n"
        + "    assert torch.allclose(triton_kernel_wrapper(x), x * 2)\n    exit(0)\n",
    ),
    _case(
        "the original module beside the kernel",
        DOUBLE_KERNEL + "\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n",
    ),
    _case(
        "an autograd function",
        kernel(
            "return Double.apply(x)",
            prelude=f"""
            class Double(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x):
                    y = torch.empty_like(x)
                    {LAUNCH}
                    return y

                @staticmethod
                def backward(ctx, gradient):
                    return gradient * 2
            """,
        ),
    ),
    _case(
        "a wrapper under no_grad",
        DOUBLE_KERNEL.replace("def triton_kernel_wrapper", "@torch.no_grad()\ndef triton_kernel_wrapper"),
    ),
    _case(
        "a wrapper under inference mode", kernel("with torch.inference_mode():\n    " + CALL.replace("\n", "\n    "))
    ),
    _case(
        "a wrapper that is a lambda",
        kernel(CALL).replace("triton_kernel_wrapper", "double") + "\ntriton_kernel_wrapper = lambda x: double(x)\n",
    ),
    _case(
        "a grid as a function",
        kernel(
            CALL.replace("[(triton.cdiv(x.numel(), 32),)]", "[lambda meta: (triton.cdiv(x.numel(), meta['BLOCK']),)]")
        ),
    ),
    _case("options of the compiler", kernel(CALL.replace("BLOCK=32)", "BLOCK=32, num_warps=4, num_stages=2)"))),
    _case("a seed of its own", kernel(f"torch.manual_seed(0)\n{CALL}")),
    _case(
        "settings of torch's own precision",
        kernel(CALL, prelude="torch.backends.cuda.matmul.allow_tf32 = False\ntorch.set_grad_enabled(False)\n"),
    ),
    _case(
        "a launch in a try with a message",
        kernel(
            f"y = torch.empty_like(x)\ntry:\n    {LAUNCH}\nexcept Exception as error:\n"
            "    raise RuntimeError('the launch failed') from error\nreturn y"
        ),
    ),
    _case(
        "a helper class before the module",
        DOUBLE_KERNEL,
        problem(
            "x * 2", prelude="class Helper(nn.Module):\n    def __init__(self, size):\n        super().__init__()\n"
        ).replace("class Model", "class Doubled"),
        "helper classes",
    ),
    _case(
        "a helper class after the module",
        DOUBLE_KERNEL,
        problem("x * 2").replace("class Model", "class Doubled")
        + "\nclass Late(nn.Module):\n    def __init__(self, size):\n        super().__init__()\n",
        "helper classes",
    ),
)
