"""Asking a model: user messages in, completions out, in batches.

Knows nothing of kernels, problems or verdicts. The same loaded model answers with its adapter or, with the adapter
switched off, as the base model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.decoding import Row, decode
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.stopping import REASONING_START, StopAtTriton
from triton_sft_pipeline.evaluation.streaming import TextPieces
from triton_sft_pipeline.training.threads import suitable_threads
from triton_sft_pipeline.training.unpacked import unpacked_linears

_logger = logging.getLogger(__name__)

OnTokens = Callable[[Sequence[int]], None]
"""Is called often, with the tokens that each answer under way has so far."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        index: position of the question in the caller's list; comes back in the completion.
        sample: 0 for the first answer to that question, 1 for the second, ...
        prompt: the user message, without any template.
        seed: of the sampling; see `sampling.request_seed`.
    """

    index: int
    sample: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        index: the request's.
        sample: the request's.
        text: the answer, with the `<think>` that the generation prompt already held, without the end-of-turn token.
        prompt_tokens: tokens of the prompt.
        tokens: tokens that were generated, the end-of-turn token included.
        stopped: "stop" (`</triton>` was written), "eos" (the model ended its turn) or "length" (the limit was reached).
        seconds: this answer's share of the wall time, so that the sum over all answers is the time that was spent.
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


class Asker(Protocol):
    """Whoever answers: a loaded model (`LocalAsker`) or a server."""

    @property
    def models(self) -> tuple[str, ...]:
        """Who can be asked: ("base",) or ("base", "tuned")."""
        ...

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: OnTokens | None = None,
    ) -> None:
        """Answer every request, in any order, and hand out each completion the moment it exists."""
        ...

    def facts(self) -> dict[str, Any]:
        """JSON data that says who answers, for the provenance, and for knowing an earlier run of the same again."""
        ...


class LocalAsker:
    """Asks a model that is loaded in this process; an `Asker`.

    Args:
        model: the loaded model, with the adapter when `has_adapter`.
        tokenizer: its tokenizer.
        settings: how answers are generated.
        has_adapter: whether there is a tuned model beside the base.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EvaluationSettings, has_adapter: bool) -> None:
        self.models: tuple[str, ...] = ("base", "tuned") if has_adapter else ("base",)
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._weights: str | None = None

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: OnTokens | None = None,
    ) -> None:
        """See `Asker.ask`; "base" is the same model with its adapter off."""
        generate(
            self._model,
            self._tokenizer,
            requests,
            self._settings,
            adapter_enabled=model == "tuned",
            on_completion=on_completion,
            on_tokens=on_tokens,
            on_smaller=self._remember,
        )

    def facts(self) -> dict[str, Any]:
        """How it was asked, the batch size that fitted, and hashes of weights and chat template."""
        # An adapter can be gigabytes: once is enough.
        self._weights = self._weights or weights_fingerprint(self._model)
        return {
            "asked": "in process",
            "batch_size": self._settings.batch_size,
            "weights": self._weights,
            "chat_template": _short_hash(str(getattr(self._tokenizer, "chat_template", None)).encode()),
        }

    def _remember(self, size: int) -> None:
        # The next model is asked with what fitted this one: what does not fit is tried once.
        self._settings = self._settings.model_copy(update={"batch_size": size})


def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    settings: EvaluationSettings,
    *,
    adapter_enabled: bool = True,
    on_completion: Callable[[Completion], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_tokens: OnTokens | None = None,
    on_smaller: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer every request.

    Prompts of like length share a batch, the longest first, so that what does not fit into memory is known at once. An
    answer depends on its request and the settings alone, up to rounding: a matrix product may round differently in a
    batch of another size. The caller's random state and training mode are left as they were.

    A batch that does not fit into the GPU's memory is halved, and so are all that follow; answers that were finished
    stay.

    Args:
        model: a transformers causal language model or a PEFT model around one.
        tokenizer: its tokenizer, with a chat template.
        requests: what is asked.
        settings: of it, batch_size, max_new_tokens, temperature and top_p.
        adapter_enabled: False asks the base model, by switching the adapter of the same loaded model off. A model
            without an adapter is a base model already.
        on_completion: called with each completion the moment it exists.
        on_text: called with each piece of the answer as it appears; for exactly one request.
        on_tokens: called after every step with the tokens of each answer that is not finished yet.
        on_smaller: called with the new batch size when a batch was halved; a warning is logged in any case.

    Returns:
        A completion for each request, ordered by index and then by sample.

    Raises:
        PipelineError: the tokenizer has no chat template, or neither a padding nor an end token; or `on_text` for
            another number of requests than one.
        StepError: one answer alone does not fit into the GPU's memory.
    """
    import torch

    if on_text and len(requests) != 1:
        raise PipelineError(f"text can be shown as it appears for one answer at a time, not for {len(requests)}")
    rendered, lead = _render(tokenizer, [request.prompt for request in requests])
    rows = [
        _row(number, text, request.seed, model, tokenizer, settings)
        for number, (text, request) in enumerate(zip(rendered, requests, strict=True))
    ]
    pieces = TextPieces(tokenizer, lead, on_text) if on_text else None
    done: list[Completion] = []

    def finish(row: Row) -> None:
        text = lead + tokenizer.decode(row.tokens[:-1] if row.stopped == "eos" else row.tokens)
        if pieces:
            pieces.close(text)
        request = requests[row.number]
        counts = len(row.prompt), len(row.tokens)
        done.append(Completion(request.index, request.sample, text, *counts, row.stopped, row.seconds))
        if on_completion:
            on_completion(done[-1])

    for row in rows:
        if row.stopped:
            finish(row)
    order = sorted(rows, key=lambda row: (-len(row.prompt), requests[row.number].index, requests[row.number].sample))
    with (
        torch.no_grad(),
        suitable_threads(model),
        _evaluating(model),
        _adapter(model, adapter_enabled),
        unpacked_linears(model),
    ):
        _decode_all(
            model,
            [row for row in order if not row.stopped],
            settings,
            on_smaller or (lambda size: None),
            pad=_pad_token(tokenizer, _end_tokens(model, tokenizer)),
            ends=frozenset(_end_tokens(model, tokenizer)),
            answered=StopAtTriton(tokenizer, bool(lead)),
            on_token=(lambda row: pieces.add(row.tokens)) if pieces else None,
            on_step=on_tokens,
            on_end=finish,
        )
    return sorted(done, key=lambda completion: (completion.index, completion.sample))


def weights_fingerprint(model: Any) -> str:
    """A short hash by which a loaded model, with its adapter, is known again.

    Of an adapter every value counts; of the base the names, shapes and first values of what is not quantised, which are
    the same on every device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        if parameter.is_floating_point():
            digest.update(f"{name}:{tuple(parameter.shape)}".encode())
            values = parameter.detach().flatten()
            values = values if "lora_" in name else values[:_FIRST_VALUES]
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


_FIRST_VALUES = 1024


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _decode_all(
    model: Any, rows: list[Row], settings: EvaluationSettings, on_smaller: Callable[[int], None], **how: Any
) -> None:
    """Decode the rows batch by batch, in smaller batches from the first that does not fit into memory."""
    import torch

    size = settings.batch_size
    how |= {"temperature": settings.resolved_temperature, "top_p": settings.top_p}
    while rows:
        batch, fits = rows[:size], True
        try:
            decode(model, batch, **how)
        except torch.cuda.OutOfMemoryError:
            fits = False
        if not fits:
            # Outside the handler: the error's frames hold on to the batch's tensors.
            size = _smaller(len(batch), batch[0], settings)
            on_smaller(size)
            torch.cuda.empty_cache()
        rows = [row for row in rows if not row.stopped]
        for row in rows:
            row.tokens.clear()


def _smaller(size: int, longest: Row, settings: EvaluationSettings) -> int:
    """Half of a batch size that did not fit.

    Raises:
        StepError: it was one row.
    """
    if size == 1:
        raise StepError(
            f"out of GPU memory with one answer at a time: its prompt has {len(longest.prompt)} tokens, and "
            f"evaluation.max_new_tokens is {settings.max_new_tokens}. Lower that, or free the GPU."
        )
    half = size // 2
    _logger.warning("A batch of %d answers does not fit into the GPU's memory: going on with %d at a time.", size, half)
    return half


def _row(number: int, prompt: str, seed: int, model: Any, tokenizer: Any, settings: EvaluationSettings) -> Row:
    """A prompt in the model's template as a row; one that leaves no room for an answer has ended already."""
    tokens: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = min(settings.max_new_tokens, _positions(model) - len(tokens))
    return Row(number, tokens, room, seed, stopped="" if room > 0 else "length")


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
