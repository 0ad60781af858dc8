"""What the judge says about one kernel, as plain data. Knows nothing of how it is found out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Enters the code version of whatever stores verdicts: raise it whenever the same kernel may get another verdict than
# before.
JUDGE_VERSION = "4"

# Every verdict this judge gives, and what it means.
VERDICTS = {
    # The kernel holds.
    "verified": "the outputs match the reference's in every trial, and Triton kernels computed them",
    "verified_hybrid": "the outputs match in every trial; PyTorch operators did the lesser part of the work",
    # It computes something else.
    "incorrect_structure": "the outputs are nested otherwise than the reference's",
    "incorrect_shape": "an output has another shape",
    "incorrect_dtype": "an output has another dtype",
    "incorrect_nan": "NaN stands where the reference has a number, or the reverse",
    "incorrect_numerical": "a value is outside the tolerance",
    # It never became a running kernel.
    "no_code": "there is no kernel code",
    "unparsed": "the model's answer holds no code to judge",
    "syntax_error": "the kernel code is not valid Python",
    "import_error": "the kernel code imports what is not there",
    "missing_wrapper": "neither triton_kernel_wrapper nor ModelNew is defined",
    "contract_error": "the wrapper's parameters cannot be bound to inputs and weights",
    "compile_error": "Triton refuses a kernel",
    # It did not come to its end.
    "runtime_error": "the kernel code raised an exception",
    "timeout": "the kernel did not finish in time",
    "crash": "a signal killed the kernel's process",
    "resource_limit": "the kernel needs more memory, disk or processor time than it may have",
    "early_exit": "the kernel's process ended without an answer",
    # It broke a rule: the outputs may be right, the kernel is worth nothing.
    "no_kernel_launch": "no Triton kernel was launched",
    "dummy_kernel": "the outputs are the same when the launched kernels do nothing",
    "torch_fallback": "PyTorch operators did at least half of the work",
    "output_cached": "an output of an earlier call came back for new inputs",
    "output_alias": "an output shares its memory with an input or an earlier output, where the reference's does not",
    "input_mutated": "the kernel wrote to an input that the reference leaves alone",
    "lazy_output": "an output is no plain tensor",
    "harness_tamper": "functions of torch, triton or Python that the judge relies on were replaced",
    "timing_tamper": "the times that the kernel's process told contradict the judge's own clock",
    "stream_escape": "work was still pending on another stream when the wrapper returned",
    "thread_leak": "the wrapper left threads running",
    "process_leak": "the wrapper left processes running",
    "forged_result": "what the kernel's process sent cannot be read as an answer",
    "reference_access": "the kernel code reaches for the reference",
    "sandbox_violation": "the kernel code did what its confinement forbids",
    "forbidden_construct": "the source uses what no kernel needs",
    # Nothing is known about the kernel.
    "unsupported_on_cpu": "the problem or kernel is beyond Triton's CPU interpreter",
    "degenerate_task": "the problem cannot tell a right kernel from a wrong one",
    "reference_error": "the reference itself fails",
    "infra_error": "the judge failed, not the kernel",
}

CORRECT = frozenset({"verified", "verified_hybrid"})
"""Verdicts on kernels whose outputs are right and their own; all others have correctness False."""

UNJUDGED = frozenset({"unsupported_on_cpu", "degenerate_task", "reference_error", "infra_error"})
"""Verdicts that say something about the problem or the machine, nothing about the kernel."""


@dataclass(frozen=True)
class JudgeItem:
    """A kernel to be judged.

    Attributes:
        key: comes back in the verdict; need not be unique.
        pytorch_code: the problem, in KernelBench's format; None or empty text gets the verdict reference_error.
        triton_code: the kernel; None or empty text gets the verdict no_code.
    """

    key: str
    pytorch_code: str | None
    triton_code: str | None


@dataclass(frozen=True)
class Verdict:
    """What the judge says about one kernel. A field is None where it was not measured, like speed in the interpreter.

    Attributes:
        key: the item's key.
        verdict: one of VERDICTS.
        correctness: the kernel is right: the verdict is one of CORRECT.
        fast_0: the same as correctness.
        fast_1: correct, and the whole interval of the speedup lies above 1.0.
        fast_2: correct, and the whole interval of the speedup lies at or above 2.0.
        speedup: reference time / kernel time, of the medians.
        speedup_low, speedup_high: the speedup's 95 % interval.
        reference_time_ms: median time of the reference in eager mode, in milliseconds.
        reference_iqr_ms: interquartile range of the reference's times, in milliseconds.
        kernel_time_ms: median time of the kernel, in milliseconds.
        kernel_iqr_ms: interquartile range of the kernel's times, in milliseconds.
        compile_time_ms: median time of the reference under torch.compile, in milliseconds; only when asked for.
        compile_speedup: compile_time_ms / kernel_time_ms.
        launch_bound: the reference is so short that a launch outweighs it; read graph_speedup then.
        graph_speedup: the speedup when both are replayed as CUDA graphs, without the cost of launches.
        torch_share: share of the reference's work that PyTorch operators did in the kernel, 0 to 1 and beyond.
        contract: how arguments were bound: "name", "head", "v1" or "ModelNew"; None when it did not come to that.
        device: "cuda" or "cpu".
        backend: "cuda", or "interpreter" for Triton's CPU interpreter.
        isolation: how the kernel was confined: "namespaces", or "process" for a session with resource limits.
        trials: number of input draws that were compared.
        detail: one sentence that a person can act on.
        wall_s: seconds from the start of the judgement to its end, waiting included.
        versions: of what judged: python, torch, triton, gpu, driver, cuda.
    """

    key: str
    verdict: str
    correctness: bool
    fast_0: bool
    fast_1: bool | None = None
    fast_2: bool | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    reference_time_ms: float | None = None
    reference_iqr_ms: float | None = None
    kernel_time_ms: float | None = None
    kernel_iqr_ms: float | None = None
    compile_time_ms: float | None = None
    compile_speedup: float | None = None
    launch_bound: bool | None = None
    graph_speedup: float | None = None
    torch_share: float | None = None
    contract: str | None = None
    device: str = "cpu"
    backend: str = "interpreter"
    isolation: str = "none"
    trials: int = 0
    detail: str = ""
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_conclusive(self) -> bool:
        """Whether it says something about the kernel. A timeout of the interpreter, thousands of times slower than a
        GPU, does not.
        """
        return self.verdict not in UNJUDGED and (self.verdict, self.backend) != ("timeout", "interpreter")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """The reverse of `to_dict`. Unknown fields are ignored, so that files of a newer version can be read."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Finding:
    """A verdict's name and sentence, before it is known what they belong to."""

    verdict: str
    detail: str
