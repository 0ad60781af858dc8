"""When training goes through the fused layers, when it must not, and that both leave the model as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.afmoe import modeling_afmoe

from triton_sft_pipeline.training.fast import install
from triton_sft_pipeline.training.fast.install import fused_passes, make_fast, make_plain
from triton_sft_pipeline_tests.training.fast.models import assert_equal, gradients, tiny_model, tokens


@pytest.fixture
def model() -> Any:
    """In single precision, with fused layers."""
    model = tiny_model(torch.float32)
    assert make_fast(model, force=True)
    return model


def test_it_names_what_it_replaced(model: Any) -> None:
    assert make_fast(model, force=True) == [
        "base_model.model.model",
        *(f"base_model.model.model.layers.{i}" for i in range(4)),
        "base_model.model.model.norm",
    ]


def test_training_passes_are_fused_and_evaluation_is_not(model: Any) -> None:
    model(input_ids=tokens(1, 6), labels=tokens(1, 6)).loss.backward()
    assert fused_passes(model) == 1
    model.eval()
    model(input_ids=tokens(1, 6))
    model.train()
    with torch.no_grad():
        model(input_ids=tokens(1, 6))
    assert fused_passes(model) == 1


def test_rows_padded_behind_give_what_they_give_alone(model: Any) -> None:
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    fused = _loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert fused_passes(model) == 2
    make_plain(model)
    assert_equal(fused, _loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels), 1e-4)
    torch.testing.assert_close(logits[1:, :4], model(input_ids=ids[1:, :4]).logits, rtol=1e-4, atol=1e-4)


def test_rows_padded_in_front_go_the_stock_way(model: Any) -> None:
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    assert fused_passes(model) == 0
    make_plain(model)
    assert torch.equal(padded, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "options", [{"use_cache": True}, {"output_router_logits": True}, {"output_attentions": True}], ids=str
)
def test_what_the_fused_layers_cannot_give_goes_the_stock_way(model: Any, options: dict[str, bool]) -> None:
    model(input_ids=tokens(1, 6), **options)
    assert fused_passes(model) == 0


def test_a_disabled_adapter_gives_the_base_model(model: Any) -> None:
    with model.disable_adapter():
        without = model(input_ids=tokens(1, 6)).logits
    assert fused_passes(model) == 0
    assert not torch.allclose(without, model(input_ids=tokens(1, 6)).logits)
    assert fused_passes(model) == 1


def test_on_the_cpu_it_waits_to_be_forced() -> None:
    model = tiny_model(torch.float32)
    assert make_fast(model)
    model(input_ids=tokens(1, 6))
    assert fused_passes(model) == 0


def test_plain_leaves_every_module_as_it_was() -> None:
    model = tiny_model(torch.float32)
    before = [dict(module.__dict__) for module in model.modules()]
    make_fast(model, force=True)
    make_fast(model, force=True)
    make_plain(model)
    make_plain(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert fused_passes(model) == 0


def test_the_environment_can_switch_it_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SFT_PLAIN", "1")
    model(input_ids=tokens(1, 6))
    assert fused_passes(model) == 0
    assert make_fast(model, force=True) == []


def test_masks_nobody_reads_are_not_built(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(modeling_afmoe, "create_causal_mask", refuse)
    monkeypatch.setattr(modeling_afmoe, "create_sliding_window_causal_mask", refuse)
    model(input_ids=tokens(1, 6))
    assert fused_passes(model) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_compute_a_layer_twice(
    model: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(model, tokens(1, 8))
    calls: list[int] = []
    fused = install.decoder_layer

    def counted(x: Any, call: Any) -> Any:
        calls.append(call.parts.number)
        return fused(x, call)

    monkeypatch.setattr(install, "decoder_layer", counted)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(model, tokens(1, 8))
    assert calls == [0, 1, 2, 3]
    assert_equal(actual, expected, 1e-12)
    # A pass that goes the stock way is checkpointed as before.
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


def test_a_stock_pass_after_a_fused_one_is_its_own_when_it_recomputes(model: Any) -> None:
    """Rows padded in front, under checkpointing: the recomputation happens outside of the model's forward."""
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=tokens(1, 6)).logits.sum().backward()
    mixed = gradients(model, ids, attention_mask=mask)
    assert fused_passes(model) == 1
    make_plain(model)
    assert_equal(mixed, gradients(model, ids, attention_mask=mask), 1e-12)


def test_seeds_come_from_the_generator_that_resuming_restores() -> None:
    model = tiny_model(torch.float32, dropout=0.5)
    make_fast(model, force=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (model(input_ids=tokens(1, 6)).logits for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(model(input_ids=tokens(1, 6)).logits, first)
    assert not torch.equal(first, second)


def test_reading_the_model_draws_no_random_number() -> None:
    model = tiny_model(torch.float32, dropout=0.5)
    before = torch.get_rng_state()
    make_fast(model, force=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "q_proj"),
        ({"attention_dropout": 0.1}, "attention weights"),
        ({"head_dim": 12}, "head_dim 12"),
        ({"num_shared_experts": 0}, "shared experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_it_does_not_know_stays_stock_and_is_named(
    changes: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(torch.float32, **changes)
    with caplog.at_level(logging.WARNING):
        assert make_fast(model, force=True) == []
    assert named in caplog.text
    model(input_ids=tokens(1, 6))
    assert fused_passes(model) == 0


def test_adapters_that_are_off_when_it_is_called_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(torch.float32)
    with model.disable_adapter(), caplog.at_level(logging.WARNING):
        assert make_fast(model, force=True) == []
    assert "switched off" in caplog.text


def test_other_architectures_are_left_alone() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert make_fast(LlamaForCausalLM(config), force=True) == []


@pytest.mark.slow
def test_a_trainer_with_checkpointing_and_accumulation_learns_the_same(tmp_path: Path) -> None:
    losses = [_train(fused, tmp_path) for fused in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_gradients_reach_distributed_training(model: Any, tmp_path: Path) -> None:
    """DDP hangs its own hooks on every parameter: they see the gradients of the fused layers."""
    expected = gradients(model, tokens(1, 8))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        logits = wrapped(input_ids=tokens(1, 8), use_cache=False).logits
        weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(2))
        (logits * weights).tanh().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(found, {name: expected[name] for name in found}, 1e-6)
    assert len(found) == len(expected) - 2


def _loss_and_gradients(model: Any, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def _train(fused: bool, directory: Path) -> list[float]:
    """Four steps of two rows each through TRL's trainer: the logged losses."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = tiny_model(torch.float32)
    words = models.WordLevel({str(i): i for i in range(40)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="12", eos_token="3")
    rows = [tokens(1, 9 + i, i)[0].tolist() for i in range(8)]
    config = SFTConfig(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        max_length=None,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    if fused:
        assert make_fast(trainer.model, force=True)
    trainer.train()
    assert fused_passes(trainer.model) == (8 if fused else 0)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
