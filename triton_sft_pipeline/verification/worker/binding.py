"""Which tensors go to which parameter of `triton_kernel_wrapper`. Works on names alone and imports no torch.

How traces pass weights changed over time, so there are three rules, tried in this order:

name  Parameters called like an argument of the module's `forward` get that input; parameters called like a weight or
      buffer get that (`conv1.weight` as `conv1_weight`, or by its last part alone when only one ends so); the inputs
      that are left fill the other parameters in order.
head  The present rule of the traces' producer: when the inputs satisfy every parameter without a default, pass only
      them. Else append the weight and bias of every module, in modules() order, and cut the list to the number of
      parameters without a default.
v1    Its older rule: the inputs, then every parameter in named_parameters() order, cut to the number of all parameters;
      not cut for a wrapper that takes *args.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Available:
    """What can be passed to a wrapper. An input is referred to by its position, a weight or buffer by its dotted name.

    Attributes:
        input_count: number of inputs.
        input_names: names of forward's parameters, by position; may be shorter than the inputs when forward takes
            *args.
        parameters: dotted names, in named_parameters() order.
        buffers: dotted names, in named_buffers() order.
        module_weights: dotted names of the weight and bias of every module, in modules() order.
    """

    input_count: int
    input_names: Sequence[str] = ()
    parameters: Sequence[str] = ()
    buffers: Sequence[str] = ()
    module_weights: Sequence[str] = ()


@dataclass(frozen=True)
class Binding:
    """A call of the wrapper: positional and keyword references, each an input's position or a dotted name."""

    rule: str
    positional: tuple[int | str, ...] = ()
    keyword: tuple[tuple[str, int | str], ...] = ()


def bindings(signature: inspect.Signature, available: Available) -> list[Binding]:
    """Every way to call a wrapper that satisfies its signature, in the order of the rules; equal calls appear once."""
    candidates = [
        _by_name(signature, available),
        _by_head_rule(signature, available),
        _by_v1_rule(signature, available),
    ]
    found: list[Binding] = []
    calls: list[dict[str, object]] = []
    for candidate in candidates:
        call = None if candidate is None else _bound_arguments(signature, candidate)
        if candidate is not None and call is not None and call not in calls:
            found.append(candidate)
            calls.append(call)
    return found


def _bound_arguments(signature: inspect.Signature, binding: Binding) -> dict[str, object] | None:
    try:
        return dict(signature.bind(*binding.positional, **dict(binding.keyword)).arguments)
    except TypeError:
        return None


def _by_name(signature: inspect.Signature, available: Available) -> Binding | None:
    if _takes_any_number(signature):
        return None
    names = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    inputs = {name: position for position, name in enumerate(available.input_names[: available.input_count])}
    known: dict[str, int | str] = {**_state_aliases([*available.parameters, *available.buffers]), **inputs}
    chosen = {name: known[name] for name in names if name in known}
    free = [name for name in names if name not in chosen]
    left_over = [position for position in range(available.input_count) if position not in chosen.values()]
    if len(left_over) > len(free):
        return None
    chosen.update(zip(free, left_over, strict=False))
    return Binding("name", keyword=tuple(chosen.items()))


def _state_aliases(dotted_names: Sequence[str]) -> dict[str, str]:
    """Map each spelling that means exactly one weight or buffer to its dotted name."""
    meanings: dict[str, set[str]] = {}
    for dotted in dotted_names:
        parts = dotted.split(".")
        for start in range(len(parts)):
            meanings.setdefault("_".join(parts[start:]), set()).add(dotted)
    aliases = {alias: next(iter(names)) for alias, names in meanings.items() if len(names) == 1}
    # The whole name always means its own weight, even where it is also the end of a longer name.
    return aliases | {dotted.replace(".", "_"): dotted for dotted in dotted_names}


def _by_head_rule(signature: inspect.Signature, available: Available) -> Binding:
    inputs = tuple(range(available.input_count))
    required = sum(
        parameter.default is inspect.Parameter.empty
        for parameter in signature.parameters.values()
        if parameter.kind in _POSITIONAL
    )
    if len(inputs) >= required:
        return Binding("head", inputs)
    arguments: tuple[int | str, ...] = (*inputs, *available.module_weights)
    return Binding("head", arguments[:required])


def _by_v1_rule(signature: inspect.Signature, available: Available) -> Binding:
    count = sum(parameter.kind in _POSITIONAL for parameter in signature.parameters.values())
    arguments: tuple[int | str, ...] = (*range(available.input_count), *available.parameters)
    return Binding("v1", arguments if _takes_any_number(signature) else arguments[:count])


def _takes_any_number(signature: inspect.Signature) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
