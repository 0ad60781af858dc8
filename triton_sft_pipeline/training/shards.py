"""A model's weights as they lie on disk: which safetensors files there are, what is in each, and a copy of one with
some of its tensors changed.

A copy keeps the file's own header, so names, types, shapes and order are those of the original by construction. It is
written tensor by tensor: the largest one is all that is ever in memory. Knows nothing of models or adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100 * 2**20
"""Bytes; the format allows no more."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by its file's header.

    Attributes:
        dtype: as safetensors spells it ("BF16", "F32", "U8").
        shape: its dimensions.
        size: in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: where it is.
        head: everything before its first tensor, as it lies in the file.
        tensors: name -> what it is, in the order of their bytes.
    """

    path: Path
    head: bytes
    tensors: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return len(self.head) + sum(info.size for info in self.tensors.values())


@dataclass(frozen=True)
class Rewritten:
    """SHA-256 (hex) of a shard as it was read, and of its copy."""

    source_sha256: str
    sha256: str


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file, checked against its length: a file that was cut short is found here.

    Raises:
        PipelineError: there is no such file, or it is no whole safetensors file.
    """
    if not path.is_file():
        raise PipelineError(f"{path} is missing: the directory is incomplete.")
    length = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        count = int.from_bytes(head, "little")
        if len(head) < 8 or count > min(_LONGEST_HEADER, length):
            raise _damaged(path, "its header does not fit into it")
        head += stream.read(count)
    try:
        entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
        in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        tensors, end = {}, 0
        for name, entry in in_order:
            begin, following = entry["data_offsets"]
            if begin != end or following < begin:
                raise _damaged(path, f"the bytes of {name} are not where they should be")
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), following - begin)
            end = following
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read ({type(error).__name__})") from error
    if length != len(head) + end:
        raise _damaged(path, f"{length} bytes where its header promises {len(head) + end}")
    return Shard(path, head, tensors)


def read_shards(directory: Path) -> list[Shard]:
    """Every file of a model's weights: `model.safetensors`, or the files that its index names.

    Raises:
        PipelineError: there are none, one is missing or damaged, or the index does not say what is in them.
    """
    if (directory / WHOLE).is_file():
        return [read_shard(directory / WHOLE)]
    index = directory / INDEX
    if not index.is_file():
        raise PipelineError(f"{directory} holds neither {WHOLE} nor {INDEX}: name a model directory in safetensors.")
    places = _weight_map(index)
    shards = [read_shard(directory / name) for name in sorted(set(places.values()))]
    found = {name: shard.path.name for shard in shards for name in shard.tensors}
    if sum(len(shard.tensors) for shard in shards) != len(found) or found != places:
        differing = sorted(name for name in found.keys() | places.keys() if found.get(name) != places.get(name))
        first = differing[0] if differing else "a name in two files"
        raise PipelineError(f"{index} does not say what its files hold; the first difference: {first}. Fetch it again.")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = read_json(index)["weight_map"]
        whole = bool(places) and all(Path(place).name == place for place in places.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{index}: not the index of a model's weights ({type(error).__name__}).") from error
    if not whole:
        raise PipelineError(f"{index}: its weight_map is empty or names files outside the directory.")
    return dict(places)


def rewrite(
    shard: Shard,
    destination: Path,
    change: Callable[[str, Any], Any],
    advance: Callable[[int], None],
) -> Rewritten:
    """Copy a shard, each tensor as `change(name, tensor)` returns it: in the same type and shape.

    Args:
        advance: told the size in bytes of every tensor that was written.
    """
    import torch
    from safetensors import safe_open

    before, after = hashlib.sha256(shard.head), hashlib.sha256(shard.head)
    with safe_open(str(shard.path), framework="pt") as source, open(destination, "wb") as sink:
        sink.write(shard.head)
        for name, info in shard.tensors.items():
            old = source.get_tensor(name)
            new = change(name, old)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(f"{name} changed from {old.dtype} {old.shape} to {new.dtype} {new.shape}")
            for tensor, digest in ((old, before), (new, after)):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            sink.write(new.contiguous().reshape(-1).view(torch.uint8).numpy())
            advance(info.size)
        sink.flush()
        os.fsync(sink.fileno())
    return Rewritten(before.hexdigest(), after.hexdigest())


def _damaged(path: Path, why: str) -> PipelineError:
    return PipelineError(f"{path}: damaged or cut short, {why}. Fetch or train it again.")
