"""Folding an adapter into its base model: a checkpoint that vLLM, SGLang and transformers serve as any other.

The base is never loaded as a model. Its files are copied tensor by tensor, and a tensor that the adapter reaches gets
`scale * B @ A` added in float32 on the way, so host memory holds one tensor and one layer's adapter however large the
model is. Names, types, shapes and the split into files stay those of the base, which for a mixture of experts is the
released layout with one tensor an expert. The base has to be unquantised: what is added to NF4 weights is lost in
their steps.

Nothing appears at the destination before all of it is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import hash_json, locked, read_json, sha256_file, write_json
from triton_sft_pipeline.training.shards import INDEX, WHOLE, Rewritten, Shard, read_shard, read_shards, rewrite
from triton_sft_pipeline.training.updates import AdapterFactors, Update, find_updates

ADAPTER = "adapter_model.safetensors"
REPORT = "merge.json"
_LEFT_OUT = (".bin", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors")
"""Not copied from beside the weights: other forms of the weights, and a model card that speaks of the base."""
_NO_PLACE = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS)

Progress = Callable[[int, int], None]


class MergeSettings(BaseModel):
    """Whether the pipeline makes a merged model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        False, description="Also make the asset merged_model: base and adapter in one, as large as the base."
    )


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, found out from headers alone.

    Attributes:
        base: directory of the base model.
        adapter: directory of the adapter.
        shards: the base's weight files.
        beside: the base's other files that are copied: config, tokenizer, chat template, index of the weights.
        updates: name of a base tensor -> what is added to it.
    """

    base: Path
    adapter: Path
    shards: tuple[Shard, ...]
    beside: tuple[Path, ...]
    updates: Mapping[str, Update]

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(shard.size for shard in self.shards) + sum(path.stat().st_size for path in self.beside)

    @property
    def tensors(self) -> int:
        """How many tensors the base has."""
        return sum(len(shard.tensors) for shard in self.shards)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        files: name -> SHA-256 of the merged weight files.
        tensors: how many tensors they hold.
        updated: to how many of them the adapter added something.
        unmoved: how many of those are bit for bit what they were: the addition was zero, or lost in rounding to the
            weight's type.
        size: bytes written, everything together.
    """

    files: Mapping[str, str]
    tensors: int
    updated: int
    unmoved: int
    size: int

    @property
    def version(self) -> str:
        """A hash of the merged weights."""
        return hash_json(dict(self.files))


def merge(base: Path | str, adapter: Path, out: Path, *, progress: Progress | None = None) -> MergeReport:
    """Write the model that `base` with `adapter` is, to the new directory `out`.

    Args:
        base: directory of the unquantised base model in safetensors, or its hub name when it was fetched before.
        adapter: directory that training, or any PEFT, wrote.
        out: must not exist, or be empty. It appears when everything is written.
        progress: told (done, total) in MiB.

    Raises:
        PipelineError: adapter and base do not fit, one of them cannot be read, `out` is taken or another merge is
            writing it.
        StepError: the disk is full, or a merged weight is not finite.
    """
    out = Path(out).resolve()
    plan = plan_merge(base, adapter)
    require_free(out)
    with _published(out) as directory:
        return write_merged(plan, directory, progress=progress)


def plan_merge(base: Path | str, adapter: Path) -> MergePlan:
    """Match every tensor of the adapter with what it changes in the base. Reads headers and writes nothing.

    Raises:
        PipelineError: as `merge`.
    """
    base, adapter = local_base(base), Path(adapter)
    model = _read_config(base / "config.json", "name the directory of an unquantised base model")
    if method := (model.get("quantization_config") or {}).get("quant_method"):
        raise PipelineError(
            f"{base} is quantised ({method}). An adapter is merged into the unquantised base that it was trained for."
        )
    config = _read_config(adapter / "adapter_config.json", "name a directory that training wrote")
    from triton_sft_pipeline.training.experts.layouts import LAYOUTS

    shards = tuple(read_shards(base))
    factors = read_shard(adapter / ADAPTER)
    layout = LAYOUTS.get(model.get("model_type", ""))
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    try:
        updates = find_updates(config, factors.tensors, tensors, layout.released if layout else {})
    except PipelineError as error:
        raise PipelineError(f"{adapter} cannot be merged into {base}: {error}") from error
    return MergePlan(base, adapter, shards, _beside(base, shards), updates)


def write_merged(plan: MergePlan, directory: Path, *, progress: Progress | None = None) -> MergeReport:
    """Do what `plan` says, into an empty directory that is there. A failure leaves it half full: see `merge`.

    Raises:
        StepError: the disk is full, or a merged weight is not finite.
    """
    from safetensors import safe_open

    with _disk_explained(directory):
        free = shutil.disk_usage(directory).free
        if free < plan.size:
            raise StepError(
                f"{directory.parent}: the merged model needs {size_text(plan.size)}, but only {size_text(free)} are "
                "free. Free some space or choose another disk."
            )
        with safe_open(str(plan.adapter / ADAPTER), framework="pt") as source:
            adding = _Adding(plan.updates, AdapterFactors(source))
            advance = _in_mebibytes(sum(shard.size for shard in plan.shards), progress)
            written = {s.path.name: rewrite(s, directory / s.path.name, adding.change, advance) for s in plan.shards}
        for path in plan.beside:
            shutil.copyfile(path, directory / path.name)
        report = MergeReport(
            files={name: shard.sha256 for name, shard in written.items()},
            tensors=plan.tensors,
            updated=len(plan.updates),
            unmoved=adding.unmoved,
            size=plan.size,
        )
        write_json(directory / REPORT, _record(plan, written, report))
    return report


def local_base(name: Path | str) -> Path:
    """The directory of a base model: `name` itself, or where the hub's model of that name was fetched to.

    Raises:
        PipelineError: it is neither.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return hub_directory(str(name))


def hub_directory(name: str, revision: str | None = None) -> Path:
    """Where the hub's model `name` lies in the local cache. Fetches nothing.

    Raises:
        PipelineError: it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, OSError, ValueError) as error:
        raise PipelineError(
            f"{name}: neither a directory nor a model in the local cache. Fetch it first with `hf download {name}`, "
            "or name a directory."
        ) from error


def require_free(out: Path) -> None:
    """Fail when something is at `out` already: a merge replaces nothing.

    Raises:
        PipelineError: it is a file, or a directory with something in it.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise PipelineError(f"{out} is there already: remove it or choose another --out.")


def size_text(size: int) -> str:
    """Bytes as people say them: 52.2 GB."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} bytes"


class _Adding:
    """Adds the adapter to the tensors that it reaches, and counts those that did not move."""

    def __init__(self, updates: Mapping[str, Update], factors: AdapterFactors) -> None:
        self._updates = updates
        self._factors = factors
        self.unmoved = 0

    def change(self, name: str, weight: Any) -> Any:
        import torch

        update = self._updates.get(name)
        if update is None:
            return weight
        # Added in float32 (float64 where the weight is): PEFT adds in the weight's own type, and rounds twice.
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = self._factors.delta(update).to(wide).add_(weight).to(weight.dtype)
        # Both ends are numbers: all are, without another tensor in memory.
        if merged.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(merged))).all()):
            raise StepError(f"{name} with {update.module} added is not finite: the adapter or the base is damaged.")
        self.unmoved += int(torch.equal(merged, weight))
        return merged


def _read_config(path: Path, fix: str) -> dict[str, Any]:
    if not path.is_file():
        raise PipelineError(f"{path} is missing: {fix}.")
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} cannot be read (it holds no JSON object).")
    return content


def _beside(base: Path, shards: tuple[Shard, ...]) -> tuple[Path, ...]:
    index = () if shards[0].path.name == WHOLE else (INDEX,)
    return tuple(
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in _LEFT_OUT
        and path.name != REPORT
        and (path.name in index or not path.name.endswith(".index.json"))
    )


def _in_mebibytes(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done >> 20, max(total >> 20, 1))

    return advance


def _record(plan: MergePlan, written: Mapping[str, Rewritten], report: MergeReport) -> dict[str, Any]:
    return {
        "base": str(plan.base),
        "adapter": str(plan.adapter),
        "adapter_sha256": sha256_file(plan.adapter / ADAPTER),
        "base_sha256": {name: shard.source_sha256 for name, shard in written.items()},
        "merged_sha256": dict(report.files),
        "tensors": report.tensors,
        "updated": report.updated,
        "unmoved": report.unmoved,
    }


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends without an error, and vanishes when it does not.

    What a killed process left there is removed by the next one. A lock, which dies with its process, keeps a second
    one out meanwhile.
    """
    building = out.with_name(f".{out.name}.merging")
    with _disk_explained(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out.with_name(f".{out.name}.merge.lock"), out):
            # Another merge may have finished between the first look and the lock.
            require_free(out)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                yield building
                _rename(building, out)
            finally:
                shutil.rmtree(building, ignore_errors=True)


def _rename(building: Path, out: Path) -> None:
    try:
        # Over an empty directory this is one step too.
        os.rename(building, out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise PipelineError(f"{out} appeared while the merge was written; it was left alone.") from error


@contextmanager
def _alone(path: Path, out: Path) -> Iterator[None]:
    in_use = PipelineError(f"{out}: another merge is writing it; wait for it or choose another --out.")
    while True:
        with locked(open(path, "w", encoding="utf-8"), in_use) as lock:
            if not _is_same_file(lock.fileno(), path):
                continue  # Its last owner removed it between the two calls.
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _disk_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StepError(
                f"{directory}: the disk is full. Nothing of the merged model was kept; free some space and run again."
            ) from error
        place = Path(error.filename) if isinstance(error.filename, str) else directory
        if error.errno in _NO_PLACE and place.is_relative_to(directory):
            raise PipelineError(f"{place}: {error.strerror}. Choose another --out.") from error
        raise
