"""What fails for want of memory or disk is said in one sentence; anything else passes as it is."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.training import model as model_module
from triton_sft_pipeline.training.failures import failures_explained
from triton_sft_pipeline.training.memory import device_name
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import ModelSettings
from triton_sft_pipeline_tests.training.setups import Setup, at_step


def exhaust() -> None:
    import torch

    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def pretend_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return SimpleNamespace(per_device_train_batch_size=2, max_length=4096, output_dir=str(tmp_path))


def test_out_of_memory_names_the_device_and_what_to_lower(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_there_is_a_gpu(monkeypatch)
    message = (
        r"Out of memory on NVIDIA H200 \(139 GiB\) with training.per_device_batch_size 2 and training.max_length 4096: "
        r"lower one of them, set training.gradient_checkpointing to true, or choose a smaller preset\."
    )
    with pytest.raises(StepError, match=message), failures_explained(config):
        exhaust()


def test_out_of_memory_names_a_preset_of_the_same_base_model_that_needs_less(
    config: Any, afmoe: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(afmoe.base_model)
    base.name_or_path = "/models/Trinity-Mini"
    pretend_there_is_a_gpu(monkeypatch)
    # More than the three presets need with a model as small as this one, then less.
    for used, said in [
        (8 * 2**30, r"8\.0 GiB were in use\. The preset trinity-mini-16k fits"),
        (1, "No shipped preset"),
    ]:
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda used=used: used)
        with pytest.raises(StepError, match=rf"choose a smaller preset\. .*{said}"), failures_explained(config, base):
            exhaust()


def test_out_of_memory_in_a_step_is_said_so(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"on .* with training.per_device_batch_size 2 and training.max_length 256"):
        setup.train(tmp_path, on_log=at_step(2, exhaust))


def test_a_model_that_does_not_fit_is_said_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: exhaust())
    monkeypatch.setattr(model_module, "device_name", lambda: "NVIDIA H200 (139 GiB)")
    with pytest.raises(StepError, match=r"does not fit on NVIDIA H200 \(139 GiB\): free the GPU"):
        load_model_and_tokenizer(setup.model)


def test_the_device_at_hand_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_name() == "the CPU"
    pretend_there_is_a_gpu(monkeypatch)
    assert device_name() == "NVIDIA H200 (139 GiB)"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_a_step_names_the_place(setup: Setup, tmp_path: Path, number: int) -> None:
    def fill() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(StepError, match=rf"disk is full while writing to {tmp_path}: free some space"):
        setup.train(tmp_path, on_log=at_step(1, fill))


def torch_save(directory: Path) -> None:
    import torch

    # A device that is always full.
    torch.save(torch.zeros(100_000), "/dev/full")


def safetensors_save(directory: Path) -> None:
    from safetensors import SafetensorError

    # What it says on a full file system; it writes to a new name, so /dev/full cannot stand for one.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def own_write(directory: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [torch_save, safetensors_save, own_write])
def test_a_full_disk_is_recognised_whichever_library_meets_it(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(StepError, match="disk is full"), failures_explained(config):
        write(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_that_failed_on_a_disk_with_space_passes_as_it_is(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(RuntimeError) as caught, failures_explained(config):
        torch_save(tmp_path)
    assert not isinstance(caught.value, StepError)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ValueError("no"), KeyboardInterrupt()])
def test_another_error_passes_as_it_is(config: Any, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, failures_explained(config):
        raise error
    assert caught.value is error
