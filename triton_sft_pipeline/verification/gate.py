"""Looks at a kernel's source before anything runs: refuses what cannot be judged. Executes nothing."""

from __future__ import annotations

import ast

from triton_sft_pipeline.verification.verdict import Finding

WRAPPER = "triton_kernel_wrapper"
MODEL_CLASS = "ModelNew"


def inspect_source(triton_code: str | None) -> Finding | None:
    """The reason why this code needs no run, or None when it may be run."""
    if not triton_code or not triton_code.strip():
        return Finding("no_code", "There is no kernel code; check that the model's answer was parsed.")
    try:
        tree = ast.parse(triton_code)
    except SyntaxError as error:
        return Finding("syntax_error", f"Line {error.lineno}: {error.msg}.")
    # ValueError: a null byte; RecursionError and MemoryError: an expression nested too deep for the parser.
    except (ValueError, RecursionError, MemoryError) as error:
        return Finding("syntax_error", f"The code cannot be parsed: {error}.")
    if not _defined_names(tree.body) & {WRAPPER, MODEL_CLASS}:
        return Finding("missing_wrapper", f"Define {WRAPPER}(...), or KernelBench's class {MODEL_CLASS}.")
    return None


def _defined_names(body: list[ast.stmt]) -> set[str]:
    """Names bound at the top level, also inside its if, try and with blocks."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
            names |= _defined_names([child for child in inner if not isinstance(child, ast.If | ast.Try | ast.With)])
    return names
