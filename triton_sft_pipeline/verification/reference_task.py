"""What the reference's process does: draw inputs, compute what is expected, write both down; or time itself.

It runs the problem's own code, which the pipeline's user brings and no model wrote. Inputs and weights go to a folder
that kernels' processes are told of, expected outputs to one that they are not. The seeds of the inputs are drawn here
and never leave this process.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from triton_sft_pipeline.verification import timing
from triton_sft_pipeline.verification.compare import compare
from triton_sft_pipeline.verification.interpreter import MAX_ELEMENTS
from triton_sft_pipeline.verification.loading import explain, load_code
from triton_sft_pipeline.verification.values import UnsupportedValueError, nbytes, on_cpu, packed, tensors_in, to_plain
from triton_sft_pipeline.verification.verdict import Finding

CODE, INPUTS, EXPECTED, STATE, TASK = "reference.py", "inputs.pt", "expected.pt", "state.pt", "task.json"
INIT_SEED = 0
# Inputs of all trials together; a problem with larger inputs gets fewer trials, at least one.
_MAX_INPUT_BYTES = 2 << 30


class ReferenceFailure(Exception):
    """The problem cannot be judged, for the reason in `finding`."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = Finding(verdict, detail)


def run_reference(folder: Path) -> dict[str, Any]:
    """Prepare a problem, or time its reference, as `task.json` in `folder` says.

    Writes INPUTS (a list with the inputs of each trial) and STATE (weights, names, init inputs) to the task's `given`
    folder, and EXPECTED (a list with {"output", "inputs"} of each trial, the inputs as the reference left them) to
    `folder`.

    Returns:
        {"trials", "bytes", "class_name", "uses_bfloat16"} or {"time_ms"}; {"verdict", "detail"} when the reference
        cannot be used.
    """
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    try:
        return _time(folder, task) if task["mode"] == "time" else _prepare(folder, task)
    except ReferenceFailure as failure:
        return {"verdict": failure.finding.verdict, "detail": failure.finding.detail}
    # Whatever the problem's code raises is a fact about the problem.
    except Exception as error:
        return {"verdict": "reference_error", "detail": f"The reference fails: {explain(error, folder / CODE)}"}


def _prepare(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    import torch

    device, given = task["device"], Path(task["given"])
    # Expected values in full float32: in TF32, PyTorch's default for convolutions, they are off by more than the
    # tolerance. Only here, not where the reference is timed.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    code = load_code(folder / CODE, "reference")
    if device == "cpu":
        _refuse_huge_inputs(code)
    draws = _draw_inputs(code, task["trials"])
    torch.save(draws, given / INPUTS)
    module, class_name = _build_module(
        code, _module_classes(folder / CODE, code), lambda: _load_inputs(given, device)[0], device
    )
    state = _describe_state(code, module, len(draws[0]))
    torch.save(state, given / STATE)
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def run(inputs: tuple[Any, ...]) -> dict[str, Any]:
        module.load_state_dict(initial)
        with torch.no_grad():
            output = module(*inputs)
        try:
            return {"output": to_plain(output, packed), "inputs": to_plain(inputs, packed)}
        except UnsupportedValueError as error:
            raise ReferenceFailure(
                "reference_error", f"The reference returns {error}, which cannot be compared."
            ) from error

    expected = [run(inputs) for inputs in _load_inputs(given, device)]
    torch.save(expected, folder / EXPECTED)
    # Other random numbers, same inputs: a reference that depends on them has no right answer.
    _seed_secretly()
    difference = compare(expected[0]["output"], run(_load_inputs(given, device)[0])["output"])
    if difference:
        raise ReferenceFailure(
            "degenerate_task", f"The reference gives two answers for the same inputs: {difference.detail}"
        )
    tensors = list(tensors_in((*draws, *expected, state["tensors"])))
    return {
        "trials": len(draws),
        "bytes": nbytes((*draws, *expected)),
        "class_name": class_name,
        "uses_bfloat16": any(tensor.dtype == torch.bfloat16 for tensor in tensors),
    }


def _time(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    import torch

    code = load_code(folder / CODE, "reference")
    module = _instantiate(code, task["class_name"], task["device"])
    inputs = _load_inputs(Path(task["given"]), task["device"])[0]
    with torch.no_grad():
        return {"time_ms": timing.median_ms(lambda: module(*inputs))}


def _seed_secretly() -> None:
    """Seed every generator that problems draw from with what nobody else can know or repeat."""
    import numpy as np
    import torch

    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _draw_inputs(code: ModuleType, trials: int) -> list[Any]:
    draws: list[Any] = []
    while len(draws) < trials:
        _seed_secretly()
        inputs = code.get_inputs()
        if not isinstance(inputs, list | tuple):
            raise ReferenceFailure(
                "reference_error", f"get_inputs() returns a {type(inputs).__name__}; it must return a list."
            )
        try:
            draws.append(to_plain(inputs, on_cpu))
        except UnsupportedValueError as error:
            raise ReferenceFailure(
                "reference_error", f"get_inputs() returns {error}, which cannot be passed on."
            ) from error
        trials = min(trials, max(1, _MAX_INPUT_BYTES // max(1, nbytes(draws[0]))))
    return draws


def _load_inputs(given: Path, device: str) -> list[Any]:
    """Fresh copies of the drawn inputs on the device, with their strides, exactly as the kernel's process gets them."""
    import torch

    return torch.load(given / INPUTS, weights_only=True, map_location=device)


def _refuse_huge_inputs(code: ModuleType) -> None:
    """Find out how large the inputs are without allocating them, where get_inputs can be run on the meta device."""
    import torch

    try:
        with torch.device("meta"):
            inputs = to_plain(code.get_inputs(), lambda tensor: tensor)
    # Code that needs values cannot run there; it is drawn for real next, and fails there if it must.
    except Exception:
        return
    elements = sum(tensor.numel() for tensor in tensors_in(inputs))
    if elements > MAX_ELEMENTS:
        raise ReferenceFailure(
            "unsupported_on_cpu",
            f"The inputs have {elements:.3g} elements; the CPU interpreter takes at most {MAX_ELEMENTS:.3g}.",
        )


def _module_classes(file: Path, code: ModuleType) -> list[str]:
    """Classes that may be the module under test: `Model` alone, else every nn.Module of the file, the last first."""
    import torch

    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    modules = [name for name in names if issubclass(getattr(code, name, object), torch.nn.Module)]
    if not modules:
        raise ReferenceFailure("reference_error", "The problem defines no nn.Module.")
    return ["Model"] if "Model" in modules else modules[::-1]


def _build_module(code: ModuleType, names: list[str], fresh_inputs: Callable[[], Any], device: str) -> tuple[Any, str]:
    """The first of these classes that can be built and called, in a fresh state, and its name."""
    import torch

    if len(names) == 1:
        return _instantiate(code, names[0], device), names[0]
    errors: list[Exception] = []
    for name in names:
        try:
            module = _instantiate(code, name, device)
            with torch.no_grad():
                module(*fresh_inputs())
            return _instantiate(code, name, device), name
        # A helper class takes other arguments; that is no reason to give up on the others.
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _instantiate(code: ModuleType, class_name: str, device: str) -> Any:
    import torch

    args, kwargs = _init_arguments(code)
    # The same for ModelNew, which may draw constants that are in no state_dict. Weights are no secret.
    torch.manual_seed(INIT_SEED)
    return getattr(code, class_name)(*args, **kwargs).to(device).eval()


def _init_arguments(code: ModuleType) -> tuple[list[Any], dict[str, Any]]:
    """get_init_inputs() gives [arguments] in KernelBench and [[arguments], {keywords}] in KernelBook."""
    get_init_inputs: Callable[[], Any] = getattr(code, "get_init_inputs", list)
    given = get_init_inputs()
    if len(given) == 2 and isinstance(given[0], list | tuple) and isinstance(given[1], dict):
        return list(given[0]), given[1]
    return list(given), {}


def _describe_state(code: ModuleType, module: Any, input_count: int) -> dict[str, Any]:
    """Everything that a wrapper or ModelNew may be given besides the inputs."""
    import torch

    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    module_weights: list[str] = []
    for prefix, part in module.named_modules():
        for leaf in ("weight", "bias"):
            tensor = getattr(part, leaf, None)
            if isinstance(tensor, torch.Tensor):
                dotted = f"{prefix}.{leaf}" if prefix else leaf
                state.setdefault(dotted, tensor)
                module_weights.append(dotted)
    signature = inspect.signature(module.forward)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        init_inputs = to_plain(_init_arguments(code), on_cpu)
    except UnsupportedValueError:
        init_inputs = None
    return {
        "tensors": {name: on_cpu(tensor.detach()) for name, tensor in state.items()},
        "state_dict": list(module.state_dict()),
        "init_inputs": init_inputs,
        "available": {
            "input_count": input_count,
            "input_names": [name for name, item in signature.parameters.items() if item.kind in positional],
            "parameters": [name for name, _ in module.named_parameters()],
            "buffers": [name for name, _ in module.named_buffers()],
            "module_weights": module_weights,
        },
    }
