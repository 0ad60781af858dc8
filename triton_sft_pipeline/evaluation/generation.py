"""Asking a model: user messages in, completions out, in left-padded batches.

Knows nothing of kernels, problems or verdicts. The same loaded model answers with its adapter or, with the adapter
switched off, as the base model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.training.threads import suitable_threads

STOP = "</triton>"
REASONING_START, REASONING_END = "<think>", "</think>"
_TAIL_TOKENS = 32
"""Tokens that are decoded to look for `STOP`: it is 9 bytes long, so 9 tokens would do for any tokenizer; the rest is
margin.
"""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        index: position of the prompt in the list that was asked.
        sample: 0 for the first answer to that prompt, 1 for the second, ...
        text: the answer, with the `<think>` that the generation prompt already held, without the end-of-turn token.
        prompt_tokens: tokens of the prompt.
        tokens: tokens that were generated, the end-of-turn token included.
        stopped: "stop" (`</triton>` was written), "eos" (the model ended its turn) or "length" (the limit was reached).
        seconds: this answer's share of its batch's wall time, so that the sum over all answers is the time that was
            spent.
    """

    index: int
    sample: int
    text: str
    prompt_tokens: int
    tokens: int
    stopped: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: EvaluationSettings,
    *,
    adapter_enabled: bool = True,
    on_completion: Callable[[Completion], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Answer every prompt `settings.samples` times.

    Prompts of like length share a batch, the longest first, so that what does not fit into memory fails at once. Each
    batch is seeded by itself, so an answer depends on the settings and the list of prompts alone; the caller's random
    state, training mode and padding side are left as they were.

    Args:
        model: a transformers causal language model or a PEFT model around one.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages, without any template.
        adapter_enabled: False asks the base model, by switching the adapter of the same loaded model off. A model
            without an adapter is a base model already.
        on_completion: called with each completion the moment it exists, in the order of generation.
        progress: called with (answers done, answers in all) after each batch.

    Returns:
        `len(prompts) * samples` completions, ordered by prompt and then by sample.

    Raises:
        PipelineError: the tokenizer has no chat template, or neither a padding nor an end token.
        StepError: a batch does not fit into the GPU's memory.
    """
    import torch

    rendered, lead = _render(tokenizer, prompts)
    encoded: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), i))
    jobs = [(index, sample) for index in order for sample in range(settings.samples)]
    done: list[Completion] = []
    with (
        torch.no_grad(),
        suitable_threads(model),
        _evaluating(model),
        _adapter(model, adapter_enabled),
        _kept_random_state(model),
    ):
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            torch.manual_seed(_batch_seed(settings.seed, start))
            began = time.perf_counter()
            with _memory_explained(settings):
                answers = _generate_batch(
                    model, tokenizer, [encoded[index] for index, _ in batch], settings, bool(lead)
                )
            share = (time.perf_counter() - began) / len(batch)
            for (index, sample), (text, tokens, stopped) in zip(batch, answers, strict=True):
                done.append(Completion(index, sample, lead + text, len(encoded[index]), tokens, stopped, share))
                if on_completion:
                    on_completion(done[-1])
            if progress:
                progress(len(done), len(jobs))
    return sorted(done, key=lambda completion: (completion.index, completion.sample))


class StopAtTriton:
    """A stopping criterion that ends each row at its own `</triton>`.

    A `</triton>` inside the reasoning is a draft: a row that reasons ends at the first one that follows `</think>`. A
    row that never closes its reasoning runs to its end-of-turn token or to the limit.

    Rows are looked at only after a token that holds a ">", a table look-up on the model's device, so the usual step
    decodes nothing. transformers' `stop_strings` compares every row with an embedding of the vocabulary at every step
    and cannot tell a draft from an answer.

    Args:
        tokenizer: decodes the rows.
        prompt_length: columns of the padded prompts.
        thinking: whether the prompt ends inside the reasoning, as Trinity's does.

    Attributes:
        ends: row -> tokens generated up to and including the one that completed `</triton>`.
    """

    def __init__(self, tokenizer: Any, prompt_length: int, thinking: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._thinking = thinking
        self._closes: Any = None
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any = None, **_: Any) -> Any:
        """Whether each row is done, as a boolean tensor [rows]; `input_ids` is [rows, tokens], prompt included."""
        import torch

        if self._closes is None:
            self._closes = _tokens_that_close(self._tokenizer, input_ids.device)
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        last = input_ids[:, -1].clamp(max=self._closes.shape[0] - 1)
        for row in self._closes[last].nonzero().flatten().tolist():
            if row not in self.ends and self._answered(input_ids[row, self._prompt_length :]):
                self.ends[row] = input_ids.shape[1] - self._prompt_length
        finished[list(self.ends)] = True
        return finished

    def _answered(self, tokens: Any) -> bool:
        if STOP not in self._tokenizer.decode(tokens[-_TAIL_TOKENS:]):
            return False
        text = self._tokenizer.decode(tokens)
        if self._thinking or REASONING_START in text:
            _, _, text = text.partition(REASONING_END)
        return STOP in text


def _tokens_that_close(tokenizer: Any, device: Any) -> Any:
    """A boolean per token of the vocabulary: its text holds ">". Byte-level and SentencePiece vocabularies both write
    ">" as itself.

    The last entry, always False, stands for the tokens that a model may know beyond its tokenizer (embeddings are often
    padded to a round number).
    """
    import torch

    vocabulary = tokenizer.get_vocab()
    closes = torch.zeros(max(vocabulary.values()) + 2, dtype=torch.bool)
    closes[[token for text, token in vocabulary.items() if ">" in text]] = True
    return closes.to(device)


def _render(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[str], str]:
    """The prompts in the model's template, and the beginning of the answer that the template itself writes ("<think>"
    and a newline, or nothing).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PipelineError(
            "the tokenizer has no chat template: evaluate with the tokenizer that was saved beside the adapter"
        )
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rendered = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    if not rendered:
        return [], ""
    without = tokenizer.apply_chat_template(turns[0], tokenize=False, add_generation_prompt=False)
    opening = rendered[0][len(without) :] if rendered[0].startswith(without) else ""
    return rendered, opening[opening.find(REASONING_START) :] if REASONING_START in opening else ""


def _generate_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], settings: EvaluationSettings, thinking: bool
) -> list[tuple[str, int, str]]:
    """Text, token count and reason of stopping for each row of one batch."""
    import torch
    from transformers import StoppingCriteriaList

    width = max(map(len, prompts))
    room = min(settings.max_new_tokens, _positions(model) - width)
    if room < 1:
        return [("", 0, "length")] * len(prompts)
    ends = _end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer, ends)
    device = model.get_input_embeddings().weight.device
    # Left padding: every row's last prompt token is in the last column. generate() derives the position ids from the
    # mask.
    rows = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    stop = StopAtTriton(tokenizer, width, thinking)
    output = model.generate(
        input_ids=rows,
        attention_mask=mask,
        generation_config=_generation_config(settings, room, pad, ends),
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    return [_read_row(tokenizer, row, stop.ends.get(i), ends) for i, row in enumerate(output[:, width:].tolist())]


def _read_row(tokenizer: Any, row: list[int], stop: int | None, ends: list[int]) -> tuple[str, int, str]:
    """Cut a row where it ended: what follows is padding. Special tokens are kept in the text, because a tokenizer may
    count `<think>` among them.
    """
    if stop is not None:
        return tokenizer.decode(row[:stop]), stop, "stop"
    end = next((i for i, token in enumerate(row) if token in ends), None)
    if end is not None:
        return tokenizer.decode(row[:end]), end + 1, "eos"
    return tokenizer.decode(row), len(row), "length"


def _generation_config(settings: EvaluationSettings, room: int, pad: int, ends: list[int]) -> Any:
    """Every value that shapes the distribution is given: what is left open is filled from the model's own
    generation_config.json.
    """
    from transformers import GenerationConfig

    neutral: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    if settings.greedy:
        # transformers' own defaults: it warns about any other value of these where nothing is sampled.
        how: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    else:
        how = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
            "min_p": 0.0,
        }
    return GenerationConfig(
        max_new_tokens=room, use_cache=True, pad_token_id=pad, eos_token_id=ends or None, **neutral, **how
    )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The model's end-of-turn tokens and the tokenizer's: a fine-tuned adapter may come with either."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(token for token in tokens if token is not None)


def _pad_token(tokenizer: Any, ends: list[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if ends:
        return ends[0]
    raise PipelineError(
        "the tokenizer has neither a padding nor an end token, so answers cannot be batched: set tokenizer.pad_token"
    )


def _positions(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def _batch_seed(seed: int, start: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{start}".encode()).digest()[:7], "big")


@contextmanager
def _memory_explained(settings: EvaluationSettings) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise StepError(
            f"out of GPU memory with evaluation.batch_size {settings.batch_size} and evaluation.max_new_tokens "
            f"{settings.max_new_tokens}: lower one of them"
        ) from error


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and back to what each module was in: training may go on with the same model."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _adapter(model: Any, enabled: bool) -> AbstractContextManager[Any]:
    if enabled or not hasattr(model, "disable_adapter"):
        return nullcontext()
    return model.disable_adapter()


@contextmanager
def _kept_random_state(model: Any) -> Iterator[None]:
    import torch

    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
