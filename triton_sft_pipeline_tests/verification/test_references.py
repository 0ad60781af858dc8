"""References are prepared once, and forgotten when there are too many, but never while somebody uses them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from triton_sft_pipeline.verification import references
from triton_sft_pipeline.verification.references import Reference, ReferenceCache, Trial
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline_tests.verification.peers import array


class Preparations:
    """Makes references and remembers of which codes."""

    def __init__(self, elements: int = 1) -> None:
        self.codes: list[str] = []
        self._elements = elements

    def __call__(self, code: str) -> Reference:
        self.codes.append(code)
        return Reference(trials=(Trial((), array([0.0] * self._elements)),), class_name=code)


def borrow(cache: ReferenceCache, prepare: Preparations, *codes: str) -> None:
    for code in codes:
        with cache.borrow(code, prepare) as reference:
            assert reference.class_name == code


def test_the_reference_used_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MAX_PROBLEMS", 2)
    cache, prepare = ReferenceCache(), Preparations()
    borrow(cache, prepare, "a", "b", "a", "c", "a", "b")
    assert prepare.codes == ["a", "b", "c", "b"]


def test_large_references_are_forgotten_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MAX_BYTES", 1000)
    cache, prepare = ReferenceCache(), Preparations(elements=100)
    borrow(cache, prepare, "a", "b", "b", "a", "c", "a", "b")
    assert prepare.codes == ["a", "b", "c", "b"]


def test_one_reference_that_is_too_large_is_forgotten_after_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MAX_BYTES", 100)
    cache, prepare = ReferenceCache(), Preparations(elements=100)
    borrow(cache, prepare, "a", "a")
    assert prepare.codes == ["a", "a"]


def test_a_reference_in_use_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MAX_PROBLEMS", 2)
    cache, prepare = ReferenceCache(), Preparations()
    with cache.borrow("a", prepare):
        borrow(cache, prepare, "b", "c", "d", "a")
    assert prepare.codes == ["a", "b", "c", "d"]


def test_a_preparation_that_failed_is_tried_again() -> None:
    attempts: list[str] = []

    def prepare(code: str) -> Reference:
        attempts.append(code)
        if len(attempts) == 1:
            raise OSError("no space")
        return Reference(class_name=code)

    cache = ReferenceCache()
    with pytest.raises(OSError, match="no space"), cache.borrow("a", prepare):
        pass
    with cache.borrow("a", prepare) as reference:
        assert reference.class_name == "a"
    assert attempts == ["a", "a"]


def test_whoever_asks_meanwhile_waits_for_the_one_preparation() -> None:
    cache, begun, release = ReferenceCache(), threading.Event(), threading.Event()
    prepared: list[str] = []
    found: list[Reference] = []

    def prepare(code: str) -> Reference:
        prepared.append(code)
        begun.set()
        release.wait(10)
        return Reference(class_name=code)

    def use() -> None:
        with cache.borrow("a", prepare) as reference:
            found.append(reference)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    # Another problem is not kept waiting.
    borrow(cache, Preparations(), "b")
    release.set()
    for thread in threads:
        thread.join(10)
    assert prepared == ["a"] and len(found) == 3 and len({id(reference) for reference in found}) == 1


def test_code_that_is_no_unicode_has_a_place_too() -> None:
    cache, prepare = ReferenceCache(), Preparations()
    borrow(cache, prepare, "# \udc80", "# ?", "# \udc80")
    assert prepare.codes == ["# \udc80", "# ?"]


def answer(**fields: Any) -> dict[str, Any]:
    trial = {"inputs": (array([1.0, 2.0]),), "output": array([3.0]), "after": None, "slack": (0.5,)}
    plain = {"mixable": True, "class_name": "Model", "compute": 2.0, "copy": 1.0, "aliases": (0,)}
    derived = {"mixed": None, "shifted": trial, "negative": None, "sparse": None, "uses_bfloat16": False}
    state = {"tensors": {"w": array([0.0] * 5)}, "state_dict": ("w",)}
    arguments = {"state": state, "available": {"input_count": 1}, "init_inputs": None}
    return {"trials": (trial, trial), **plain, **derived, **arguments, "dirty": False, **fields}


def test_an_answer_is_read_with_its_derived_trials_and_counted_with_its_weights() -> None:
    reference = Reference.from_answer(answer())
    assert reference.failure is None and len(reference.trials) == 2
    assert reference.shifted is not None and reference.mixed is None
    assert reference.all_trials == [*reference.trials, reference.shifted]
    assert reference.trials[0].slack == (0.5,)
    assert set(reference.kernel_arguments) == {"state", "available", "init_inputs"}
    assert reference.output_bytes == 4 + 8
    assert reference.total_bytes == 3 * (4 + 8) + 20


def test_a_failure_holds_nothing_else() -> None:
    reference = Reference.from_answer({"verdict": "degenerate_task", "detail": "why", "dirty": True})
    assert reference == Reference(failure=Finding("degenerate_task", "why"))
    assert reference.output_bytes == reference.total_bytes == 0


def test_the_time_for_moving_grows_with_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(trials=(Trial((array([0.0] * 100),), array([0.0] * 50)),))
    assert reference.moving_s == references._LEAST_MOVING_S
    monkeypatch.setattr(references, "_LEAST_BYTES_A_SECOND", 2.0)
    assert reference.moving_s == references._LEAST_MOVING_S + 300
