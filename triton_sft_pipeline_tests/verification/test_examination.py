"""What is said of a kernel follows from the bytes that its process sends, and never from what it claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from triton_sft_pipeline.verification import VERDICTS, examination, references
from triton_sft_pipeline.verification.examination import RIGHT, Examination, examine, reported
from triton_sft_pipeline.verification.peer import Clock
from triton_sft_pipeline.verification.references import Reference
from triton_sft_pipeline.verification.wire import Array
from triton_sft_pipeline_tests.verification.peers import Answer, Doubler, ScriptedPeer, array, doubling, numbers, trial

Change = Callable[[int, Answer], Answer]


def examined(child: Doubler, reference: Reference | None = None) -> Examination:
    return examine(ScriptedPeer(child), reference or doubling(), "code", 0, Clock(10.0))  # type: ignore[arg-type]


def verdict_of(change: Change, reference: Reference | None = None) -> str:
    return examined(Doubler(change), reference).finding.verdict


def always(**fields: Any) -> Change:
    return lambda number, answer: answer | fields


def in_call(wanted: int, **fields: Any) -> Change:
    return lambda number, answer: answer | (fields if number == wanted else {})


def test_an_honest_kernel_is_verified_in_every_trial() -> None:
    peer = ScriptedPeer(Doubler())
    reference = doubling(shifted=trial([0.5, -0.5, 1.5]), negative=trial([-1.0, -2.0, -3.0]))
    found = examine(peer, reference, "code", 0, Clock(10.0))  # type: ignore[arg-type]
    assert found == Examination(found.finding, "name", 1, 0.0)
    assert found.finding.verdict == "verified"
    assert found.finding.detail == "The outputs match the reference's in 2 trials and 3 derived from them."
    assert peer.names() == ["load", *["call"] * 5, "recall", "ablate"]


def test_the_code_is_loaded_with_what_the_problem_offers_and_nothing_else() -> None:
    peer = ScriptedPeer(Doubler())
    arguments = {"state": {}, "available": {"input_count": 1}, "init_inputs": None}
    examine(peer, doubling(kernel_arguments=arguments), "the code", 2, Clock(10.0))  # type: ignore[arg-type]
    assert peer.asked[0] == ("load", {"code": "the code", "binding": 2, **arguments})


def test_every_second_draw_and_the_mixture_come_in_the_tensors_of_the_call_before() -> None:
    peer = ScriptedPeer(Doubler())
    draws = ([1.0], [2.0], [3.0], [4.0])
    examine(peer, doubling(draws, shifted=trial([-1.0])), "code", 0, Clock(10.0))  # type: ignore[arg-type]
    calls = [fields for name, fields in peer.asked if name == "call"]
    assert [fields["reuse"] for fields in calls] == [False, True, False, True, True, False]
    assert [float(numbers(fields["inputs"][0])[0]) for fields in calls[:4]] == [1.0, 2.0, 3.0, 4.0]


def test_the_kernel_is_never_sent_an_output_of_the_reference() -> None:
    peer = ScriptedPeer(Doubler())
    reference = doubling()
    examine(peer, reference, "code", 0, Clock(10.0))  # type: ignore[arg-type]
    sent = [item.data for _, fields in peer.asked for item in fields.get("inputs", ())]
    assert len(sent) == 4
    assert not {bytes(data) for data in sent} & {bytes(item.output.data) for item in reference.all_trials}  # type: ignore[union-attr]


def one_too_many(number: int, answer: Answer) -> Answer:
    return answer | {"output": array([*numbers(answer["output"]), 0.0])}


def off_by(error: float) -> Change:
    return lambda number, answer: answer | {"output": array(numbers(answer["output"]) + error)}


WRONG = {
    "values": (off_by(0.1), "incorrect_numerical"),
    "another shape": (one_too_many, "incorrect_shape"),
    "another dtype": (
        lambda number, answer: answer | {"output": array(numbers(answer["output"]), "float64")},
        "incorrect_dtype",
    ),
    "NaN": (off_by(math.nan), "incorrect_nan"),
    "a tuple": (lambda number, answer: answer | {"output": (answer["output"],)}, "incorrect_structure"),
    "nothing": (always(output=None), "incorrect_structure"),
    "no launch": (always(launches=0), "no_kernel_launch"),
    "no launch in the second call": (in_call(1, launches=0), "no_kernel_launch"),
    "launches less than none": (always(launches=-5), "no_kernel_launch"),
    "launches that are no number": (always(launches="many"), "no_kernel_launch"),
    "NaN launches": (always(launches=math.nan), "no_kernel_launch"),
    "inputs written to": (in_call(1, inputs=(array([0.0, 0.0, 0.0]),)), "input_mutated"),
    "inputs of another structure": (always(inputs=7), "input_mutated"),
    "memory of an input": (always(aliases=(0,)), "output_alias"),
    "aliases in the last call": (in_call(2, aliases=(3,)), "output_alias"),
    "aliases that are no tuple": (always(aliases=0), "output_alias"),
    "aliases that are nothing": (always(aliases=None), "output_alias"),
    "operators that do the work": (always(compute=3.0, operators=("aten.mul",)), "torch_fallback"),
    "operators in one call": (in_call(2, compute=3.0, operators=("aten.mul",)), "torch_fallback"),
    "arithmetic on single elements": (always(scalars=9), "torch_fallback"),
    "work without an end": (always(compute=math.inf), "torch_fallback"),
    "an answer in an argument": (lambda number, answer: answer | {"arguments": (answer["output"],)}, "torch_fallback"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    change, verdict = WRONG[name]
    assert verdict_of(change) == verdict
    assert verdict in VERDICTS


def test_a_wrong_trial_is_named_and_ends_the_examination() -> None:
    peer = ScriptedPeer(Doubler(in_call(1, output=array([0.0, 0.0, 0.0]))))
    found = examine(peer, doubling(), "code", 0, Clock(10.0))  # type: ignore[arg-type]
    assert found.finding.detail.startswith("Trial 2 of 2: ")
    assert found.contract == "name" and found.torch_share is None
    assert peer.names() == ["load", "call", "call"]


def test_a_few_operations_on_single_elements_are_free_and_light_operators_make_a_hybrid() -> None:
    assert verdict_of(always(scalars=8)) == "verified"
    found = examined(Doubler(in_call(0, compute=1.0, operators=("aten.sum",))))
    assert found.finding.verdict == "verified_hybrid" and "aten.sum" in found.finding.detail
    assert found.torch_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_each_kind_of_trial_decides(number: int) -> None:
    reference = doubling(shifted=trial([-1.0, 0.5]), sparse=trial([0.0, 3.0]))
    found = examined(Doubler(in_call(number, output=array([9.0, 9.0, 9.0] if number < 3 else [9.0, 9.0]))), reference)
    places = ["Trial 1 of 2", "Trial 2 of 2", "On a mixture of two draws", "On inputs on both sides", "many zeros"]
    assert found.finding.verdict == "incorrect_numerical"
    assert places[number] in found.finding.detail


def test_an_earlier_answer_for_new_inputs_is_a_cached_one() -> None:
    first = array([2.0, -4.0, 6.0])
    found = examined(Doubler(always(output=first)))
    assert found.finding.verdict == "output_cached" and "Trial 2" in found.finding.detail


@pytest.mark.parametrize("change", [off_by(0.1), off_by(math.nan)])
def test_a_wrong_output_with_work_on_another_stream_has_escaped(change: Change) -> None:
    found = examined(Doubler(lambda number, answer: change(number, answer) | {"side_launches": 2})).finding
    assert found.verdict == "stream_escape"
    assert found.detail.startswith("Trial 1 of 2: ") and "on another stream" in found.detail


def test_an_old_answer_with_work_on_another_stream_has_escaped_too() -> None:
    assert verdict_of(always(output=array([2.0, -4.0, 6.0]), side_launches=1)) == "stream_escape"


def test_a_right_output_with_work_on_another_stream_was_waited_for() -> None:
    assert verdict_of(always(side_launches=3)) == "verified"


def test_only_work_on_another_stream_in_the_wrong_call_itself_counts() -> None:
    def earlier(number: int, answer: Answer) -> Answer:
        return answer | ({"side_launches": 3} if number == 0 else {"output": array([9.0] * 3)})

    assert verdict_of(earlier) == "incorrect_numerical"


@pytest.mark.parametrize("side_launches", [0, -1, math.nan, "many", None, ({},)])
def test_no_number_of_launches_on_another_stream_excuses_or_explains_a_wrong_output(side_launches: Any) -> None:
    wrong = lambda number, answer: off_by(0.1)(number, answer) | {"side_launches": side_launches}  # noqa: E731
    assert verdict_of(wrong) == "incorrect_numerical"


def test_nan_in_an_output_comes_with_a_hint_at_memory_that_was_not_written() -> None:
    found = examined(Doubler(in_call(2, output=array([math.nan, 0.0, 0.0]))))
    assert found.finding.verdict == "incorrect_nan"
    assert "memory that nothing has written" in found.finding.detail


def test_what_the_reference_does_to_its_inputs_the_kernel_may_do_too() -> None:
    draw, after = [1.0, 2.0], (array([0.0, 2.0]),)
    reference = Reference(trials=(trial(draw, after),), aliases=(0,), compute=2.0)
    assert verdict_of(always(inputs=after, aliases=(0,)), reference) == "verified"
    assert verdict_of(always(), reference) == "verified"
    assert verdict_of(always(inputs=(array([1.0, 0.0]),)), reference) == "input_mutated"
    assert verdict_of(always(aliases=(0, 1)), reference) == "output_alias"


class Forgetful(Doubler):
    """Has something else in the memory of its first output by the end, and fails or lies when it is asked."""

    def __init__(self, answer: Any, change: Change = lambda number, answer: answer) -> None:
        super().__init__(change)
        self._answer = answer

    def recall(self) -> Answer:
        return dict(self._answer)


def test_an_output_that_a_later_call_overwrites_is_an_alias() -> None:
    for output in (array([0.0, 0.0, 0.0]), array([2.0]), None):
        assert examined(Forgetful({"output": output})).finding.verdict == "output_alias"
    assert examined(Forgetful({})).finding.verdict == "output_alias"


def test_an_output_in_the_memory_of_an_input_may_change_with_it() -> None:
    reference = Reference(trials=(trial([1.0]), trial([2.0])), aliases=(0,), compute=1.0)
    assert examined(Forgetful({"output": array([4.0])}, always(aliases=(0,))), reference).finding.verdict == "verified"
    assert examined(Forgetful({"output": array([4.0])}), reference).finding.verdict == "output_alias"


def test_what_is_found_at_the_end_counts() -> None:
    found = examined(Forgetful({"verdict": "thread_leak", "detail": "A thread."}))
    assert (found.finding.verdict, found.finding.detail) == ("thread_leak", "A thread.")


class Idle(Doubler):
    """Gives some answer when no Triton kernel does anything."""

    def __init__(self, answer: Callable[[Any], Answer]) -> None:
        super().__init__()
        self._answer = answer

    def ablate(self, inputs: Any, sizes: tuple[int, ...]) -> Answer:
        return self._answer(array(2 * numbers(inputs[0])))


ABLATED: dict[str, tuple[Callable[[Any], Answer], str]] = {
    "the right output": (lambda right: {"output": right, "arguments": ()}, "dummy_kernel"),
    "the right output, raised too": (lambda right: {"output": right, "raised": "KeyError"}, "dummy_kernel"),
    "an argument of a launch": (lambda right: {"output": None, "arguments": (right,)}, "torch_fallback"),
    "an argument and no output": (lambda right: {"raised": "KeyError", "arguments": (3, right)}, "torch_fallback"),
    "an argument of another shape": (
        lambda right: {"arguments": (Array("float32", (1, *right.shape), right.data),)},
        "torch_fallback",
    ),
    "an argument of another dtype": (
        lambda right: {"arguments": (Array("int32", right.shape, right.data),)},
        "verified",
    ),
    "another output": (lambda right: {"output": array([0.0] * 3), "arguments": ()}, "verified"),
    "an exception": (lambda right: {"raised": "KeyError", "arguments": ()}, "verified"),
    "nothing": (lambda right: {}, "verified"),
    "arguments that are none": (lambda right: {"arguments": {"a": 1}}, "verified"),
}


@pytest.mark.parametrize("name", ABLATED)
def test_a_call_without_kernels_shows_who_does_the_work(name: str) -> None:
    answer, verdict = ABLATED[name]
    assert examined(Idle(answer)).finding.verdict == verdict


def test_an_argument_that_is_the_same_all_over_gives_nothing_away() -> None:
    filled = lambda number, answer: answer | {"arguments": (array([2.0, 2.0]),)}  # noqa: E731
    assert verdict_of(filled, doubling(([1.0, 1.0], [1.0, 1.0]))) == "verified"


def test_an_output_of_zeros_proves_nothing_without_kernels() -> None:
    peer = ScriptedPeer(Doubler())
    reference = doubling(([0.0, 0.0], [0.0, 0.0]))
    assert examine(peer, reference, "code", 0, Clock(10.0)).finding.verdict == "verified"  # type: ignore[arg-type]
    assert "ablate" not in peer.names()


def test_the_trial_that_looks_least_like_zeros_is_repeated_without_kernels() -> None:
    peer = ScriptedPeer(Doubler())
    reference = doubling(([0.0, 0.0], [1.0, 2.0]), mixed=trial([0.0, 0.0]))
    examine(peer, reference, "code", 0, Clock(10.0))  # type: ignore[arg-type]
    (fields,) = [fields for name, fields in peer.asked if name == "ablate"]
    assert fields == {"inputs": reference.trials[1].inputs, "sizes": (2,)}


def test_inputs_of_gigabytes_are_not_sent_again_to_be_called_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_HUGE_BYTES", 16)
    for draws, expected in ((([1.0, 2.0, 3.0],), None), (([1.0],), array([1.0]))):
        peer = ScriptedPeer(Doubler())
        reference = Reference(trials=tuple(map(trial, draws)), compute=3.0)
        examine(peer, reference, "code", 0, Clock(10.0))  # type: ignore[arg-type]
        (fields,) = [fields for name, fields in peer.asked if name == "ablate"]
        assert fields["inputs"] == (None if expected is None else (expected,))


def test_an_empty_output_needs_no_launch() -> None:
    assert verdict_of(always(launches=0), doubling(([], []), compute=0.0)) == "verified"


def test_no_launch_is_told_by_whether_there_ever_was_one() -> None:
    never = examined(Doubler(always(launches=0))).finding.detail
    once = examined(Doubler(in_call(1, launches=0))).finding.detail
    assert "PyTorch computed them" in never and "every call has to compute" in once


@pytest.mark.parametrize("field", sorted(Doubler().call((array([1.0]),), False, ()).keys()))
def test_an_answer_without_a_field_is_no_answer(field: str) -> None:
    found = verdict_of(lambda number, answer: {name: value for name, value in answer.items() if name != field})
    assert found == "forged_result"


@pytest.mark.parametrize("verdict", ["verified", "verified_hybrid", "excellent", "", 7, None, True, ("verified",)])
def test_a_child_that_reports_what_it_cannot_know_forges(verdict: Any) -> None:
    news = {"verdict": verdict, "detail": "I am right."}
    assert verdict_of(always(**news)) == "forged_result"
    assert examined(Forgetful(news)).finding.verdict == "forged_result"

    class Boaster(Doubler):
        def load(self, **fields: Any) -> Answer:
            return super().load() | news

    assert examined(Boaster()).finding.verdict == "forged_result"


def test_bad_news_that_a_child_reports_counts() -> None:
    assert reported({"output": 1}) is None
    for verdict in ("runtime_error", "compile_error", "lazy_output"):
        found = reported({"verdict": verdict, "detail": "why"})
        assert found is not None and (found.verdict, found.detail) == (verdict, "why")
    silent = reported({"verdict": "crash"})
    assert silent is not None and silent.detail == ""


LIES: dict[str, tuple[Answer, tuple[str | None, int]]] = {
    "a rule that does not exist": ({"contract": "the best", "bindings": 1}, (None, 1)),
    "a rule of another type": ({"contract": array([1.0]), "bindings": 1}, (None, 1)),
    "many bindings": ({"contract": "v1", "bindings": 10**9}, ("v1", 1)),
    "less than no bindings": ({"contract": "head", "bindings": -1}, ("head", 1)),
    "bindings of another type": ({"contract": "name", "bindings": "3"}, ("name", 1)),
    "nothing": ({}, (None, 1)),
    "the truth": ({"contract": "ModelNew", "bindings": 3}, ("ModelNew", 3)),
}


@pytest.mark.parametrize("name", LIES)
def test_what_a_child_says_of_its_arguments_is_believed_within_reason(name: str) -> None:
    answer, expected = LIES[name]

    class Liar(Doubler):
        def load(self, **fields: Any) -> Answer:
            return answer

    found = examined(Liar())
    assert (found.contract, found.bindings) == expected
    assert found.finding.verdict in RIGHT


HOSTILE: dict[str, dict[str, Any]] = {
    "a dictionary among aliases": {"aliases": ({},)},
    "an array among aliases": {"aliases": (Array("uint8", (1,), memoryview(bytearray(1))),)},
    "operators that are no tuple": {"operators": 3},
    "operators that are nothing": {"operators": None},
    "infinite launches": {"launches": math.inf},
    "infinite work": {"compute": math.inf, "copy": math.nan, "scalars": -math.inf},
    "operators that are no texts": {"operators": (array([1.0]), {}, None), "compute": 1e300},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_makes_the_judge_fail(name: str) -> None:
    assert verdict_of(always(**HOSTILE[name])) in VERDICTS


class Partial(Doubler):
    """A child that sends a few elements of what is large, and all of it when it is asked.

    Args:
        held: what it has in an argument of the first launch; `without` what it gives without kernels.
    """

    def __init__(self, held: Any, without: Any) -> None:
        super().__init__()
        self._held, self._without = array(held), array(without)
        self._whole: Answer = {}

    def call(self, inputs: Any, reuse: bool, sizes: tuple[int, ...], places: Any = None) -> Answer:
        self._whole = {"arguments": (self._held,)}
        return super().call(inputs, reuse, sizes) | ({"arguments": (self._few(self._held, places),)} if sizes else {})

    def ablate(self, inputs: Any, sizes: tuple[int, ...], places: Any = None) -> Answer:
        self._whole = {"output": self._without, "arguments": (self._held,)}
        return {"output": self._few(self._without, places)[1], "arguments": (self._few(self._held, places),)}

    def whole(self) -> Answer:
        return self._whole

    def _few(self, value: Any, places: Any) -> Any:
        chosen = numbers(value)[numbers(places[len(numbers(value))])]
        return len(numbers(value)), array(chosen)


DRAW = [1.0, -2.0, 3.0, 4.0, 5.0]
RIGHT_ANSWER = [2.0, -4.0, 6.0, 8.0, 10.0]
NOTHING = [math.nan] * 5
PARTIAL = {
    "an honest kernel": (NOTHING, NOTHING, "verified", 0),
    "right without kernels": (NOTHING, RIGHT_ANSWER, "dummy_kernel", 1),
    "the answer in an argument": (RIGHT_ANSWER, NOTHING, "torch_fallback", 1),
    "right but for what was not looked at": (NOTHING, [*RIGHT_ANSWER[:4], 0.0], "verified", 1),
    "another value in what was not looked at": ([*RIGHT_ANSWER[:4], 0.0], NOTHING, "verified", 2),
    "other values": ([0.0, *RIGHT_ANSWER[1:]], NOTHING, "verified", 0),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_of_large_tensors_all_is_looked_at_only_where_a_part_agrees(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    held, without, verdict, asked = PARTIAL[name]
    monkeypatch.setattr(examination, "_MANY", 4)
    # Of five elements the last one is not looked at.
    places = {5: array([0, 1, 2, 3], "int64")}
    monkeypatch.setattr(examination, "_places", lambda sizes: {size: places[size] for size in sizes})
    peer = ScriptedPeer(Partial(held, without))
    reference = Reference(trials=(trial(DRAW),), compute=5.0)
    found = examine(peer, reference, "code", 0, Clock(10.0))  # type: ignore[arg-type]
    assert found.finding.verdict == verdict, found.finding
    assert peer.names().count("whole") == asked


def test_bad_news_instead_of_the_whole_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_MANY", 4)
    for child in (Partial(RIGHT_ANSWER, NOTHING), Partial(NOTHING, RIGHT_ANSWER)):
        child.whole = lambda: {"verdict": "resource_limit", "detail": "Too large."}  # type: ignore[method-assign]
        peer = ScriptedPeer(child)
        found = examine(peer, Reference(trials=(trial(DRAW),), compute=5.0), "code", 0, Clock(10.0))  # type: ignore[arg-type]
        assert found.finding.verdict == "resource_limit"


def test_where_it_is_looked_nobody_can_know() -> None:
    (first,), (second,) = (examination._places((10, 1 << 25)).values() for _ in range(2))
    positions = numbers(first)
    assert len(set(positions.tolist())) > 65000 and 0 <= positions.min() < 1 << 20 < positions.max() < 1 << 25
    assert bytes(first.data) != bytes(second.data)
    assert examination._places((10, 1 << 24)) == {}


class Slow(Clock):
    """A clock of a judge that is never done in time."""

    is_judge_late = True


def test_a_judge_that_is_late_says_nothing_about_the_kernel() -> None:
    found = examine(ScriptedPeer(Doubler()), doubling(), "code", 0, Slow(10.0, 158.0)).finding  # type: ignore[arg-type]
    assert found.verdict == "infra_error" and "158 s" in found.detail and "nothing is known" in found.detail


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        ([], True),
        ([0.0], True),
        ([1.0], False),
        ([1.0, 1.0], True),
        ([0.0] * 400_000, True),
        ([2.0] * 400_000, True),
        ([2.0] * 400_000 + [3.0], False),
        ([0.0] * 400_000 + [3.0], False),
    ],
    ids=["nothing", "zero", "one", "ones", "zeros", "twos", "a three after twos", "a three after zeros"],
)
def test_an_array_is_flat_when_all_of_it_is_alike(values: list[float], flat: bool) -> None:
    assert examination._is_flat(array(values)) is flat
