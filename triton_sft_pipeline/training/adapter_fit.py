"""Whether a saved adapter belongs on a base model, told from names and shapes before any weight is loaded.

Loading finds out too, after minutes and a tensor at a time. Here both sides are put next to each other: how many
layers, which modules, how wide. Knows the adapter's files and the base's config.json, and nothing of numbers.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json
from triton_sft_pipeline.training.settings import ModelSettings
from triton_sft_pipeline.training.shards import TensorInfo, read_shard
from triton_sft_pipeline.training.updates import kinds

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(r"base_model\.model\.(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight")
_LAYER = re.compile(r"\.(\d+)\.")
_SHOWN = 4
_FIXED = "\N{NO-BREAK SPACE}"
"""Keeps a name and its count on one line."""


@dataclass(frozen=True)
class Base:
    """What an adapter can be put on.

    Attributes:
        linears: module -> (inputs, outputs) of every linear layer.
        experts: module -> the shapes [experts, rows, columns] of its fused parameters.
    """

    linears: Mapping[str, tuple[int, int]]
    experts: Mapping[str, tuple[tuple[int, ...], ...]]


def recorded_base(adapter: Path) -> str:
    """The base model that an adapter says it was trained on: a directory, or a name of the Hub.

    Raises:
        PipelineError: there is no adapter, or its configuration does not say.
    """
    return str(_read_config(adapter)["base_model_name_or_path"])


def same_model(one: str, other: str) -> bool:
    """Whether two names are likely to mean one model: a Hub name and a local copy share their last part."""
    return one == other or Path(one).name.lower() == Path(other).name.lower()


def check_adapter_fits(adapter: Path, model: ModelSettings) -> str | None:
    """Compare an adapter with a base model by names and shapes. Reads headers and config.json; loads no weights.

    Args:
        adapter: a directory that `triton-sft train`, or any PEFT, wrote.
        model: which base it is to be put on.

    Returns:
        None, or a sentence for the reader of a result: the shapes fit, but the adapter names another base model.

    Raises:
        PipelineError: they do not fit, with every difference on a line of its own; the adapter is missing or damaged;
            or the base model cannot be had.
    """
    config = _read_config(adapter)
    recorded = str(config["base_model_name_or_path"])
    found = differences(config, read_shard(adapter / WEIGHTS).tensors, read_base(model))
    if found:
        raise PipelineError(
            f"{adapter} does not fit the base model {model.base_model}:\n"
            f"{_table([('trained on', recorded), *found])}\n"
            "Name the model that it was trained on: --preset, or --set model.base_model=NAME."
        )
    if same_model(recorded, model.base_model):
        return None
    return (
        f"The adapter says that it was trained on {recorded}, not on {model.base_model}: its shapes fit, its numbers "
        "may not."
    )


def read_base(model: ModelSettings) -> Base:
    """Names and shapes of a base model's layers, from its config.json alone.

    Raises:
        PipelineError: the model cannot be had.
    """
    from torch import nn

    from triton_sft_pipeline.training.experts.layouts import empty_model
    from triton_sft_pipeline.training.model import base_config

    empty = empty_model(base_config(model))
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear)
    }
    experts: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, value in empty.named_parameters():
        if value.dim() == 3:
            module = name.rpartition(".")[0]
            experts[module] = (*experts.get(module, ()), tuple(value.shape))
    return Base(linears, experts)


def differences(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], base: Base) -> list[tuple[str, str]]:
    """What keeps an adapter from being put on a base, as (label, what differs); empty when it fits.

    Args:
        config: the adapter's adapter_config.json.
        tensors: what its weights file holds.
        base: the base model.
    """
    factors, strange = _factors(tensors)
    adapted = {module for module, _ in factors}
    own = {*base.linears, *base.experts}
    layers, base_layers = _layers(adapted), _layers(own)
    found = []
    if layers != base_layers and layers and not config.get("layers_to_transform"):
        found.append(("layers", f"{_numbers(layers)} in the adapter, {_numbers(base_layers)} in the base"))
    # A layer that one side lacks was named; what it holds need not be.
    both = layers & base_layers if layers and base_layers else set()
    homeless = [m for m in adapted - own if not _layers({m}) or _layers({m}) <= both]
    lacking = [m for m in _targeted(config, base) - adapted if not _layers({m}) or _layers({m}) <= both]
    for label, names in (("adapter only", [*homeless, *strange]), ("base only", lacking)):
        if names:
            found.append((label, _some(kinds(dict.fromkeys(names)))))
    return [*found, *_shape_differences(factors, base)]


def _factors(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]], list[str]]:
    """(module, how it is wrapped) -> shapes of A and B, and the names of what is no pair of LoRA factors.

    PEFT wraps an experts module once for each of its parameters: `base_layer` tells the wrappers apart.
    """
    found: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    strange = []
    for name, info in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match and len(info.shape) == 2:
            found.setdefault((match[1], match[2]), {})[match[3]] = info.shape
        else:
            strange.append(name)
    strange += [f"{module}.lora_{letter}" for (module, _), pair in found.items() for letter in pair if len(pair) == 1]
    return {key: (pair["A"], pair["B"]) for key, pair in found.items() if len(pair) == 2}, strange


def _shape_differences(
    factors: Mapping[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]], base: Base
) -> list[tuple[str, str]]:
    """One line for each kind of module whose sizes differ, from the first layer where they do."""
    found: dict[str, str] = {}
    for (module, _), (a, b) in factors.items():
        name = module.rsplit(".", 1)[-1]
        if name in found:
            continue
        if module in base.linears:
            inputs, outputs = base.linears[module]
            if (a[1], b[0]) != (inputs, outputs):
                found[name] = f"{a[1]} to {b[0]} in the adapter, {inputs} to {outputs} in the base"
            elif a[0] != b[1]:
                found[name] = f"lora_A has rank {a[0]} and lora_B rank {b[1]}: the adapter is damaged"
        elif module in base.experts and not any(_fits_experts(a, b, shape) for shape in base.experts[module]):
            shapes = " and ".join(" x ".join(map(str, shape)) for shape in base.experts[module])
            found[name] = f"A {a[0]} x {a[1]}, B {b[0]} x {b[1]} in the adapter; {shapes} in the base"
    return list(found.items())


def _fits_experts(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A is [experts * rank, one side] and B [other side, experts * rank]; architectures order the sides either way."""
    experts, *sides = shape
    return a[0] == b[1] and a[0] % experts == 0 and [a[1], b[0]] in (sides, sides[::-1])


def _targeted(config: Mapping[str, Any], base: Base) -> set[str]:
    """The linear layers of the base that an adapter of this configuration would be put on.

    Lists of names are looked up, as this project's training writes them; about a pattern, or a choice of layers,
    nothing is said.
    """
    names = config.get("target_modules")
    if not isinstance(names, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return set()
    parameters = [p.removesuffix(".weight") for p in config.get("target_parameters") or () if p.endswith(".weight")]
    leaves = {str(name).rsplit(".", 1)[-1] for name in (*names, *parameters)}
    return {module for module in base.linears if module.rsplit(".", 1)[-1] in leaves}


def _layers(modules: Iterable[str]) -> set[int]:
    """The numbers of the layers that modules lie in: the first number in each name."""
    return {int(match[1]) for module in modules if (match := _LAYER.search(module))}


def _numbers(layers: set[int]) -> str:
    if not layers:
        return "none"
    whole = layers == set(range(len(layers)))
    return str(len(layers)) if whole else f"{len(layers)} ({min(layers)} to {max(layers)})"


def _some(counted: Mapping[str, int]) -> str:
    shown = [f"{name}{_FIXED}({count})" for name, count in sorted(counted.items())]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _table(rows: list[tuple[str, str]]) -> str:
    """Label and text on each line, 80 columns wide where names allow it."""
    width = max(len(label) for label, _ in rows)
    lines = []
    for label, text in rows:
        first, *rest = textwrap.wrap(text, 80 - width - 4, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {label:{width}}  {first}", *(f"  {'':{width}}  {more}" for more in rest)]
    return "\n".join(lines).replace(_FIXED, " ")


def _read_config(adapter: Path) -> dict[str, Any]:
    path = Path(adapter) / CONFIG
    if not path.is_file():
        raise PipelineError(f"{adapter}: no adapter there ({CONFIG} is missing).")
    try:
        config = read_json(path)
        config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: not an adapter's configuration ({error!r}).") from error
    return dict(config)
