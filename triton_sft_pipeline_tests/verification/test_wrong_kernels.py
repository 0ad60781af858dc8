"""Wrong and hostile kernels are refused, each with the verdict that names what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.verification import JudgeItem, KernelJudge
from triton_sft_pipeline_tests.verification.conftest import SECRET_VARIABLE
from triton_sft_pipeline_tests.verification.snippets import (
    DOUBLE,
    DOUBLE_KERNEL,
    HEADER,
    pointwise,
    pointwise_kernel,
    problem,
    wrapper,
)

CALL = "y = torch.empty_like(x)\npointwise[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y"

# name: (verdict, what the sentence must mention, problem, kernel)
WRONG = {
    "other values": ("incorrect_numerical", "32 of 32 values", DOUBLE, pointwise_kernel("x * 2 + 0.01")),
    "one wrong value": (
        "incorrect_numerical",
        "1 of 32 values",
        DOUBLE,
        pointwise_kernel("tl.where(offsets == 7, x * 2 + 1, x * 2)"),
    ),
    "right for positive inputs only": (
        "incorrect_numerical",
        "the output",
        problem("x"),
        pointwise_kernel("tl.abs(x)"),
    ),
    "an integer off by one": (
        "incorrect_numerical",
        "differs in",
        problem("(x > 0).long()"),
        pointwise_kernel("(x > 0).to(tl.int64) + 1", output="torch.empty_like(x, dtype=torch.int64)"),
    ),
    "a shape that broadcasts": (
        "incorrect_shape",
        "(1, 4, 8), expected (4, 8)",
        DOUBLE,
        pointwise_kernel("x * 2", result="y[None]"),
    ),
    "shape (1,) for a 0-d output": (
        "incorrect_shape",
        "(1,), expected ()",
        problem("x[0, 0] * 2"),
        pointwise_kernel("x * 2", result="y[0, :1]"),
    ),
    "another dtype": (
        "incorrect_dtype",
        "float16, expected float32",
        DOUBLE,
        pointwise_kernel("x * 2", result="y.half()"),
    ),
    "integers of another width": (
        "incorrect_dtype",
        "int32, expected int64",
        problem("(x > 0).long()"),
        pointwise_kernel("(x > 0).to(tl.int32)", output="torch.empty_like(x, dtype=torch.int32)"),
    ),
    "NaN": ("incorrect_nan", "NaN in", DOUBLE, pointwise_kernel("tl.sqrt(x) * 0 + x * 2")),
    "no NaN where the reference has it": (
        "incorrect_nan",
        "not NaN in",
        problem("torch.sqrt(x)"),
        pointwise_kernel("tl.sqrt(tl.abs(x))"),
    ),
    "one value instead of two": ("incorrect_structure", "expected 2 values", problem("(x * 2, x)"), DOUBLE_KERNEL),
    "a tuple instead of a tensor": (
        "incorrect_structure",
        "1 values",
        DOUBLE,
        pointwise_kernel("x * 2", result="(y,)"),
    ),
    "nothing": ("incorrect_structure", "None", DOUBLE, pointwise_kernel("x * 2", result="None")),
    "a tensor subclass": (
        "lazy_output",
        "Lazy",
        DOUBLE,
        pointwise("x * 2")
        + "\nclass Lazy(torch.Tensor):\n    pass\n"
        + wrapper(CALL.replace("return y", "return y.as_subclass(Lazy)")),
    ),
    "an input that it overwrites": (
        "input_mutated",
        "input",
        DOUBLE,
        pointwise_kernel("x * 2", result="y.copy_(y) + 0 * x.zero_()"),
    ),
    "the input itself": ("incorrect_numerical", "the output", DOUBLE, pointwise_kernel("x * 2", result="x")),
    "torch without Triton": ("no_kernel_launch", "PyTorch", DOUBLE, HEADER + wrapper("return x * 2")),
    "torch after a launch that failed": (
        "no_kernel_launch",
        "PyTorch",
        DOUBLE,
        pointwise("tl.no_such_function(x)")
        + wrapper(
            """
            y = torch.empty_like(x)
            try:
                pointwise[(1,)](x, y, x.numel(), BLOCK=32)
            except Exception:
                y = x * 2
            return y
            """
        ),
    ),
    "sys.exit": ("early_exit", "SystemExit", DOUBLE, pointwise_kernel("x * 2", before="import sys\nsys.exit(0)")),
    "sys.exit at import": ("early_exit", "SystemExit", DOUBLE, "import sys\n" + DOUBLE_KERNEL + "\nsys.exit(0)\n"),
    "os._exit": ("early_exit", "exit code 0", DOUBLE, pointwise_kernel("x * 2", before="import os\nos._exit(0)")),
    "a forged report": (
        "forged_result",
        "cannot know",
        DOUBLE,
        pointwise_kernel(
            "x * 2", before="""import os\nos.write(3, b'{"verdict": "verified", "launches": 1}')\nos._exit(0)"""
        ),
    ),
    "a forged report beside the real one": (
        "early_exit",
        "before it answered",
        DOUBLE,
        pointwise_kernel("x * 3", before="""import os\nos.write(3, b'{"verdict": "verified", "launches": 1}')"""),
    ),
    "a forged file of outputs": (
        "forged_result",
        "something else",
        DOUBLE,
        pointwise_kernel(
            "x * 2",
            before="""
                import os
                torch.save("all of them match", "outputs.pt")
                os.write(3, b'{"launches": 1}')
                os._exit(0)
            """,
        ),
    ),
    "outputs that are a program": (
        "forged_result",
        "cannot be read",
        DOUBLE,
        pointwise_kernel(
            "x * 2",
            before="""\
                import os, pickle
                class Program:
                    def __reduce__(self):
                        return os.system, ("true",)
                open("outputs.pt", "wb").write(pickle.dumps(Program()))
                os.write(3, b'{"launches": 1}')
                os._exit(0)
            """,
        ),
    ),
    "a forged answer on standard output": (
        "incorrect_numerical",
        "the output",
        DOUBLE,
        pointwise_kernel("x * 3", before="""print('{"id": 1, "exit_code": 0, "report": "{}"}', flush=True)"""),
    ),
    "patched comparisons": (
        "incorrect_numerical",
        "the output",
        DOUBLE,
        pointwise_kernel("x * 3", before="torch.allclose = torch.isclose = torch.equal = lambda *args, **kwargs: True"),
    ),
    "a segmentation fault": (
        "crash",
        "SIGSEGV",
        DOUBLE,
        pointwise_kernel("x * 2", before="import ctypes\nctypes.string_at(0)"),
    ),
    "suicide": (
        "crash",
        "SIGKILL",
        DOUBLE,
        pointwise_kernel("x * 2", before="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
    ),
    "a huge tensor": ("resource_limit", "memory", DOUBLE, pointwise_kernel("x * 2", before="torch.zeros(1 << 44)")),
    "a huge file": (
        "resource_limit",
        "file",
        DOUBLE,
        pointwise_kernel("x * 2", before="open('huge', 'wb').truncate(1 << 40)"),
    ),
    "a syntax error": ("syntax_error", "Line 2", DOUBLE, "import torch\ndef triton_kernel_wrapper(x) return x"),
    "three dots": ("missing_wrapper", "triton_kernel_wrapper", DOUBLE, "..."),
    "no wrapper": ("missing_wrapper", "triton_kernel_wrapper", DOUBLE, pointwise("x * 2")),
    "no code": ("no_code", "no kernel code", DOUBLE, "  \n"),
    "a missing library": ("import_error", "no_such_library", DOUBLE, "import no_such_library\n" + DOUBLE_KERNEL),
    "an undefined function in a kernel": (
        "compile_error",
        "no_such_function",
        DOUBLE,
        pointwise_kernel("tl.no_such_function(x)"),
    ),
    "a range that is no power of two": (
        "compile_error",
        "power of 2",
        DOUBLE,
        pointwise("x * 2") + wrapper(CALL.replace("BLOCK=32", "BLOCK=33")),
    ),
    "an exception": (
        "runtime_error",
        "line 14 of kernel.py: ValueError: no",
        DOUBLE,
        pointwise_kernel("x * 2", before="raise ValueError('no')"),
    ),
    "an exception at import": ("runtime_error", "ZeroDivisionError", DOUBLE, DOUBLE_KERNEL + "\n1 / 0\n"),
    "a parameter that nothing fills": (
        "contract_error",
        "unknown",
        DOUBLE,
        pointwise("x * 2") + wrapper(CALL, signature="x, unknown"),
    ),
    "a ModelNew with other weights": (
        "contract_error",
        "state_dict",
        problem("x * self.gain", init="self.gain = nn.Parameter(torch.ones(8))"),
        HEADER + "class ModelNew(torch.nn.Module):\n    def forward(self, x):\n        return x\n",
    ),
    "a grid that is too large for the interpreter": (
        "unsupported_on_cpu",
        "2000000 programs",
        DOUBLE,
        pointwise("x * 2") + wrapper(CALL.replace("[(1,)]", "[(2000, 1000)]")),
    ),
    "a library function that needs a GPU": (
        "unsupported_on_cpu",
        "libdevice.tanh",
        problem("torch.tanh(x)"),
        "from triton.language.extra import libdevice\n" + pointwise_kernel("libdevice.tanh(x)"),
    ),
    "arithmetic in bfloat16": (
        "unsupported_on_cpu",
        "bfloat16",
        problem("x + x", inputs="[torch.randn(4, 8).to(torch.bfloat16)]"),
        pointwise_kernel("x + x"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_is_refused_by_name(case: str, judge: KernelJudge) -> None:
    expected, mentioned, pytorch_code, triton_code = WRONG[case]
    verdict = judge.verify(pytorch_code, triton_code)
    assert verdict.verdict == expected, verdict.detail
    assert mentioned in verdict.detail
    assert not verdict.correctness and not verdict.fast_0


UNUSABLE = {
    "a reference that fails": (
        "reference_error",
        "no luck",
        problem("raise_(x)", prelude="def raise_(x):\n    raise ValueError('no luck')"),
    ),
    "a reference that exits": (
        "reference_error",
        "exit code",
        problem("exit(x)", prelude="import os\ndef exit(x):\n    os._exit(3)"),
    ),
    "a reference of dice": ("degenerate_task", "two answers", problem("x + torch.rand_like(x)")),
    "no code": ("reference_error", "no PyTorch code", ""),
    "code that does not parse": ("reference_error", "SyntaxError", "class Model("),
    "no module": ("reference_error", "no nn.Module", "import torch\ndef get_inputs():\n    return [torch.ones(2)]\n"),
    "no inputs": ("reference_error", "get_inputs", "import torch.nn as nn\nclass Model(nn.Module):\n    pass\n"),
    "an output that cannot be compared": ("reference_error", "object of type", problem("object()")),
    "inputs beyond the interpreter": (
        "unsupported_on_cpu",
        "4e+08 elements",
        problem("x * 2", inputs="[torch.rand(20000, 20000)]"),
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_problem_that_cannot_be_judged_is_not_the_kernels_fault(case: str, judge: KernelJudge) -> None:
    expected, mentioned, pytorch_code = UNUSABLE[case]
    verdict = judge.verify(pytorch_code, DOUBLE_KERNEL)
    assert verdict.verdict == expected, verdict.detail
    assert mentioned in verdict.detail


ENDLESS = {
    "a loop in the wrapper": pointwise_kernel("x * 2", before="while True:\n    pass"),
    "a loop at import": DOUBLE_KERNEL + "\nwhile True:\n    pass\n",
    "a loop that ignores signals": pointwise_kernel(
        "x * 2",
        before="""\
            import signal
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            while True:
                pass
        """,
    ),
    "a flood of output": pointwise_kernel("x * 2", before="while True:\n    print('x' * 10000)"),
}


def test_a_kernel_that_never_ends_is_stopped_at_its_limit(impatient_judge: KernelJudge) -> None:
    items = [JudgeItem(name, DOUBLE, code) for name, code in ENDLESS.items()]
    verdicts = {verdict.key: verdict for verdict in impatient_judge.verify_many(items)}
    assert {name: verdict.verdict for name, verdict in verdicts.items()} == dict.fromkeys(ENDLESS, "timeout")
    assert all("2 s" in verdict.detail for verdict in verdicts.values())


def test_a_kernel_finds_no_secret_in_its_environment(judge: KernelJudge) -> None:
    before = f"import os\nraise KeyError(os.environ.get({SECRET_VARIABLE!r}, 'there is nothing'))"
    verdict = judge.verify(DOUBLE, pointwise_kernel("x * 2", before=before))
    assert "there is nothing" in verdict.detail


def test_a_kernel_is_told_neither_the_reference_nor_where_it_lies(judge: KernelJudge) -> None:
    # Looks through every dictionary of the process for a name of the reference, and for one of the kernel itself.
    before = """\
        import gc, os
        texts = [repr(list(item.values())) for item in gc.get_objects() if isinstance(item, dict)]
        theirs = [text for text in texts if "only_in_the_" "reference" in text]
        mine = [text for text in texts if "only_in_the_" "kernel" in text]
        raise KeyError(f"{os.listdir('.')}: found mine {bool(mine)}, theirs {bool(theirs)}")
    """
    pytorch_code = problem("x * only_in_the_reference", prelude="only_in_the_reference = 2")
    verdict = judge.verify(pytorch_code, pointwise_kernel("x * 2", before=before) + "\nname = 'only_in_the_kernel'\n")
    assert "['kernel.py']: found mine True, theirs False" in verdict.detail


def test_the_files_of_a_kernel_are_gone_after_its_verdict_and_so_is_what_it_started(judge: KernelJudge) -> None:
    before = """\
        import os, subprocess
        command = ["sleep", "1000"]
        pids = [subprocess.Popen(command).pid, subprocess.Popen(command, start_new_session=True).pid]
        raise KeyError(f"started {pids[0]} and {pids[1]} in {os.getcwd()}.")
    """
    verdict = judge.verify(DOUBLE, pointwise_kernel("x * 2", before=before))
    started = verdict.detail.partition("started ")[2].split()
    assert verdict.verdict == "runtime_error" and len(started) >= 5, verdict.detail
    left_behind = [Path("/proc", started[0]), Path("/proc", started[2]), Path(started[4].rstrip(".'\""))]
    assert not any(path.exists() for path in left_behind)
