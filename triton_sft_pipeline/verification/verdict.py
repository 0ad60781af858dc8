"""What the judge says about one kernel, as plain data. Knows nothing of how it is found out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Enters the code version of whatever stores verdicts: raise it whenever the same kernel may get another verdict than
# before.
JUDGE_VERSION = "plain-2"

# Every verdict this judge gives, and what it means. Names follow the project's taxonomy, which has more for later
# judges.
VERDICTS = {
    "verified": "the outputs match the reference's for every trial",
    "incorrect_structure": "the outputs are nested otherwise than the reference's",
    "incorrect_shape": "an output has another shape",
    "incorrect_dtype": "an output has another dtype",
    "incorrect_nan": "NaN stands where the reference has a number, or the reverse",
    "incorrect_numerical": "a value is outside the tolerance",
    "input_mutated": "the kernel wrote to an input that the reference leaves alone",
    "lazy_output": "an output is no plain tensor",
    "no_kernel_launch": "the outputs match, but no Triton kernel was launched",
    "no_code": "there is no kernel code",
    "syntax_error": "the kernel code is not valid Python",
    "missing_wrapper": "neither triton_kernel_wrapper nor ModelNew is defined",
    "import_error": "the kernel code imports what is not there",
    "contract_error": "the wrapper's parameters cannot be bound to inputs and weights",
    "compile_error": "Triton refuses a kernel",
    "runtime_error": "the kernel code raised an exception",
    "resource_limit": "the kernel needs more memory, disk or processor time than it may have",
    "timeout": "the kernel did not finish in time",
    "crash": "a signal killed the kernel's process",
    "early_exit": "the kernel's process ended without an answer",
    "forged_result": "what the kernel's process left behind cannot be read as an answer",
    "unsupported_on_cpu": "the problem or kernel is beyond Triton's CPU interpreter",
    "degenerate_task": "the reference gives different outputs for the same inputs",
    "reference_error": "the reference itself fails",
    "infra_error": "the judge failed, not the kernel",
}


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
        correctness: the kernel's outputs match the reference's; true for "verified" alone.
        fast_0: the same as correctness.
        fast_1: correct and speedup > 1.0.
        fast_2: correct and speedup >= 2.0.
        speedup: reference time / kernel time.
        reference_time_ms: median time of the reference in eager mode, in milliseconds.
        kernel_time_ms: median time of the kernel, in milliseconds.
        contract: how arguments were bound: "name", "head", "v1" or "ModelNew"; None when it did not come to that.
        device: "cuda" or "cpu".
        backend: "cuda", or "interpreter" for Triton's CPU interpreter.
        isolation: how the kernel was confined; "process" means its own session with resource limits.
        trials: number of input draws that were compared.
        detail: one sentence that a person can act on.
        wall_s: seconds from the start of the judgement to its end, waiting included.
        versions: of the libraries and the device that judged.
    """

    key: str
    verdict: str
    correctness: bool
    fast_0: bool
    fast_1: bool | None = None
    fast_2: bool | None = None
    speedup: float | None = None
    reference_time_ms: float | None = None
    kernel_time_ms: float | None = None
    contract: str | None = None
    device: str = "cpu"
    backend: str = "interpreter"
    isolation: str = "none"
    trials: int = 0
    detail: str = ""
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

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
