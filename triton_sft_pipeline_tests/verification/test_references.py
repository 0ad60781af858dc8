"""References are prepared once, and forgotten when there are too many, but never while somebody uses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.verification import references
from triton_sft_pipeline.verification.references import Reference, ReferenceCache


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(references, "_MAX_KEPT", 2)
    return []


def make_cache(prepared: list[str], discarded: list[str]) -> ReferenceCache:
    def prepare(code: str) -> Reference:
        prepared.append(code)
        return Reference(folder=Path(code), given=Path(code))

    return ReferenceCache(prepare, lambda reference: discarded.append(reference.folder.name))


def test_the_reference_used_longest_ago_is_forgotten(prepared: list[str]) -> None:
    discarded: list[str] = []
    cache = make_cache(prepared, discarded)
    for code in ("a", "b", "a", "c", "a", "b"):
        with cache.borrow(code) as reference:
            assert reference.folder.name == code
    assert (prepared, discarded) == (["a", "b", "c", "b"], ["b", "c"])


def test_a_reference_in_use_is_kept(prepared: list[str]) -> None:
    discarded: list[str] = []
    cache = make_cache(prepared, discarded)
    with cache.borrow("a"):
        for code in ("b", "c", "d"):
            with cache.borrow(code):
                assert "a" not in discarded
    assert discarded == ["b", "c"]


def test_a_preparation_that_failed_is_tried_again(prepared: list[str]) -> None:
    attempts: list[str] = []

    def prepare(code: str) -> Reference:
        attempts.append(code)
        if len(attempts) == 1:
            raise OSError("no space")
        return Reference(folder=Path(code), given=Path(code))

    cache = ReferenceCache(prepare, lambda reference: None)
    with pytest.raises(OSError, match="no space"), cache.borrow("a"):
        pass
    with cache.borrow("a") as reference:
        assert reference.folder == Path("a")
