"""Models of the Hub that judged code may load: their folders of the local cache, and what makes libraries find them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def cached_models(names: Iterable[str]) -> list[Path]:
    """The folders of the Hub's local cache that hold these repositories ("owner/name"), of those that it holds."""
    names = sorted(set(names))
    if not names:
        return []
    from huggingface_hub.file_download import repo_folder_name

    folders = (_cache() / repo_folder_name(repo_id=name, repo_type="model") for name in names)
    return [folder for folder in folders if folder.is_dir()]


def hub_environment(folders: Iterable[Path]) -> dict[str, str]:
    """Environment variables with which the Hub's library reads these folders and asks nobody."""
    return {"HF_HUB_CACHE": str(_cache()), "HF_HUB_OFFLINE": "1"} if list(folders) else {}


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).absolute()
