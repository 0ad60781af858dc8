"""The loss in one pass against TRL's, which computes every logit twice, and against all logits written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sft_pipeline.training.fast import head
from triton_sft_pipeline.training.fast.head import TrainedTokens, add_one_pass_head, one_pass, trained_tokens
from triton_sft_pipeline_tests.training.fast.models import tiny_model

VOCABULARY, WIDTH = 70, 16


def inputs(tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(device, dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device, dtype)
    labels = torch.randint(VOCABULARY, (1, tokens), generator=generator)
    labels[0, : tokens // 3] = -100
    return hidden, weight, labels


def written_out(hidden: Tensor, weight: Tensor, trained: TrainedTokens) -> tuple[Tensor, Tensor, Tensor]:
    logits = (hidden @ weight.t())[trained.positions].float()
    distribution = torch.distributions.Categorical(logits=logits)
    log_probs = logits.log_softmax(-1).gather(1, trained.targets[:, None])[:, 0]
    return log_probs, distribution.entropy(), logits.argmax(-1) == trained.targets


@pytest.mark.parametrize("tile", [head.TILE_BYTES, 1], ids=["one group", "many groups"])
def test_numbers_and_gradient_are_those_of_all_logits_written_out(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_BYTES", tile)
    hidden, weight, labels = inputs(300)
    trained = trained_tokens(labels)
    found_in, expected_in = (hidden.clone().requires_grad_() for _ in range(2))
    found, expected = one_pass(found_in, weight, trained), written_out(expected_in, weight, trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    # Another factor for each token, as no mean has.
    factors = torch.linspace(-1, 1, len(trained.targets))
    (found[0] * factors).sum().backward()
    (expected[0] * factors).sum().backward()
    torch.testing.assert_close(found_in.grad, expected_in.grad, rtol=1e-5, atol=1e-6)


def test_entropy_and_hits_have_no_gradient() -> None:
    hidden, weight, labels = inputs(12)
    log_probs, entropy, hits = one_pass(hidden.requires_grad_(), weight, trained_tokens(labels))
    assert log_probs.requires_grad and not entropy.requires_grad and not hits.requires_grad


def test_a_batch_that_trains_nothing_has_a_gradient_of_zero() -> None:
    hidden, weight, labels = inputs(9)
    log_probs, _, _ = one_pass(hidden.requires_grad_(), weight, trained_tokens(labels.fill_(-100)))
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and hidden.grad is not None and not hidden.grad.any()


def test_trained_tokens_are_what_follows_in_the_same_row() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 3]])
    trained = trained_tokens(labels)
    # 5 and the first token of the second row are what nothing comes before.
    assert trained.positions.tolist() == [1, 2, 6]
    assert trained.targets.tolist() == [7, 8, 3]


def test_a_model_gives_trls_numbers_token_by_token() -> None:
    trl_output, output, labels = both_heads(tiny_model(torch.float32))
    mask = labels[:, 1:] != -100
    for name in ("log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(output, name), getattr(trl_output, name)[mask], rtol=1e-4, atol=1e-4)
    assert int(output.label_mask.sum()) == int(mask.sum())


def test_a_head_with_a_bias_or_scaled_logits_keeps_trls_way() -> None:
    model = tiny_model(torch.float32).get_base_model()
    model.requires_grad_(False)
    model.config.final_logit_softcapping = 30.0
    assert not add_one_pass_head(model)
    model.config.final_logit_softcapping = None
    model.lm_head.bias = nn.Parameter(torch.zeros(model.lm_head.out_features), requires_grad=False)
    assert not add_one_pass_head(model)
    model.lm_head.bias = None
    model.lm_head.weight.requires_grad_(True)
    assert not add_one_pass_head(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_kernels_gradient_is_as_near_as_trls_to_that_of_logits_in_float64() -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(700, 256, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(200_192, 256, generator=generator, device="cuda", dtype=torch.bfloat16) * 0.1
    labels = torch.randint(len(weight), (1, 700), generator=generator, device="cuda").cpu()
    trained = trained_tokens(labels).to(torch.device("cuda"))

    def gradient(log_probs: Any, dtype: torch.dtype) -> Tensor:
        own = hidden.to(dtype).clone().requires_grad_()
        (-log_probs(own).sum() / 699).backward()
        assert own.grad is not None
        return own.grad.double()

    exact = gradient(lambda x: written_out_exactly(x, weight, trained), torch.float64)
    found = gradient(lambda x: one_pass(x, weight, trained)[0], torch.bfloat16)
    trls = gradient(
        lambda x: ChunkedLogProbFunction.apply(x[:-1], weight, None, trained.targets, 1.0, 32768)[0], torch.bfloat16
    )
    error, trls_error = ((g - exact).norm() / exact.norm() for g in (found, trls))
    assert error <= 1.5 * trls_error, (error, trls_error)


def written_out_exactly(hidden: Tensor, weight: Tensor, trained: TrainedTokens) -> Tensor:
    logits = hidden[trained.positions] @ weight.double().t()
    return logits.log_softmax(-1).gather(1, trained.targets[:, None])[:, 0]


def both_heads(model: Any) -> tuple[Any, Any, Tensor]:
    from trl.trainer.utils import add_fused_lm_head

    model.requires_grad_(False)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    assert add_one_pass_head(model)
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    trl_output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True, trained=trained_tokens(labels))
    return trl_output, output, labels
