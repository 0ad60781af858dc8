"""Compares a kernel's outputs with the reference's. Runs in a trusted process that has executed neither.

Tolerances are absolute and relative at once, |actual - expected| <= tolerance + tolerance * |expected|. Those of
float32, float16 and bfloat16 are KernelBench's (its `get_tolerance_for_precision`: 1e-4, 1e-2 and 1e-2). float64 gets
1e-6. Integers and booleans must be equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.values import tensors_in
from triton_sft_pipeline.verification.verdict import Finding

TASK = "task.json"
TOLERANCES = {
    "float64": 1e-6,
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 1e-2,
    "complex64": 1e-4,
    "complex128": 1e-6,
}
# For formats that KernelBench does not know, such as the 8-bit floats.
_DEFAULT_TOLERANCE = 1e-2
# Elements compared at a time: bounds the memory that the masks and differences take.
_BLOCK = 1 << 24


def run_compare(folder: Path) -> dict[str, Any]:
    """Compare as `task.json` in `folder` says, which names the three files. Returns {"verdict", "detail"}."""
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    finding = judge_outputs(Path(task["inputs"]), Path(task["expected"]), Path(task["outputs"]))
    return {"verdict": finding.verdict, "detail": finding.detail}


def judge_outputs(inputs_file: Path, expected_file: Path, outputs_file: Path) -> Finding:
    """Compare the outputs of every trial, and what the kernel did to its inputs.

    Args:
        inputs_file: list with the inputs of each trial.
        expected_file: list with {"output", "inputs"} of each trial, as the reference made and left them.
        outputs_file: the same from the kernel's process: not trusted.
    """
    import torch

    try:
        answers = torch.load(outputs_file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return Finding("early_exit", "The kernel's process ended without writing its outputs.")
    # The file was written by a process that ran untrusted code: any kind of damage means the same.
    except Exception as error:
        return Finding("forged_result", f"The kernel's outputs cannot be read: {_first_line(error)}.")
    drawn = torch.load(inputs_file, weights_only=True)
    expected = torch.load(expected_file, weights_only=True)
    if not _is_answer(answers, len(expected)):
        return Finding("forged_result", "The kernel's process left something else than its outputs.")
    for trial, (wanted, answer) in enumerate(zip(expected, answers, strict=True), start=1):
        problem = compare(wanted["output"], answer["output"])
        if problem:
            return Finding(problem.verdict, f"Trial {trial} of {len(expected)}: {problem.detail}")
    for before, wanted, answer in zip(drawn, expected, answers, strict=True):
        # An in-place reference leaves its inputs changed; the kernel may do the same, but need not.
        if not _identical(before, answer["inputs"]) and compare(wanted["inputs"], answer["inputs"]):
            return Finding("input_mutated", "The kernel writes to an input that the reference leaves alone.")
    return Finding("verified", f"The outputs match the reference's in {len(expected)} trials.")


def compare(expected: Any, actual: Any, place: str = "the output") -> Finding | None:
    """The first difference between two plain values, or None. A list and a tuple count as the same structure."""
    if isinstance(expected, tuple) or isinstance(actual, tuple):
        if not isinstance(expected, tuple) or not isinstance(actual, tuple) or len(expected) != len(actual):
            return Finding("incorrect_structure", f"{place} is {_kind(actual)}, expected {_kind(expected)}.")
        pairs = [(f"{place}[{i}]", e, a) for i, (e, a) in enumerate(zip(expected, actual, strict=True))]
    elif isinstance(expected, dict) or isinstance(actual, dict):
        if not isinstance(expected, dict) or not isinstance(actual, dict) or expected.keys() != actual.keys():
            return Finding("incorrect_structure", f"{place} is {_kind(actual)}, expected {_kind(expected)}.")
        pairs = [(f"{place}[{key!r}]", expected[key], actual[key]) for key in expected]
    else:
        return _compare_leaves(expected, actual, place)
    return next((found for name, e, a in pairs if (found := compare(e, a, name))), None)


def _compare_leaves(expected: Any, actual: Any, place: str) -> Finding | None:
    import torch

    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        return _compare_tensors(expected, actual, place)
    if isinstance(expected, float) and isinstance(actual, float | int):
        return _compare_tensors(torch.tensor(expected), torch.tensor(float(actual)), place)
    if type(expected) is not type(actual):
        return Finding("incorrect_structure", f"{place} is {_kind(actual)}, expected {_kind(expected)}.")
    if expected != actual:
        return Finding("incorrect_numerical", f"{place} is {actual!r}, expected {expected!r}.")
    return None


def _compare_tensors(expected: Any, actual: Any, place: str) -> Finding | None:
    import torch

    if actual.layout is not torch.strided or actual.device.type != "cpu":
        return Finding("lazy_output", f"{place} is no plain tensor with values.")
    if expected.shape != actual.shape:
        return Finding("incorrect_shape", f"{place} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}.")
    if expected.dtype != actual.dtype:
        return Finding("incorrect_dtype", f"{place} has dtype {_name(actual)}, expected {_name(expected)}.")
    tolerance = TOLERANCES.get(_name(expected), _DEFAULT_TOLERANCE)
    exact = not (expected.is_floating_point() or expected.is_complex())
    wrong = 0
    largest = 0.0
    for e, a in zip(_blocks(expected), _blocks(actual), strict=True):
        if exact:
            wrong += int((e != a).sum())
            continue
        if not torch.equal(torch.isnan(e), torch.isnan(a)):
            return Finding("incorrect_nan", _nan_detail(e, a, place))
        matches = torch.isclose(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)
        wrong += int((~matches).sum())
        largest = max(largest, float((a - e).abs().nan_to_num(0.0).max()) if e.numel() else 0.0)
    if not wrong:
        return None
    share = f"{wrong} of {expected.numel()} values"
    if exact:
        return Finding("incorrect_numerical", f"{place} differs in {share}.")
    return Finding(
        "incorrect_numerical",
        f"{place} differs in {share} by more than {tolerance:g} (absolute and relative); "
        f"the largest difference is {largest:.3g}.",
    )


def _blocks(tensor: Any) -> Any:
    """The tensor's values in flat blocks, in a dtype that comparisons are defined for."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1)
    for block in flat.split(_BLOCK) if flat.numel() else (flat,):
        yield block.float() if block.is_floating_point() and block.element_size() < 4 else block


def _identical(left: Any, right: Any) -> bool:
    """Whether two plain values hold tensors of equal values; NaN equals NaN here."""
    tensors = list(tensors_in(left)), list(tensors_in(right))
    return len(tensors[0]) == len(tensors[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(*tensors, strict=True)
    )


def _is_answer(answers: Any, trials: int) -> bool:
    return (
        isinstance(answers, list)
        and len(answers) == trials
        and all(isinstance(answer, dict) and answer.keys() >= {"output", "inputs"} for answer in answers)
    )


def _nan_detail(expected: Any, actual: Any, place: str) -> str:
    unexpected = int((actual.isnan() & ~expected.isnan()).sum())
    missing = int((expected.isnan() & ~actual.isnan()).sum())
    return f"{place} is NaN in {unexpected} places where the reference is not, and not NaN in {missing} where it is."


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, dict):
        return f"a dictionary with the keys {sorted(map(str, value))}"
    if hasattr(value, "shape"):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
