"""A tiny AFMoE with adapters, and the two ways to train it: through stock layers and through the fused ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM
from transformers.models.afmoe import modeling_afmoe

from triton_sft_pipeline.training.experts.layouts import known_layout
from triton_sft_pipeline.training.experts.module import ExpertStorage, replace_experts
from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
from triton_sft_pipeline.training.settings import LoraSettings

VOCABULARY = 40


def tiny_model(
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    targets: tuple[str, ...] | None = None,
    **changes: Any,
) -> Any:
    """Four layers: dense and sliding, two sliding and one full with experts; every weight and every factor random."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_scale": 2.826,
        "sliding_window": 5,
        "global_attn_every_n_layers": 4,
        "mup_enabled": True,
        "max_position_embeddings": 64,
        "pad_token_id": 12,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    model = AfmoeForCausalLM(AfmoeConfig(**{**options, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("expert_bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("router.gate.weight"):
                parameter.normal_(std=0.3)
            elif "embed" not in name:
                parameter.normal_(std=0.1)
    model = model.to(dtype).requires_grad_(False)
    replace_experts(model, known_layout(model.config), ExpertStorage(compute_dtype=dtype))
    return with_adapters(model, dtype, dropout, targets)


def with_adapters(model: Any, dtype: torch.dtype, dropout: float, targets: tuple[str, ...] | None = None) -> Any:
    """Adapters of rank 4, of rank 2 on experts, in training mode."""
    settings = {"target_modules": list(targets)} if targets else {}
    peft_model = attach_lora(
        model, create_lora_config(LoraSettings(r=4, alpha=6, dropout=dropout, expert_r=2, **settings))
    )
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=dtype) * 0.2
    return peft_model.train()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(13, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """One pass forwards and backwards: the logits, and the gradient of the embedded input and of every factor."""
    model.zero_grad()
    inputs = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False, **options).logits
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(2)).to(logits)
    (logits * weights).tanh().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert inputs.grad is not None and all(grad is not None for grad in found.values())
    both = {"logits": logits.detach(), "input": inputs.grad, **found}
    # A copy, also on the CPU: gradients are added up in place.
    return {name: value.clone().cpu() for name, value in both.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the other's norm, and none of them zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} has no gradient at all"
        error = float((actual[name] - value).norm() / value.norm())
        assert error < tolerance, f"{name} is off by {error:.1e}"


def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stock layers compute in float64 where they are written to use float32, so that only errors of formulas
    are left."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def router(self: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x.view(-1, x.shape[-1]))
        scores = torch.sigmoid(logits)
        index = torch.topk(scores + bias, k=self.top_k, dim=1).indices
        top = scores.gather(1, index)
        return logits, top / (top.sum(-1, keepdim=True) + 1e-20) * self.route_scale, index

    monkeypatch.setattr(modeling_afmoe.AfmoeRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_afmoe.AfmoeTokenChoiceRouter, "forward", router)
