"""Packed samples are whole, and each is read and learned as if it were alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training import packing
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.samples import IGNORED, Sample
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline_tests.training.setups import Setup, adapter_weights, losses

WINDOW = 6
VOCABULARY = 96


def sample(length: int, start: int = 13, prompt: int = 1, key: str = "") -> Sample:
    ids = [13 + (start * 7 + 5 * i) % (VOCABULARY - 13) for i in range(length)]
    return Sample(key or f"s{start}", ids, [IGNORED] * prompt + ids[prompt:])


SAMPLES = [sample(5, 1), sample(11, 2, prompt=4), sample(8, 3, prompt=2), sample(7, 4)]
"""Two are longer than the sliding window."""


@pytest.fixture
def model() -> Any:
    """A four-layer AFMoE whose attention matters: sliding and full layers, dense and mixed ones, large weights."""
    import torch
    from transformers import AfmoeConfig, AfmoeForCausalLM

    torch.manual_seed(0)
    config = AfmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        sliding_window=WINDOW,
        global_attn_every_n_layers=2,
        mup_enabled=True,
        pad_token_id=12,
    )
    model = AfmoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def batch_of(samples: list[Sample]) -> dict[str, Any]:
    rows = [{"input_ids": s.input_ids, "labels": s.labels, "seq_lengths": list(s.documents)} for s in samples]
    return packing.collator(12)(rows)


def one_pack(samples: list[Sample]) -> Sample:
    (packed,) = packing.pack(samples, sum(len(s.input_ids) for s in samples))
    return packed


def alone(model: Any, sample: Sample) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([sample.input_ids])).logits[0]


def greatest_difference(model: Any, samples: list[Sample]) -> float:
    """How far the logits of packed documents are from those of the documents alone, when called as in training."""
    import torch

    batch = batch_of([one_pack(samples)])
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0].split([len(s.input_ids) for s in samples])
    return max((a - alone(model, s)).abs().max().item() for a, s in zip(logits, samples, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    assert greatest_difference(model, SAMPLES) > 1e-2, "without masks of its own, AFMoE leaks"
    packing.keep_documents_apart(model)
    assert greatest_difference(model, SAMPLES) < 1e-5


def test_the_sliding_window_holds_inside_a_document(model: Any) -> None:
    import torch

    positions = torch.cat([torch.arange(len(s.input_ids)) for s in SAMPLES])[None]
    masks = packing.document_masks(model.base_model, positions)
    document = torch.cat([torch.full((len(s.input_ids),), i) for i, s in enumerate(SAMPLES)])
    i, j = torch.meshgrid(torch.arange(len(document)), torch.arange(len(document)), indexing="ij")
    full = (document[i] == document[j]) & (j <= i)
    assert torch.equal(masks["full_attention"][0, 0], full)
    assert torch.equal(masks["sliding_attention"][0, 0], full & (j > i - WINDOW))


def test_no_mask_is_built_before_it_is_asked_for(model: Any) -> None:
    import torch

    masks = packing.document_masks(model.base_model, torch.arange(4)[None] % 2)
    assert dict(masks) == {}
    assert masks["full_attention"] is masks["full_attention"]
    assert set(masks) == {"full_attention"}


def test_a_call_with_a_mask_a_cache_or_no_positions_is_left_as_it_was(model: Any) -> None:
    import torch

    ids = torch.tensor([SAMPLES[1].input_ids])
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    calls: list[dict[str, Any]] = [{}, {"attention_mask": padding}, {"use_cache": True}]
    with torch.no_grad():
        before = [model(input_ids=ids, **call).logits for call in calls]
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        packing.keep_documents_apart(model)
        for expected, call in zip(before, calls, strict=True):
            assert torch.equal(model(input_ids=ids, **call).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def test_a_model_that_attends_across_documents_is_refused(model: Any) -> None:
    with pytest.raises(PipelineError, match=r"training\.packing is true, but .*\(afmoe\) attends from one packed"):
        packing.check_documents_apart(model)
    packing.keep_documents_apart(model)
    packing.check_documents_apart(model)


@pytest.mark.parametrize("which", ["afmoe", "llama"])
def test_a_quantised_model_keeps_documents_apart_and_is_left_as_it_was(
    which: str, request: pytest.FixtureRequest
) -> None:
    settings: ModelSettings = request.getfixturevalue(which)
    loaded, _ = load_model_and_tokenizer(settings)
    assert packing.prepare(loaded, SAMPLES, 32)
    assert greatest_difference(loaded, SAMPLES) < 1e-5
    assert all(parameter.grad is None for parameter in loaded.parameters())


def test_the_loss_is_the_mean_over_the_tokens_of_all_samples(model: Any) -> None:
    import torch
    from trl.trainer.utils import add_fused_lm_head

    packing.keep_documents_apart(model)
    add_fused_lm_head(model)
    packs = packing.pack(SAMPLES, 19)
    assert len(packs) == 2 and all(len(pack.documents) > 1 for pack in packs)
    total, tokens = 0.0, 0
    for s in SAMPLES:
        trained = sum(label != IGNORED for label in s.labels)
        ids, labels = torch.tensor([s.input_ids]), torch.tensor([s.labels])
        total += trained * model(input_ids=ids, labels=labels, fused_lm_head=True).loss.item()
        tokens += trained
    packed = model(**batch_of(packs), fused_lm_head=True)
    assert packed.label_mask.sum() == tokens
    assert packed.loss.item() == pytest.approx(total / tokens, rel=1e-6)


def test_the_gradient_is_that_of_the_samples_alone(model: Any) -> None:
    import torch

    def gradient(losses: list[Any]) -> Any:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    def summed(logits: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")

    packing.keep_documents_apart(model)
    separate = gradient(
        [summed(model(input_ids=torch.tensor([s.input_ids])).logits[0], torch.tensor(s.labels)) for s in SAMPLES]
    )
    batch = batch_of([one_pack(SAMPLES)])
    labels = batch.pop("labels")
    together = gradient([summed(model(**batch).logits[0], labels[0])])
    assert torch.allclose(together, separate, rtol=1e-4, atol=1e-5 * separate.abs().max().item())


def test_fused_layers_keep_documents_apart_and_need_no_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from triton_sft_pipeline.training.fast.install import fused_passes, make_fast
    from triton_sft_pipeline.training.lora import attach_lora, create_lora_config

    packing.prepare(model, SAMPLES, 31)
    peft_model = attach_lora(model, create_lora_config(LoraSettings(r=4, alpha=8, dropout=0.0))).train()
    batch = batch_of([one_pack(SAMPLES)])

    def loss_and_gradient() -> tuple[float, Any]:
        peft_model.zero_grad()
        loss = peft_model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in peft_model.parameters() if p.requires_grad])

    plain = loss_and_gradient()
    assert make_fast(peft_model, force=True)

    def unwanted(*_: Any) -> Any:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(packing._DocumentMasks, "__missing__", unwanted)
    fused = loss_and_gradient()
    assert fused_passes(peft_model) == 1
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    assert torch.allclose(fused[1], plain[1], rtol=1e-3, atol=1e-5 * plain[1].abs().max().item())
    # Evaluation goes through the plain layers, which do need them.
    with pytest.raises(AssertionError, match="a mask was built"), torch.no_grad():
        peft_model.eval()(**batch, use_cache=False)


def test_no_document_is_trained_to_follow_another() -> None:
    # Samples whose first token counts: what precedes it in a pack is another document.
    greedy = [sample(4, i, prompt=0) for i in range(3)]
    (packed,) = packing.pack(greedy, 12)
    starts = [0, *itertools.accumulate(packed.documents)][:-1]
    assert [packed.labels[start] for start in starts] == [IGNORED] * 3
    assert sum(label != IGNORED for label in packed.labels) == 9
    rows = [{"input_ids": packed.input_ids, "labels": packed.input_ids, "seq_lengths": list(packed.documents)}]
    labels = packing.collator(12)(rows * 2)["labels"][0]
    assert (labels == IGNORED).nonzero().flatten().tolist() == [0, 4, 8, 12, 16, 20]


def test_a_packed_batch_has_positions_and_neither_padding_nor_a_mask() -> None:
    batch = batch_of(packing.pack(SAMPLES, 19))
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, sum(len(s.input_ids) for s in SAMPLES))
    )
    # The longest first, joined by the one that leaves least room: 11 + 8 and 7 + 5.
    expected = [5, 7, 11, 8]
    assert batch["position_ids"][0].tolist() == [i for length in expected for i in range(length)]


def test_rows_that_are_not_packed_are_padded_as_ever() -> None:
    rows = [{"input_ids": s.input_ids, "labels": s.labels} for s in SAMPLES[:2]]
    batch = packing.collator(12)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [5, 11]
    assert batch["input_ids"][0].tolist() == SAMPLES[0].input_ids + [12] * 6
    assert batch["labels"][0].tolist() == SAMPLES[0].labels + [IGNORED] * 6
    assert "position_ids" not in batch


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 60))
def test_every_sample_is_in_one_pack_whole_and_no_pack_is_too_long(lengths: list[int], slack: int) -> None:
    longest = max(lengths, default=1) + slack
    samples = [sample(length, i, key=str(i)) for i, length in enumerate(lengths)]
    packs = packing.pack(samples, longest)
    found = []
    for pack in packs:
        assert sum(pack.documents) == len(pack.input_ids) == len(pack.labels) <= longest
        start = 0
        for key, length in zip(pack.key.split("+"), pack.documents, strict=True):
            part = slice(start, start + length)
            found.append(int(key))
            assert pack.input_ids[part] == samples[int(key)].input_ids
            assert pack.labels[part] == [IGNORED, *samples[int(key)].labels[1:]]
            start += length
    assert sorted(found) == list(range(len(samples)))
    # Two packs that together fit into one would be a packer that does not try.
    sizes = sorted(len(pack.input_ids) for pack in packs)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > longest
    assert packing.pack(samples, longest) == packs


def test_a_sample_longer_than_a_sequence_is_refused_by_name_and_not_cut() -> None:
    with pytest.raises(PipelineError, match=r"sample s2 has 11 tokens, more than training.max_length \(10\)"):
        packing.pack(SAMPLES, 10)


def test_packing_is_off_by_default(tmp_path: Path) -> None:
    from triton_sft_pipeline.training.config import create_training_config

    assert TrainingSettings().packing is False
    assert create_training_config(output_dir=tmp_path).packing is False


def test_a_packed_training_learns_what_one_of_the_same_samples_apart_does(setup: Setup, tmp_path: Path) -> None:
    import torch

    # All six rows in every step, so that how they are put into sequences is all that differs.
    apart = setup.but(
        lora={"dropout": 0.0}, training={"max_steps": 2, "per_device_batch_size": 6, "max_length": 200, "save_steps": 2}
    )
    one = apart.train(tmp_path / "apart")
    other = apart.but(training={"packing": True}).train(tmp_path / "packed")
    for (_, before), (_, after) in zip(losses(one), losses(other), strict=True):
        assert after == pytest.approx(before, abs=1e-5)
    assert other.eval_loss == pytest.approx(one.eval_loss, abs=1e-5)
    separate, together = adapter_weights(tmp_path / "apart"), adapter_weights(tmp_path / "packed")
    assert separate.keys() == together.keys()
    assert all(torch.allclose(together[name], separate[name], atol=1e-4) for name in separate)


def test_a_packed_epoch_has_fewer_steps(setup: Setup, tmp_path: Path) -> None:
    changes = {"max_steps": -1, "epochs": 1, "per_device_batch_size": 1, "max_length": 200}
    assert setup.but(training=changes).train(tmp_path / "apart").steps == 6
    assert setup.but(training={**changes, "packing": True}).train(tmp_path / "packed").steps == 3
