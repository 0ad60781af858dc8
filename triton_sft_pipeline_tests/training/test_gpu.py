"""The same training on a GPU. Sums over experts are atomic there, so runs agree closely and not to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triton_sft_pipeline.training.reload import reload_adapter
from triton_sft_pipeline_tests.training.setups import Died, Setup, at_step, die, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TRITON_SFT_TEST_GPU"), reason="TRITON_SFT_TEST_GPU is not set"),
]


def test_a_training_runs_on_the_gpu_in_bfloat16_and_reloads(setup: Setup, tmp_path: Path) -> None:
    on_gpu = setup.but(model={"compute_dtype": "bfloat16"}, training={"gradient_checkpointing": True, "max_steps": 12})
    run = on_gpu.train(tmp_path)
    assert next(run.model.parameters()).device.type == "cuda"
    assert run.train_loss[1] < run.train_loss[0]
    reloaded = reload_adapter(tmp_path, on_gpu.model)
    assert reloaded.agrees, reloaded


def test_a_training_that_died_on_the_gpu_goes_on_and_ends_close_to_an_uninterrupted_one(
    setup: Setup, tmp_path: Path
) -> None:
    whole = setup.train(tmp_path / "whole")
    with pytest.raises(Died):
        setup.train(tmp_path / "died", on_log=at_step(5, die))
    resumed = setup.train(tmp_path / "died")
    assert resumed.resumed_from == 4
    assert [step for step, _ in losses(resumed)] == [step for step, _ in losses(whole)]
    assert losses(resumed)[-1][1] == pytest.approx(losses(whole)[-1][1], rel=0.01)


def test_8_bit_optimiser_states_work_there(setup: Setup, tmp_path: Path) -> None:
    run = setup.but(training={"optim": "paged_adamw_8bit"}).train(tmp_path)
    assert run.train_loss[1] < run.train_loss[0]
