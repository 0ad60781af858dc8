"""The tiny base model under data/tiny_base: Trinity's architecture in miniature, and the command that rebuilds it.

    python -m triton_sft_pipeline.training.tiny_base --traces data/reasoning_traces.json --out data/tiny_base [--check]

It is an AFMoE (experts, shared experts, dense first layer, gated and sliding-window attention) of half a million
parameters with a byte-level BPE tokenizer. It is pre-trained on what the correct traces are made of: prompts, reasoning
and code, each as a document of its own, never joined with another. So it knows the vocabulary of kernels and nothing of
which kernel answers which prompt: that is left for fine-tuning to teach, and for the report to show. Held-out problems
are no part of it.

Every document is read twice in a row. The second reading can be copied from the first, so the model learns to look far
back, as language models of a useful size do. A base that never learned it hardly sees the prompt at the first word of
its answer: fine-tuning then takes nearly twice as many steps, and that word is where it goes wrong.

The result is the same to the bit whenever the command runs with the same torch on the same kind of CPU: one thread,
deterministic algorithms, and vector units capped at AVX2. Another torch release or another CPU maker may round
differently.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.chat.prompt import think_block, triton_block, user_message
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json, sha256_file
from triton_sft_pipeline.training.progress import library_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Ids of bos, eos and pad are Trinity-Mini's: 0, 3 and 12.
_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_PAD_ID = 12

# What Trinity's template does: ChatML; an answer is asked for with an open <think>; reasoning stays in the last
# assistant turn alone, because a model that is asked a second time never sees what it thought the first time.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Recipe:
    """How the base is made. Changing any of it changes the shipped weights."""

    vocabulary: int = 768
    hidden_size: int = 64
    layers: int = 4
    readings: int = 2
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 5e-3
    seed: int = 0


def build_tiny_base(traces: Path, out: Path, recipe: Recipe = Recipe()) -> str:
    """Train tokenizer and model on the fragments of the correct traces and save both to `out`.

    Returns:
        The SHA-256 of the weights.
    """
    import torch

    documents = fragments(traces)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        tokenizer = train_tokenizer(documents, recipe.vocabulary)
        model = new_model(tokenizer, recipe)
        pretrain(model, [_encode(tokenizer, text) for text in documents], recipe)
    finally:
        torch.use_deterministic_algorithms(False)
    out.mkdir(parents=True, exist_ok=True)
    with library_bars(False):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sha256_file(out / "model.safetensors")


def fragments(traces: Path) -> list[str]:
    """The documents of pre-training: every prompt, every reasoning and every kernel of the traces labelled correct,
    each by itself."""
    try:
        records = read_json(traces)
    except (OSError, json.JSONDecodeError) as error:
        raise PipelineError(f"{traces} cannot be read as a JSON array of traces: {error}") from error
    correct = [r for r in records if isinstance(r, dict) and (r.get("result") or {}).get("correctness") is True]
    if not correct:
        raise PipelineError(f"{traces} holds no trace with result.correctness true: there is nothing to pre-train on.")
    texts = []
    for record in correct:
        reasoning = record.get("model_reasoning") or record.get("reasoning") or record.get("thinking") or ""
        texts += [user_message(record["pytorch_code"]), think_block(reasoning), triton_block(record["triton_code"])]
    return list(dict.fromkeys(texts))


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens with Trinity's special tokens, their ids and its template semantics."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    reserved = [f"<|reserved_{i}|>" for i in range(_PAD_ID - len(_SPECIAL) - len(_THINK))]
    first = [*_SPECIAL, *_THINK, *reserved, "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in first],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # Tags are text: decoding without special tokens must keep them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[3],
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> PreTrainedModel:
    """An AFMoE with Trinity-Mini's proportions: every part of the large one is there, once."""
    import torch
    from transformers import AfmoeConfig, AfmoeForCausalLM

    size = recipe.hidden_size
    config = AfmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=2 * size,
        moe_intermediate_size=size,
        num_hidden_layers=recipe.layers,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        route_scale=2.826,
        sliding_window=512,
        global_attn_every_n_layers=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        mup_enabled=True,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = AfmoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("router.gate.weight"):
            # transformers starts routers at zero, where all experts tie and the same two win every time.
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def pretrain(model: PreTrainedModel, documents: Sequence[list[int]], recipe: Recipe) -> None:
    """Next-token training on whole documents, each `readings` times in a row, `batch_size` of them a step."""
    import torch

    order = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        chosen = order.sample(range(len(documents)), min(recipe.batch_size, len(documents)))
        batch = _pad([documents[i] * recipe.readings for i in chosen], model.config.pad_token_id)
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear up in the first tenth, then half a cosine down."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: Any = tokenizer(text)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def _pad(documents: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    import torch

    longest = max(map(len, documents))
    ids = torch.tensor([d + [pad_id] * (longest - len(d)) for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _cap_vector_units() -> None:
    """Ask the numeric libraries for code that every x86-64 CPU of the last ten years runs alike. They read this when
    torch is imported."""
    for name, value in {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "OMP_NUM_THREADS": "1",
    }.items():
        os.environ.setdefault(name, value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: build, or with --check build elsewhere and compare with what is there."""
    parser = argparse.ArgumentParser(description="Build the tiny base model from the sample traces.")
    parser.add_argument(
        "--traces", type=Path, required=True, help="JSON array of traces; those labelled correct are used"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 when a rebuild differs from what is in --out"
    )
    options = parser.parse_args(arguments)
    _cap_vector_units()
    if not options.check:
        print(build_tiny_base(options.traces, options.out), options.out / "model.safetensors")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rebuilt = build_tiny_base(options.traces, Path(scratch))
    shipped = sha256_file(options.out / "model.safetensors")
    print(f"shipped {shipped}\nrebuilt {rebuilt}")
    return 0 if rebuilt == shipped else 1


if __name__ == "__main__":
    sys.exit(main())
