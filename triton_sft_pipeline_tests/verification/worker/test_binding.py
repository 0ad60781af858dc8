"""Which rule gives which tensor to which parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from triton_sft_pipeline.verification.worker.binding import Available, Binding, bindings

LINEAR = Available(
    input_count=1,
    input_names=("x",),
    parameters=("fc.weight", "fc.bias"),
    module_weights=("fc.weight", "fc.bias"),
)
TWO_LAYERS = Available(
    input_count=1,
    input_names=("x",),
    parameters=("gain", "a.weight", "a.bias", "b.weight", "b.bias"),
    buffers=("a.mean",),
    module_weights=("a.weight", "a.bias", "b.weight", "b.bias"),
)


def rules(wrapper: Callable[..., None], available: Available) -> dict[str, Binding]:
    return {binding.rule: binding for binding in bindings(inspect.signature(wrapper), available)}


def test_names_win_over_positions() -> None:
    def wrapper(bias, weight, x): ...

    assert rules(wrapper, LINEAR)["name"].keyword == (("bias", "fc.bias"), ("weight", "fc.weight"), ("x", 0))


def test_inputs_with_other_names_fill_the_free_parameters_in_order() -> None:
    def wrapper(first, weight, second): ...

    available = Available(input_count=2, input_names=("x", "y"), parameters=("weight",))
    assert dict(rules(wrapper, available)["name"].keyword) == {"first": 0, "second": 1, "weight": "weight"}


def test_an_input_named_like_a_weight_is_the_input() -> None:
    def wrapper(weight): ...

    available = Available(input_count=1, input_names=("weight",), parameters=("weight",))
    assert rules(wrapper, available)["name"].keyword == (("weight", 0),)


def test_a_last_name_that_two_weights_share_means_neither() -> None:
    def wrapper(x, weight): ...

    found = rules(wrapper, TWO_LAYERS)
    assert "name" not in found
    assert found["head"].positional == (0, "a.weight")


def test_dotted_names_and_buffers_are_found() -> None:
    def wrapper(x, b_weight, mean, gain): ...

    assert dict(rules(wrapper, TWO_LAYERS)["name"].keyword) == {
        "x": 0,
        "b_weight": "b.weight",
        "mean": "a.mean",
        "gain": "gain",
    }


def test_the_head_rule_passes_inputs_alone_when_they_suffice() -> None:
    def wrapper(inp, eps=1e-5): ...

    assert [(item.rule, item.keyword) for item in bindings(inspect.signature(wrapper), TWO_LAYERS)] == [
        ("name", (("inp", 0),)),
        ("v1", ()),
    ]


def test_the_head_rule_takes_weights_of_modules_and_v1_takes_all_parameters() -> None:
    def wrapper(inp, w1, w2, eps=1e-5): ...

    found = rules(wrapper, TWO_LAYERS)
    assert found["head"].positional == (0, "a.weight", "a.bias")
    assert found["v1"].positional == (0, "gain", "a.weight", "a.bias")


def test_equal_calls_are_tried_once() -> None:
    def wrapper(x): ...

    assert [item.rule for item in bindings(inspect.signature(wrapper), LINEAR)] == ["name"]


def test_a_wrapper_that_nothing_satisfies_has_no_binding() -> None:
    def wrapper(x, weight, bias, in_features): ...

    assert bindings(inspect.signature(wrapper), LINEAR) == []


def test_the_v1_rule_drops_inputs_that_the_wrapper_does_not_take() -> None:
    def wrapper(prediction): ...

    found = bindings(inspect.signature(wrapper), Available(input_count=2, input_names=("x", "y")))
    assert [(item.rule, item.positional) for item in found] == [("v1", (0,))]


def test_any_number_of_arguments_means_inputs_or_inputs_and_all_parameters() -> None:
    def wrapper(*tensors): ...

    found = rules(wrapper, LINEAR)
    assert (found["head"].positional, found["v1"].positional) == ((0,), (0, "fc.weight", "fc.bias"))
