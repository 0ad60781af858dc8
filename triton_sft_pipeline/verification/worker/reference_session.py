"""What the reference's process does: draw inputs, compute what is expected, and be measured beside a kernel.

It runs the problems' own code, which the pipeline's user brings and no model wrote, one problem after another. The
seeds of the inputs are drawn here and never leave this process.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from triton_sft_pipeline.verification.wire import Value, nbytes
from triton_sft_pipeline.verification.worker import cores, mixing, tensors
from triton_sft_pipeline.verification.worker.bench_session import BenchSession
from triton_sft_pipeline.verification.worker.launches import LaunchMonitor
from triton_sft_pipeline.verification.worker.loading import explain, is_out_of_memory, load_code
from triton_sft_pipeline.verification.worker.operators import OperatorLog
from triton_sft_pipeline.verification.worker.precision import allowance, full_precision
from triton_sft_pipeline.verification.worker.problem_code import (
    ReferenceFailure,
    are_inputs_large,
    build_module,
    describe_state,
    draw_elsewhere,
    draw_inputs,
    instantiate,
    module_classes,
    refuse_huge_inputs,
    runs_code_when_loaded,
    seed_secretly,
)
from triton_sft_pipeline.verification.worker.session import GpuGate, Handler
from triton_sft_pipeline.verification.worker.session import serve as answer_questions
from triton_sft_pipeline.verification.worker.tensors import (
    UnsupportedValueError,
    in_slices,
    tensors_in,
    to_wire,
    to_wire_strided,
)

CODE = "reference.py"
# Inputs of gigabytes are drawn and tried once, and nothing is derived from them.
_MAX_DERIVED_BYTES = 1 << 30
_MAX_RESERVED = 1 << 30
# Inputs that no draw gave are only used where PyTorch computes this precisely on them.
_WELL_CONDITIONED = 1e-5


def serve(sock: socket.socket, backend: str) -> None:
    """Serve the judge at the other end of `sock` until it closes the connection."""
    session = ReferenceSession(backend, GpuGate(sock, needed=backend == "cuda"))
    handlers: dict[str, Handler] = {
        "load": session.load,
        "adopt": session.adopt,
        "expect": session.expect,
        "compile": session.compile,
    }
    answer_questions(sock, session.gate, handlers | session.bench.handlers())


class ReferenceSession:
    """One problem at a time."""

    def __init__(self, backend: str, gate: GpuGate) -> None:
        self.gate = gate
        self.bench = BenchSession(backend, gate, lambda *inputs: self._measured(*inputs), self._failure, self._held)
        self._device = "cuda" if backend == "cuda" else "cpu"
        self._file = Path(CODE).absolute()
        self._monitor = LaunchMonitor(backend)
        self._clean = _settings()
        self._source = ""
        self._code: ModuleType | None = None
        self._module: Any = None
        self._measured: Any = None
        self._initial: dict[str, Any] = {}
        self._masters: dict[int, tuple[Any, Any]] = {}
        self._first_draw: Any = None

    def load(self, code: str, trials: int) -> dict[str, Value]:
        """Prepare a problem.

        Returns:
            {"trials", "mixed", "shifted", "negative", "sparse", "mixable", "state", "available", "init_inputs",
            "class_name", "compute", "copy", "aliases", "uses_bfloat16", "dirty"}. A trial is {"inputs", "output",
            "after", "slack"}: `after` holds the inputs as the reference left them, None when it left them alone;
            `slack` an extra tolerance for each tensor of the output. Trials on inputs that no draw gave, None where
            they make no sense: "mixed" on an element-wise mixture of two draws; "shifted" on non-negative inputs moved
            to both sides of zero; "negative" on non-negative inputs negated; "sparse" on inputs with many zeros, for a
            problem whose draws all give the same output. "mixable": the reference runs on any mixture of draws.
            "dirty": do not use this process for another problem. {"verdict", "detail", "dirty"} when it cannot be
            judged.
        """
        try:
            answer = self._prepare(code, trials) | {"dirty": self._is_dirty(code)}
            self.gate.moves(nbytes(answer["trials"]))
            return answer
        except ReferenceFailure as failure:
            return {"verdict": failure.finding.verdict, "detail": failure.finding.detail, "dirty": True}
        except UnsupportedValueError as error:
            detail = f"The reference returns {error}, which cannot be compared."
            return {"verdict": "reference_error", "detail": detail, "dirty": True}
        # Whatever the problem's code raises is a fact about the problem.
        except BaseException as error:
            short = is_out_of_memory(error)
            return self._failure(error) | {"dirty": True} | ({"verdict": "resource_limit"} if short else {})
        finally:
            self._release()

    def adopt(self, code: str, class_name: str) -> dict[str, Value]:
        """Load a problem that another process prepared, to measure it here."""
        cores.stand_aside()
        self.gate.enter()
        try:
            if code != self._source:
                self._load(code)
                self._keep(instantiate(self._code, class_name, self._device))  # type: ignore[arg-type]
            self._measured = self._module
            return {}
        except BaseException as error:
            return self._failure(error)

    def expect(self, a: Value, b: Value, seeds: tuple[int, ...]) -> dict[str, Value]:
        """{"outputs"} for the mixtures of two draws with these seeds."""
        cores.stand_aside()
        self.gate.enter()
        try:
            draws = tensors.from_wire(a, self._device), tensors.from_wire(b, self._device)
            return {"outputs": tuple(to_wire(self._run(mixing.mix(*draws, seed))) for seed in seeds)}
        except BaseException as error:
            return self._failure(error)

    def compile(self) -> dict[str, Value]:
        """From here on measure the module as torch.compile makes it."""
        import torch

        # A pool of compiler processes would be more than a child may have.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        self._measured = torch.compile(self._module)
        return {}

    def _prepare(self, code: str, trials: int) -> dict[str, Value]:
        self._load(code)
        assert self._code is not None
        if self._device == "cpu":
            refuse_huge_inputs(self._code)
        cores.stand_aside()
        draws = self._draw(code, trials)
        self._first_draw = draws[0]
        classes = module_classes(self._file, self._code)
        module, class_name = build_module(self._code, classes, lambda: self._fresh(draws[0]), self._device)
        described = describe_state(self._code, module, len(draws[0]))
        self._keep(module)
        first = self._run(self._fresh(draws[0]))
        slack = self._slack(draws[0], first)
        self._refuse_chance(draws[0], first)
        log = OperatorLog(self._monitor, poison=False)
        aliases = self._watch(draws[0], log)
        holds = list(tensors_in((*draws, *self._initial.values())))
        trials_and_outputs = [self._trial(draw, slack) for draw in draws]
        outputs = [output for _, output in trials_and_outputs]
        # Nothing is derived from gigabytes: making it takes as long as the rest together.
        derives = tensors.nbytes(draws[0]) <= _MAX_DERIVED_BYTES
        mixture = self._mixture(draws) if derives else None
        shifted, negated = (mixing.shift(draws[0]), mixing.negate(draws[-1])) if derives else (None, None)
        thinned = mixing.sparse(draws[0], seed=_secret()) if derives and _all_alike(outputs) else None
        return described | {
            "trials": tuple(trial for trial, _ in trials_and_outputs),
            "mixed": self._precise_trial(mixture, slack),
            "shifted": self._precise_trial(shifted, slack),
            "negative": self._precise_trial(negated, slack),
            "sparse": self._precise_trial(thinned, slack),
            "mixable": mixture is not None and self._runs(mixture),
            "class_name": class_name,
            "compute": float(log.compute),
            "copy": float(log.copy),
            "aliases": aliases,
            "uses_bfloat16": "bfloat16" in code or any(str(tensor.dtype) == "torch.bfloat16" for tensor in holds),
        }

    def _draw(self, code: str, count: int) -> list[Any]:
        """Inputs, on the GPU already where they are large and the problem's code allows it."""
        assert self._code is not None
        if self._device != "cpu" and are_inputs_large(self._file, code):
            had_gpu = self.gate.entered
            self.gate.enter()
            draws = draw_elsewhere(self._file, code, count, self._device)
            if draws is not None:
                return draws
            if not had_gpu:
                self.gate.leave()
        return draw_inputs(self._code, count)

    def _release(self) -> None:
        """Give memory that is free in this process to the others."""
        import torch

        if self._device == "cuda" and torch.cuda.memory_reserved() > _MAX_RESERVED:
            torch.cuda.empty_cache()

    def _load(self, code: str) -> None:
        self._source = ""
        self._masters.clear()
        self._first_draw = None
        self._file.write_text(code, encoding="utf-8", errors="surrogatepass")
        self._code = load_code(self._file, "reference")
        self._source = code

    def _keep(self, module: Any) -> None:
        self._module = self._measured = module
        self._initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def _mixture(self, draws: Sequence[Any]) -> Any:
        if len(draws) < 2:
            return None
        return mixing.mix(draws[0], draws[1], seed=_secret())

    def _runs(self, draw: Any) -> bool:
        try:
            self._run(self._fresh(draw))
        except Exception:
            return False
        return True

    def _fresh(self, draw: Any) -> Any:
        """A copy of a draw on the device, made there: a problem's inputs cross over once."""
        if id(draw) not in self._masters:
            # The draw itself is kept, too: its identity is its key.
            self._masters[id(draw)] = draw, tensors.to_plain(draw, lambda tensor: tensor.to(self._device))
        return tensors.clone(self._masters[id(draw)][1])

    def _held(self) -> Any:
        """Inputs to measure on where none are sent; drawn when another process prepared the problem."""
        assert self._code is not None
        if self._first_draw is None:
            self._first_draw = self._draw(self._source, 1)[0]
        return self._fresh(self._first_draw)

    def _run(self, inputs: Any, module: Any = None) -> Any:
        """The module's output, from its initial state and with full float32: `inputs` may be written to."""
        import torch

        module = self._module if module is None else module
        if module is self._module:
            module.load_state_dict(self._initial)
        self.gate.enter()
        with torch.no_grad(), full_precision():
            return tensors.to_plain(module(*inputs), tensors.same)

    def _trial(self, draw: Any, slack: tuple[float, ...] = ()) -> tuple[dict[str, Value], Any]:
        """What the judge is told of a trial, and the output itself."""
        # Moving data takes next to nothing of the GPU: meanwhile others may measure.
        inputs = self._fresh(draw)
        self.gate.enter()
        before = tensors.clone(inputs)
        output = self._run(inputs)
        touched = not tensors.same_bits(before, inputs)
        self.gate.leave()
        self.gate.moves(tensors.nbytes(draw) + tensors.nbytes(output))
        trial: dict[str, Value] = {
            "inputs": to_wire_strided(draw),
            "output": to_wire(output),
            "after": to_wire(inputs) if touched else None,
            "slack": slack,
        }
        self.gate.computes()
        return trial, output

    def _precise_trial(self, draw: Any, slack: tuple[float, ...]) -> dict[str, Value] | None:
        """The trial, unless the reference fails, overflows or is imprecise on inputs that no draw gave."""
        import torch

        if draw is None:
            return None
        try:
            trial, output = self._trial(draw, slack)
            exact = self._run_double(draw)
            if exact is None:
                return None
            for value, true in zip(tensors_in(output), tensors_in(exact), strict=True):
                if not torch.isfinite(value).all():
                    return None
                limit = _WELL_CONDITIONED if value.element_size() >= 4 else 1e-3
                if not torch.allclose(value.double(), true.double(), rtol=limit, atol=limit):
                    return None
            return trial
        # Inputs outside of what the problem was made for.
        except Exception:
            return None

    def _run_double(self, draw: Any) -> Any:
        """The output in float64; None when the module cannot compute in it."""
        import torch

        def widened(tensor: Any) -> Any:
            return tensor.double() if tensor.is_floating_point() else tensor

        try:
            module = copy.deepcopy(self._module)
            module.load_state_dict(self._initial)
            with torch.no_grad():
                return self._run(tensors.to_plain(self._fresh(draw), widened), module.double())
        except Exception:
            return None

    def _slack(self, draw: Any, output: Any) -> tuple[float, ...]:
        """How much more than the tolerance is allowed for each tensor of the output, because PyTorch itself is off."""
        import torch

        leaves = list(tensors_in(output))
        usual = leaves
        if self._device == "cuda":
            # With PyTorch's own settings, in which convolutions are in TF32.
            self._module.load_state_dict(self._initial)
            with torch.no_grad():
                usual = list(tensors_in(tensors.to_plain(self._module(*self._fresh(draw)), tensors.same)))
        double = self._run_double(draw) if tensors.nbytes(draw) <= _MAX_DERIVED_BYTES else None
        exact = leaves if double is None else list(tensors_in(double))
        if not len(usual) == len(exact) == len(leaves):
            return tuple(0.0 for _ in leaves)
        return tuple(allowance(a, b, c) for a, b, c in zip(leaves, usual, exact, strict=True))

    def _refuse_chance(self, draw: Any, first: Any) -> None:
        """Other random numbers, same inputs: a reference that depends on them has no right answer."""
        import torch

        seed_secretly()
        for a, b in zip(tensors_in(first), tensors_in(self._run(self._fresh(draw))), strict=True):
            tolerance = 1e-3 if a.is_floating_point() or a.is_complex() else 0.0
            if a.shape != b.shape or not all(
                torch.allclose(_wide(c), _wide(d), rtol=tolerance, atol=tolerance, equal_nan=True)
                for c, d in in_slices(a, b)
            ):
                raise ReferenceFailure("degenerate_task", "The reference gives two answers for the same inputs.")

    def _watch(self, draw: Any, log: OperatorLog) -> tuple[int, ...]:
        """Log the reference's operators; the positions of outputs that share memory with an input."""
        import torch

        inputs = self._fresh(draw)
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(inputs)}
        self._module.load_state_dict(self._initial)
        with torch.no_grad(), log:
            output = self._module(*inputs)
        leaves = tensors_in(tensors.to_plain(output, tensors.same))
        return tuple(i for i, leaf in enumerate(leaves) if leaf.untyped_storage().data_ptr() in places)

    def _is_dirty(self, code: str) -> bool:
        return runs_code_when_loaded(code) or _settings() != self._clean

    def _failure(self, error: BaseException) -> dict[str, Value]:
        return {"verdict": "reference_error", "detail": f"The reference fails: {explain(error, self._file)}"}


def _secret() -> int:
    return int.from_bytes(os.urandom(4), "little")


def _wide(tensor: Any) -> Any:
    return tensor if tensor.is_complex() else tensor.double()


def _all_alike(outputs: list[Any]) -> bool:
    """Whether the outputs of all draws are about the same; the judge decides what follows from that."""
    import torch

    leaves = [list(tensors_in(output)) for output in outputs]
    return all(
        len(other) == len(leaves[0])
        and all(
            a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-2, equal_nan=True)
            for a, b in zip(leaves[0], other, strict=True)
            if not a.is_complex() and not b.is_complex()
        )
        for other in leaves[1:]
    )


def _settings() -> tuple[Any, ...]:
    """The state of torch that one problem could change for the next."""
    import torch

    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )
