"""What goes wrong in a kernel's code is said in one sentence that names the line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from triton_sft_pipeline.verification.worker.loading import explain, load_code

KERNEL = "def kernel(x, n):\n    row = tl.program_id(0)\n    tl.store(x + row, n[:, None],\n             mask=row)"
INNER = "def inner(x):\n    return x.y"


def refused(source: str, line: int, reason: str | None = None) -> Exception:
    """What Triton's compiler raises about a line of a function."""
    from triton.compiler.errors import CompilationError

    node = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "lineno", 0) == line)
    error: Exception = CompilationError(source, node, reason)
    return error


@pytest.mark.parametrize(
    ("reason", "said"), [("Mask must\nhave boolean type.", ": Mask must have boolean type."), (None, ".")]
)
def test_of_a_kernel_that_the_compiler_refuses_only_the_refused_line_is_quoted(reason: str | None, said: str) -> None:
    error = refused(KERNEL, 3, reason)
    assert explain(error, Path("kernel.py")) == f"CompilationError: `tl.store(x + row, n[:, None],`{said}"


def test_of_a_function_that_the_kernel_calls_the_innermost_line_is_quoted() -> None:
    error = refused(KERNEL, 3, f"{refused(INNER, 2)}\nno attribute y")
    assert explain(error, Path("kernel.py")) == "CompilationError: `return x.y`: no attribute y."


@pytest.mark.parametrize("text", ["at 3:4:", "^", "at 3:4:\n^", "at the end:\nx\n^", ""])
def test_another_message_stays_as_it_is(text: str) -> None:
    said = " ".join(text.split())
    assert explain(ValueError(text), Path("kernel.py")) == f"ValueError: {said}".rstrip(": .") + "."


def test_the_line_of_the_file_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text("def run():\n    raise ValueError('no luck')\n")
    with pytest.raises(ValueError) as raised:
        load_code(file, "a_kernel").run()
    assert explain(raised.value, file) == "line 2 of kernel.py: ValueError: no luck."
