"""What the project is measured against: how Trinity-Mini was trained before, and what the stock libraries make of it.

Both get random weights of the same shape and the same clock. Neither uses any of the project's layers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import train_step_measure as measure
import train_step_models as models

LOOP_WARMUP, LOOP_STEPS = 1, 2
STOCK_WARMUP, STOCK_STEPS = 2, 4

_BYTES_AN_ADAPTER_WEIGHT = 16
_STOCK_ROOM_GIB = 6.0


def loop(job: measure.Job) -> dict[str, Any]:
    """The original's way: every expert three `Linear4bit` of its own, called one after the other, LoRA on q, k, v and o
    only, and the model's own loss over full logits.

    One micro-batch a step: a second one would take as long again and say nothing new.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    device = measure.start(job)
    config, steps = job.config(), LOOP_WARMUP + LOOP_STEPS
    began = time.monotonic()
    model = loop_model(job, device)
    built = {"seconds": time.monotonic() - began, **measure.memory(device)}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout)
    lora.target_modules, lora.task_type = set(targets), "CAUSAL_LM"
    with _names_left_alone(model):
        peft_model = get_peft_model(model, lora)
    peft_model.enable_input_require_grads()
    single = replace(job, accumulation=1)
    arguments = measure.training_arguments(single, single.config(), steps)
    arguments.optim = "adamw_torch"
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=_rows(single, steps, model.config.vocab_size))
    result = measure.trained(trainer, LOOP_WARMUP, job.seq * job.batch, device)
    return result | {"built": built, "adapter": "q_proj, k_proj, v_proj, o_proj"}


def stock(job: measure.Job) -> dict[str, Any]:
    """The stock stack: bitsandbytes' 4 bits, which pass the fused experts by and leave them in bfloat16, PEFT's own
    adapter on what it makes of the preset's targets, without the dropout that it refuses, and AdamW in float32."""
    import torch
    from trl import SFTTrainer

    from triton_sft_pipeline.training.lora import create_lora_config

    device = measure.start(job)
    config = job.config()
    needed = stock_needs_gib(job)
    if device != "cpu" and needed > (total := torch.cuda.get_device_properties(device).total_memory / measure.GIB):
        return {"skipped": f"needs about {needed:.0f} GiB, this GPU has {total:.0f}"}
    steps = STOCK_WARMUP + STOCK_STEPS
    began = time.monotonic()
    model = stock_model(job, device)
    built = {"seconds": time.monotonic() - began, **measure.memory(device)}
    lora = create_lora_config(config.lora.model_copy(update={"dropout": 0.0}))
    arguments = measure.training_arguments(job, config, steps)
    arguments.optim, arguments.max_length = "adamw_torch", None
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_rows(job, steps, model.config.vocab_size),
        processing_class=models.tokenizer(),
        peft_config=lora,
    )
    # TRL makes the adapter bfloat16; optimiser states in float32 need an adapter in float32.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    result = measure.trained(trainer, STOCK_WARMUP, job.seq * job.batch * job.accumulation, device)
    adapted = sorted(
        {name.split(".lora_A")[0].rsplit("layers.", 1)[-1].split(".", 1)[-1] for name in _adapted(trainer)}
    )
    return result | {"built": built, "adapter": ", ".join(adapted)}


def stock_needs_gib(job: measure.Job) -> float:
    """About how much the stock stack takes: bfloat16 experts, an adapter in float32 with gradient and two moments,
    twice the rank on gate and up together, and some room for a step."""
    shape = models.SHAPES[job.shape]
    layers = job.layers or shape["num_hidden_layers"]
    fused = (layers - min(layers, shape["num_dense_layers"])) * shape["num_experts"]
    hidden, inner = shape["hidden_size"], shape["moe_intermediate_size"]
    lora = job.config().lora
    rank = lora.expert_r or lora.r
    adapter = fused * rank * (2 * (hidden + 2 * inner) + hidden + inner)
    rest = 4 * shape["vocab_size"] * hidden
    experts = 2 * 3 * fused * hidden * inner
    return (experts + rest + _BYTES_AN_ADAPTER_WEIGHT * adapter) / measure.GIB + _STOCK_ROOM_GIB


def loop_model(job: measure.Job, device: str) -> Any:
    """A 4-bit model whose routed experts are lists of small MLPs, as the checkpoint's first code had them."""
    import torch

    settings = job.config().model
    model = models.empty_model(job.shape, job.layers, getattr(torch, settings.compute_dtype))
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "AfmoeExperts":
            with torch.device("meta"):
                model.set_submodule(name, _expert_loop(module))
    return _converted(model, settings, device, ["lm_head", "router.gate"])


def stock_model(job: measure.Job, device: str) -> Any:
    """What `from_pretrained` gives with `BitsAndBytesConfig(load_in_4bit=True)`; the experts are made on the device."""
    import torch

    settings = job.config().model
    model = models.empty_model(job.shape, job.layers, getattr(torch, settings.compute_dtype))
    return _converted(model, settings, device, None)


def _converted(model: Any, settings: Any, device: str, skipped: list[str] | None) -> Any:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype),
        llm_int8_skip_modules=skipped,
    )
    quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device})
    return models.finished(model, quantizer, torch.Generator(device).manual_seed(0))


def _expert_loop(experts: Any) -> Any:
    """A module in the place of fused `experts`: each one alone, in a Python loop that waits for the GPU every time."""
    import torch
    from torch import nn

    hidden, inner = experts.hidden_dim, experts.intermediate_dim

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = nn.Linear(hidden, inner, bias=False)
            self.up_proj = nn.Linear(hidden, inner, bias=False)
            self.down_proj = nn.Linear(inner, hidden, bias=False)

        def forward(self, x: Any) -> Any:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class ExpertLoop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(Expert() for _ in range(experts.num_experts))

        def forward(self, x: Any, index: Any, weights: Any) -> Any:
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.each):
                token, choice = torch.where(index == number)
                if token.numel():
                    part = expert(x[token]) * weights[token, choice, None]
                    out = out.index_add(0, token, part.to(out.dtype))
            return out

    return ExpertLoop()


def _rows(job: measure.Job, steps: int, vocabulary: int) -> Any:
    from datasets import Dataset

    rows = measure.data(job, steps, vocabulary)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _adapted(trainer: Any) -> list[str]:
    return [name for name, _ in trainer.model.named_parameters() if ".lora_A" in name]


def _names_left_alone(model: Any) -> Any:
    """PEFT would look for fused experts in a model of this type; this one has none."""
    from triton_sft_pipeline.training.lora import _targets_left_alone

    return _targets_left_alone(model)
