"""Finds out whether one kernel is right: calls it on trial after trial and looks at every answer.

What is tried, in this order:
- the independent draws, each in memory that was filled with NaN wherever the kernel's own code asks for uninitialised
  memory; every second draw in the very tensors of the one before, so that an answer remembered by address is wrong;
- an element-wise mixture of two draws, which no part of a remembered answer fits;
- inputs on both sides of zero and below it, where all draws were non-negative;
- inputs with many zeros, where all draws gave the same output;
- the first answer once more: a later call must not have overwritten it;
- a call in which no Triton kernel does anything: an answer that is right all the same was not the kernels' work, and
  neither is one that stands in an argument of a launch before any kernel has run.
What PyTorch's operators did in the wrapper is weighed in between, see `policy`.

Of arguments, and of what comes without kernels, a few random elements are looked at first where there are millions:
what differs there differs. Only where they agree is the rest sent, too.

Runs in the judge, which executes nothing itself. Of time it knows only that the judge's own is not the kernel's.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.verification import ends
from triton_sft_pipeline.verification.compare import compare, matches
from triton_sft_pipeline.verification.peer import Clock, Peer
from triton_sft_pipeline.verification.policy import Work, judge_operators
from triton_sft_pipeline.verification.references import Reference, Trial
from triton_sft_pipeline.verification.verdict import VERDICTS, Finding
from triton_sft_pipeline.verification.wire import ITEM_SIZE, Array, ClosedError, Value, WireError, arrays_in

RIGHT = frozenset({"verified", "verified_hybrid"})
# These would spare a kernel its verdict, and are nothing that its process can know.
_NOT_A_KERNELS = frozenset({"infra_error", "reference_error", "degenerate_task", "no_code", "unparsed"})
_CONTRACTS = ("name", "head", "v1", "ModelNew")
# An answer may hold more than an honest one before it counts as a flood: outputs of another dtype or shape.
_SPACE = 4
_MORE_SPACE = 64 << 20
# Of tensors with more elements than these, so many are looked at before the rest is.
_MANY, _FEW = 1 << 24, 1 << 16
# Bytes that are compared at a time: all of an output need not be in memory twice.
_COMPARED = 1 << 20
# More operators than these on single elements are arithmetic in disguise.
_FREE_SCALARS = 8
# What a process says that it has done beyond this is no number.
_MOST_WORK = 1e30
_FIELDS = {"output", "inputs", "arguments", "aliases", "launches", "side_launches", "compute", "copy", "scalars"} | {
    "operators"
}
_COMPUTED_BEFORE = "The answer stands in an argument before any Triton kernel has run: something else computes it."


@dataclass(frozen=True)
class Examination:
    """What was found out about one kernel with one way of binding its arguments.

    Attributes:
        finding: a right kernel's too.
        contract: the rule by which arguments were bound, None when it did not come to that.
        bindings: how many ways of binding there are.
        torch_share: share of the reference's work that PyTorch's operators did in the kernel.
    """

    finding: Finding
    contract: str | None = None
    bindings: int = 1
    torch_share: float | None = None


@dataclass(frozen=True)
class _Step:
    name: str
    trial: Trial
    reuse: bool


def examine(peer: Peer, reference: Reference, triton_code: str, binding: int, clock: Clock) -> Examination:
    """Examine a kernel in a child of its own.

    Args:
        peer: a fresh child.
        reference: the problem.
        triton_code: the kernel.
        binding: which of the possible bindings of arguments to use.
        clock: the time that all of this may take.

    Raises:
        ZygoteDiedError: the child did not end by itself.
    """
    most = _SPACE * reference.output_bytes + _MORE_SPACE
    try:
        loaded = peer.ask("load", clock, code=triton_code, binding=binding, **reference.kernel_arguments)
    except (TimeoutError, ClosedError, WireError) as error:
        return Examination(ends.finding_of(error, peer.child, clock.seconds))
    contract = loaded.get("contract") if loaded.get("contract") in _CONTRACTS else None
    count = loaded.get("bindings")
    bindings = count if isinstance(count, int) and 1 <= count <= len(_CONTRACTS) else 1

    def done(finding: Finding, torch_share: float | None = None) -> Examination:
        return Examination(finding, contract, bindings, torch_share)

    if problem := reported(loaded):
        return done(problem)
    examiner = _Examiner(peer, reference, clock, most)
    try:
        return done(*examiner.examine())
    except _JudgeLateError:
        detail = (
            f"The judge itself took over {clock.moving_s:g} s to compare outputs; nothing is known about the kernel."
        )
        return done(Finding("infra_error", detail))
    except (TimeoutError, ClosedError, WireError) as error:
        return done(ends.finding_of(error, peer.child, clock.seconds))


class _JudgeLateError(Exception):
    """The judge's own work takes too long."""


class _Examiner:
    """One kernel that is loaded, and its answers so far."""

    def __init__(self, peer: Peer, reference: Reference, clock: Clock, most: int) -> None:
        self._peer = peer
        self._reference = reference
        self._clock = clock
        self._most = most
        self._telling = _telling_trial(reference)
        self._places = {} if self._telling is None else _places(_sizes(self._telling))
        self._answers: list[dict[str, Any]] = []
        self._earlier: list[Trial] = []

    def _call(self, step: _Step) -> Finding | None:
        """Call the kernel once; what is wrong with its answer."""
        about = self._about_arguments() if step.trial is self._telling else {"sizes": ()}
        answer = self._ask("call", inputs=step.trial.inputs, reuse=step.reuse, **about)
        problem = reported(answer)
        if not problem and self._may_hold_answer(answer.get("arguments"), step.trial):
            whole = self._ask("whole")
            problem = reported(whole)
            answer["arguments"] = whole.get("arguments")
        problem = problem or _judge_answer(answer, step, self._earlier, self._reference)
        self._answers.append(answer)
        self._earlier.append(step.trial)
        return problem

    def examine(self) -> tuple[Finding, float | None]:
        """The finding, and PyTorch's share of the work."""
        for step in _steps(self._reference):
            if problem := self._call(step):
                return problem, None
        if problem := self._what_is_left():
            return problem, None
        finding, share = _judge_work(self._answers, self._reference)
        if finding.verdict in RIGHT and self._telling is not None:
            held = self._reference.is_huge and self._answers[-1]["inputs"] is None
            inputs = None if held else self._telling.inputs
            ablated = self._ask("ablate", inputs=inputs, **self._about_arguments())
            finding = self._judge_ablated(ablated, self._telling) or finding
        return finding, share

    def _judge_ablated(self, ablated: dict[str, Any], trial: Trial) -> Finding | None:
        """What an answer without kernels says of the kernel; all of it is only asked for where a part speaks for it."""
        if not self._places:
            return _without_kernels(ablated, trial, self._reference)
        few = _thinned(trial.output, self._places)
        agrees = "output" in ablated and matches(few, ablated["output"], trial.slack)
        if agrees or self._may_hold_answer(ablated.get("arguments"), trial):
            ablated = self._ask("whole")
            if problem := reported(ablated):
                return problem
        else:
            ablated.pop("output", None)
        return _without_kernels(ablated, trial, self._reference)

    def _about_arguments(self) -> dict[str, Any]:
        """What a question says about the arguments that are wanted, on the telling trial."""
        assert self._telling is not None
        places = {"places": self._places} if self._places else {}
        return {"sizes": _sizes(self._telling), **places}

    def _may_hold_answer(self, arguments: Any, trial: Trial) -> bool:
        """Whether one of which a few elements were sent agrees with an output in them."""
        pairs = [item for item in arguments if _is_pair(item)] if isinstance(arguments, tuple) else []
        slacks = [*trial.slack, *(0.0 for _ in arrays_in(trial.output))]
        return any(
            size in self._places
            and math.prod(part.shape) == size
            and _agrees(_few(part, self._places[size]), few, slack)
            for size, few in pairs
            for part, slack in zip(arrays_in(trial.output), slacks, strict=False)
        )

    def _what_is_left(self) -> Finding | None:
        """What the calls have left behind in the process, and in the first output."""
        if len(self._answers) == 1:
            return reported(self._ask("inspect"))
        recalled = self._ask("recall")
        if problem := reported(recalled):
            return problem
        first = self._answers[0]
        # What shares memory with an input may change with it.
        if not first["aliases"] and not matches(first["output"], recalled.get("output")):
            return Finding("output_alias", "A later call overwrites the output of an earlier one; allocate it anew.")
        return None

    def _ask(self, do: str, **fields: Any) -> dict[str, Any]:
        if self._clock.is_judge_late:
            raise _JudgeLateError
        return self._peer.ask(do, self._clock, self._most, **fields)


def reported(answer: dict[str, Any]) -> Finding | None:
    """The bad news that a child reports of itself; good news does not count."""
    if "verdict" not in answer:
        return None
    verdict = answer["verdict"]
    if not isinstance(verdict, str) or verdict not in VERDICTS or verdict in RIGHT | _NOT_A_KERNELS:
        return Finding("forged_result", "The kernel's process reported a verdict that it cannot know.")
    return Finding(verdict, str(answer.get("detail", "")))


def _steps(reference: Reference) -> list[_Step]:
    count = len(reference.trials)
    steps = [
        _Step(f"Trial {number} of {count}", trial, reuse=number % 2 == 0)
        for number, trial in enumerate(reference.trials, start=1)
    ]
    if reference.mixed is not None:
        steps.append(_Step("On a mixture of two draws", reference.mixed, reuse=True))
    if reference.shifted is not None:
        steps.append(_Step("On inputs on both sides of zero", reference.shifted, reuse=False))
    if reference.negative is not None:
        steps.append(_Step("On negative inputs", reference.negative, reuse=False))
    if reference.sparse is not None:
        steps.append(_Step("On inputs with many zeros", reference.sparse, reuse=False))
    return steps


def _judge_answer(answer: dict[str, Any], step: _Step, earlier: list[Trial], reference: Reference) -> Finding | None:
    if not answer.keys() >= _FIELDS:
        return Finding("forged_result", "The kernel's process sent something else than an answer.")
    wrong = compare(step.trial.output, answer["output"], step.trial.slack)
    if wrong:
        if _number(answer["side_launches"]) and wrong.verdict in ("incorrect_numerical", "incorrect_nan"):
            detail = f"{step.name}: the kernel returns before its work on another stream is done. {wrong.detail}"
            return Finding("stream_escape", detail)
        if wrong.verdict == "incorrect_numerical" and _is_old(answer["output"], earlier):
            return Finding("output_cached", f"{step.name}: the kernel returns the answer of an earlier call.")
        hint = " It may read memory that nothing has written." if wrong.verdict == "incorrect_nan" else ""
        return Finding(wrong.verdict, f"{step.name}: {wrong.detail}{hint}")
    if answer["inputs"] is not None and (step.trial.after is None or not matches(step.trial.after, answer["inputs"])):
        return Finding("input_mutated", "The kernel writes to an input that the reference leaves alone.")
    if _holds_answer(answer["arguments"], step.trial, reference):
        return Finding("torch_fallback", _COMPUTED_BEFORE)
    aliases = answer["aliases"]
    if not isinstance(aliases, tuple) or any(place not in reference.aliases for place in aliases):
        return Finding("output_alias", "The kernel returns an input's own memory, which the reference does not.")
    return None


def _is_old(output: Value, earlier: list[Trial]) -> bool:
    return any(matches(trial.output, output, trial.slack) for trial in earlier)


def _judge_work(answers: list[dict[str, Any]], reference: Reference) -> tuple[Finding, float | None]:
    launches = min(_number(answer["launches"]) for answer in answers)
    heaviest = max(answers, key=lambda answer: sum(_number(answer[kind]) for kind in ("compute", "copy", "scalars")))
    if launches < 1 and any(0 not in array.shape for array in arrays_in(reference.trials[0].output)):
        detail = "The outputs are right, but no Triton kernel was launched; PyTorch computed them."
        if any(_number(answer["launches"]) for answer in answers):
            detail = "In a later call no Triton kernel was launched; every call has to compute."
        return Finding("no_kernel_launch", detail), None
    scalars = _number(heaviest["scalars"])
    compute = _number(heaviest["compute"]) + (scalars if scalars > _FREE_SCALARS else 0.0)
    kernel = Work(compute, _number(heaviest["copy"]), _names(heaviest["operators"]))
    elements = sum(math.prod(array.shape) for array in arrays_in(reference.trials[0].output))
    # Where there is nothing to compute, no launch is as good as one.
    ruling = judge_operators(kernel, Work(reference.compute, reference.copy), max(1, int(launches)), elements)
    agreed = f"The outputs match the reference's in {_tried(len(reference.trials), len(answers))}."
    if ruling.finding is None:
        return Finding("verified", agreed), ruling.torch_share
    if ruling.finding.verdict in RIGHT:
        return Finding(ruling.finding.verdict, f"{agreed} {ruling.finding.detail}"), ruling.torch_share
    return ruling.finding, ruling.torch_share


def _tried(draws: int, calls: int) -> str:
    """`5 trials and 1 derived from them`: the first is the number that was set and that a verdict gives as `trials`."""
    independent = f"{draws} trial{'' if draws == 1 else 's'}"
    return f"{independent} and {calls - draws} derived from them" if calls > draws else independent


def _number(value: Any) -> float:
    return min(float(value), _MOST_WORK) if isinstance(value, int | float) and value >= 0 else 0.0


def _names(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, tuple) else ()


def _telling_trial(reference: Reference) -> Trial | None:
    """The trial on which doing nothing looks least like an answer; None when there is none where it does not."""
    trials = (reference.shifted, reference.sparse, reference.mixed, *reversed(reference.trials))
    return next((trial for trial in trials if trial and _is_telling(trial)), None)


def _is_telling(trial: Trial) -> bool:
    """Neither memory that happens to hold zeros nor poisoned truth values look like this output."""
    blanks = (_blank(trial.output, truth) for truth in (False, True))
    return not any(matches(trial.output, blank, trial.slack) for blank in blanks)


def _sizes(trial: Trial) -> tuple[int, ...]:
    return tuple(math.prod(array.shape) for array in arrays_in(trial.output))


def _places(sizes: tuple[int, ...]) -> dict[int, Array]:
    """Secret positions in tensors of many elements, by their number of elements."""
    import numpy as np

    random = np.random.default_rng(secrets.randbits(128))
    few = {size: random.integers(0, size, _FEW, dtype="<i8") for size in sizes if size > _MANY}
    return {size: Array("int64", (_FEW,), positions.data) for size, positions in few.items()}


def _thinned(value: Value, places: dict[int, Array]) -> Value:
    """The value with no more than these elements of each of its arrays that has so many."""
    if isinstance(value, Array):
        size = math.prod(value.shape)
        return _few(value, places[size]) if size in places else value
    if isinstance(value, tuple):
        return tuple(_thinned(item, places) for item in value)
    if isinstance(value, dict):
        return {key: _thinned(item, places) for key, item in value.items()}
    return value


def _few(array: Array, positions: Array) -> Array:
    """These elements of a dense array."""
    import numpy as np

    items = np.frombuffer(array.data, dtype=np.dtype((np.void, ITEM_SIZE[array.dtype])))
    chosen = items[np.frombuffer(positions.data, dtype="<i8")]
    return Array(array.dtype, chosen.shape, chosen.tobytes())


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int) and isinstance(item[1], Array)


def _without_kernels(ablated: dict[str, Any], trial: Trial, reference: Reference) -> Finding | None:
    if "output" in ablated and matches(trial.output, ablated["output"], trial.slack):
        detail = "The output is right even when no Triton kernel does anything: something else computes it."
        return Finding("dummy_kernel", detail)
    if _holds_answer(ablated.get("arguments"), trial, reference):
        return Finding("torch_fallback", _COMPUTED_BEFORE)
    return None


def _holds_answer(arguments: Any, trial: Trial, reference: Reference) -> bool:
    """Whether one of these arrays is, but for its shape, a part of the output that has to be computed."""
    given = [item for item in arguments if isinstance(item, Array)] if isinstance(arguments, tuple) else []
    candidates = [item for item in given if not _is_input(item, trial)]
    slacks = [*trial.slack, *(0.0 for _ in arrays_in(trial.output))]
    return any(
        not _is_flat(part) and not _is_constant(index, part, trial, reference) and _agrees(part, candidate, slack)
        for candidate in candidates
        for index, (part, slack) in enumerate(zip(arrays_in(trial.output), slacks, strict=False))
    )


def _is_input(candidate: Array, trial: Trial) -> bool:
    """Whether this is a copy of an input, made contiguous perhaps, as an output may be, too."""
    return any(_agrees(item, candidate) for item in arrays_in(trial.inputs))


def _is_constant(index: int, part: Array, trial: Trial, reference: Reference) -> bool:
    """Whether this part of the output is the same for all inputs, as positions are."""
    others = [list(arrays_in(other.output)) for other in reference.all_trials if other is not trial]
    return bool(others) and all(index < len(parts) and _agrees(part, parts[index]) for parts in others)


def _agrees(expected: Array, actual: Array, slack: float = 0.0) -> bool:
    size = math.prod(expected.shape) * ITEM_SIZE[expected.dtype]
    if expected.dtype != actual.dtype or len(actual.data) != size:
        return False
    return matches(expected, Array(expected.dtype, expected.shape, actual.data), (slack,))


def _is_flat(array: Array) -> bool:
    """Whether all elements are zero, or there are several and all are the same. Looks no further than it must."""
    size = ITEM_SIZE[array.dtype]
    data = memoryview(array.data).cast("B") if array.data else b""
    first = bytes(data[:size])
    if not any(first):
        return _repeats(data, bytes(1))
    return len(data) > size and _repeats(data, first)


def _repeats(data: memoryview | bytes, unit: bytes) -> bool:
    step = _COMPARED // len(unit) * len(unit)
    many = unit * (step // len(unit))
    return all(data[start : start + step] == many[: len(data) - start] for start in range(0, len(data), step))


def _blank(value: Value, truth: bool) -> Value:
    """Zeros in the form of this value; truth values are all `truth`."""
    if isinstance(value, Array):
        # One element that stands for all.
        size = 0 if 0 in value.shape else ITEM_SIZE[value.dtype]
        one = bytes([truth and value.dtype == "bool"]) * size
        return Array(value.dtype, value.shape, one, tuple(0 for _ in value.shape))
    if isinstance(value, tuple):
        return tuple(_blank(item, truth) for item in value)
    if isinstance(value, dict):
        return {key: _blank(item, truth) for key, item in value.items()}
    return value
