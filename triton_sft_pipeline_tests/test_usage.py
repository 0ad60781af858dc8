"""The step-by-step usage of the original script, on the tiny preset, with the original hyper-parameters."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_steps_of_the_original_script_work_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton_sft_pipeline import (
        create_lora_config,
        create_training_config,
        inference,
        load_and_filter_traces,
        load_model_and_tokenizer,
        prepare_dataset,
        train,
    )
    from triton_sft_pipeline.config import data_dir

    traces = load_and_filter_traces(data_dir() / "reasoning_traces.json")
    assert len(traces) == 31
    assert "kept" in capsys.readouterr().out
    dataset = prepare_dataset(traces, test_size=0.1)
    assert (len(dataset["train"]), len(dataset["test"])) == (28, 3)

    model, tokenizer = load_model_and_tokenizer()
    assert model.is_loaded_in_4bit
    assert tokenizer.pad_token is not None

    lora = create_lora_config()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 128, 0.05)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    config = create_training_config(tmp_path / "out", max_steps=2)
    assert (config.learning_rate, config.lr_scheduler_type, config.weight_decay) == (2e-4, "cosine", 0.01)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.max_length) == (1, 8, 4096)
    assert config.num_train_epochs == 3

    run = train(model, tokenizer, dataset, config, lora)
    assert run.steps == 2
    answer = inference(traces[0]["pytorch_code"], adapter=run.adapter_dir)
    assert answer.startswith("<think>")


def test_main_does_all_of_it_as_a_plain_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_sft_pipeline import main

    settings = tmp_path / "settings.yaml"
    settings.write_text("training: {max_steps: 2}\n")
    monkeypatch.setenv("TRITON_SFT_CONFIG", str(settings))
    run = main(output_dir=tmp_path / "out")
    assert (run.adapter_dir / "adapter_config.json").is_file()
    assert (tmp_path / "out/dataset/train.parquet").is_file()
