"""How many threads a model gets while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from triton_sft_pipeline.training import threads
from triton_sft_pipeline.training.threads import suitable_threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    import torch

    return torch.nn.Linear(4, 4)


def test_a_small_model_gets_one_thread_and_what_follows_gets_them_back(model: Any) -> None:
    import torch

    with suitable_threads(model):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_the_threads_come_back_after_an_error(model: Any) -> None:
    import torch

    with pytest.raises(ValueError, match="broken"), suitable_threads(model):
        raise ValueError("broken")
    assert torch.get_num_threads() == 3


def test_a_large_model_keeps_its_threads(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(threads, "SMALL", 20)
    with suitable_threads(model):
        assert torch.get_num_threads() == 3


def test_a_model_on_another_device_keeps_its_threads() -> None:
    import torch

    with suitable_threads(torch.nn.Linear(4, 4, device="meta")):
        assert torch.get_num_threads() == 3
