"""A dataset directory to the Hub: what would be sent, and sending it.

Nothing is sent to a public dataset unless that is asked for, an existing one included: rows cannot be taken back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton_sft_pipeline.chat.card import CARD_FILE
from triton_sft_pipeline.chat.dataset import SPLITS, read_examples
from triton_sft_pipeline.errors import PipelineError, StepError

_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_REFUSED = (401, 403)


@dataclass(frozen=True)
class PushPlan:
    """What would be sent.

    Attributes:
        files: paths, the card first.
        rows: rows by split.
        folders: of this machine, named by the column `file`.
    """

    directory: Path
    repo: str
    files: list[Path]
    rows: dict[str, int]
    folders: list[str]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.stat().st_size for file in self.files)


def plan_push(directory: Path, repo: str) -> PushPlan:
    """Look at a dataset directory and at the name it is to have.

    Raises:
        PipelineError: the name is none, or the directory holds no whole dataset.
    """
    if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo:
        raise PipelineError(f"--repo {repo}: expected owner/name, of letters, digits, dots, dashes and underscores.")
    directory = Path(directory)
    examples = {split: read_examples(directory, split) for split in SPLITS}
    card = directory / CARD_FILE
    if not card.is_file():
        raise PipelineError(f"{card}: the dataset card is missing. Build it again: `triton-sft dataset build`.")
    local = {Path(e.file).parent for rows in examples.values() for e in rows if not e.file.startswith("hf:")}
    folders = {str(folder) for folder in local if folder != Path()}
    files = [card, *(directory / f"{split}.parquet" for split in SPLITS)]
    return PushPlan(directory, repo, files, {s: len(rows) for s, rows in examples.items()}, sorted(folders))


def push(plan: PushPlan, *, public: bool, progress: bool = False) -> str:
    """Send the files of a plan in one commit; the dataset is made when there is none.

    Args:
        public: whether anybody may read it. An existing dataset keeps its visibility, and is refused where it is public
            and this is not set.
        progress: show the libraries' bars.

    Returns:
        The address of the dataset.

    Raises:
        PipelineError: offline, not logged in, not allowed, or public against the will of the caller.
        StepError: the Hub cannot be reached, or failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    api = HfApi(library_name="triton-sft-pipeline")
    with _told_plainly(plan.repo, constants.ENDPOINT):
        api.create_repo(plan.repo, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not api.dataset_info(plan.repo).private:
            raise PipelineError(
                f"{plan.repo} is public, and everybody could read these rows: add --public if that is meant, or choose "
                "another name. Nothing was sent."
            )
        api.create_commit(
            plan.repo,
            repo_type="dataset",
            operations=[CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in plan.files],
            commit_message=f"Chat dataset: {plan.rows['train']} train, {plan.rows['test']} test rows",
        )
    return f"{constants.ENDPOINT}/datasets/{plan.repo}"


@contextmanager
def _told_plainly(repo: str, endpoint: str) -> Iterator[None]:
    """The Hub's errors in a sentence that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PipelineError(f"{repo}: nothing was sent, because HF_HUB_OFFLINE is set. Unset it to push.") from error
    except LocalTokenNotFoundError as error:
        raise PipelineError(f"{repo}: nothing was sent; {login}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in _REFUSED:
            raise PipelineError(f"{repo}: {endpoint} refused it ({status}); {login}.") from error
        said = (error.server_message or str(error).splitlines()[0]).strip()
        raise StepError(f"{repo}: {endpoint} answered {status}: {said}") from error
    except json.JSONDecodeError as error:
        raise StepError(f"{repo}: {endpoint} does not answer as a Hub does; is a proxy in between?") from error
    except ValueError as error:
        # The name is looked at before anything is sent, and the card's header before any row is.
        said = " ".join(str(error).split())
        raise PipelineError(f"{repo}: {endpoint} does not take it: {said}") from error
    except Exception as error:
        # The library's HTTP client has errors of its own, and its name changes between releases.
        root = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if not isinstance(root, OSError) and type(root).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        why = str(root).splitlines()[0] if str(root) else type(root).__name__
        raise StepError(
            f"{repo}: {endpoint} cannot be reached ({why}). Nothing was changed there; try again with a network."
        ) from error
