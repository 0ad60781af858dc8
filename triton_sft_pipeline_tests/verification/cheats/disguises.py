"""PyTorch does the work, and the code hides that from whoever counts launches or watches operators."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import DOUBLE, HEADER, LAUNCH, Case, kernel, pointwise, wrapper

_REFUSED = frozenset(
    {"torch_fallback", "dummy_kernel", "no_kernel_launch", "harness_tamper", "forbidden_construct", "thread_leak"}
    | {"runtime_error", "compile_error", "sandbox_violation", "process_leak", "lazy_output", "reference_access"}
)
_COPY = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn y"


def _hidden(name: str, before: str, prelude: str = "") -> Case:
    """The work is done in `before`, unseen by a mode of this thread; a kernel that copies comes after it."""
    code = kernel(f"{before}\n{_COPY}", expression="x", prelude=prelude)
    return Case(name, "hidden from the judge", DOUBLE, code, _REFUSED)


def _patched(name: str, body: str, prelude: str, expression: str = "x * 0") -> Case:
    return Case(name, "patched launch", DOUBLE, kernel(body, expression, prelude=prelude), _REFUSED)


_CALL = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn y"

HIDDEN = (
    _hidden(
        "torch in a thread that has ended",
        "done = []\nwork = threading.Thread(target=lambda: done.append(x * 2))\nwork.start()\nwork.join()\nx = done[0]",
        "import threading\n",
    ),
    _hidden(
        "torch in a pool of threads",
        "with ThreadPoolExecutor(1) as pool:\n    x = pool.submit(torch.mul, x, 2).result()",
        "from concurrent.futures import ThreadPoolExecutor\n",
    ),
    _hidden(
        "torch in a forked process that sends the result back",
        """
        ours, theirs = os.pipe()
        if os.fork() == 0:
            os.write(theirs, (x * 2).numpy().tobytes())
            os._exit(0)
        x = torch.frombuffer(bytearray(os.read(ours, 1 << 16)), dtype=torch.float32).view(4, 8)
        """.replace("\n        ", "\n"),
        "import os\n",
    ),
    _hidden(
        "torch with its modes switched off",
        "with _disable_current_modes():\n    x = x * 2",
        "from torch.utils._python_dispatch import _disable_current_modes\n",
    ),
    _hidden(
        "torch with its modes switched off by a name put together at run time",
        "with getattr(torch.utils._python_dispatch, '_disable_' + 'current_modes')():\n    x = x * 2",
        "import torch.utils._python_dispatch\n",
    ),
    _hidden(
        "torch below its Python modes",
        "with getattr(torch._C, '_DisableTorchDispatch')():\n    x = x * 2",
    ),
    _hidden(
        "torch as the gradient of a square",
        "with torch.enable_grad():\n    z = x.clone().requires_grad_(True)\n    (z * z).sum().backward()\nx = z.grad",
    ),
    _hidden(
        "torch as a script",
        "x = compute(x)",
        "@torch.jit.script\ndef compute(x):\n    return x * 2\n",
    ),
    _hidden(
        "torch as a traced graph",
        "x = compute(x)",
        "compute = torch.jit.trace(lambda x: x * 2, torch.zeros(4, 8))\n",
    ),
    _hidden(
        "torch through a compiler",
        "x = torch.compile(lambda x: x * 2, backend='eager')(x)",
    ),
    _hidden("torch through vmap", "x = torch.vmap(lambda row: row * 2)(x)"),
    _hidden(
        "torch through a subclass that undresses itself",
        "x = x.as_subclass(Sly)\nx = (x * 2).as_subclass(torch.Tensor)",
        "class Sly(torch.Tensor):\n    __torch_function__ = torch._C._disabled_torch_function_impl\n",
    ),
    _hidden(
        "torch one element at a time",
        "z = torch.zeros_like(x)\nfor row in range(4):\n    for column in range(8):\n"
        "        z[row, column] = x[row, column] * 2\nx = z",
    ),
    Case(
        "torch inside the kernel's body",
        "hidden from the judge",
        DOUBLE,
        # Only the interpreter, where a kernel's body is Python, runs this at all.
        HEADER
        + """
BOX = {}

def work():
    BOX["y"].copy_(BOX["x"] * 2)

@triton.jit
def idle(n):
    work()

def triton_kernel_wrapper(x):
    BOX.update(x=x, y=torch.empty_like(x))
    idle[(1,)](1)
    return BOX["y"]
""",
        _REFUSED | {"unsupported_on_cpu"},
    ),
)

LAUNCHERS = (
    _patched(
        "triton.jit replaced by a function of torch",
        "y = torch.empty_like(x)\nfast[(1,)](x, y)\nreturn y",
        """
        class Launcher:
            def __init__(self, function):
                self.function = function

            def __getitem__(self, grid):
                return self.function

        triton.jit = Launcher

        @triton.jit
        def fast(x, y):
            torch.mul(x, 2, out=y)
        """,
    ),
    _patched(
        "a launcher of one's own under the name of the kernel",
        _CALL,
        """
        class Launcher:
            def __getitem__(self, grid):
                return lambda x, y, n, BLOCK: y.copy_(x + x)

        pointwise = Launcher()
        """,
    ),
    _patched(
        "the kernel's run replaced on the object",
        _CALL,
        "pointwise.run = lambda x, y, n, grid=None, warmup=False, **rest: y.copy_(x * 2)\n",
    ),
    _patched(
        "the kernel's run replaced on its class",
        _CALL,
        "def run(self, x, y, n, grid=None, warmup=False, **rest):\n    y.copy_(x * 2)\n\ntype(pointwise).run = run\n",
    ),
    _patched(
        "the kernel's run replaced on its class through an alias and setattr",
        _CALL,
        """
        def run(self, x, y, n, *rest, **more):
            torch.mul(x, 2, out=y)

        kind = pointwise.__class__
        [setattr(kind, name, run) for name in ("run",)]
        """,
    ),
    _patched(
        "the kernel's run wrapped so that torch writes after it",
        _CALL,
        """
        honest = type(pointwise).run

        def run(self, x, y, n, **rest):
            honest(self, x, y, n, **rest)
            y.copy_(x * 2)

        type(pointwise).run = run
        """,
    ),
    _patched(
        "the kernel's item lookup replaced on its class",
        _CALL,
        "type(pointwise).__getitem__ = lambda self, grid: lambda x, y, n, BLOCK: y.copy_(x * 2)\n",
    ),
    _patched(
        "a launch hook that does the work",
        "y = torch.empty_like(x)\nBOX.update(x=x, y=y)\n" + LAUNCH + "\nreturn y",
        """
        BOX = {}
        before = pointwise.run

        def run(*args, **rest):
            result = before(*args, **rest)
            BOX["y"].copy_(BOX["x"] * 2)
            return result

        vars(pointwise)["run"] = run
        """,
    ),
    _patched(
        "a language function replaced by torch",
        "BOX.update(x=x, y=torch.empty_like(x))\ny = BOX['y']\n" + LAUNCH + "\ny.copy_(BOX['z'])\nreturn y",
        """
        BOX = {}
        cdiv = triton.cdiv

        def sly(*args):
            BOX["z"] = BOX["x"] * 2
            return cdiv(*args)

        triton.cdiv = sly
        """,
    ),
    Case(
        "a count of launches that is counted up by hand",
        "patched launch",
        DOUBLE,
        pointwise("x * 2")
        + """
import gc

def raise_counts():
    for item in gc.get_objects():
        if "Launch" in type(item).__name__ and hasattr(item, "count"):
            item.count += 1
"""
        + wrapper("raise_counts()\nreturn x * 2"),
        _REFUSED,
    ),
    Case(
        "a count of launches that is found in the frames of the caller",
        "patched launch",
        DOUBLE,
        pointwise("x * 2")
        + """
import sys

def raise_counts():
    frame = sys._getframe()
    while frame is not None:
        for item in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if "Launch" in type(item).__name__ and hasattr(item, "count"):
                item.count += 1
        frame = frame.f_back
"""
        + wrapper("raise_counts()\nreturn x * 2"),
        _REFUSED,
    ),
    Case(
        "an ablation that is switched off by hand",
        "patched launch",
        DOUBLE,
        pointwise("x")
        + """
import gc

def switch_off():
    for item in gc.get_objects():
        if hasattr(type(item), "__dict__") and "Launch" in type(item).__name__ and hasattr(item, "ablated"):
            item.ablated = False
"""
        + wrapper(f"switch_off()\nx = x * 2\n{_COPY}"),
        _REFUSED,
    ),
)

CASES = (*HIDDEN, *LAUNCHERS)
