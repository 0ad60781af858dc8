"""Models and judges small enough for a test: a byte-level tokenizer, random networks, a scripted one, a recording
judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton_sft_pipeline.verification.verdict import CORRECT, JudgeItem, Verdict

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a byte, plus ChatML's special tokens; the prompt ends in `<think>`, as Trinity's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def micro_afmoe(tokenizer: Any, **overrides: Any) -> Any:
    """A random AFMoE in float32 with a sliding window that is shorter than the prompts, so that padding can do harm."""
    import torch
    from transformers import AfmoeConfig, AfmoeForCausalLM

    sizes = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "global_attn_every_n_layers": 4,
        "sliding_window": 16,
        "mup_enabled": True,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(1)
    model = AfmoeForCausalLM(AfmoeConfig(**{**sizes, **overrides}))
    for name, parameter in model.named_parameters():
        if "router" in name:  # Built as zero, where all experts tie.
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


class ScriptedModel:
    """Writes prescribed answers, token by token, the way a causal language model with a cache does.

    Args:
        tokenizer: a byte-level tokenizer.
        answers: (a piece of the prompt, adapter on?) -> what is written after the generation prompt, without the end
            token.
        end: whether the end-of-turn token is written after an answer.

    Attributes:
        asked: (rows, adapter on?) of each batch.
        widths: rows of each step.
    """

    def __init__(self, tokenizer: Any, answers: dict[tuple[str, bool], str], end: bool = True) -> None:
        import torch

        self.tokenizer, self.answers, self.end = tokenizer, answers, end
        self.adapter, self.training = True, True
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self._weight = torch.nn.Embedding.from_pretrained(torch.ones(1, 1))
        self.asked: list[tuple[int, bool]] = []
        self.widths: list[int] = []

    def modules(self) -> Iterator[Any]:
        return iter([self])

    def parameters(self) -> Iterator[Any]:
        return self._weight.parameters()

    def named_parameters(self) -> Iterator[Any]:
        return self._weight.named_parameters()

    def eval(self) -> None:
        self.training = False

    def get_input_embeddings(self) -> Any:
        return self._weight

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.adapter = False
        try:
            yield
        finally:
            self.adapter = True

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, use_cache: bool
    ) -> Any:
        import torch

        assert not self.training and use_cache
        cache = past_key_values
        if cache is None:
            self.asked.append((input_ids.shape[0], self.adapter))
            cache = ScriptedCache([self._script(row) for row in input_ids])
        self.widths.append(input_ids.shape[0])
        assert input_ids.shape[0] == len(cache.scripts) == attention_mask.shape[0] == position_ids.shape[0]
        column = [s[cache.step] if cache.step < len(s) else ord("z") for s in cache.scripts]
        cache.step += 1
        logits = torch.nn.functional.one_hot(torch.tensor(column), len(self.tokenizer)).float() * 1e4
        return SimpleNamespace(logits=logits[:, None], past_key_values=cache)

    def _script(self, row: Any) -> list[int]:
        prompt = self.tokenizer.decode(row)
        answer = next(a for (piece, adapter), a in self.answers.items() if piece in prompt and adapter == self.adapter)
        tokens = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*tokens, self.tokenizer.eos_token_id] if self.end else tokens


class ScriptedCache:
    """What a `ScriptedModel` remembers of a batch."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts, self.step = scripts, 0

    def batch_select_indices(self, indices: Any) -> None:
        self.scripts = [self.scripts[i] for i in indices.tolist()]


class RecordingJudge:
    """Gives the verdict that `verdicts` names for a piece of the code, else "verified"; last item first."""

    def __init__(self, verdicts: dict[str, str] | None = None, **fields: Any) -> None:
        self.verdicts = verdicts or {}
        self.fields = {"device": "cpu", "backend": "interpreter", "isolation": "process", **fields}
        self.backend: str | None = None
        self.items: list[JudgeItem] = []

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        self.items = list(items)
        for item in reversed(self.items):
            name = next((v for piece, v in self.verdicts.items() if piece in (item.triton_code or "")), "verified")
            good = name in CORRECT
            yield Verdict(
                key=item.key,
                verdict=name,
                correctness=good,
                fast_0=good,
                detail=f"The judge found {name}.",
                versions={"triton": "3.7.1"},
                **self.fields,
            )
