"""Makes sense of a problem's code: which class is the module under test, what it is built with, what it offers.

A problem defines an nn.Module, `get_inputs()` and perhaps `get_init_inputs()`, as in KernelBench and KernelBook. Used
in the reference's process, where torch is loaded.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.worker.interpreter import MAX_ELEMENTS
from triton_sft_pipeline.verification.worker.kernel_session import INIT_SEED
from triton_sft_pipeline.verification.worker.loading import load_code
from triton_sft_pipeline.verification.worker.tensors import (
    UnsupportedValueError,
    clone,
    nbytes,
    same,
    tensors_in,
    to_plain,
    to_wire,
    to_wire_strided,
)

# Inputs of all draws together; a problem with larger inputs gets fewer, at least one.
_MAX_INPUT_BYTES = 2 << 30
# A processor takes seconds to draw more than this, and a GPU next to nothing.
_LARGE_BYTES = 128 << 20
# Bytes of the widest element of a tensor.
_WIDEST = 16


class ReferenceFailure(Exception):
    """The problem cannot be judged, for the reason in `finding`."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = Finding(verdict, detail)


def seed_secretly() -> None:
    """Seed every generator that problems draw from with what nobody else can know or repeat."""
    import numpy as np
    import torch

    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_inputs(code: ModuleType, count: int, device: str = "cpu") -> list[Any]:
    """Inputs of `count` trials on a device, each drawn with a seed of its own; fewer when they are gigabytes.

    On a GPU whatever the code makes without naming a device is made there, by that device's generators; all else is
    the code's own affair, and may fail.

    Raises:
        ReferenceFailure: get_inputs gives what cannot be passed on.
    """
    import torch

    draws: list[Any] = []
    while len(draws) < count:
        seed_secretly()
        with nullcontext() if device == "cpu" else torch.device(device):
            inputs = code.get_inputs()
        if not isinstance(inputs, list | tuple):
            raise ReferenceFailure(
                "reference_error", f"get_inputs() returns a {type(inputs).__name__}; it must return a list."
            )
        try:
            draws.append(to_plain(inputs, lambda tensor: tensor.to(device)))
        except UnsupportedValueError as error:
            raise ReferenceFailure(
                "reference_error", f"get_inputs() returns {error}, which cannot be passed on."
            ) from error
        count = min(count, max(1, _MAX_INPUT_BYTES // max(1, nbytes(draws[0]))))
    return draws


def are_inputs_large(file: Path, source: str) -> bool:
    """Whether drawing this problem's inputs takes a processor seconds; False where that cannot be told beforehand."""
    if not _has_large_numbers(source):
        return False
    with _apart(file, source) as code:
        inputs = None if code is None else _inputs_on_meta(code)
        return nbytes(inputs) > _LARGE_BYTES


def draw_elsewhere(file: Path, source: str, count: int, device: str) -> list[Any] | None:
    """Inputs as `draw_inputs` draws them on a GPU; None where the problem's code does not allow it."""
    with _apart(file, source) as code:
        try:
            return None if code is None else draw_inputs(code, count, device)
        # Code that mixes devices, for one; it is drawn where it was written for, and fails there if it must.
        except Exception:
            return None


@contextmanager
def _apart(file: Path, source: str) -> Iterator[ModuleType | None]:
    """The problem's code loaded once more, where that does nothing else: what an attempt leaves behind in a module, a
    tensor on another device say, must not reach the module under test.
    """
    name, code = "apart", None
    try:
        # Not everything can be loaded twice: a new operator has its name only once.
        with suppress(Exception):
            code = None if runs_code_when_loaded(source) else load_code(file, name)
        yield code
    finally:
        sys.modules.pop(name, None)


def _has_large_numbers(source: str) -> bool:
    """Whether the numbers in a problem's code could be the shape of a large tensor; spares most problems a look."""
    elements = 1
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Pow | ast.LShift):
            return True
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 1:
            elements *= node.value
        if elements > _LARGE_BYTES // _WIDEST:
            return True
    return False


def _inputs_on_meta(code: ModuleType) -> Any:
    """The inputs without their values; None where get_inputs cannot be run on the meta device."""
    import torch

    try:
        with torch.device("meta"):
            return to_plain(code.get_inputs(), same)
    # Code that needs values cannot run there; it is drawn for real next, and fails there if it must.
    except Exception:
        return None


def refuse_huge_inputs(code: ModuleType) -> None:
    """Find out how large the inputs are without allocating them, where get_inputs can be run on the meta device.

    Raises:
        ReferenceFailure: they are too large for the CPU interpreter.
    """
    elements = sum(tensor.numel() for tensor in tensors_in(_inputs_on_meta(code)))
    if elements > MAX_ELEMENTS:
        raise ReferenceFailure(
            "unsupported_on_cpu",
            f"The inputs have {elements:.3g} elements; the CPU interpreter takes at most {MAX_ELEMENTS:.3g}.",
        )


def module_classes(file: Path, code: ModuleType) -> list[str]:
    """Classes that may be the module under test: `Model` alone, else every nn.Module of the file, the last first."""
    import torch

    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    modules = [name for name in names if issubclass(getattr(code, name, object), torch.nn.Module)]
    if not modules:
        raise ReferenceFailure("reference_error", "The problem defines no nn.Module.")
    return ["Model"] if "Model" in modules else modules[::-1]


def build_module(code: ModuleType, names: list[str], fresh_inputs: Callable[[], Any], device: str) -> tuple[Any, str]:
    """The first of these classes that can be built and called, in a fresh state, and its name."""
    import torch

    if len(names) == 1:
        return instantiate(code, names[0], device), names[0]
    errors: list[Exception] = []
    for name in names:
        try:
            module = instantiate(code, name, device)
            with torch.no_grad():
                module(*fresh_inputs())
            return instantiate(code, name, device), name
        # A helper class takes other arguments; that is no reason to give up on the others.
        except Exception as error:
            errors.append(error)
    raise errors[0]


def instantiate(code: ModuleType, class_name: str, device: str) -> Any:
    """The module under test on a device, in evaluation mode, with the weights that every instance has."""
    import torch

    args, kwargs = init_arguments(code)
    # The same for ModelNew, which may draw constants that are in no state_dict. Weights are no secret.
    torch.manual_seed(INIT_SEED)
    return getattr(code, class_name)(*args, **kwargs).to(device).eval()


def init_arguments(code: ModuleType) -> tuple[list[Any], dict[str, Any]]:
    """get_init_inputs() gives [arguments] in KernelBench and [[arguments], {keywords}] in KernelBook."""
    get_init_inputs: Callable[[], Any] = getattr(code, "get_init_inputs", list)
    given = get_init_inputs()
    if len(given) == 2 and isinstance(given[0], list | tuple) and isinstance(given[1], dict):
        return list(given[0]), given[1]
    return list(given), {}


def describe_state(code: ModuleType, module: Any, input_count: int) -> dict[str, Any]:
    """Everything that a wrapper or ModelNew may be given besides the inputs.

    Returns:
        The arguments `state`, `available` and `init_inputs` of `KernelSession.load`.
    """
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
        init_inputs = to_wire(init_arguments(code))
    except UnsupportedValueError:
        init_inputs = None
    return {
        # A copy: the module's own may change with the next call.
        "state": {
            "tensors": {name: to_wire_strided(clone(tensor)) for name, tensor in state.items()},
            "state_dict": tuple(module.state_dict()),
        },
        "available": {
            "input_count": input_count,
            "input_names": tuple(name for name, item in signature.parameters.items() if item.kind in positional),
            "parameters": tuple(name for name, _ in module.named_parameters()),
            "buffers": tuple(name for name, _ in module.named_buffers()),
            "module_weights": tuple(module_weights),
        },
        "init_inputs": init_inputs,
    }


def runs_code_when_loaded(source: str) -> bool:
    """Whether a problem does more at its top level than define and import, and so may change what others see."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(source).body:
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if not (documentation or isinstance(node, harmless)) or any(not isinstance(t, ast.Name) for t in targets):
            return True
    return False
