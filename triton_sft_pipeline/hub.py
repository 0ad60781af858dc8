"""Datasets of the Hugging Face Hub as files in its local cache. Knows nothing of what is in them."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from triton_sft_pipeline.errors import PipelineError

SCHEME = "hf://"

# `Path("hf://owner/name")` has lost one of the slashes.
_PLACE = re.compile(
    r"hf:/{1,2}(?:datasets/)?(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?", re.DOTALL
)
# What the Hub's own tools keep beside the data.
_BOOKKEEPING = ["dataset_infos.json", "**/dataset_infos.json", "dataset_info.json", "**/dataset_info.json"]


@dataclass(frozen=True)
class HubPlace:
    """A dataset, or a part of one.

    Attributes:
        repo: owner/name.
        revision: branch, tag or commit; None is the default branch. A branch whose name holds a slash is written with
            %2F.
        path: a file, a folder or a pattern in it; empty is all of it.
    """

    repo: str
    revision: str | None
    path: str


def is_hub(place: str) -> bool:
    """Whether `place` is written as a dataset of the Hub."""
    return place.startswith("hf:/")


def parse(place: str) -> HubPlace:
    """The parts of hf://owner/name[@revision][/path]; `hf://datasets/owner/name` is the same.

    Raises:
        PipelineError: it is written otherwise.
    """
    match = _PLACE.fullmatch(place)
    if match is None:
        raise PipelineError(f"{place}: not a dataset of the Hub; expected hf://owner/name[@revision][/path].")
    revision = match["revision"]
    return HubPlace(match["repo"], revision and revision.replace("%2F", "/"), (match["path"] or "").strip("/"))


def fetch(
    place: str, suffixes: Sequence[str], origin: str | None = None, what: str = "traces"
) -> list[tuple[str, Path]]:
    """Download what is not yet in the Hub's cache and list it. Without a network, what the cache holds is all there is.

    Args:
        place: see `parse`.
        suffixes: which files of a folder, a pattern or a whole dataset are wanted.
        origin: what the place was read from, for the error.
        what: what the files should hold, for the error.

    Returns:
        (hf:// name, local path) of each file, by name.

    Raises:
        PipelineError: the dataset is not in the cache and cannot be had, or it holds no such file.
    """
    wanted = parse(place)
    root = _snapshot(wanted, place, suffixes, origin)
    prefix = SCHEME + wanted.repo + (f"@{wanted.revision.replace('/', '%2F')}" if wanted.revision else "")
    found = [(f"{prefix}/{path.relative_to(root).as_posix()}", path) for path in _matching(root, wanted.path, suffixes)]
    if not found:
        raise PipelineError(f"{place}: the dataset holds no such file of {what} ({', '.join(suffixes)}).")
    return found


def _snapshot(wanted: HubPlace, place: str, suffixes: Sequence[str], origin: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    setting = f" ({origin})" if origin else ""
    try:
        folder = snapshot_download(
            wanted.repo,
            repo_type="dataset",
            revision=wanted.revision,
            allow_patterns=list(_patterns(wanted.path, suffixes)),
            ignore_patterns=_BOOKKEEPING,
        )
    except GatedRepoError as error:
        raise PipelineError(
            f"{place}{setting}: access must be asked for on the dataset's page; then log in with hf auth login."
        ) from error
    except RepositoryNotFoundError as error:
        raise PipelineError(
            f"{place}{setting}: the Hub knows no such dataset, or it is private (hf auth login gives access)."
        ) from error
    except RevisionNotFoundError as error:
        raise PipelineError(f"{place}{setting}: the dataset has no revision {wanted.revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise PipelineError(
            f"{place}{setting}: not in the local cache, and the Hub cannot be reached. "
            "Download it once where there is a network "
            f"(hf download {wanted.repo} --repo-type dataset --local-dir DIR), and name that folder."
        ) from error
    except Exception as error:  # Whatever the network, the disk or the client's own rules object to.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PipelineError(f"{place}{setting}: cannot be downloaded ({first}).") from error
    return Path(folder)


def _patterns(path: str, suffixes: Sequence[str]) -> Iterator[str]:
    if not path:
        yield from (f"*{suffix}" for suffix in suffixes)
        return
    yield path
    if not path.lower().endswith(tuple(suffixes)):
        yield from (f"{path}/*{suffix}" for suffix in suffixes)


def _matching(root: Path, path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a snapshot that `path` names. The snapshot may hold more, from an earlier download."""
    starts = sorted(root.glob(path)) if glob.has_magic(path) else [root / path]
    files = [file for start in starts for file in (sorted(start.rglob("*")) if start.is_dir() else [start])]
    hidden = {part.split("/")[-1] for part in _BOOKKEEPING}
    return [
        file
        for file in files
        if file.is_file()
        and file.name.lower().endswith(tuple(suffixes))
        and file.name not in hidden
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
