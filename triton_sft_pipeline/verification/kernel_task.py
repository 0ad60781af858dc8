"""What a kernel's process does: load the code, call it on the inputs of every trial, write the outputs; or time it.

From its first line of kernel code on this process is not trusted. It holds the inputs, the weights and the kernel's
code, never the reference's code, its outputs or a seed. What it reports may lower a verdict (an exception, no launch)
and never raise one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification import interpreter, timing
from triton_sft_pipeline.verification.binding import Available, Binding, bindings
from triton_sft_pipeline.verification.gate import MODEL_CLASS, WRAPPER
from triton_sft_pipeline.verification.launches import LaunchCounter
from triton_sft_pipeline.verification.loading import classify, load_code
from triton_sft_pipeline.verification.reference_task import INIT_SEED
from triton_sft_pipeline.verification.values import packed, to_plain

CODE, OUTPUTS, TASK = "kernel.py", "outputs.pt", "task.json"


class ContractError(Exception):
    """The kernel's code does not take what the problem has to give."""


def run_kernel(folder: Path) -> dict[str, Any]:
    """Run a kernel as `task.json` in `folder` says.

    Returns:
        {"contract", "bindings"} and {"launches"} or {"time_ms"}; {"verdict", "detail"} too when the code failed.
    """
    import torch

    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    # Kernel code has no business with the task, nor with the folder that it names.
    (folder / TASK).unlink()
    trials = torch.load(task["inputs"], weights_only=True, map_location=task["device"])
    state = torch.load(task["state"], weights_only=True, map_location=task["device"])
    source = (folder / CODE).read_text(encoding="utf-8")
    if task["backend"] == "interpreter":
        (folder / CODE).write_text(interpreter.on_cpu(source), encoding="utf-8")
        interpreter.install()
    launches = LaunchCounter(task["backend"])
    report: dict[str, Any] = {}
    try:
        call = _load_kernel(folder / CODE, state, task, report)
        if task["mode"] == "time":
            with torch.no_grad():
                report["time_ms"] = timing.median_ms(lambda: call(trials[0]))
        else:
            torch.save([_answer(call, inputs) for inputs in trials], folder / OUTPUTS)
            report["launches"] = launches.count
    except ContractError as error:
        report |= {"verdict": "contract_error", "detail": str(error)[:1000]}
    # SystemExit and KeyboardInterrupt raised by kernel code are facts about the kernel too.
    except BaseException as error:
        finding = classify(error, folder / CODE)
        report |= {"verdict": finding.verdict, "detail": finding.detail}
    return report


def _answer(call: Callable[[tuple[Any, ...]], Any], inputs: tuple[Any, ...]) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        output = call(inputs)
    return {"output": to_plain(output, packed), "inputs": to_plain(inputs, packed)}


def _load_kernel(
    file: Path, state: dict[str, Any], task: dict[str, Any], report: dict[str, Any]
) -> Callable[[tuple[Any, ...]], Any]:
    """The kernel as a function of one trial's inputs, by the contract that its code follows."""
    module = load_code(file, "kernel")
    if hasattr(module, WRAPPER):
        return _load_wrapper(getattr(module, WRAPPER), state, task["binding"], report)
    if hasattr(module, MODEL_CLASS):
        report |= {"contract": MODEL_CLASS, "bindings": 1}
        return _load_model(getattr(module, MODEL_CLASS), state, task["device"])
    raise ContractError(f"Neither {WRAPPER} nor {MODEL_CLASS} is defined after the code has run.")


def _load_wrapper(
    wrapper: Callable[..., Any], state: dict[str, Any], index: int, report: dict[str, Any]
) -> Callable[[tuple[Any, ...]], Any]:
    available = Available(**state["available"])
    signature = inspect.signature(wrapper)
    found = bindings(signature, available)
    if not found:
        raise ContractError(
            f"{WRAPPER}{signature} cannot be called with {available.input_count} inputs "
            f"and the weights {', '.join((*available.parameters, *available.buffers)) or '(none)'}."
        )
    chosen: Binding = found[min(index, len(found) - 1)]
    report |= {"contract": chosen.rule, "bindings": len(found)}

    def call(inputs: tuple[Any, ...]) -> Any:
        def value(reference: int | str) -> Any:
            return inputs[reference] if isinstance(reference, int) else state["tensors"][reference]

        positional = [value(reference) for reference in chosen.positional]
        return wrapper(*positional, **{name: value(reference) for name, reference in chosen.keyword})

    return call


def _load_model(
    model_class: Callable[..., Any], state: dict[str, Any], device: str
) -> Callable[[tuple[Any, ...]], Any]:
    import torch

    if state["init_inputs"] is None:
        raise ContractError(f"The problem's init inputs cannot be passed to {MODEL_CLASS}; use {WRAPPER}.")
    args, kwargs = state["init_inputs"]
    torch.manual_seed(INIT_SEED)
    model = model_class(*args, **kwargs).to(device).eval()
    try:
        model.load_state_dict({name: state["tensors"][name] for name in state["state_dict"]})
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise ContractError(f"{MODEL_CLASS} does not take the reference's state_dict: {message}") from error
    return lambda inputs: model(*inputs)
