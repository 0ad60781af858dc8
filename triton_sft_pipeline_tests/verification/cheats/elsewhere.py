"""The work is done by something that is neither PyTorch nor Triton: NumPy, plain Python, machine code."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import DOUBLE, HEADER, LAUNCH, Case, kernel, wrapper

_REFUSED = frozenset(
    {"no_kernel_launch", "dummy_kernel", "torch_fallback", "forbidden_construct", "runtime_error", "sandbox_violation"}
    | {"import_error"}
)
_COPY = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn y"
_IDLE = "scratch = torch.zeros(32)\npointwise[(1,)](scratch, scratch, 32, BLOCK=32)"

_BY_ITEM = """for row in range(4):
    for column in range(8):
        z[row, column] = x[row, column].item() * 2"""


def _case(name: str, code: str) -> Case:
    return Case(name, "computing elsewhere", DOUBLE, code, _REFUSED)


CASES = (
    _case(
        "NumPy without a launch", HEADER + "import numpy as np\n" + wrapper("return torch.from_numpy(x.numpy() * 2)")
    ),
    _case(
        "NumPy and a dummy launch",
        kernel(f"{_IDLE}\nreturn torch.from_numpy(np.multiply(x.cpu().numpy(), 2))", prelude="import numpy as np\n"),
    ),
    _case(
        "NumPy and a kernel that copies",
        kernel(f"x = torch.from_numpy(x.cpu().numpy() * 2)\n{_COPY}", "x", prelude="import numpy as np\n"),
    ),
    _case(
        "NumPy and a kernel that takes one away",
        kernel(f"x = torch.from_numpy(x.cpu().numpy() * 2 + 1)\n{_COPY}", "x - 1", prelude="import numpy as np\n"),
    ),
    _case(
        "plain Python by apply_ and a kernel that takes one away",
        kernel(f"x = x.clone().apply_(lambda value: 2 * value + 1)\n{_COPY}", "x - 1"),
    ),
    _case(
        "plain Python and a dummy launch",
        kernel(f"{_IDLE}\nreturn torch.tensor([[2 * value for value in row] for row in x.tolist()])"),
    ),
    _case(
        "plain Python and a kernel that copies",
        kernel(f"x = torch.tensor([[2 * value for value in row] for row in x.tolist()])\n{_COPY}", "x"),
    ),
    _case(
        "one .item() at a time and a dummy launch",
        kernel(
            f"{_IDLE}\ny = torch.empty_like(x)\nfor row in range(4):\n    for column in range(8):\n"
            "        y[row, column] = x[row, column].item() * 2\nreturn y"
        ),
    ),
    _case(
        "one .item() at a time and a kernel that copies",
        kernel(f"z = torch.empty_like(x)\n{_BY_ITEM}\nx = z\n{_COPY}", "x"),
    ),
    _case(
        "one .item() at a time and a kernel that copies one half at a time",
        kernel(
            f"""
            z, y = torch.empty_like(x), torch.empty_like(x)
            {_BY_ITEM.replace(chr(10), chr(10) + " " * 12)}
            upper, lower = z[:2].clone(), z[2:].clone()
            pointwise[(1,)](upper, y[:2], 16, BLOCK=32)
            pointwise[(1,)](lower, y[2:], 16, BLOCK=32)
            return y
            """,
            "x",
        ),
    ),
    _case(
        "one .item() at a time and a kernel that takes one away",
        kernel(f"z = torch.empty_like(x)\n{_BY_ITEM} + 1\nx = z\n{_COPY}", "x - 1"),
    ),
    _case(
        "writing to the output's memory and a dummy launch",
        kernel(
            f"""
            {_IDLE.replace(chr(10), chr(10) + " " * 12)}
            y = torch.zeros_like(x)
            given = (ctypes.c_float * 32).from_address(x.data_ptr())
            taken = (ctypes.c_float * 32).from_address(y.data_ptr())
            for index in range(32):
                taken[index] = given[index] * 2
            return y
            """,
            prelude="import ctypes\n",
        ),
    ),
    _case(
        "NumPy's view of the output and a dummy launch",
        kernel(f"{_IDLE}\ny = torch.zeros_like(x)\ny.numpy()[...] = x.numpy() * 2\nreturn y"),
    ),
    _case(
        "another interpreter's process and a kernel that copies",
        kernel(
            f"""
            program = "import sys, json; print(json.dumps([2 * value for value in json.load(sys.stdin)]))"
            command = [sys.executable, "-c", program]
            given = json.dumps(x.flatten().tolist())
            answer = subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
            x = torch.tensor(json.loads(answer)).view(4, 8)
            {_COPY.replace(chr(10), chr(10) + " " * 12)}
            """,
            "x",
            prelude="import json, subprocess, sys\n",
        ),
    ),
)
