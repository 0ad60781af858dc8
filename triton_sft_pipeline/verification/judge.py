"""Decides whether a Triton kernel computes what a PyTorch module computes, and how much faster it is.

This is the plain judge. What it covers:
- The verdict is made in processes that never ran the kernel. The kernel's own process gets the inputs and the weights,
  and nothing of the reference's code, its outputs or the seeds; what it reports about itself may only lower the
  verdict.
- Every kernel has a fresh process (a fork of one that has torch and Triton loaded), its own session, resource limits, a
  small environment, a scratch folder and a deadline. Whatever it starts is killed with it. A worker process that dies
  is replaced; no other verdict is lost.
- Outputs are compared in structure, shape, dtype, NaN and value for several secret draws of the inputs. Writing to
  inputs is noticed, and so is a wrapper that launches no Triton kernel.

What it does NOT cover, and the next judge is for: namespaces (a kernel can read the user's files, reach the network and
signal the user's processes; expected outputs lie on disk, though nobody tells it where); kernels that launch something
idle while torch computes; caching of outputs between calls; uninitialised memory; work on side streams, patched timers
and other tampering with the measurement, which is made in the kernel's own process; confidence intervals of speedups.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification import compare, kernel_task, outcomes, reference_task
from triton_sft_pipeline.verification.confine import ISOLATION, Limits
from triton_sft_pipeline.verification.gate import inspect_source
from triton_sft_pipeline.verification.outcomes import Outcome
from triton_sft_pipeline.verification.references import Reference, ReferenceCache
from triton_sft_pipeline.verification.scratch import new_folder, remove, scratch
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.verdict import Finding, JudgeItem, Verdict
from triton_sft_pipeline.verification.zygote_client import ZygoteClient, ZygoteDiedError

_MAX_WORKERS = 8
_COMPARE_TIMEOUT_S = 300.0
# Room for a kernel's compiled code beside its outputs.
_EXTRA_FILE_BYTES = 64 << 20
_UNLIMITED_BYTES = 1 << 50
# After these, another way of binding the arguments may do better.
_PERHAPS_BINDING = frozenset(
    {"runtime_error", "compile_error", "input_mutated", "incorrect_structure", "incorrect_shape", "incorrect_dtype"}
    | {"incorrect_nan", "incorrect_numerical"}
)


@dataclass(frozen=True)
class _Attempt:
    """One run of a kernel with one way of binding its arguments."""

    finding: Finding
    contract: str | None = None
    binding: int = 0
    bindings: int = 1
    times_ms: tuple[float, float] | None = None


class KernelJudge:
    """Judges kernels. A context manager: its processes and files are gone when the block ends.

    Args:
        device: "cuda", "cpu" (Triton's interpreter: no speed), or "auto" for the GPU when there is one.
        workers: kernels judged at a time; None for one a processor, at most 8. Measurements always run alone.
        timeout_s: seconds that a kernel may take for all trials, compilation included; the same again for its
            measurement.
        trials: draws of the inputs that are compared. A problem whose inputs are gigabytes gets fewer.
        timing: measure speedups; only ever done on a GPU.

    Raises:
        PipelineError: a setting out of range; on entering the block, no GPU where "cuda" was asked for.
    """

    def __init__(
        self,
        device: str = "auto",
        workers: int | None = None,
        timeout_s: float = 60.0,
        trials: int = 5,
        timing: bool = True,
    ) -> None:
        if device not in ("auto", "cuda", "cpu"):
            raise PipelineError(f"Unknown judge device {device!r}: use auto, cuda or cpu.")
        if trials < 1 or timeout_s <= 0 or (workers is not None and workers < 1):
            raise PipelineError("The judge needs trials >= 1, timeout_s > 0 and workers >= 1.")
        self.workers = workers or max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0))))
        self._device = device
        self._timeout_s = timeout_s
        self._trials = trials
        self._timing = timing
        self._traffic = Traffic()
        self._zygote: ZygoteClient | None = None

    def __enter__(self) -> KernelJudge:
        self._folder = Path(tempfile.mkdtemp(prefix="triton-sft-judge-"))
        self._references = ReferenceCache(self._prepare_reference, self._discard_reference)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="judge")
        try:
            self._zygote = ZygoteClient(self._device, self._folder)
            self.backend, self._versions = self._zygote.backend_and_versions()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.device = "cuda" if self.backend == "cuda" else "cpu"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        # Without a zygote, what is still being judged ends at once.
        self._pool.shutdown(cancel_futures=True)
        remove(self._folder)

    def verify(self, pytorch_code: str | None, triton_code: str | None, key: str = "") -> Verdict:
        """Judge one kernel. Whatever is wrong with it, or with the problem, is a verdict and not an exception."""
        if self._zygote is None:
            raise PipelineError("Use the judge as a context manager: with KernelJudge() as judge: ...")
        began = time.monotonic()
        try:
            attempt, trials = self._judge(pytorch_code, triton_code)
        except ZygoteDiedError as error:
            detail = f"The judge's worker process failed twice while this kernel ran, the second time alone: {error}."
            attempt, trials = _Attempt(Finding("infra_error", detail)), 0
        except OSError as error:
            attempt, trials = (
                _Attempt(Finding("infra_error", f"The judge could not read or write its files: {error}.")),
                0,
            )
        return self._verdict(key, began, attempt, trials)

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        """Judge kernels side by side; verdicts come in the order in which they are decided.

        Items are taken one at a time as workers become free, so `items` may be endless.
        """
        source = iter(items)
        running: set[Future[Verdict]] = set()
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self.workers:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    else:
                        running.add(self._pool.submit(self.verify, item.pytorch_code, item.triton_code, item.key))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()

    def _judge(self, pytorch_code: str | None, triton_code: str | None) -> tuple[_Attempt, int]:
        """The best attempt and the number of trials that the problem has."""
        refused = inspect_source(triton_code)
        if refused is not None or triton_code is None:
            return _Attempt(refused or Finding("no_code", "")), 0
        if not pytorch_code:
            return _Attempt(Finding("reference_error", "There is no PyTorch code to compare with.")), 0
        with self._references.borrow(pytorch_code) as reference:
            if reference.failure:
                return _Attempt(reference.failure), 0
            attempt = self._best_attempt(reference, triton_code)
            if self.backend == "interpreter" and attempt.finding.verdict in ("incorrect_numerical", "incorrect_nan"):
                attempt = replace(attempt, finding=_blame_interpreter(attempt.finding, reference, triton_code))
            if attempt.finding.verdict == "verified" and self._measures():
                attempt = self._measure(reference, triton_code, attempt)
            return attempt, reference.trials

    def _best_attempt(self, reference: Reference, triton_code: str) -> _Attempt:
        """Try each way of binding the wrapper's arguments until one is right; the first one's verdict when none is."""
        first = self._attempt(reference, triton_code, binding=0)
        for binding in range(1, first.bindings):
            if first.finding.verdict not in _PERHAPS_BINDING:
                break
            other = self._attempt(reference, triton_code, binding)
            if other.finding.verdict == "verified":
                return other
        return first

    def _attempt(self, reference: Reference, triton_code: str, binding: int) -> _Attempt:
        with scratch(self._folder, "kernel") as folder:
            files = self._kernel_files(reference, triton_code, binding, mode="check")
            outcome = self._run("kernel", folder, files, self._timeout_s, self._kernel_limits(reference))
            failure = outcomes.kernel_failure(outcome, self._timeout_s)
            attempt = _Attempt(
                finding=failure or self._compare(reference, folder / kernel_task.OUTPUTS),
                contract=outcomes.contract_of(outcome),
                binding=binding,
                bindings=outcomes.binding_count(outcome),
            )
        if attempt.finding.verdict == "verified" and not outcomes.has_launched(outcome):
            detail = "The outputs are right, but no Triton kernel was launched; PyTorch computed them."
            return replace(attempt, finding=Finding("no_kernel_launch", detail))
        return attempt

    def _compare(self, reference: Reference, outputs: Path) -> Finding:
        """Compare in a fork of its own, which has run neither the reference nor the kernel."""
        task = {
            "inputs": str(reference.given / reference_task.INPUTS),
            "expected": str(reference.folder / reference_task.EXPECTED),
            "outputs": str(outputs),
        }
        limits = self._limits(_COMPARE_TIMEOUT_S, _EXTRA_FILE_BYTES)
        with scratch(self._folder, "compare") as folder:
            outcome = self._run("compare", folder, {compare.TASK: json.dumps(task)}, _COMPARE_TIMEOUT_S, limits)
        if outcome.report is None:
            return Finding("infra_error", f"The process that compares the outputs {outcomes.describe_end(outcome)}.")
        return Finding(outcome.report["verdict"], outcome.report["detail"])

    def _prepare_reference(self, pytorch_code: str) -> Reference:
        folder, given = new_folder(self._folder, "reference"), new_folder(self._folder, "given")
        task = {"mode": "prepare", "device": self.device, "given": str(given), "trials": self._trials}
        files = {reference_task.CODE: pytorch_code, reference_task.TASK: json.dumps(task)}
        outcome = self._run(
            "reference", folder, files, self._timeout_s, self._limits(self._timeout_s, _UNLIMITED_BYTES)
        )
        report = outcome.report
        if report is None and outcome.timed_out and self.backend == "interpreter":
            detail = f"The reference alone did not finish in {self._timeout_s:g} s on a CPU; judge it on a GPU."
            return Reference(folder, given, Finding("unsupported_on_cpu", detail))
        if report is None:
            detail = f"The reference's process {outcomes.describe_end(outcome)}."
            return Reference(folder, given, Finding("reference_error", detail))
        if "verdict" in report:
            return Reference(folder, given, Finding(report["verdict"], report["detail"]))
        return Reference(folder, given, **report)

    @staticmethod
    def _discard_reference(reference: Reference) -> None:
        remove(reference.folder)
        remove(reference.given)

    def _measures(self) -> bool:
        return self._timing and self.backend == "cuda"

    def _measure(self, reference: Reference, triton_code: str, attempt: _Attempt) -> _Attempt:
        """Time the reference, once a problem, and the kernel, with nothing else on the GPU."""
        with self._traffic.alone(), scratch(self._folder, "kernel") as folder:
            if reference.time_ms is None:
                task = {
                    "mode": "time",
                    "device": self.device,
                    "given": str(reference.given),
                    "class_name": reference.class_name,
                }
                limits = self._limits(self._timeout_s, _UNLIMITED_BYTES)
                files = {reference_task.TASK: json.dumps(task)}
                reference.time_ms = outcomes.time_of(
                    self._run_once("reference", reference.folder, files, self._timeout_s, limits)
                )
            files = self._kernel_files(reference, triton_code, attempt.binding, mode="time")
            limits = self._kernel_limits(reference)
            kernel_ms = outcomes.time_of(self._run_once("kernel", folder, files, self._timeout_s, limits))
        if reference.time_ms is None or kernel_ms is None:
            whose = "reference" if reference.time_ms is None else "kernel"
            detail = f"{attempt.finding.detail} The {whose} could not be timed within {self._timeout_s:g} s."
            return replace(attempt, finding=Finding("verified", detail))
        return replace(attempt, times_ms=(reference.time_ms, kernel_ms))

    def _kernel_files(self, reference: Reference, triton_code: str, binding: int, mode: str) -> dict[str, str]:
        task = {
            "mode": mode,
            "device": self.device,
            "backend": self.backend,
            "binding": binding,
            "inputs": str(reference.given / reference_task.INPUTS),
            "state": str(reference.given / reference_task.STATE),
        }
        return {kernel_task.CODE: triton_code, kernel_task.TASK: json.dumps(task)}

    def _run(self, task: str, folder: Path, files: dict[str, str], timeout_s: float, limits: Limits) -> Outcome:
        """Run a task beside others; once more, alone, when the zygote died or memory ran short: perhaps their fault."""
        try:
            with self._traffic.together():
                outcome = self._run_once(task, folder, files, timeout_s, limits)
            if not outcomes.is_short_of_memory(outcome):
                return outcome
        except ZygoteDiedError:
            pass
        with self._traffic.alone():
            return self._run_once(task, folder, files, timeout_s, limits)

    def _run_once(self, task: str, folder: Path, files: dict[str, str], timeout_s: float, limits: Limits) -> Outcome:
        if self._zygote is None:
            raise ZygoteDiedError("the judge is closed")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        return self._zygote.run(task, folder, timeout_s, limits)

    def _kernel_limits(self, reference: Reference) -> Limits:
        return self._limits(self._timeout_s, 2 * reference.bytes + _EXTRA_FILE_BYTES)

    def _limits(self, timeout_s: float, file_bytes: int) -> Limits:
        # The deadline ends a child long before its processor time does; this is for one that the zygote has lost.
        cpu_s = int(timeout_s * (os.cpu_count() or 1)) + 10
        half_of_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        return Limits(cpu_s, file_bytes, data_bytes=half_of_memory if self.backend == "interpreter" else 0)

    def _verdict(self, key: str, began: float, attempt: _Attempt, trials: int) -> Verdict:
        correct = attempt.finding.verdict == "verified"
        reference_ms, kernel_ms = attempt.times_ms or (None, None)
        speedup = reference_ms / kernel_ms if reference_ms and kernel_ms else None
        # A kernel that is wrong is not fast; of one that is right but was not timed, nobody knows.
        known = self._measures() and (speedup is not None or not correct)
        return Verdict(
            key=key,
            verdict=attempt.finding.verdict,
            correctness=correct,
            fast_0=correct,
            fast_1=(speedup is not None and speedup > 1.0) if known else None,
            fast_2=(speedup is not None and speedup >= 2.0) if known else None,
            speedup=speedup,
            reference_time_ms=reference_ms,
            kernel_time_ms=kernel_ms,
            contract=attempt.contract,
            device=self.device,
            backend=self.backend,
            isolation=ISOLATION,
            trials=trials,
            detail=attempt.finding.detail,
            wall_s=round(time.monotonic() - began, 3),
            versions=dict(self._versions),
        )


def _blame_interpreter(finding: Finding, reference: Reference, triton_code: str) -> Finding:
    """Wrong values are not held against a kernel where the interpreter itself computes wrong ones."""
    if not reference.uses_bfloat16 and "bfloat16" not in triton_code:
        return finding
    detail = f"Triton's interpreter cannot compute in bfloat16; judge this kernel on a GPU. {finding.detail}"
    return Finding("unsupported_on_cpu", detail)
