"""One kernel in one fresh process, the way KernelBench-style harnesses judge: the yardstick of benchmarks/judge.py.

    python benchmarks/yardstick_worker.py task.json

The task: {"pytorch_code", "triton_code", "device", "trials", "timing"}. The process imports torch and Triton, runs the
problem and the kernel side by side, compares the outputs for some seeds, and on a GPU times both. It reports on its own
standard output, one line a stage, and believes whatever it computed itself: it is a measure of speed, no judge.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.worker import interpreter
from triton_sft_pipeline.verification.worker.binding import Available, Binding, bindings

MARK = "yardstick "
TOLERANCE = 1e-2
WARM_UPS = 3
TIMED_RUNS = 100
# Larger than any GPU's L2 cache.
FLUSH_BYTES = 256 << 20


def main(task_file: Path) -> None:
    task = json.loads(task_file.read_text(encoding="utf-8"))
    say(stage="start")
    import torch
    import triton  # noqa: F401

    if task["device"] == "cpu":
        interpreter.install()
    say(stage="reference")
    problem = load("problem", task["pytorch_code"], task_file.parent, task["device"])
    model = build(problem, model_name(task["pytorch_code"], problem), task["device"])
    say(stage="load")
    kernel = load("kernel", task["triton_code"], task_file.parent, task["device"])
    say(stage="bind")
    torch.manual_seed(0)
    calls = list(callables(kernel, problem, model, len(problem.get_inputs()), task["device"]))
    if not calls:
        say(stage="end", outcome="contract_error")
        return
    say(stage="run")
    outcome, call = first_right(calls, problem, model, task)
    times = {}
    if outcome == "correct" and task["timing"]:
        inputs = draw(problem, 0, task["device"])
        times = {"reference_ms": mean_ms(lambda: model(*inputs)), "kernel_ms": mean_ms(lambda: call(*inputs))}
    say(stage="end", outcome=outcome, **times)


def say(**fields: Any) -> None:
    print(MARK + json.dumps(fields), flush=True)


def load(name: str, source: str, folder: Path, device: str) -> Any:
    """The source as a module. It stays on disk: Triton reads the text of its kernels again."""
    file = folder / f"{name}.py"
    text = interpreter.on_cpu(source) if device == "cpu" else source
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def model_name(source: str, problem: Any) -> str:
    """The class under test: `Model`, else the last nn.Module of the file."""
    import torch

    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    modules = [name for name in classes if issubclass(getattr(problem, name), torch.nn.Module)]
    return "Model" if "Model" in modules else modules[-1]


def build(problem: Any, name: str, device: str, source: Any = None) -> Any:
    """An instance of the class `name` of `source` (the problem itself, if none) with the problem's init inputs."""
    import torch

    given: Any = getattr(problem, "get_init_inputs", list)()
    args, kwargs = given, {}
    if len(given) == 2 and isinstance(given[0], list | tuple) and isinstance(given[1], dict):
        args, kwargs = given
    torch.manual_seed(0)
    return getattr(source or problem, name)(*args, **kwargs).to(device).eval()


def callables(kernel: Any, problem: Any, model: Any, inputs: int, device: str) -> Iterator[Callable[..., Any]]:
    """The kernel as a function of the inputs, for each way of passing the weights."""
    if not hasattr(kernel, "triton_kernel_wrapper"):
        if hasattr(kernel, "ModelNew"):
            twin = build(problem, "ModelNew", device, kernel)
            twin.load_state_dict(model.state_dict())
            yield twin
        return
    wrapper = kernel.triton_kernel_wrapper
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for binding in bindings(inspect.signature(wrapper), describe(model, inputs)):
        yield bound(wrapper, binding, weights)


def describe(model: Any, inputs: int) -> Available:
    parameters = [name for name, _ in model.named_parameters()]
    return Available(
        input_count=inputs,
        input_names=list(inspect.signature(model.forward).parameters),
        parameters=parameters,
        buffers=[name for name, _ in model.named_buffers()],
        module_weights=[name for name in parameters if name.rsplit(".", 1)[-1] in ("weight", "bias")],
    )


def bound(wrapper: Callable[..., Any], binding: Binding, weights: dict[str, Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        def value(reference: int | str) -> Any:
            return inputs[reference] if isinstance(reference, int) else weights[reference]

        return wrapper(*map(value, binding.positional), **{name: value(ref) for name, ref in binding.keyword})

    return call


def first_right(
    calls: list[Callable[..., Any]], problem: Any, model: Any, task: dict[str, Any]
) -> tuple[str, Callable[..., Any]]:
    """The first call that is right for every seed, and "correct"; else the first call and what is wrong with it."""
    outcomes = []
    for call in calls:
        outcomes.append(examine(call, problem, model, task))
        if outcomes[-1] == "correct":
            return "correct", call
    return outcomes[0], calls[0]


def examine(call: Callable[..., Any], problem: Any, model: Any, task: dict[str, Any]) -> str:
    import torch

    try:
        with torch.no_grad():
            for seed in range(task["trials"]):
                expected = model(*draw(problem, seed, task["device"]))
                if not same(expected, call(*draw(problem, seed, task["device"]))):
                    return "incorrect"
            if task["device"] == "cuda":
                torch.cuda.synchronize()
    # Whatever the kernel's code raises is its outcome.
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return outcome_of(error)
    return "correct"


def outcome_of(error: BaseException) -> str:
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    if interpreter.is_unsupported(error):
        return "unsupported"
    return "compile_error" if type(error).__module__.startswith("triton.") else "runtime_error"


def draw(problem: Any, seed: int, device: str) -> list[Any]:
    import torch

    torch.manual_seed(seed)
    return [item.to(device) if isinstance(item, torch.Tensor) else item for item in problem.get_inputs()]


def same(expected: Any, actual: Any) -> bool:
    import torch

    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or expected.shape != actual.shape:
            return False
        if not expected.dtype.is_floating_point:
            return bool(torch.equal(expected, actual))
        return bool(torch.allclose(expected, actual.to(expected.dtype), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
    if isinstance(expected, list | tuple):
        return isinstance(actual, list | tuple) and len(expected) == len(actual) and all(map(same, expected, actual))
    if isinstance(expected, dict):
        return isinstance(actual, dict) and expected.keys() == actual.keys() and all(map(same, *both(expected, actual)))
    return bool(expected == actual)


def both(expected: dict[Any, Any], actual: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(expected.values()), [actual[key] for key in expected]


def mean_ms(call: Callable[[], Any]) -> float:
    """Mean time of `call` in milliseconds by CUDA events, with a cold L2 cache."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: list[float] = []
    with torch.no_grad():
        for _ in range(WARM_UPS):
            call()
        for _ in range(TIMED_RUNS):
            torch.cuda.synchronize()
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return sum(times) / len(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
