"""Where the time of one optimiser step of one micro-batch goes: every kernel put into one of ten buckets.

The trace that torch writes is read as it lies: kernels with their times, the operators that launched them, and within
which function those ran. A kernel's own name does not say whether a matrix product belongs to the head, to an adapter
or to a frozen layer; the operator's shapes and the function around it do.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import train_step_measure as measure

ATTENTION, EXPERTS, LINEARS, DEQUANTISE = "attention", "expert grouped GEMM", "other GEMM", "dequantisation"
LORA, ELEMENTWISE, ROUTING = "LoRA and dropout", "norms, element-wise", "routing, gather, combine"
HEAD, OPTIMISER, OTHER = "head and loss", "optimiser", "other"
BUCKETS = (ATTENTION, EXPERTS, LINEARS, DEQUANTISE, LORA, ELEMENTWISE, ROUTING, HEAD, OPTIMISER, OTHER)

WARMUP, TIMED = 3, 5

_ADAPTERS = re.compile(r"dropout|\b_(shrink|expand|outer|fill_b|join_b)\b")
_PRODUCTS = re.compile(r"^aten::(_grouped_mm|grouped_mm|mm|addmm_?|bmm|baddbmm_?|mv|addmv_?)$")
_PRODUCT_KERNEL = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk", re.I)
_ROUTING = re.compile(r"sort|radix|topk|top_k|bitonic|scan|histc|histogram|rout|gather|scatter|combine|index", re.I)
_ELEMENTWISE = re.compile(
    r"norm|swiglu|silu|gate_mul|rope|elementwise|reduce|copy|\bcat|catarray|fill|mul|add|sigmoid|rsqrt|pow|mean|sum|neg",
    re.I,
)
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_SCOPES = {"cpu_op", "user_annotation"}


@dataclass(frozen=True)
class Scope:
    """An operator or a named stretch of code, and the shapes of its inputs."""

    name: str
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Launch:
    """Something that ran on the device.

    Attributes:
        name: of the kernel.
        start, length: microseconds.
        scopes: what it was launched within, the innermost first.
    """

    name: str
    start: float
    length: float
    scopes: tuple[Scope, ...] = field(default=())


def profile(job: measure.Job) -> dict[str, Any]:
    """Train some steps of one micro-batch each, measure most of them, and take the last one apart."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile
    from transformers import TrainerCallback

    device = measure.start(job)
    single = replace(job, accumulation=1)
    trainer = measure.project_trainer(single, device, WARMUP + TIMED + 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    profiler = torch_profile(activities=activities, record_shapes=True)
    spans: list[float] = []

    class TakeApart(TrainerCallback):
        """Profiles the last step only, and that layer by layer: a recorded graph does not say what a kernel is for."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP + TIMED:
                measure.unrecorded(trainer.model)
                profiler.start()
                spans.append(measure._now(device))
            elif state.global_step == WARMUP + TIMED + 1:
                spans.append(measure._now(device))
                profiler.stop()

    trainer.add_callback(TakeApart())
    result = measure.trained(trainer, WARMUP, job.seq * job.batch, device)
    if "failed" in result:
        return {"failed": result["failed"]}
    watched = spans[1] - spans[0]
    # A GPU's kernels take no longer when watched, but operators on a CPU do.
    times = {"wall_s": watched if device == "cpu" else result["step_s"]["median"], "profiled_wall_s": watched}
    config = job.config()
    narrow = 4 * max(config.lora.r, config.lora.expert_r or config.lora.r)
    launches = read_trace(_trace_of(profiler))
    found = taken_apart(launches, narrow, trainer.model.config.vocab_size)
    idle = max(0.0, times["wall_s"] - found["busy_s"])
    tokens = tokens_an_expert(trainer, torch.tensor([trainer.train_dataset[0]["input_ids"]]))
    return {
        **times,
        **found,
        "idle_s": idle,
        "tokens_an_expert": tokens,
        "fused": measure.fused(trainer.model),
    }


def _trace_of(profiler: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return events


def read_trace(events: Iterable[Mapping[str, Any]]) -> list[Launch]:
    """Everything that ran on the device, with what launched it, from the events of a trace in Chrome's format.

    Without a device, operators themselves stand for kernels, each with the time that it did not spend in others.
    """
    events = [event for event in events if event.get("ph") == "X"]
    by_correlation: dict[Any, tuple[Scope, ...]] = {}
    by_operator: dict[Any, tuple[Scope, ...]] = {}
    own: list[Launch] = []
    for event, scopes, own_time in _nested(events):
        arguments = event.get("args", {})
        if event["cat"] in _LAUNCHES:
            by_correlation[arguments.get("correlation")] = scopes
        else:
            by_operator[arguments.get("External id")] = scopes
            if event["cat"] == "cpu_op":
                own.append(Launch(event["name"], float(event["ts"]), own_time, scopes))
    on_device = [event for event in events if event.get("cat") in _ON_DEVICE]
    if not on_device:
        return own
    return [
        Launch(
            event["name"],
            float(event["ts"]),
            float(event["dur"]),
            by_correlation.get(event["args"].get("correlation"), ())
            or by_operator.get(event["args"].get("External id", -1), ()),
        )
        for event in on_device
    ]


def _nested(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], tuple[Scope, ...], float]]:
    """Each operator and launch with the scopes around it (an operator is one of its own), innermost first, and the
    time in it that no other operator within it took."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _SCOPES | _LAUNCHES:
            threads[event.get("tid")].append(event)
    for found in threads.values():
        found.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        inner: dict[int, float] = defaultdict(float)
        stack: list[Mapping[str, Any]] = []
        chains: list[tuple[Scope, ...]] = [()]
        placed = []
        for event in found:
            while stack and float(event["ts"]) >= float(stack[-1]["ts"]) + float(stack[-1]["dur"]):
                stack.pop()
                chains.pop()
            if event["cat"] in _LAUNCHES:
                placed.append((event, chains[-1]))
                continue
            if stack:
                inner[id(stack[-1])] += float(event["dur"])
            stack.append(event)
            chains.append((_scope(event), *chains[-1]))
            placed.append((event, chains[-1]))
        for event, scopes in placed:
            yield event, scopes, float(event["dur"]) - inner[id(event)]


def _scope(event: Mapping[str, Any]) -> Scope:
    shapes = event.get("args", {}).get("Input Dims") or ()
    flat = (tuple(shape) for shape in shapes if isinstance(shape, list) and all(isinstance(n, int) for n in shape))
    return Scope(event["name"], tuple(flat))


def bucket(launch: Launch, narrow: int, vocabulary: int) -> str:
    """Which bucket a launch belongs to.

    Args:
        launch: what ran.
        narrow: a matrix product with a side of at most this belongs to an adapter (or is a router's, of which there
            is one small one a layer).
        vocabulary: a product with a side of this is the head's.
    """
    names = [scope.name for scope in launch.scopes]
    text = " ".join([launch.name, *names[:1]])
    product = next((scope for scope in launch.scopes if _PRODUCTS.match(scope.name)), None)
    sides = {side for shape in product.shapes if len(shape) >= 2 for side in shape[-2:]} if product else set()
    if any(name.startswith(("Optimizer.step", "aten::_foreach")) for name in names) or "multi_tensor" in launch.name:
        return OPTIMISER
    if vocabulary in sides or any("LogProb" in name or "nll_loss" in name or "log_softmax" in name for name in names):
        return HEAD
    if re.search("flash|fmha", launch.name, re.I) or any(_is_attention(name) for name in names):
        return ATTENTION
    if "equantize" in launch.name or "equantize" in text:
        return DEQUANTISE
    if product or _PRODUCT_KERNEL.search(launch.name):
        if sides and min(sides) <= narrow:
            return LORA
        grouped = (product and "grouped" in product.name) or re.search("group", launch.name, re.I)
        return EXPERTS if grouped else LINEARS
    if _ADAPTERS.search(text) or any(name == "aten::native_dropout" for name in names):
        return LORA
    if _ROUTING.search(text) and "elementwise_kernel_with_index" not in text:
        return ROUTING
    return ELEMENTWISE if _ELEMENTWISE.search(text) else OTHER


def _is_attention(name: str) -> bool:
    return name.startswith("aten::") and "attention" in name


def taken_apart(launches: list[Launch], narrow: int, vocabulary: int) -> dict[str, Any]:
    """Seconds and launches of every bucket, how long anything ran at all, and the costliest kernels."""
    buckets = {name: {"seconds": 0.0, "launches": 0} for name in BUCKETS}
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch in launches:
        name = bucket(launch, narrow, vocabulary)
        buckets[name]["seconds"] += launch.length / 1e6
        buckets[name]["launches"] += 1
        kernels[name, launch.name].append(launch.length / 1e6)
    costly = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "buckets": buckets,
        "launches": len(launches),
        "busy_s": busy(launches),
        "kernels": [
            {"bucket": name, "name": kernel[:160], "seconds": sum(times), "launches": len(times)}
            for (name, kernel), times in costly
        ],
    }


def busy(launches: Iterable[Launch]) -> float:
    """Seconds in which at least one launch ran. Times of operators on a CPU are their own and are added up."""
    launches = sorted(launches, key=lambda launch: launch.start)
    if any(scope.name == launch.name for launch in launches for scope in launch.scopes[:1]):
        return sum(launch.length for launch in launches) / 1e6
    total, end = 0.0, float("-inf")
    for launch in launches:
        begin, stop = max(launch.start, end), launch.start + launch.length
        total += max(0.0, stop - begin)
        end = max(end, stop)
    return total / 1e6


def tokens_an_expert(trainer: Any, input_ids: Any) -> dict[str, float]:
    """How evenly random routers spread one sequence: mean and maximum of the tokens that an expert of a layer gets, and
    the share of experts without any."""
    import torch

    model = trainer.model.get_base_model()
    counts: list[Any] = []
    # The gate's input and output fuse away in places; what a router returns in evaluation mode is the same everywhere.
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: counts.append(
                torch.bincount(output[2].reshape(-1), minlength=module.num_experts).float().cpu()
            )
        )
        for module in model.modules()
        if type(module).__name__.endswith("Router")
    ]
    model.eval()
    try:
        with torch.no_grad():
            model.model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    every = torch.stack(counts) if counts else torch.zeros(1, 1)
    return {
        "mean": float(every.mean()),
        "max": float(every.max()),
        "max_of_a_layer_mean": float(every.max(dim=1).values.mean()),
        "without": float((every == 0).float().mean()),
    }
