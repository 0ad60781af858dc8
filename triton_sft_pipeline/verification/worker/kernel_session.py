"""What a kernel's process does: load the code, call it on the inputs that the judge sends, send back what it returns.

From its first line of kernel code on this process is not trusted. It holds the kernel's code, the weights and the
inputs of one trial at a time, never the reference's code, its outputs or a seed of theirs. What it reports about itself
may lower a verdict and never raise one.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.gate import MODEL_CLASS, WRAPPER
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import Value, nbytes
from triton_sft_pipeline.verification.worker import cores, interpreter, tampering, tensors
from triton_sft_pipeline.verification.worker.bench_session import BenchSession
from triton_sft_pipeline.verification.worker.binding import Available, Binding, bindings
from triton_sft_pipeline.verification.worker.launches import LaunchMonitor
from triton_sft_pipeline.verification.worker.loading import classify, load_code
from triton_sft_pipeline.verification.worker.operators import OperatorLog
from triton_sft_pipeline.verification.worker.session import GpuGate, Handler
from triton_sft_pipeline.verification.worker.session import serve as answer_questions
from triton_sft_pipeline.verification.worker.streams import SideStreams

CODE = "kernel.py"
# Copying less than this disturbs no measurement of others.
_SMALL = 1 << 20
# Of a kernel's launches and their arguments, so many are looked at.
_MOST_LAUNCHES = 8
_MOST_ARGUMENTS = 8
INIT_SEED = 0
"""The generators' state before a module of either side is built; weights are no secret."""

Call = Callable[[tuple[Any, ...]], Any]


_ESCAPES = "The kernel returns before the work that it put on another stream is done; wait for that stream."


class _StreamEscape(Exception):
    """A call returned before its work was done."""


class ContractError(Exception):
    """The kernel's code does not take what the problem has to give."""


def serve(sock: socket.socket, backend: str) -> None:
    """Serve the judge at the other end of `sock` until it closes the connection."""
    session = KernelSession(backend, GpuGate(sock, needed=backend == "cuda"))
    cores.stand_aside()
    session.rehearse()
    handlers: dict[str, Handler] = {
        "load": session.load,
        "call": session.call,
        "ablate": session.ablate,
        "recall": session.recall,
        "inspect": session.inspect,
        "whole": session.whole,
    }
    answer_questions(sock, session.gate, handlers | session.bench.handlers())


class KernelSession:
    """One kernel, from loading its code to its last measurement."""

    def __init__(self, backend: str, gate: GpuGate) -> None:
        self.gate = gate
        self._device = "cuda" if backend == "cuda" else "cpu"
        self._file = Path(CODE).absolute()
        if self._device == "cpu":
            interpreter.install()
        self._monitor = LaunchMonitor(backend)
        self.bench = BenchSession(
            backend,
            gate,
            lambda *inputs: self._call(inputs),
            self._failure,
            self._held_inputs,
            lambda: self._monitor.count,
        )
        self._side = SideStreams() if self._device == "cuda" else None
        self._threads = tampering.ThreadCounter()
        self._fingerprint = tampering.fingerprint()
        self._weights: Any = None
        self._call: Call = _not_loaded
        self._inputs: Any = None
        self._first_output: Any = None
        # What was sent in part, and may be asked for in full.
        self._partial: dict[str, Any] = {}

    def rehearse(self) -> None:
        """Call what is no kernel, so that the first call of one does not wait for the watching to warm up."""
        import torch

        def call(inputs: tuple[Any, ...]) -> Any:
            return torch.empty_like(inputs[0]).copy_(inputs[0])

        # Nobody answers yet, and what this does to others is too little to measure.
        self.gate.entered = True
        self._call = call
        self.bench.rehearse()
        given = tensors.from_wire(tensors.to_wire((torch.randn(64), torch.arange(64))), self._device)
        self._run(given, OperatorLog(self._monitor, poison=True))
        tensors.same_bits(tensors.clone(given), given)
        self._call = _not_loaded
        self.gate.entered = False

    def load(self, code: str, state: Any, available: Any, init_inputs: Any, binding: int) -> dict[str, Value]:
        """Load the kernel's code and bind its arguments.

        Args:
            code: source text.
            state: {dotted name: tensor} of weights and buffers; `state_dict` holds the names of the reference's.
            available: the fields of `binding.Available`.
            init_inputs: (positional, keywords) that the module under test was built with, None when they cannot travel.
            binding: which of the possible bindings of arguments to use.

        Returns:
            {"contract", "bindings"}, or {"verdict", "detail"} as well when that failed.
        """
        if self._device == "cpu":
            code = interpreter.on_cpu(code)
        self._file.write_text(code, encoding="utf-8", errors="surrogatepass")
        self.gate.moves(nbytes(state))
        self._weights = weights = tensors.from_wire(state, self._device)
        self.gate.computes()
        report: dict[str, Value] = {}
        try:
            self._call = self._load(weights, Available(**available), init_inputs, binding, report)
        except BaseException as error:
            report |= self._failure(error)
        return report | self._suspicion()

    def call(self, inputs: Value, reuse: bool, sizes: tuple[int, ...] = (), places: Value = None) -> dict[str, Value]:
        """Call the kernel once, watched.

        Args:
            inputs: of one trial.
            reuse: put them into the tensors of the call before, so that only their values are new.
            sizes: numbers of elements; arguments of the first launch that have so many are sent back, too.
            places: {number of elements: positions}; of an argument with so many only these are sent, together with the
                number. `whole` gives all of it.

        Returns:
            {"output", "inputs", "arguments", "aliases", "launches", "side_launches", "compute", "copy", "scalars",
            "operators"}: `inputs` as the call left them, None when they were not touched; `arguments` as they were
            before the first launch; `aliases` are the outputs that share memory with an input, by position;
            `side_launches` those on other streams. {"verdict", "detail"} when the call failed.
        """
        # Moving inputs and outputs takes next to nothing of the GPU, and neither does compiling: others may measure.
        self.gate.moves(nbytes(inputs))
        self._partial = {}
        few = _few(places)
        given = self._receive(inputs, reuse)
        if nbytes(inputs) > _SMALL:
            self.gate.enter()
        before = tensors.clone(given)
        self.gate.leave()
        self.gate.computes()
        late = 0 if self._side is None else self._side.late
        self._monitor.before_launch = self._before_launch
        log = OperatorLog(self._monitor, poison=True)
        log.before_compute = self.gate.enter
        self._monitor.count = 0
        arguments = _Arguments(sizes, [given, self._weights], self._monitor, first_only=True)
        self._monitor.seen = arguments.note if sizes else None
        try:
            output = self._run(given, log)
            untouched = tensors.same_bits(before, given)
            self.gate.leave()
            self._first_output = output if self._first_output is None else self._first_output
            del before
            self.gate.moves(tensors.nbytes(output))
            self._partial = {"arguments": tuple(arguments.found)} if few else {}
            reply: dict[str, Value] = {
                "output": tensors.to_wire(output),
                "inputs": None if untouched else tensors.to_wire(given),
                "arguments": tensors.to_wire(tuple(_marked(found, few) for found in arguments.found)),
                "aliases": _aliases(output, given),
            }
        except BaseException as error:
            return self._failure(error)
        finally:
            self._monitor.before_launch = self._monitor.seen = None
        if not log.intact:
            return {"verdict": "harness_tamper", "detail": "The kernel code switches off what watches its operators."}
        work: dict[str, Value] = {
            "launches": self._monitor.count,
            "compute": float(log.compute),
            "copy": float(log.copy),
            "scalars": log.scalars,
            "side_launches": 0 if self._side is None else self._side.late - late,
            "operators": tuple(name for name, _ in log.top(4)),
        }
        return reply | work

    def ablate(self, inputs: Value, sizes: tuple[int, ...], places: Value = None) -> dict[str, Value]:
        """Call the kernel while launches do nothing: {"output", "arguments"}; no output when it did not get that far.

        `arguments` of all launches this time. Without inputs, on those of the last call. `places` is as for `call`, and
        of an output, too, only these elements are sent.
        """
        self.gate.moves(nbytes(inputs))
        self._partial = {}
        few = _few(places)
        given = self._inputs if inputs is None else self._receive(inputs, reuse=False)
        self.gate.computes()
        self.gate.enter()
        self._monitor.ablated = True
        log = OperatorLog(self._monitor, poison=True)
        arguments = _Arguments(sizes, [given, self._weights], self._monitor, first_only=False)
        self._monitor.seen = arguments.note
        reply: dict[str, Value] = {}
        try:
            output = self._run(given, log)
            self.gate.moves(tensors.nbytes(output))
            reply["output"] = tensors.to_wire(tensors.to_plain(output, lambda tensor: _thinned(tensor, few)))
            self._partial = {"output": output} if few else {}
        # Without its kernels it may fail in any way.
        except BaseException as error:
            reply["raised"] = type(error).__name__
        self._monitor.seen = None
        self._monitor.ablated = False
        if few:
            self._partial["arguments"] = tuple(arguments.found)
        return reply | {"arguments": tensors.to_wire(tuple(_marked(found, few) for found in arguments.found))}

    def whole(self) -> dict[str, Value]:
        """In full what the last answer held a part of: {"output", "arguments"}, as far as there was one."""
        partial, self._partial = self._partial, {}
        try:
            self.gate.moves(tensors.nbytes(partial))
            return {name: tensors.to_wire(value) for name, value in partial.items()}
        except BaseException as error:
            return self._failure(error)

    def inspect(self) -> dict[str, Value]:
        """What the kernel has left behind by now."""
        cores.stand_aside()
        return self._suspicion()

    def recall(self) -> dict[str, Value]:
        """The very first output once more, as it is now, and what the kernel has left behind."""
        try:
            return {"output": tensors.to_wire(self._first_output)} | self._suspicion()
        except BaseException as error:
            return self._failure(error)

    def _held_inputs(self) -> Any:
        # About to be measured: nobody will ask for it now, and it may be gigabytes.
        self._partial = {}
        return self._inputs

    def _before_launch(self) -> None:
        self.gate.enter()
        if self._side is not None:
            self._side.hold_up()

    def _run(self, given: Any, log: OperatorLog) -> Any:
        import torch

        with torch.no_grad(), log:
            output = self._call(given)
        # A subclass or another object is refused here, before anything is asked of it.
        output = tensors.to_plain(output, tensors.same)
        if self._device == "cuda":
            self.gate.enter()
            if self._side is not None and self._side.left_behind():
                raise _StreamEscape
        return output

    def _receive(self, inputs: Value, reuse: bool) -> Any:
        fresh = tensors.from_wire(inputs, self._device)
        if not (reuse and _refilled(self._inputs, fresh)):
            self._inputs = fresh
        return self._inputs

    def _load(
        self, weights: dict[str, Any], available: Available, init_inputs: Any, index: int, report: dict[str, Value]
    ) -> Call:
        module = load_code(self._file, "kernel")
        if hasattr(module, WRAPPER):
            return _load_wrapper(getattr(module, WRAPPER), weights["tensors"], available, index, report)
        if hasattr(module, MODEL_CLASS):
            report |= {"contract": MODEL_CLASS, "bindings": 1}
            return _load_model(getattr(module, MODEL_CLASS), weights, init_inputs, self._device)
        raise ContractError(f"Neither {WRAPPER} nor {MODEL_CLASS} is defined after the code has run.")

    def _failure(self, error: BaseException) -> dict[str, Value]:
        if isinstance(error, _StreamEscape):
            return {"verdict": "stream_escape", "detail": _ESCAPES}
        if isinstance(error, ContractError):
            return {"verdict": "contract_error", "detail": str(error)[:1000]}
        # SystemExit and KeyboardInterrupt raised by kernel code are facts about the kernel too.
        finding = classify(error, self._file)
        return {"verdict": finding.verdict, "detail": finding.detail}

    def _suspicion(self) -> dict[str, Value]:
        """What can be seen from inside of a kernel that reaches for more than its work."""
        finding = _suspicious(self._fingerprint, self._threads, self._device)
        return {} if finding is None else {"verdict": finding.verdict, "detail": finding.detail}


def _few(places: Value) -> dict[int, Any]:
    """The positions to send of a tensor, by its number of elements."""
    found = tensors.from_wire(places, "cpu")
    return found if isinstance(found, dict) else {}


def _thinned(tensor: Any, few: dict[int, Any]) -> Any:
    positions = few.get(tensor.numel())
    return tensor if positions is None else tensors.picked(tensor, positions)


def _marked(tensor: Any, few: dict[int, Any]) -> Any:
    """The tensor, or its number of elements and some of them: to be told from one that has no more."""
    return (tensor.numel(), _thinned(tensor, few)) if tensor.numel() in few else tensor


class _Arguments:
    """Copies of tensors that launches are given, of certain sizes, and that are neither inputs nor weights."""

    def __init__(self, sizes: tuple[int, ...], known: list[Any], monitor: LaunchMonitor, first_only: bool) -> None:
        self._sizes = frozenset(sizes)
        self._known = {
            tensor.untyped_storage().data_ptr() for value in known if value for tensor in tensors.tensors_in(value)
        }
        self._monitor = monitor
        self._most = 1 if first_only else _MOST_LAUNCHES
        self.found: list[Any] = []

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at one launch."""
        import torch

        if self._most < 1:
            return
        self._most -= 1
        with self._monitor.within_triton():
            for value in (*args, *kwargs.values()):
                if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.numel() not in self._sizes:
                    continue
                if value.untyped_storage().data_ptr() not in self._known and len(self.found) < _MOST_ARGUMENTS:
                    self.found.append(value.detach().clone())


def _suspicious(
    fingerprint: Any,
    counter: tampering.ThreadCounter,
    device: str,
    # Taken hold of now: kernel code may replace the module's own.
    changed: Callable[[Any], list[str]] = tampering.changed,
    threads: Callable[[], int] = tampering.threads,
    processes: Callable[[], int] = tampering.processes,
) -> Finding | None:
    replaced = changed(fingerprint)
    if replaced:
        return Finding("harness_tamper", f"The kernel code replaces {', '.join(replaced[:4])}.")
    if threads() or counter.started:
        return Finding("thread_leak", "The kernel code starts a thread.")
    if processes():
        return Finding("process_leak", "The kernel code leaves a process running.")
    if device == "cpu" and interpreter.pending_launches():
        return Finding("stream_escape", _ESCAPES)
    return None


def _not_loaded(inputs: tuple[Any, ...]) -> Any:
    raise ContractError("The kernel was not loaded.")


def _load_wrapper(
    wrapper: Callable[..., Any], weights: dict[str, Any], available: Available, index: int, report: dict[str, Value]
) -> Call:
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
            return inputs[reference] if isinstance(reference, int) else weights[reference]

        positional = [value(reference) for reference in chosen.positional]
        return wrapper(*positional, **{name: value(reference) for name, reference in chosen.keyword})

    return call


def _load_model(model_class: Callable[..., Any], weights: dict[str, Any], init_inputs: Any, device: str) -> Call:
    import torch

    if init_inputs is None:
        raise ContractError(f"The problem's init inputs cannot be passed to {MODEL_CLASS}; use {WRAPPER}.")
    args, kwargs = tensors.from_wire(init_inputs, device="cpu")
    torch.manual_seed(INIT_SEED)
    model = model_class(*args, **kwargs).to(device).eval()
    try:
        model.load_state_dict({name: weights["tensors"][name] for name in weights["state_dict"]})
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise ContractError(f"{MODEL_CLASS} does not take the reference's state_dict: {message}") from error
    return lambda inputs: model(*inputs)


def _refilled(old: Any, new: Any) -> bool:
    """Copy the new tensors' values into the old ones; False, and nothing done, when they do not fit."""
    pairs = list(zip(tensors.tensors_in(old), tensors.tensors_in(new), strict=False))
    fits = len(pairs) == len(list(tensors.tensors_in(new))) == len(list(tensors.tensors_in(old))) > 0 and all(
        a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride() and not _overlaps(a) for a, b in pairs
    )
    for a, b in pairs if fits else ():
        a.copy_(b)
    return fits


def _overlaps(tensor: Any) -> bool:
    return any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _aliases(output: Any, inputs: Any) -> tuple[int, ...]:
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.tensors_in(inputs) if tensor.numel()}
    return tuple(
        index
        for index, tensor in enumerate(tensors.tensors_in(output))
        if tensor.numel() and tensor.untyped_storage().data_ptr() in places
    )
