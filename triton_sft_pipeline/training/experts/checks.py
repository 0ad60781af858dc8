"""What is checked before a checkpoint is loaded: that it holds the tensors it should; and after: that what should be in
4 bits is, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.experts.layouts import NOT_QUANTISED, ExpertLayout, released_shapes
from triton_sft_pipeline.training.experts.module import PROJECTIONS, PackedExperts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

_NAMED = 5
"""Tensors that a message names before it only counts."""
_COMPUTED = "rotary_emb.inv_freq"
"""A buffer that old checkpoints hold and every architecture computes for itself."""

Shapes = dict[str, tuple[int, ...] | None]


def check_packed(model: nn.Module, name: str = "the model", whole: Iterable[str] = NOT_QUANTISED) -> None:
    """Fail when an expert is not in 4 bits, or when something is that must not be.

    Args:
        model: a model loaded in 4 bits.
        name: what the user calls it.
        whole: last names of modules that must not be quantised.

    Raises:
        StepError: a routed expert parameter is not uint8, or a router or the head is; the parameter is named.
    """
    for parameter, value in model.named_parameters():
        owner, _, last = parameter.rpartition(".")
        packed = value.dtype == torch.uint8
        if packed and owner.endswith(tuple(whole)):
            raise StepError(f"{name}: {owner} was quantised to 4 bits, although heads and routers must not be.")
        expert = isinstance(model.get_submodule(owner), PackedExperts) or (last in PROJECTIONS and value.dim() == 3)
        if expert and not packed:
            raise StepError(
                f"{name}: the experts {parameter} were not packed in 4 bits but are {value.dtype}, of shape "
                f"{tuple(value.shape)}: the installed transformers loads them in a way that this version does not know."
            )


def check_checkpoint(
    base_model: str, revision: str | None, config: Any, layout: ExpertLayout, *, packed: bool = True
) -> None:
    """Compare the tensors of a checkpoint with those of the released layout, before any of them is loaded.

    Nothing is checked of a checkpoint whose list of tensors is not at hand: one of the hub that was never downloaded
    and cannot be reached, or one that is not in safetensors.

    Args:
        base_model: hub id or directory.
        revision: of a hub model.
        config: the model's config.
        layout: its architecture's layout.
        packed: experts are to be packed, so that a fused checkpoint is refused. Otherwise nothing is checked of one.

    Raises:
        PipelineError: experts are stored fused; tensors are missing, of another shape, or not of this architecture; or
            a file is missing, cut short or no safetensors file. Tensors and files are named.
    """
    found = checkpoint_shapes(base_model, revision)
    if found is None:
        return
    if fused := [name for name in found if name.rpartition(".")[2] in layout.released]:
        if not packed:
            return
        raise PipelineError(
            f"{base_model} stores all experts of a layer in one tensor ({_listed(fused)}): that is not the released "
            f"layout, which has a tensor for each expert ({_first_source(layout, fused[0])}), and such a stack "
            "cannot be packed without holding it whole. Take the checkpoint as it was released."
        )
    expected = released_shapes(config, layout)
    faults = _faults(expected, found)
    if faults:
        raise PipelineError(
            f"The checkpoint {base_model} does not fit its config.json (architecture {layout.model_type}): "
            f"{'; '.join(faults)}. Download it again, or name the directory of a whole one."
        )


def _first_source(layout: ExpertLayout, fused: str) -> str:
    return layout.source_name(fused, layout.released[fused.rpartition(".")[2]][0], 0)


def _faults(expected: Mapping[str, tuple[int, ...]], found: Shapes) -> list[str]:
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"{_counted(missing)} missing: {_listed(missing)}")
    if extra := [name for name in found if name not in expected and not name.endswith(_COMPUTED)]:
        faults.append(f"{_counted(extra)} too many: {_listed(extra)}")
    wrong = [
        f"{name} {shape} instead of {expected[name]}"
        for name, shape in found.items()
        if shape is not None and expected.get(name, shape) != shape
    ]
    if wrong:
        faults.append(f"{_counted(wrong)} of another shape: {_listed(wrong)}")
    return faults


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def checkpoint_shapes(base_model: str, revision: str | None) -> Shapes | None:
    """Every tensor of a safetensors checkpoint with its shape, read from the files' headers.

    Args:
        base_model: hub id or directory.
        revision: of a hub model.

    Returns:
        Shapes by name; None for a shape when the file that holds it has not been downloaded yet. None: there is no list
        of tensors at hand.

    Raises:
        PipelineError: a file that the index of a directory names is not there, or a file is damaged.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    # In transformers' own order. A single file is only looked up, never fetched: that is left to loading, with its bar.
    if (single := _resolved(base_model, revision, SAFE_WEIGHTS_NAME, fetch=False)) is not None:
        return dict(_header(single))
    index = _resolved(base_model, revision, SAFE_WEIGHTS_INDEX_NAME, fetch=True)
    if index is None:
        return None
    try:
        homes: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{index} is no index of a checkpoint: download it again.") from error
    files = {name: index.parent / name for name in sorted(set(homes.values()))}
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent and Path(base_model).is_dir():
        raise PipelineError(
            f"{base_model} is not whole: its index names {len(absent)} files that are not there: {_listed(absent)}. "
            "Download them."
        )
    shapes: Shapes = {name: None for name, file in homes.items() if file in absent}
    for name, file in files.items():
        if name not in absent:
            shapes.update(_header(file))
    return shapes


def _resolved(base_model: str, revision: str | None, filename: str, *, fetch: bool) -> Path | None:
    from transformers.utils import cached_file

    try:
        path = cached_file(
            base_model,
            filename,
            revision=revision,
            local_files_only=not fetch,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):
        # A model that cannot be had at all: loading it says why.
        return None
    return Path(path) if path is not None else None


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in one safetensors file: an 8-byte length, that many bytes of JSON, then the numbers."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            entries: Any = json.loads(stream.read(length)) if 8 + length <= size else None
            tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{file} is no safetensors file, or a damaged one: download it again.") from error
    if size < 8 + length + end:
        raise PipelineError(
            f"{file} is cut short: {size:,} of {8 + length + end:,} bytes are there. Download it again."
        )
    return shapes
