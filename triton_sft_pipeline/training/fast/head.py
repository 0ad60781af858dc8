"""The loss of a frozen head in one pass: log-probabilities of the trained tokens and, at once, their gradient.

TRL's fused head computes every logit twice, once forwards and once again backwards, because it cannot know what its
result is multiplied with. But that is one number a token, so the gradient can be computed while the logits are there,
and multiplied later. Tokens are taken in groups whose logits fit into half a GiB; the logits of all are never there.

The arithmetic on the logits is TRL's (`trl.kernels.chunked_logprob`), which the tests compare with.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 2**29
"""Logits that are there at once."""

_GROUP = 128
_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True)
class TrainedTokens:
    """Where a batch is to learn something.

    Attributes:
        positions: int64 [T], into the rows of the flattened batch, in ascending order: where the hidden state stands.
        targets: int64 [T], the token that should follow.
    """

    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> TrainedTokens:
        """The same on a device, without waiting for it."""
        moved = (t.pin_memory() if device.type == "cuda" else t for t in (self.positions, self.targets))
        return TrainedTokens(*(t.to(device, non_blocking=True) for t in moved))


def trained_tokens(labels: Tensor) -> TrainedTokens:
    """The trained tokens of labels [rows, tokens], -100 where nothing is to be learned."""
    following = labels.new_full(labels.shape, -100)
    following[:, :-1] = labels[:, 1:]
    following = following.flatten()
    positions = (following != -100).nonzero().flatten()
    return TrainedTokens(positions, following[positions])


def add_one_pass_head(model: Any) -> bool:
    """Teach a causal model with TRL's fused head (`add_fused_lm_head`) to be called with `trained`, too.

    `model(..., fused_lm_head=True, trained=TrainedTokens)` returns TRL's output with one number a trained token instead
    of one a token of the batch. Without `trained` nothing changes.

    Returns:
        Whether it was taught: not if the head is trained, has a bias, or if logits are scaled or capped.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    scaled = any(getattr(config, name, None) is not None for name in _SCALED)
    if head.weight.requires_grad or head.bias is not None or scaled:
        return False
    plain = causal.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, trained: TrainedTokens | None = None, **kwargs: Any) -> Any:
        if trained is None:
            return plain(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        for name in ("labels", "fused_lm_head", "num_items_in_batch"):
            kwargs.pop(name, None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        weight = self.get_output_embeddings().weight
        log_probs, entropy, is_top1 = one_pass(hidden.reshape(-1, hidden.shape[-1]), weight, trained)
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=trained.targets >= 0
        )

    causal.forward = types.MethodType(forward, causal)
    return True


def one_pass(hidden: Tensor, weight: Tensor, trained: TrainedTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the trained tokens' targets, differentiable in `hidden` alone.

    Args:
        hidden: [N, H].
        weight: [V, H], frozen, in the same type.

    Returns:
        float32 [T] log-probabilities, float32 [T] entropies of the predicted distributions in nats, bool [T] whether
        the target is the likeliest token. The last two have no gradient.
    """
    found: tuple[Tensor, Tensor, Tensor] = _OnePass.apply(hidden, weight, trained.positions, trained.targets)
    return found


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.index_select(0, positions).to(weight.dtype)
        parts = [_scored(*part, weight) for part in _groups(rows, targets, len(weight))]
        if parts:
            log_probs, entropy, is_top1, gradient = (torch.cat(several) for several in zip(*parts, strict=True))
        else:
            log_probs, entropy = (rows.new_zeros(0, dtype=torch.float32) for _ in range(2))
            is_top1, gradient = positions.new_zeros(0, dtype=torch.bool), rows
        ctx.save_for_backward(gradient, positions)
        ctx.like = (hidden.shape, hidden.dtype)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        gradient, positions = ctx.saved_tensors
        shape, dtype = ctx.like
        whole = torch.zeros(shape, dtype=dtype, device=gradient.device)
        whole.index_copy_(0, positions, (gradient * grad[:, None]).to(dtype))
        return whole, None, None, None


def _groups(rows: Tensor, targets: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and targets in groups of like size, the logits of each of which are at most `TILE_BYTES`."""
    most = max(1, TILE_BYTES // (vocabulary * rows.element_size() * _GROUP)) * _GROUP
    count = -(-len(rows) // most)
    if not count:
        return []
    size = -(-len(rows) // (count * _GROUP)) * _GROUP
    return list(zip(rows.split(size), targets.split(size), strict=True))


def _scored(rows: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, whether a target is the likeliest, and d log-probability / d row, of one group."""
    from trl.kernels import chunked_logprob as trl

    triton = trl._use_triton(rows.device)
    count, vocabulary = len(rows), len(weight)
    logits = rows @ weight.t()

    def numbers(value: float) -> Tensor:
        return torch.full((count,), value, dtype=torch.float32, device=rows.device)

    largest, before = numbers(float("-inf")), numbers(float("-inf"))
    total, weighted, squares, summed, target = (numbers(0.0) for _ in range(5))
    scale = {"logit_scale": 1.0, "softcap": 1.0, "inv_t": 1.0, "HAS_SOFTCAP": False, "BLOCK_SIZE": trl._BLOCK_SIZE}
    fold = trl._forward_kernel[(count,)] if triton else trl._forward_tile
    fold(
        *(logits, logits.stride(0), targets, largest, total, weighted, squares, summed, before, target, 0, vocabulary),
        **scale,
        HAS_ENTROPY=True,
        HAS_LOG_SUM_SQ_PROBS=False,
        HAS_MEAN_LOGITS=False,
        HAS_IS_TOP1=True,
    )
    log_total = largest + torch.log(total)
    # Now the logits become the gradient: one at the target less the probabilities.
    blocks = -(-vocabulary // trl._BLOCK_SIZE)
    differentiate = trl._backward_kernel[(count, blocks)] if triton else trl._backward_tile
    differentiate(
        *(logits, logits.stride(0), targets, log_total, log_total, numbers(1.0), log_total, 0, vocabulary),
        **scale,
        HAS_LOGPROB_GRAD=True,
        HAS_ENTROPY_GRAD=False,
    )
    return (
        target - log_total,
        log_total - weighted / total,
        (target >= largest) & (target > before),
        logits @ weight,
    )
