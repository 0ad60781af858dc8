"""Several samples in one sequence, each as if it were alone: no padding, no cut, and no attention from one to another.

Knows nothing of where samples come from. A *document* is one sample in a packed sequence. Its positions begin at zero,
and that is all that tells documents apart: the batch has `position_ids` and no attention mask. Most architectures of
transformers derive a mask per document from that; AFMoE does not, and attends across documents without a word, so it
gets its masks from here. Whether documents really are apart is checked on the very model that will be trained.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.samples import IGNORED, Sample

if TYPE_CHECKING:
    import torch

_MASKS_BY_HAND = ("afmoe",)
"""Architectures whose mask builders are not told the positions."""


def prepare(model: Any, samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Pack `samples`, and make sure that `model` keeps documents apart.

    Args:
        model: the base model, without an adapter; AFMoE's decoder is made to add the masks.
        max_length: most tokens a packed sequence may have.

    Raises:
        PipelineError: a sample is longer than `max_length`, or the model attends across documents.
    """
    keep_documents_apart(model)
    check_documents_apart(model)
    return pack(samples, max_length)


def pack(samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Put whole samples into sequences of at most `max_length` tokens: the longest first, each where the least room is
    left that it fits into (best fit decreasing). The same samples always give the same sequences.

    Returns:
        Samples whose `documents` are the lengths of those that were joined; their keys are joined by "+".

    Raises:
        PipelineError: a sample is longer than `max_length`; nothing is cut.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids)):
        length = len(samples[index].input_ids)
        if length > max_length:
            raise PipelineError(
                f"sample {samples[index].key} has {length} tokens, more than training.max_length ({max_length}): it "
                "cannot be packed without a cut. Raise max_length, or leave the sample out."
            )
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max_length, len(packs)
            packs.append([])
        packs[number].append(index)
        insort(room, (left - length, number))
    return [_joined([samples[index] for index in sorted(members)]) for members in sorted(packs, key=min)]


def collator(pad_token_id: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """What makes a batch of rows: packed ones (those with `seq_lengths`, the lengths of their documents) become one row
    without padding; others (the test split's) are padded as TRL does it.

    A packed batch has `input_ids`, `labels` and `position_ids`, each of shape [1, tokens].
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    padded = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return _one_row(rows) if "seq_lengths" in rows[0] else padded(rows)

    return collate


def keep_documents_apart(model: Any) -> None:
    """Give an AFMoE model masks in which no document sees another, wherever its decoder is called with positions and
    without a mask or a cache. Other architectures are left alone.

    Call it before `fast.install.make_fast`: fused layers tell documents by their positions and want no mask, but where
    a pass goes through the plain layers, what was there before is called.
    """
    if model.config.model_type not in _MASKS_BY_HAND:
        return
    decoder = model.base_model
    plain = decoder.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **_with_masks(decoder, args, kwargs))

    # Not a hook: those run before whatever takes the place of `forward` later on.
    decoder.forward = forward


def check_documents_apart(model: Any) -> None:
    """Send two short documents through `model` and look whether the second one's hidden states depend on the first one
    at all: the gradient must be exactly zero.

    Raises:
        PipelineError: they do.
    """
    import torch

    decoder, words = model.base_model, model.get_input_embeddings().weight
    tokens = torch.arange(8, device=words.device)[None]
    embeddings = words.detach()[tokens].requires_grad_(True)
    with torch.enable_grad():
        states = decoder(inputs_embeds=embeddings, position_ids=tokens % 4, use_cache=False).last_hidden_state
        gradient = torch.autograd.grad(states[:, 4:].float().square().sum(), embeddings)[0]
    if gradient[:, :4].count_nonzero() or not gradient[:, 4:].count_nonzero():
        raise PipelineError(
            f"training.packing is true, but {model.config.name_or_path or type(model).__name__} "
            f"({model.config.model_type}) attends from one packed document to another: set training.packing to false."
        )


def document_masks(decoder: Any, position_ids: torch.Tensor) -> dict[str, Any]:
    """The masks of a sequence of documents by kind of attention ("full_attention", "sliding_attention"), in the form
    that the model's attention implementation takes; each is built when it is first asked for.

    Args:
        position_ids: [batch, tokens]; a document begins wherever it does not go up by one.
    """
    import torch

    words = decoder.get_input_embeddings().weight
    # Mask builders look at shape, type and device alone: one number stands for all embeddings.
    embeddings = torch.empty((), dtype=words.dtype, device=words.device).expand(*position_ids.shape, words.shape[1])
    return _DocumentMasks(decoder.config, embeddings, position_ids)


class _DocumentMasks(dict[str, Any]):
    """Masks by kind of attention, built on demand: at 16,384 tokens one takes 256 MiB, and fused layers need none."""

    def __init__(self, config: Any, embeddings: torch.Tensor, position_ids: torch.Tensor) -> None:
        super().__init__()
        self._arguments = {
            "config": config,
            "inputs_embeds": embeddings,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": position_ids,
        }

    def __missing__(self, kind: str) -> Any:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        builders = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        self[kind] = builders[kind](**self._arguments)
        return self[kind]


def _with_masks(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    positions = kwargs.get("position_ids")
    given = any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
    if positions is None or given or len(args) > 1:
        return kwargs
    return {**kwargs, "attention_mask": document_masks(decoder, positions)}


def _joined(samples: Sequence[Sample]) -> Sample:
    """One sequence of whole samples. The first token of each has no label: what would predict it is the last token of
    another document."""
    return Sample(
        key="+".join(sample.key for sample in samples),
        input_ids=[token for sample in samples for token in sample.input_ids],
        labels=[label for sample in samples for label in (IGNORED, *sample.labels[1:])],
        documents=tuple(len(sample.input_ids) for sample in samples),
    )


def _one_row(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    import torch

    lengths = [length for row in rows for length in row["seq_lengths"]]
    positions = torch.cat([torch.arange(length) for length in lengths])
    joined = {name: torch.tensor([[x for row in rows for x in row[name]]]) for name in ("input_ids", "labels")}
    # Once more, for rows that were not made by `pack`.
    joined["labels"][:, positions == 0] = IGNORED
    return {**joined, "position_ids": positions[None]}
