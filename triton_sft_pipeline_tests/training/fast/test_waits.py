"""Training asks the device for numbers only where a log line is due, and learns the same as with all the waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training import sft
from triton_sft_pipeline.training import trainer as training
from triton_sft_pipeline.training.batch_facts import FACTS, BatchFacts, facts_of, with_facts
from triton_sft_pipeline.training.config import create_training_config
from triton_sft_pipeline.training.fast.install import fused_passes, make_fast, make_plain, padding_known
from triton_sft_pipeline.training.lora import create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.sft import without_waiting
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.training.fast.models import tiny_model, tokens
from triton_sft_pipeline_tests.training.setups import Setup, different_tensors

HERE = BatchFacts(tokens=0, padded_behind=True)


@pytest.fixture(scope="module")
def trainer(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that is ready to take steps, without dropout."""
    plain = setup.but(lora={"dropout": 0.0})
    model, tokenizer = load_model_and_tokenizer(plain.model)
    config = create_training_config(plain.training, tmp_path_factory.mktemp("output"))
    splits = training._tokenized_splits(plain.dataset, tokenizer, config.max_length)
    lora = create_lora_config(plain.lora)
    found: Any = training._build_trainer(model, tokenizer, splits, config, lora, None, first=True, progress=False)
    found.model.train()
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "trainer" in request.fixturenames:
        trainer = request.getfixturevalue("trainer")
        trainer.model.train()
        trainer._pending.clear()
        trainer._metrics["train"].clear()
        trainer._metrics["eval"].clear()
        trainer._total_train_tokens = 0


def batches(trainer: Any) -> list[dict[str, Any]]:
    """Three micro-batches of two rows of different lengths; nothing is to be learned from the last one."""
    rows = [trainer.train_dataset[i] for i in range(6)]
    found = [trainer.data_collator(rows[i : i + 2]) for i in range(0, 6, 2)]
    found[-1]["labels"] = torch.full_like(found[-1]["labels"], -100)
    return found


def step(trainer: Any, facts: bool, items: Any) -> dict[str, Tensor]:
    """The losses of three micro-batches and the gradients that they add up to."""
    trainer.model.zero_grad()
    losses = []
    for batch in batches(trainer):
        if not facts:
            batch.pop(FACTS)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), **gradients}


def metrics(trainer: Any) -> dict[str, list[float]]:
    trainer._settle_metrics()
    found = {name: list(values) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    return found


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("items", [None, torch.tensor(37), torch.tensor(37.0), torch.tensor(0)], ids=str)
def test_losses_gradients_and_metrics_are_the_inherited_ones_to_the_bit(
    trainer: Any, items: Tensor | None, average: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    monkeypatch.setattr(trainer.args, "average_tokens_across_devices", average)
    expected = step(trainer, False, items)
    assert trainer._pending == []
    measured = metrics(trainer)
    found = step(trainer, True, items)
    assert len(trainer._pending) == 3
    assert not any(number.requires_grad for sums in trainer._pending for number in sums[:3])
    assert found.keys() == expected.keys() and len(found) > 30
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert all(found[name].any() for name in found)
    assert metrics(trainer) == measured
    assert measured.keys() == {"entropy", "mean_token_accuracy", "num_tokens"}
    assert measured["entropy"][0] > 0.0 == measured["entropy"][2]


def test_metrics_are_those_of_all_processes(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process sees three times as much of everything, and one label more."""

    def gathered(numbers: Tensor) -> Tensor:
        mine = numbers if numbers.dim() else numbers[None]
        return torch.cat([mine, 3 * mine + 1])

    monkeypatch.setattr(trainer.accelerator, "gather", gathered)
    expected, settled = [], []
    for batch in batches(trainer)[:2]:
        step_alone(trainer, {name: value for name, value in batch.items() if name != FACTS})
        expected.append(metrics(trainer))
        step_alone(trainer, batch)
        settled.append(metrics(trainer))
    assert settled == expected
    assert expected[0]["num_tokens"][0] == 4 * batches(trainer)[0][FACTS].tokens + 1


def step_alone(trainer: Any, batch: dict[str, Any]) -> None:
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(37))


def test_a_training_learns_and_logs_what_the_inherited_loss_does(
    setup: Setup, trained: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, evaluations and checkpoints between the steps."""
    monkeypatch.setattr(sft, "with_facts", lambda collate: collate)
    inherited = setup.train(tmp_path)
    assert different_tensors(tmp_path, trained.adapter_dir) == []
    timeless = [
        [{key: value for key, value in entry.items() if not key.endswith(("runtime", "_second"))} for entry in log]
        for log in (inherited.log_history, trained.log_history)
    ]
    assert timeless[0] == timeless[1]
    assert sum("entropy" in entry for entry in timeless[0]) == 6


def test_packed_rows_are_counted_as_the_inherited_loss_counts_them(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = setup.but(training={"packing": True, "max_steps": 2, "per_device_batch_size": 1})
    found = packed.train(tmp_path / "found")
    monkeypatch.setattr(sft, "with_facts", lambda collate: collate)
    expected = packed.train(tmp_path / "expected")
    assert different_tensors(tmp_path / "found", tmp_path / "expected") == []
    counted = [[entry.get("num_tokens") for entry in run.log_history] for run in (found, expected)]
    assert counted[0] == counted[1] and counted[0][1]


class Asked(Exception):
    """Somebody wanted a number from the device."""


def test_no_number_is_asked_of_the_device_for_the_loss(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = trainer.model(**{k: v for k, v in batches(trainer)[0].items() if k != FACTS}, fused_lm_head=True)

    def refuse(self: Tensor) -> Any:
        raise Asked

    for name in ("item", "__bool__", "__int__", "__float__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    given = {FACTS: HERE, "attention_mask": torch.ones(1, 1)}
    trainer.compute_loss(lambda **_: outputs, given, num_items_in_batch=torch.tensor(37)).backward()
    with pytest.raises(Asked):
        trainer._settle_metrics()


@pytest.mark.parametrize(
    ("name", "value"),
    [("compute_loss_func", lambda *_, **__: torch.zeros(())), ("aux_loss_enabled", True)],
    ids=["a loss function of one's own", "an auxiliary loss"],
)
def test_another_loss_is_left_to_the_inherited_path(
    trainer: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, name, value)
    trainer.compute_loss(trainer.model, batches(trainer)[0])
    assert trainer._pending == []


def test_evaluation_takes_the_inherited_path(trainer: Any) -> None:
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, batches(trainer)[0]) > 0
    assert trainer._pending == []
    assert len(trainer._metrics["eval"]["entropy"]) == 1


def test_operations_are_counted_as_the_inherited_trainer_counts_them(trainer: Any) -> None:
    from trl import SFTTrainer

    for batch in batches(trainer):
        counted = trainer.floating_point_ops(batch)
        assert counted == SFTTrainer.floating_point_ops(trainer, batch) > 0


@pytest.mark.parametrize(
    ("mask", "behind"),
    [
        ([[1, 1, 1], [1, 1, 1]], True),
        ([[1, 1, 0], [1, 0, 0]], True),
        ([[1, 1, 1], [0, 1, 1]], False),
        ([[1, 0, 1]], False),
        ([[0, 0, 0]], False),
    ],
)
def test_where_rows_are_padded_is_seen_on_the_host(mask: list[list[int]], behind: bool) -> None:
    batch = {"input_ids": torch.zeros(len(mask), 3), "attention_mask": torch.tensor(mask)}
    facts = with_facts(lambda _: batch)(None)[FACTS]
    assert facts == facts_of(batch) == BatchFacts(sum(map(sum, mask)), behind)
    assert facts_of({"input_ids": torch.zeros(1, 7)}) == BatchFacts(7, True)


def test_facts_come_through_the_data_loader_that_sends_batches_to_the_device(trainer: Any) -> None:
    (first, *_) = trainer.get_train_dataloader()
    assert first[FACTS] == facts_of(first)
    assert next(iter(first)) == "input_ids"


def test_fused_layers_ask_nobody_when_they_are_told_of_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_sft_pipeline.training.fast import install

    def refuse(mask: Tensor) -> bool:
        raise Asked

    model = tiny_model(torch.float32)
    make_fast(model, force=True)
    monkeypatch.setattr(install, "padded_behind", refuse)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    with padding_known(model, True):
        model(input_ids=ids, attention_mask=mask)
    assert fused_passes(model) == 1
    with padding_known(model, False):
        model(input_ids=ids, attention_mask=mask)
    assert fused_passes(model) == 1
    with pytest.raises(Asked):
        model(input_ids=ids, attention_mask=mask)
    make_plain(model)
    with padding_known(model, True):
        model(input_ids=ids, attention_mask=mask)


def test_the_trainer_tells_fused_layers_of_the_padding(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_sft_pipeline.training.fast import install

    asked: list[Tensor] = []

    def look(mask: Tensor) -> bool:
        asked.append(mask)
        return True

    monkeypatch.setattr(install, "padded_behind", look)
    monkeypatch.setattr(trainer, "fast_layers", len(make_fast(trainer.model, force=True)))
    try:
        step(trainer, True, None)
        assert (fused_passes(trainer.model), len(asked)) == (3, 0)
        step(trainer, False, None)
        assert (fused_passes(trainer.model), len(asked)) == (6, 3)
    finally:
        make_plain(trainer.model)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "PagedAdamW8bit"])
def test_bitsandbytes_waits_for_the_device_when_its_states_are_saved_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes
    from bitsandbytes.optim import optimizer as library

    waited: list[Tensor] = []
    monkeypatch.setattr(library, "sync_gpu", waited.append)
    stock = getattr(bitsandbytes.optim, name)
    ours = without_waiting(stock)
    updated: list[Tensor] = []
    monkeypatch.setattr(ours, "init_state", lambda *_: None)
    monkeypatch.setattr(ours, "prefetch_state", lambda *_: None)
    monkeypatch.setattr(ours, "update_step", lambda self, group, p, *_: updated.append(p))
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    optimiser = ours(parameters, lr=0.1)
    optimiser.step()
    assert (len(updated), len(waited)) == (2, 0)
    saved: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: saved.append("waited"))
    optimiser.state_dict()
    assert saved == ["waited"]
    assert library.sync_gpu.__self__ is waited
    # Trainer tells bitsandbytes' optimisers by their names.
    assert (str(ours), issubclass(ours, stock)) == (str(stock), True)


def test_other_optimisers_are_left_alone(trainer: Any) -> None:
    assert without_waiting(torch.optim.AdamW) is torch.optim.AdamW
    assert trainer.get_optimizer_cls_and_kwargs(trainer.args)[0] is torch.optim.AdamW
