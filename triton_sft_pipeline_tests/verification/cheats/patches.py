"""Patched clocks, comparisons and modules, and work that is not finished when the wrapper returns.

Most of these kernels compute the right values: what is wrong is what they do to their surroundings, which a measurement
made there would fall for.
"""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE, LAUNCH, Case, kernel, pointwise_kernel

_TAMPERED = frozenset({"harness_tamper", "timing_tamper", "forbidden_construct"})
_WRONG_ANYWAY = _TAMPERED | {"incorrect_numerical", "forged_result"}
_BROKEN = _TAMPERED | {"runtime_error", "import_error", "compile_error", "crash", "early_exit"}
_ESCAPED = frozenset({"stream_escape", "forbidden_construct", "incorrect_nan", "incorrect_numerical", "lazy_output"})


def _clock(name: str, prelude: str) -> Case:
    """A right kernel that patches something when it is imported."""
    return Case(name, "patched surroundings", DOUBLE, kernel(CALL, prelude=prelude), _TAMPERED)


def _late(name: str, before: str, prelude: str = "") -> Case:
    """A right kernel that patches something when it is called."""
    return Case(name, "patched surroundings", DOUBLE, kernel(f"{before}\n{CALL}", prelude=prelude), _TAMPERED)


def _wrong(name: str, before: str) -> Case:
    """A wrong kernel that patches what might compare it."""
    return Case(name, "patched surroundings", DOUBLE, pointwise_kernel("x * 3", before=before), _WRONG_ANYWAY)


def _replaced(name: str, prelude: str) -> Case:
    return Case(name, "replaced modules", DOUBLE, kernel(CALL, prelude=prelude), _BROKEN)


def _escaped(name: str, body: str) -> Case:
    return Case(name, "side stream", DOUBLE, kernel(body, prelude="SIDE = []\n"), _ESCAPED)


PATCHES = (
    _clock("time.perf_counter stands still", "import time\ntime.perf_counter = lambda: 0.0\n"),
    _clock("time.time stands still", "import time as clock\nclock.time = lambda: 0.0\n"),
    _clock("time.monotonic stands still", "import time\nsetattr(time, 'mono' + 'tonic', lambda: 0.0)\n"),
    _clock("time.perf_counter_ns stands still", "import time\nvars(time)['perf_counter_ns'] = lambda: 0\n"),
    _clock(
        "a clock that is found by name",
        "clock = __import__('ti' + 'me')\nfor name in ('perf_counter', 'process_time'):\n"
        "    setattr(clock, name, lambda: 0.0)\n",
    ),
    _clock("torch.cuda.synchronize does nothing", "torch.cuda.synchronize = lambda device=None: None\n"),
    _clock(
        "torch.cuda.synchronize does nothing, through an alias",
        "cuda = torch.cuda\ncuda.synchronize = lambda *args, **kwargs: None\n",
    ),
    _clock(
        "torch.cuda.Event measures nothing",
        """
        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self, stream=None):
                pass

            def elapsed_time(self, other):
                return 0.001

        torch.cuda.Event = Event
        """,
    ),
    _clock(
        "elapsed_time says what it likes",
        "torch.cuda.Event.elapsed_time = lambda self, other: 0.001\n",
    ),
    _clock(
        "elapsed_time says what it likes, through a helper",
        """
        def helper(owner, **changes):
            for name, value in changes.items():
                setattr(owner, name, value)

        helper(getattr(torch.cuda, "Ev" + "ent"), elapsed_time=lambda self, other: 0.001)
        """,
    ),
    _clock(
        "torch.manual_seed seeds with zero", "torch.manual_seed = lambda seed: torch.default_generator.manual_seed(0)\n"
    ),
    _clock("torch.randn gives zeros", "torch.randn = lambda *shape, **kwargs: torch.zeros(*shape)\n"),
    _clock("torch.randn_like gives ones", "torch.__dict__.update(randn_like=torch.ones_like)\n"),
    _clock(
        "triton.testing.do_bench is fast",
        "import triton.testing\ntriton.testing.do_bench = lambda *args, **kwargs: 0.001\n",
    ),
    _clock("torch.empty gives zeros", "torch.empty = torch.zeros\ntorch.empty_like = torch.zeros_like\n"),
    _clock("torch.Tensor.copy_ does nothing", "torch.Tensor.copy_ = lambda self, *args, **kwargs: self\n"),
    _clock("torch.Tensor.__eq__ agrees", "torch.Tensor.__eq__ = lambda self, other: torch.ones_like(self).bool()\n"),
    _late("torch.allclose agrees, when the wrapper is called", "torch.allclose = lambda *args, **kwargs: True"),
    _late(
        "torch.cuda.synchronize does nothing, in the class attribute of a helper",
        "Helper.where.synchronize = Helper.nothing",
        "class Helper:\n    where = torch.cuda\n    nothing = staticmethod(lambda *args: None)\n",
    ),
    Case(
        "sorted forgets everything",
        "patched surroundings",
        DOUBLE,
        kernel(f"import builtins\nbuiltins.sorted = lambda *args, **kwargs: []\n{CALL}"),
        _BROKEN,
    ),
    _wrong(
        "comparisons agree",
        "torch.allclose = torch.isclose = torch.equal = lambda *args, **kwargs: True",
    ),
    _wrong("torch.testing agrees", "import torch.testing\ntorch.testing.assert_close = lambda *args, **kwargs: None"),
    _wrong("NumPy agrees", "import numpy\nnumpy.allclose = numpy.array_equal = lambda *args, **kwargs: True"),
    _wrong("the difference of tensors is zero", "torch.Tensor.__sub__ = lambda self, other: torch.zeros_like(self)"),
    _wrong(
        "json writes another verdict", 'import json\njson.dumps = lambda *args, **kwargs: \'{"verdict": "verified"}\''
    ),
)

MODULES = (
    _replaced(
        "torch replaced in sys.modules",
        """
        import sys, types
        fake = types.ModuleType("torch")
        fake.__getattr__ = lambda name: (lambda *args, **kwargs: True)
        sys.modules["torch"] = fake
        """,
    ),
    _replaced(
        "time replaced in sys.modules",
        """
        import sys, types
        fake = types.ModuleType("time")
        fake.perf_counter = fake.monotonic = fake.time = lambda: 0.0
        sys.modules["time"] = fake
        """,
    ),
    _replaced(
        "numpy replaced in sys.modules, through the module's own dictionary",
        "import types\nvars(__import__('sys'))['mod' + 'ules'].update(numpy=types.ModuleType('numpy'))\n",
    ),
    _replaced(
        "every module of the judge replaced",
        """
        import sys, types
        for name in list(sys.modules):
            if "verification" in name:
                sys.modules[name] = types.ModuleType(name)
        """,
    ),
    _replaced(
        "the judge's functions replaced where they lie",
        """
        import sys
        for name, module in list(sys.modules.items()):
            if "verification" in name:
                for function in ("compare", "judge_operators", "inspect_source", "changed", "threads", "processes"):
                    if hasattr(module, function):
                        setattr(module, function, lambda *args, **kwargs: None)
        """,
    ),
    _replaced(
        "the import function replaced",
        """
        import builtins
        kept = builtins.__import__
        builtins.__import__ = lambda *args, **kwargs: kept(*args, **kwargs)
        """,
    ),
)

STREAMS = (
    _escaped(
        "a launch on another stream that nobody waits for",
        f"y = torch.empty_like(x)\nside = torch.cuda.Stream()\nwith torch.cuda.stream(side):\n    {LAUNCH}\nreturn y",
    ),
    _escaped(
        "a launch on a stream of the module",
        "y = torch.empty_like(x)\nif not SIDE:\n    SIDE.append(torch.cuda.Stream(priority=-1))\n"
        f"with torch.cuda.stream(SIDE[0]):\n    {LAUNCH}\nreturn y",
    ),
    _escaped(
        "a launch on another stream that waits, but is not waited for",
        "y = torch.empty_like(x)\nside = torch.cuda.Stream()\nside.wait_stream(torch.cuda.current_stream())\n"
        f"with torch.cuda.stream(side):\n    {LAUNCH}\nreturn y",
    ),
    _escaped(
        "an event on another stream that nobody waits for",
        "y = torch.empty_like(x)\nside = torch.cuda.Stream()\ndone = torch.cuda.Event()\n"
        f"with torch.cuda.stream(side):\n    {LAUNCH}\n    done.record(side)\nreturn y",
    ),
)

CASES = (*PATCHES, *MODULES, *STREAMS)
