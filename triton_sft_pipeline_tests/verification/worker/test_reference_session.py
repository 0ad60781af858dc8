"""What a reference's process finds out about a problem, asked over its socket."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from triton_sft_pipeline.verification.lanes import Lane
from triton_sft_pipeline.verification.peer import Clock
from triton_sft_pipeline_tests.verification.peers import array, numbers
from triton_sft_pipeline_tests.verification.snippets import problem


class Session:
    """The lane's reference process."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        return self._lane.reference().ask(do, Clock(20.0), None, **fields)

    def load(self, code: str, trials: int = 2) -> dict[str, Any]:
        answer = self.ask("load", code=code, trials=trials)
        # As the judge does.
        if answer["dirty"]:
            self._lane.drop_reference()
        return answer


@pytest.fixture
def session(lane: Lane) -> Session:
    return Session(lane)


def values(trial: dict[str, Any], index: int = 0) -> Any:
    return numbers(trial["inputs"][index])


def test_a_problem_is_drawn_and_run(session: Session) -> None:
    answer = session.load(problem("x * 2"), trials=3)
    assert len(answer["trials"]) == 3
    for trial in answer["trials"]:
        assert np.array_equal(numbers(trial["output"]), 2 * values(trial))
        assert trial["after"] is None
    draws = [values(trial) for trial in answer["trials"]]
    assert not any(np.array_equal(a, b) for a, b in pairwise(draws))
    assert (answer["class_name"], answer["mixable"], answer["dirty"], answer["aliases"]) == ("Model", True, False, ())
    assert (answer["compute"], answer["copy"], answer["uses_bfloat16"]) == (32.0, 0.0, False)


def test_no_two_processes_or_loads_draw_the_same(session: Session) -> None:
    draws = [values(session.load(problem("x * 2"))["trials"][0]) for _ in range(2)]
    assert not np.array_equal(*draws)


def test_a_seed_in_the_problem_does_not_make_its_draws_guessable(session: Session) -> None:
    code = problem("x * 2", prelude="torch.manual_seed(0)")
    first, second = (session.load(code)["trials"][0] for _ in range(2))
    assert not np.array_equal(values(first), values(second))


def test_a_mixture_has_each_element_from_one_of_two_draws(session: Session) -> None:
    answer = session.load(problem("x * 2", inputs="[torch.randn(40, 8), torch.randn(3)]", signature="x, y"))
    mixed, (first, second) = answer["mixed"], answer["trials"]
    from_first = values(mixed) == values(first)
    assert 0.3 < from_first.mean() < 0.7
    assert np.array_equal(np.where(from_first, values(first), values(second)), values(mixed))
    assert np.array_equal(numbers(mixed["output"]), 2 * values(mixed))


DERIVED = {
    # inputs, forward: which trials are derived.
    "both signs": ("[torch.randn(4, 8)]", "x * 2", {"mixed"}),
    "non-negative": ("[torch.rand(4, 8)]", "x * 2", {"mixed", "shifted", "negative"}),
    "whole numbers": ("[torch.randint(0, 9, (4, 8))]", "x * 2", {"mixed"}),
    "constant": ("[torch.ones(4, 8)]", "x * 2", {"mixed", "sparse"}),
    "output always alike": ("[torch.rand(4, 8)]", "x.sign()", {"mixed", "shifted", "negative", "sparse"}),
    "defined for positive numbers only": ("[torch.rand(4, 8) + 0.1]", "x.log()", {"mixed"}),
    "imprecise on mixtures and negatives": ("[torch.rand(4, 8) + 1]", "1e8 + x - 1e8", set()),
}


@pytest.mark.parametrize("name", DERIVED)
def test_trials_are_derived_where_they_make_sense(session: Session, name: str) -> None:
    inputs, forward, expected = DERIVED[name]
    answer = session.load(problem(forward, inputs=inputs))
    kinds = ("mixed", "shifted", "negative", "sparse")
    assert {kind for kind in kinds if answer[kind] is not None} == expected


def test_derived_inputs_are_what_their_names_say(session: Session) -> None:
    answer = session.load(problem("x.sign()", inputs="[torch.rand(40, 8)]"))
    shifted, negative, sparse = (values(answer[kind]) for kind in ("shifted", "negative", "sparse"))
    assert 0.2 < (shifted < 0).mean() < 0.8
    assert (negative <= 0).all() and np.array_equal(-negative, values(answer["trials"][-1]))
    assert 0.1 < (sparse == 0).mean() < 0.5
    for kind, inputs in (("shifted", shifted), ("negative", negative), ("sparse", sparse)):
        assert np.array_equal(numbers(answer[kind]["output"]), np.sign(inputs))


def test_a_single_draw_cannot_be_mixed(session: Session) -> None:
    answer = session.load(problem("x * 2", inputs="[torch.rand(4, 8)]"), trials=1)
    assert answer["mixed"] is None and not answer["mixable"] and len(answer["trials"]) == 1
    assert answer["negative"] is not None


def test_a_problem_that_refuses_mixtures_is_not_measured_on_them(session: Session) -> None:
    forward = "assert x.unique().numel() == 1\nreturn x * 2"
    answer = session.load(problem(forward, inputs="[torch.rand(1).expand(8).contiguous()]"))
    assert answer["mixed"] is None and not answer["mixable"]


def test_a_reference_that_writes_to_its_inputs_says_what_it_leaves(session: Session) -> None:
    answer = session.load(problem("x.mul_(2)"))
    for trial in (*answer["trials"], answer["mixed"]):
        assert np.array_equal(numbers(trial["output"]), 2 * values(trial))
        assert np.array_equal(numbers(trial["after"][0]), 2 * values(trial))
    assert answer["aliases"] == (0,)


def test_a_reference_that_returns_its_input_shares_its_memory(session: Session) -> None:
    answer = session.load(problem("x * 2, x, x.t()"))
    assert answer["aliases"] == (1, 2)


def test_every_trial_starts_from_the_same_weights_and_buffers(session: Session) -> None:
    forward = "self.seen += 1\nreturn x * self.seen"
    answer = session.load(problem(forward, init="self.register_buffer('seen', torch.zeros(1))"), trials=3)
    for trial in (*answer["trials"], answer["mixed"]):
        assert np.array_equal(numbers(trial["output"]), values(trial))
    assert numbers(answer["state"]["tensors"]["seen"]).tolist() == [0.0]


def test_slack_is_twice_pytorchs_own_error_and_nothing_where_it_is_precise(session: Session) -> None:
    noisy = "(x.sum().reshape(1), x * 2, x > 0)"
    answer = session.load(problem(noisy, inputs="[torch.rand(1 << 16)]"))
    trial = answer["trials"][0]
    exact = values(trial).astype("float64").sum()
    error = abs(float(numbers(trial["output"][0])[0]) - exact)
    assert len(trial["slack"]) == 3
    assert trial["slack"][0] == pytest.approx(2 * error, abs=1e-9)
    assert trial["slack"][1:] == (0.0, 0.0)


def test_an_error_as_large_as_the_values_excuses_nothing(session: Session) -> None:
    answer = session.load(problem("1e8 + x - 1e8"))
    assert answer["trials"][0]["slack"] == (0.0,)


def test_a_problem_of_dice_is_degenerate(session: Session) -> None:
    for forward in ("x + torch.rand_like(x)", "F.dropout(x, training=True)", "torch.randperm(64)[:8]"):
        answer = session.load(problem(forward))
        assert answer["verdict"] == "degenerate_task" and "two answers" in answer["detail"]


def test_dropout_and_batch_norm_are_in_evaluation_mode(session: Session) -> None:
    init = "self.layers = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8))"
    assert "verdict" not in session.load(problem("self.layers(x)", init=init))


CLASSES = """
import torch
import torch.nn as nn

class Helper(nn.Module):
    def __init__(self, size):
        super().__init__()

    def forward(self, x):
        return x * self.factor

class Doubling(Helper):
    factor = 2

class Later(Helper):
    def __init__(self, size, more):
        super().__init__(size)

def get_inputs():
    return [torch.rand(4)]

def get_init_inputs():
    return [[3], {}]
"""


def test_the_module_under_test_is_the_last_that_can_be_built_and_called(session: Session) -> None:
    answer = session.load(CLASSES)
    assert answer["class_name"] == "Doubling"
    assert answer["init_inputs"] == ((3,), {})
    named = CLASSES.replace("class Later(Helper)", "class Model(nn.Module)").replace("size, more", "size")
    named = named.replace(
        "super().__init__(size)", "super().__init__()\n\n    def forward(self, x):\n        return x * 5"
    )
    trial = session.load(named + "\nclass Last(Doubling):\n    pass\n")["trials"][0]
    assert np.allclose(numbers(trial["output"]), 5 * values(trial))


def test_when_no_class_can_be_called_the_last_ones_error_is_told(session: Session) -> None:
    answer = session.load(CLASSES.replace("factor = 2", "pass"))
    assert answer["verdict"] == "reference_error" and "more" in answer["detail"]


DIRTY = {
    "definitions": ("SIZE = 3", False),
    "documentation": ("'''Words.'''", False),
    "a call": ("print()", True),
    "an attribute": ("torch.backends.cudnn.benchmark = False", True),
    "a loop": ("for _ in range(2):\n    pass", True),
    "another default dtype": ("_ = torch.set_default_dtype(torch.float64)", True),
}


@pytest.mark.parametrize("name", DIRTY)
def test_a_problem_that_may_change_what_the_next_one_sees_says_so(session: Session, name: str) -> None:
    prelude, dirty = DIRTY[name]
    assert session.load(problem("x * 2", prelude=prelude))["dirty"] is dirty


def test_a_problem_that_fails_is_dirty(session: Session) -> None:
    for code in (problem("no_such_name"), "class Model(", problem("object()"), problem("1 / 0")):
        answer = session.load(code)
        assert answer["verdict"] == "reference_error" and answer["dirty"] is True
    assert "trials" in session.load(problem("x * 2"))


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float16", "bfloat16", "float64", "complex64"])
def test_outputs_of_every_usual_dtype_can_be_expected(session: Session, dtype: str) -> None:
    answer = session.load(problem(f"x.to(torch.{dtype})", inputs="[torch.rand(4, 8) * 9]"))
    assert answer["trials"][0]["output"].dtype == dtype
    assert answer["uses_bfloat16"] == (dtype == "bfloat16")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float8_e4m3fn", "float8_e5m2"])
def test_outputs_of_unusual_dtypes_can_be_expected(session: Session, dtype: str) -> None:
    answer = session.load(problem(f"x.to(torch.{dtype})", inputs="[torch.rand(4, 8) * 9]"))
    assert answer["trials"][0]["output"].dtype == dtype


def test_nan_and_infinity_can_be_expected(session: Session) -> None:
    answer = session.load(problem("x / torch.zeros(8), x.log()"))
    quotient, logarithm = answer["trials"][0]["output"]
    assert np.isinf(numbers(quotient)).all() and np.isnan(numbers(logarithm)).any()


def test_a_problem_adopted_by_another_process_expects_the_same(session: Session, lane: Lane) -> None:
    code = problem("x @ self.weight", init="self.weight = nn.Parameter(torch.randn(8, 8))")
    loaded = session.load(code)
    draws = {"a": loaded["trials"][0]["inputs"], "b": loaded["trials"][1]["inputs"]}
    here = session.ask("expect", seeds=(1, 2, 1), **draws)["outputs"]
    lane.drop_reference()
    assert session.ask("adopt", code=code, class_name="Model") == {}
    there = session.ask("expect", seeds=(1, 2, 1), **draws)["outputs"]
    assert [bytes(item.data) for item in here] == [bytes(item.data) for item in there]
    assert bytes(here[0].data) == bytes(here[2].data) != bytes(here[1].data)


def test_what_cannot_be_adopted_or_expected_is_told(session: Session) -> None:
    assert session.ask("adopt", code="x = 1\n", class_name="Model")["verdict"] == "reference_error"
    assert session.ask("adopt", code=problem("x @ x"), class_name="Model") == {}
    answer = session.ask("expect", seeds=(1,), a=(array([[1.0, 2.0]]),), b=(array([[1.0, 2.0]]),))
    assert answer["verdict"] == "reference_error" and "fails" in answer["detail"]
