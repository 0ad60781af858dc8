"""What a saved LoRA adapter adds to which weight of a checkpoint in the released layout (one tensor an expert and
projection).

An adapter's file knows linear layers and, in a mixture of experts, fused tensors: all gate and up projections of a
layer's experts in one pair of factors, all down projections in another. Every released tensor that one of them reaches
gets an `Update`. Knows nothing of how weights are stored or written.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.shards import TensorInfo

Released = Mapping[str, tuple[str, ...]]
"""Each fused expert parameter, and the projections of the checkpoint that it is made of, in the order of its rows."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_FLOATS = ("BF16", "F16", "F32", "F64")
_SHOWN = 5

_OTHER_MATHS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Options of PEFT with which an adapter is something else than W + scale * B A."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weights alone; the others train against a base of their own."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight: `scale * B @ A`.

    Attributes:
        module: the adapter's tensors are `<module>.lora_A.weight` and `<module>.lora_B.weight`.
        scale: alpha / rank (alpha / sqrt(rank) with rslora).
        experts: how many experts share the two tensors; 1 for a linear layer.
        expert: which of them this is.
        rows: first row of B's product that belongs to this weight, and the one after its last.
    """

    module: str
    scale: float
    experts: int
    expert: int
    rows: tuple[int, int]


def find_updates(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    released: Released,
) -> dict[str, Update]:
    """Name of a base tensor -> what the adapter adds to it. Every tensor of the adapter is used, or this fails.

    Args:
        config: the adapter's adapter_config.json.
        tensors: what its weights file holds.
        base: what the base checkpoint holds.
        released: the architecture's fused experts; empty for a dense model.

    Raises:
        PipelineError: the adapter is no plain LoRA, or a tensor of it has no home, no partner, or another shape than
            the base or its own config call for.
    """
    _require_plain_lora(config)
    pairs = _pairs(tensors)
    count = _expert_counts(base, released)
    updates: dict[str, Update] = {}
    homeless: list[str] = []
    for module, (a, b) in pairs.items():
        name = module.removeprefix(_PREFIX)
        fused = _without_base_layer(name)
        if f"{name}.weight" in base:
            found = {f"{name}.weight": _linear_update(config, module, name, a, b, base[f"{name}.weight"])}
        elif fused in count:
            found = _expert_updates(config, module, fused, a, b, base, released, count[fused])
        else:
            homeless += [f"{module}.lora_{factor}.weight" for factor in "AB"]
            continue
        if twice := sorted(found.keys() & updates.keys()):
            raise PipelineError(f"two tensors of the adapter change {twice[0]}: {updates[twice[0]].module}, {module}.")
        updates |= found
    if homeless:
        raise _no_home(homeless, len(tensors), base)
    if foreign := [name for name in updates if base[name].dtype not in _FLOATS]:
        raise PipelineError(
            f"the base is quantised: {foreign[0]} is {base[foreign[0]].dtype}. An adapter is merged into unquantised "
            "weights (bfloat16, float16, float32); name the base as it was released."
        )
    return updates


def kinds(names: Mapping[str, Any]) -> Counter[str]:
    """How many of `names` there are of each kind: `model.layers.*.mlp.experts.*.up_proj.weight`."""
    return Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)


class AdapterFactors:
    """The adapter's numbers, read when they are asked for: one linear layer's, or the two fused tensors of one layer's
    experts.

    Args:
        source: an open safetensors file.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._recent: dict[str, tuple[Any, Any]] = {}

    def delta(self, update: Update) -> Any:
        """What is added to the weight, in float32: [out, in]. The caller may change it."""
        first, end = update.rows
        a, b = self._factors(update.module, update.experts)
        return (b[update.expert, first:end] @ a[update.expert]).mul_(update.scale)

    def _factors(self, module: str, experts: int) -> tuple[Any, Any]:
        """A as [experts, rank, in] and B as [experts, out, rank].

        The order inside is that of PEFT's ParamWrapper: A's rows are counted rank fastest, B's columns expert fastest.
        """
        if module not in self._recent:
            a = self._source.get_tensor(f"{module}.lora_A.weight").float()
            b = self._source.get_tensor(f"{module}.lora_B.weight").float()
            rank = a.shape[0] // experts
            factors = (
                a.reshape(experts, rank, a.shape[1]),
                b.reshape(b.shape[0], rank, experts).permute(2, 0, 1).contiguous(),
            )
            # A checkpoint lists a layer's experts one after another, their two tensors by turns.
            while len(self._recent) > 1:
                del self._recent[next(iter(self._recent))]
            self._recent[module] = factors
        return self._recent[module]


def _require_plain_lora(config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise PipelineError(f"adapter_config.json: peft_type is {kind}; only LORA can be merged here.")
    for option in _OTHER_MATHS:
        if config.get(option):
            raise PipelineError(f"adapter_config.json: {option} is set; only plain LoRA can be merged here.")
    if missing := [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]:
        raise PipelineError(f"adapter_config.json: {missing[0]} is not a number; train the adapter again.")
    if config.get("bias", "none") != "none":
        raise PipelineError(f"adapter_config.json: bias is {config['bias']}; biases cannot be merged here, only none.")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise PipelineError(
            f"adapter_config.json: init_lora_weights is {start}, which changed the base model before training: "
            "the released base is not the one that this adapter was trained on."
        )


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Module -> its A and its B."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    others = []
    for name, info in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match and info.dtype in _FLOATS and len(info.shape) == 2:
            factors.setdefault(match[1], {})[match[2]] = info
        else:
            others.append(name)
    if others:
        raise PipelineError(
            f"{len(others)} of {len(tensors)} adapter tensors are no LoRA factors and have no home in the base model: "
            f"{_some(others)}. Nothing was written."
        )
    if not factors:
        raise PipelineError("the adapter holds no tensors: there is nothing to merge.")
    for module, pair in factors.items():
        if missing := {"A", "B"} - pair.keys():
            raise PipelineError(f"the adapter holds {module} without its lora_{missing.pop()}: it is incomplete.")
    return {module: (factors[module]["A"], factors[module]["B"]) for module in sorted(factors)}


def _without_base_layer(name: str) -> str:
    """PEFT wraps a module once for each of its parameters; the inner wrapper is the outer one's base_layer."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _expert_counts(base: Mapping[str, TensorInfo], released: Released) -> dict[str, int]:
    """Experts module, such as `model.layers.1.mlp.experts` -> how many experts the checkpoint has there.

    Raises:
        PipelineError: they are not numbered from 0 on, or one lacks a projection.
    """
    parts = [part for names in released.values() for part in names]
    if not parts:
        return {}
    pattern = re.compile(rf"(.+\.experts)\.(\d+)\.({'|'.join(map(re.escape, parts))})\.weight")
    found: dict[str, set[tuple[int, str]]] = {}
    for name in base:
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    for module, members in found.items():
        count = 1 + max(number for number, _ in members)
        if missing := sorted({(e, part) for e in range(count) for part in parts} - members):
            raise PipelineError(
                f"the base model lacks {module}.{missing[0][0]}.{missing[0][1]}.weight: fetch it again."
            )
    return {module: 1 + max(number for number, _ in members) for module, members in found.items()}


def _linear_update(
    config: Mapping[str, Any], module: str, name: str, a: TensorInfo, b: TensorInfo, weight: TensorInfo
) -> Update:
    # Linear layers that PEFT was told of as parameters are looked up in its patterns by the parameter's name.
    named = any(f".{name}.weight".endswith(f".{target}") for target in config.get("target_parameters") or ())
    rank, scale = _rank_and_scale(config, f"{name}.weight" if named else name)
    expected = ((rank, weight.shape[-1]), (weight.shape[0], rank))
    if len(weight.shape) != 2 or (a.shape, b.shape) != expected:
        raise _wrong_shape(module, a, b, rank, f"{name}.weight", weight)
    return Update(module, scale, 1, 0, (0, weight.shape[0]))


def _expert_updates(
    config: Mapping[str, Any],
    module: str,
    name: str,
    a: TensorInfo,
    b: TensorInfo,
    base: Mapping[str, TensorInfo],
    released: Released,
    experts: int,
) -> dict[str, Update]:
    """The updates of every expert that one fused pair of factors reaches.

    Which fused tensor a pair belongs to is told by its shape: gate_up maps H to 2 I and down maps I to H, and no sizes
    make the two the same. The name only tells in which order PEFT wrapped them.
    """
    for fused, parts in released.items():
        rank, scale = _rank_and_scale(config, f"{name}.{fused}")
        shapes = [base[f"{name}.0.{part}.weight"].shape for part in parts]
        ends = [sum(shape[0] for shape in shapes[: i + 1]) for i in range(len(parts))]
        if a.shape != (experts * rank, shapes[0][1]) or b.shape != (ends[-1], experts * rank):
            continue
        rows = [(end - shape[0], end) for end, shape in zip(ends, shapes, strict=True)]
        return {
            f"{name}.{expert}.{part}.weight": Update(module, scale, experts, expert, rows[i])
            for expert in range(experts)
            for i, part in enumerate(parts)
        }
    part = next(iter(released.values()))[0]
    rank, _ = _rank_and_scale(config, f"{name}.{next(iter(released))}")
    raise _wrong_shape(
        module, a, b, rank, f"{experts} experts such as {name}.0.{part}", base[f"{name}.0.{part}.weight"]
    )


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale of the layer `name`, by PEFT's rules: the first pattern that matches the end of the name wins."""
    rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise PipelineError(f"adapter_config.json: {pattern!r} is no regular expression ({error}).") from error
    return default


def _no_home(homeless: list[str], total: int, base: Mapping[str, TensorInfo]) -> PipelineError:
    message = f"{len(homeless)} of {total} adapter tensors have no home in the base model: {_some(homeless)}."
    fused = [name for name, info in base.items() if ".experts." in name and len(info.shape) == 3]
    if fused:
        return PipelineError(
            f"{message} The base holds fused experts ({fused[0]}); merge into the released layout, one tensor an "
            "expert. Nothing was written."
        )
    return PipelineError(f"{message} Name the base model that the adapter was trained on. Nothing was written.")


def _wrong_shape(module: str, a: TensorInfo, b: TensorInfo, rank: int, where: str, weight: TensorInfo) -> PipelineError:
    return PipelineError(
        f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, which does not fit {where} "
        f"{list(weight.shape)} at rank {rank} (adapter_config.json). Name the base model that the adapter was "
        "trained on."
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
