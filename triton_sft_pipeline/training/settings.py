"""What can be set about the model, its adapter and its training. Defaults are those of the original Trinity-Mini
script.

Knows nothing of torch: importing it is cheap, so configuration can be checked before anything heavy is loaded. Presets
(YAML files that ship with the package) override these defaults field by field.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The original's LoRA targets: attention (AFMoE's own gate included) and every MLP (dense, shared experts, routed
experts)."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Settings):
    """Which base model is loaded, and how small."""

    base_model: str = Field("arcee-ai/Trinity-Mini", min_length=1, description="Hub id or directory of the base model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null: its default branch.")
    load_in_4bit: bool = Field(True, description="Quantise linear layers to 4 bits when loading (QLoRA).")
    double_quant: bool = Field(
        True, description="Quantise the quantisation constants too: about 0.4 bits a weight less."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 fits normally distributed weights."
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Type that everything which is not quantised is kept in and that products are computed in.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention kernel; flash_attention_2 needs the flash-attn extra and a CUDA device."
    )


class LoraSettings(_Settings):
    """Size and reach of the adapter."""

    r: int = Field(64, ge=1, le=1024, description="Rank of the adapter on linear layers.")
    alpha: int = Field(128, ge=1, description="LoRA alpha; an update is scaled by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the input of every linear layer's adapter.")
    target_modules: tuple[str, ...] = Field(
        PROJECTIONS,
        min_length=1,
        description="Last name of every projection that gets an adapter, routed experts included.",
    )
    expert_r: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Rank on each fused tensor of routed experts (gate_up, down); null: r. The scale stays alpha / r.",
    )


class TrainingSettings(_Settings):
    """How the adapter is trained."""

    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which the learning rate rises from zero."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay on adapter weights.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients with a larger norm are scaled down to it.")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch",
        description="Optimiser; the 8-bit ones (bitsandbytes) need a CUDA device and a quarter of the memory.",
    )
    gpus: int = Field(1, ge=1, description="GPUs of this machine that share the forward passes of every step (DDP).")
    per_device_batch_size: int = Field(1, ge=1, description="Samples a forward pass, a device.")
    gradient_accumulation_steps: int = Field(8, ge=1, description="Forward passes an optimiser step.")
    epochs: float = Field(3.0, gt=0, description="Passes over the train split; ignored when max_steps is positive.")
    max_steps: int = Field(-1, ge=-1, description="Optimiser steps in all; -1: as many as the epochs take.")
    max_length: int = Field(
        4096, ge=16, description="Most tokens a sample may have. A longer one is refused, never cut."
    )
    packing: bool = Field(False, description="Join samples to sequences of max_length, with no attention between them.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: about a third slower, far less memory."
    )
    eval_steps: int = Field(50, ge=1, description="Optimiser steps between evaluations on the test split.")
    save_steps: int = Field(50, ge=1, description="Optimiser steps between checkpoints.")
    logging_steps: int = Field(5, ge=1, description="Optimiser steps between log lines.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    seed: int = Field(42, ge=0, description="Seed of adapter initialisation, dropout and sample order.")
    report_to_wandb: bool = Field(False, description="Also log to Weights & Biases (the wandb extra).")
    run_name: str | None = Field(None, description="Name of the run in Weights & Biases.")
