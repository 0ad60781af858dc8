"""Decides whether a Triton kernel computes what a PyTorch module computes, and how much faster it is.

What is covered:
- The verdict is made in this process, which runs neither the kernel nor the reference and reads only bytes that they
  send. The kernel's process gets the weights and one trial's inputs at a time, and nothing of the reference's code, its
  outputs or the seeds; what it says about itself may only lower the verdict.
- Every kernel has a fresh process (a fork of one that has torch and Triton loaded) in namespaces of its own where the
  machine allows it: no files but a scratch folder and the read-only interpreter, no network, no other processes, no
  environment. Elsewhere it has a session of its own and resource limits. The verdict says which.
- `examination` says what is tried for correctness, `measurement` how time is measured, `gate` what is refused unseen.

What it does NOT cover:
- A kernel that is right for every input that was tried and wrong for others, above all for other shapes.
- Code that the gate lets through and that takes over its own process: it can hide operators and launches, and so pass
  PyTorch's work off as its own, and it can forge its times. It still cannot pass a wrong answer off as a right one.
- In Triton's interpreter: TF32, limits of tiles and shared memory, races, misaligned access and speed.
- Hardware side channels, and faults of the driver that outlive a process.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification import ends
from triton_sft_pipeline.verification.compare import is_near_constant
from triton_sft_pipeline.verification.examination import RIGHT, Examination, examine
from triton_sft_pipeline.verification.gate import inspect_source
from triton_sft_pipeline.verification.lanes import Lane, Lanes
from triton_sft_pipeline.verification.measurement import Measurement, Pair, Unmeasurable, measure
from triton_sft_pipeline.verification.peer import Clock, MovingTimeoutError, Peer
from triton_sft_pipeline.verification.references import Reference, ReferenceCache, Trial
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient, ZygoteDiedError
from triton_sft_pipeline.verification.sandbox.confine import Limits
from triton_sft_pipeline.verification.sandbox.leftovers import remove_folder
from triton_sft_pipeline.verification.speedup import flags
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.verdict import Finding, JudgeItem, Verdict
from triton_sft_pipeline.verification.wire import ClosedError, WireError, arrays_in

# On an H200 with 16 processors more of them were slower: see docs/judge.md.
_MAX_WORKERS = 12
# Room for a kernel's compiled code, and for what it writes.
_FILE_BYTES = 256 << 20
# Processes that a kernel's may have: Triton starts a compiler and an assembler.
_PROCESSES = 64
_COMPILE_BASELINE_S = 120.0
# A reference is run some more times than a kernel, and in two precisions.
_REFERENCE_TIMES = 2
# After these, another way of binding the arguments may do better.
_PERHAPS_BINDING = frozenset(
    {"runtime_error", "compile_error", "input_mutated", "incorrect_structure", "incorrect_shape", "incorrect_dtype"}
    | {"incorrect_nan", "incorrect_numerical", "crash"}
)


@dataclass(frozen=True)
class _Decision:
    """Everything that was found out about one kernel."""

    examination: Examination
    trials: int = 0
    measurement: Measurement | None = None


class KernelJudge:
    """Judges kernels. A context manager: its processes and files are gone when the block ends.

    Args:
        device: "cuda", "cpu" (Triton's interpreter: no speed), or "auto" for the GPU when there is one.
        workers: kernels judged at a time; None for one a processor, at most 12. Measurements always run alone.
        timeout_s: seconds that a kernel may take for all trials, compilation included; the same again for its
            measurement. What the judge itself does with inputs and outputs is not counted, and has a limit that grows
            with their size.
        trials: independent draws of the inputs that are compared. A problem whose inputs are gigabytes gets fewer.
        timing: measure speedups; only ever done on a GPU.
        compile_baseline: also measure the reference under torch.compile; takes many seconds a kernel.
        models: repositories of the Hub ("owner/name") that problems and kernels may load, where the local cache holds
            them; nothing is ever fetched.

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
        compile_baseline: bool = False,
        models: Sequence[str] = (),
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
        self._compile_baseline = compile_baseline
        self._models = tuple(models)
        self._traffic = Traffic(batch=max(1, self.workers // 2))
        self._references = ReferenceCache()
        self._huge = threading.Lock()
        self._zygote: ZygoteClient | None = None

    def __enter__(self) -> KernelJudge:
        if self._zygote is not None:
            raise PipelineError("This judge is in use: leave its block before entering it again.")
        self._folder = Path(tempfile.mkdtemp(prefix="triton-sft-judge-"))
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="judge")
        self._lanes = Lanes([])
        try:
            self._zygote = zygote = ZygoteClient(self._device, self._folder, self._models)
            zygote.wait_ready()
            self.backend, self.isolation, self._versions = zygote.backend, zygote.isolation, zygote.versions
            self.isolation_reason = zygote.isolation_reason
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.device = "cuda" if self.backend == "cuda" else "cpu"
        traffic = self._traffic if self.backend == "cuda" else None
        self._lanes = Lanes([Lane(zygote, self._limits(), traffic) for _ in range(self.workers)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zygote is not None:
            # Without a zygote, what is still being judged ends at once.
            self._zygote.close()
        self._pool.shutdown(cancel_futures=True)
        self._lanes.close()
        self._zygote = None
        remove_folder(self._folder)

    def verify(self, pytorch_code: str | None, triton_code: str | None, key: str = "") -> Verdict:
        """Judge one kernel. Safe to call from several threads.

        Args:
            pytorch_code: the problem, in KernelBench's format.
            triton_code: the kernel.
            key: comes back in the verdict.

        Returns:
            The verdict. Whatever is wrong with the kernel, or with the problem, is one, and not an exception.

        Raises:
            PipelineError: the judge's block was not entered.
        """
        if self._zygote is None:
            raise PipelineError("Use the judge as a context manager: with KernelJudge() as judge: ...")
        began = time.monotonic()
        triton_code = triton_code if isinstance(triton_code, str) else None
        refused = inspect_source(triton_code)
        if refused is not None or triton_code is None:
            decision = _Decision(Examination(refused or Finding("no_code", "There is no kernel code.")))
        elif not isinstance(pytorch_code, str) or not pytorch_code:
            decision = _Decision(Examination(Finding("reference_error", "There is no PyTorch code to compare with.")))
        else:
            decision = self._decide_patiently(pytorch_code, triton_code)
        return self._verdict(key, began, decision)

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

    def _decide_patiently(self, pytorch_code: str, triton_code: str) -> _Decision:
        """Decide; once more with nothing beside when memory ran out or the zygote died: others may have caused it."""
        decision = None
        with self._lanes.take() as lane:
            try:
                # On a GPU the children themselves ask for their turns.
                with nullcontext() if self.backend == "cuda" else self._traffic.together():
                    decision = self._decide(lane, pytorch_code, triton_code, alone=False)
            except (ZygoteDiedError, OSError):
                lane.close()
            if decision is not None and decision.examination.finding.verdict != "resource_limit":
                return decision
            try:
                with self._traffic.alone():
                    return self._decide(lane, pytorch_code, triton_code, alone=True)
            except ZygoteDiedError as error:
                lane.close()
                detail = f"The judge's own processes failed twice while this kernel ran, once alone: {error}."
                return _Decision(Examination(Finding("infra_error", detail)))
            except OSError as error:
                detail = f"The judge could not read or write its files: {error}."
                return _Decision(Examination(Finding("infra_error", detail)))

    def _decide(self, lane: Lane, pytorch_code: str, triton_code: str, alone: bool) -> _Decision:
        prepare = partial(self._prepare, lane, alone=alone)
        with self._references.borrow(pytorch_code, prepare, wait=not alone) as reference, ExitStack() as held:
            if reference.failure:
                return _Decision(Examination(reference.failure))
            if reference.is_huge and not alone:
                # Two of them at once would not fit.
                held.enter_context(self._huge)
            decision = self._decide_with_binding(lane, pytorch_code, reference, triton_code, 0, alone)
            for binding in range(1, decision.examination.bindings):
                if decision.examination.finding.verdict not in _PERHAPS_BINDING:
                    break
                other = self._decide_with_binding(lane, pytorch_code, reference, triton_code, binding, alone)
                if other.examination.finding.verdict in RIGHT:
                    decision = other
            if self.backend == "interpreter":
                decision = _blame_interpreter(decision, reference, triton_code)
            return decision

    def _decide_with_binding(
        self, lane: Lane, pytorch_code: str, reference: Reference, triton_code: str, binding: int, alone: bool
    ) -> _Decision:
        """One attempt in a process of its own, and its measurement when the kernel is right."""
        with lane.kernel() as peer:
            peer.alone = alone
            clock = Clock(self._timeout_s, reference.moving_s)
            examination = examine(peer, reference, triton_code, binding, clock)
            if examination.finding.verdict not in RIGHT or not self._measures():
                return _Decision(examination, len(reference.trials))
            return self._measure(lane, peer, pytorch_code, reference, examination, alone)

    def _measure(
        self, lane: Lane, peer: Peer, pytorch_code: str, reference: Reference, examination: Examination, alone: bool
    ) -> _Decision:
        trials = len(reference.trials)
        limit_s = self._timeout_s + (_COMPILE_BASELINE_S if self._compile_baseline else 0.0)
        clock = Clock(limit_s, reference.moving_s)
        try:
            beside = lane.reference()
            beside.alone = alone
            pair = Pair(peer, beside, reference, pytorch_code, clock)
            result = measure(pair, Traffic() if alone else self._traffic, self._compile_baseline)
        except (ClosedError, WireError) as error:
            result = ends.finding_of(error, peer.child, clock.seconds)
        except (Unmeasurable, TimeoutError) as error:
            lane.drop_reference()
            detail = f"{examination.finding.detail} It could not be measured: {error or 'time ran out'}."
            return _Decision(replace(examination, finding=Finding(examination.finding.verdict, detail)), trials)
        if isinstance(result, Finding):
            return _Decision(replace(examination, finding=result), trials)
        if self._compile_baseline:
            lane.drop_reference()
        return _Decision(examination, trials, result)

    def _prepare(self, lane: Lane, pytorch_code: str, alone: bool) -> Reference:
        limit_s = _REFERENCE_TIMES * self._timeout_s
        # How large it is nobody knows yet.
        clock = Clock(limit_s, limit_s)
        try:
            peer = lane.reference()
            peer.alone = alone
            answer = peer.ask("load", clock, None, code=pytorch_code, trials=self._trials)
        except MovingTimeoutError:
            lane.drop_reference()
            detail = f"Moving the problem's inputs and outputs took over {limit_s:g} s; no kernel was run."
            return Reference(failure=Finding("infra_error", detail))
        except TimeoutError:
            lane.drop_reference()
            if self.backend == "interpreter":
                detail = f"The reference alone did not finish in {limit_s:g} s on a CPU; judge it on a GPU."
                return Reference(failure=Finding("unsupported_on_cpu", detail))
            return Reference(failure=Finding("reference_error", f"It did not finish in {limit_s:g} s."))
        except (ClosedError, WireError) as error:
            end = peer.child.end(5.0)
            lane.drop_reference()
            if end is not None and end.signal == "SIGKILL" and not alone:
                # Nobody kills a reference but the system when memory runs out, which may be another's fault.
                raise ZygoteDiedError("the reference's process was killed") from error
            how = f"hung up ({error})" if end is None else ends.describe(end)
            return Reference(failure=Finding("reference_error", f"The reference's process {how}."))
        if answer.get("dirty"):
            lane.drop_reference()
        if answer.get("verdict") == "resource_limit":
            if not alone:
                raise ZygoteDiedError("the reference ran out of memory beside others")
            answer["verdict"] = "reference_error"
        return _without_degenerate(Reference.from_answer(answer))

    def _measures(self) -> bool:
        return self._timing and self.backend == "cuda"

    def _limits(self) -> dict[str, Limits]:
        # The judge's clock ends a child long before its processor time does; this is for one that was lost.
        cpu_s = int(self._timeout_s * 2 * (os.cpu_count() or 1)) + 60
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Drivers map far more than they use.
        data = memory // 2 if self.backend == "interpreter" else 0
        kernel = Limits(cpu_s=cpu_s, file_bytes=_FILE_BYTES, data_bytes=data, processes=_PROCESSES)
        # A reference's process serves many problems.
        return {"kernel": kernel, "reference": replace(kernel, cpu_s=1 << 30)}

    def _verdict(self, key: str, began: float, decision: _Decision) -> Verdict:
        examination, measured = decision.examination, decision.measurement
        correct = examination.finding.verdict in RIGHT
        times = measured.speedup if measured else None
        fast_1, fast_2 = flags(times.low) if times else (None, None)
        if not correct and self._measures():
            # A kernel that is wrong is not fast; of one that is right but was not measured, nobody knows.
            fast_1 = fast_2 = False
        return Verdict(
            key=key,
            verdict=examination.finding.verdict,
            correctness=correct,
            fast_0=correct,
            fast_1=fast_1,
            fast_2=fast_2,
            speedup=times.point if times else None,
            speedup_low=times.low if times else None,
            speedup_high=times.high if times else None,
            reference_time_ms=times.reference_ms if times else None,
            reference_iqr_ms=times.reference_iqr_ms if times else None,
            kernel_time_ms=times.kernel_ms if times else None,
            kernel_iqr_ms=times.kernel_iqr_ms if times else None,
            compile_time_ms=measured.compile_ms if measured else None,
            compile_speedup=measured.compile_speedup if measured else None,
            launch_bound=measured.launch_bound if measured else None,
            graph_speedup=measured.graph_speedup if measured else None,
            torch_share=examination.torch_share,
            contract=examination.contract,
            device=self.device,
            backend=self.backend,
            isolation=self.isolation,
            trials=decision.trials,
            detail=examination.finding.detail,
            wall_s=round(time.monotonic() - began, 3),
            versions=dict(self._versions),
        )


def _without_degenerate(reference: Reference) -> Reference:
    """A problem whose output does not depend on its inputs proves nothing about a kernel."""
    trials = reference.all_trials
    if reference.failure or len(trials) < 2:
        return reference
    if _inputs_vary(trials) and is_near_constant([trial.output for trial in trials]):
        detail = "The reference's output is the same for all inputs that were drawn; any constant would pass."
        return Reference(failure=Finding("degenerate_task", detail))
    return reference


def _inputs_vary(trials: list[Trial]) -> bool:
    first = [array.data for array in arrays_in(trials[0].inputs)]
    return any([array.data for array in arrays_in(trial.inputs)] != first for trial in trials[1:])


def _blame_interpreter(decision: _Decision, reference: Reference, triton_code: str) -> _Decision:
    """Wrong values are not held against a kernel where the interpreter itself computes wrong ones."""
    finding = decision.examination.finding
    if finding.verdict not in ("incorrect_numerical", "incorrect_nan"):
        return decision
    if not reference.uses_bfloat16 and "bfloat16" not in triton_code:
        return decision
    detail = f"Triton's interpreter cannot compute in bfloat16; judge this kernel on a GPU. {finding.detail}"
    return replace(decision, examination=replace(decision.examination, finding=Finding("unsupported_on_cpu", detail)))
