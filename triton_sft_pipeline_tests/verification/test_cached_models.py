"""A problem that loads a model of the Hub is judged where the local cache holds it; nothing else there is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline.verification.sandbox.models import cached_models, hub_environment
from triton_sft_pipeline_tests.problems.codes import cached
from triton_sft_pipeline_tests.verification.snippets import DOUBLE_KERNEL, problem

LOADING = """
from huggingface_hub import constants, hf_hub_download

def weight(repo):
    assert constants.HF_HUB_OFFLINE
    with open(hf_hub_download(repo, "weight.txt")) as file:
        return float(file.read())
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hub")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    cached(folder, "owner/doubling", "weight.txt", content=b"2.0")
    cached(folder, "owner/secret", "weight.txt", content=b"2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def judge_with_models(cache: Path) -> Iterator[KernelJudge]:
    with KernelJudge(device="cpu", workers=1, trials=1, models=["owner/doubling", "owner/absent"]) as judge:
        yield judge


def loads(repo: str) -> str:
    return problem("x * self.weight", init=f"self.weight = weight({repo!r})", prelude=LOADING)


def test_a_problem_whose_model_is_cached_is_judged(judge_with_models: KernelJudge) -> None:
    verdict = judge_with_models.verify(loads("owner/doubling"), DOUBLE_KERNEL)
    assert verdict.verdict == "verified", verdict.detail


def test_of_the_cache_only_the_named_models_are_seen(judge_with_models: KernelJudge) -> None:
    if judge_with_models.isolation != "namespaces":
        pytest.skip("without namespaces files are not hidden")
    verdict = judge_with_models.verify(loads("owner/secret"), DOUBLE_KERNEL)
    assert verdict.verdict == "reference_error"


def test_a_judge_without_models_shows_none(cache: Path, judge: KernelJudge) -> None:
    verdict = judge.verify(loads("owner/doubling"), DOUBLE_KERNEL)
    assert verdict.verdict == "reference_error"


def test_cached_models_are_folders_and_what_is_not_cached_is_left_out(cache: Path) -> None:
    found = cached_models(["owner/doubling", "owner/absent", "owner/doubling"])
    assert found == [cache / "models--owner--doubling"]
    assert hub_environment(found) == {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    assert cached_models([]) == [] and hub_environment([]) == {}
