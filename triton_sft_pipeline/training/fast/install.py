"""Make an AFMoE model with adapters train through fused layers, and undo it.

`make_fast` replaces the `forward` of the model, of its decoder layers and of its last norm on these very objects: no
class is touched, and everything that is not training, such as evaluation and generation, goes the stock way. A layer
computes its activations again in the backward pass by itself, so checkpointing is kept from wrapping it a second time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.afmoe.modeling_afmoe import AfmoeModel

from triton_sft_pipeline.training.batch_facts import padded_behind
from triton_sft_pipeline.training.fast import ops
from triton_sft_pipeline.training.fast.attention import Documents, find_documents
from triton_sft_pipeline.training.fast.graphs import StackGraphs, rounded_length
from triton_sft_pipeline.training.fast.layer import LayerCall, decoder_layer
from triton_sft_pipeline.training.fast.parts import SEEDS, LayerParts, UnsupportedLayerError, lora_layers, read_layer
from triton_sft_pipeline.training.fast.scratch import Scratch

_logger = logging.getLogger(__name__)

_ATTRIBUTE = "_fused_training"

KEPT_TOKENS = 8192
"""Micro-batches of up to so many tokens keep attention's output for the backward pass, in Trinity-Mini 400 KiB a token;
longer ones compute it again."""


def make_fast(
    peft_model: nn.Module,
    *,
    longest: int | None = None,
    force: bool = False,
    kept_tokens: int = KEPT_TOKENS,
    keep_branch: bool = True,
) -> list[str]:
    """Let `peft_model` train through fused layers from now on. Call it once adapters are attached and active.

    A forward pass takes them when the model is in training mode with gradients, without a cache, on CUDA in a 16-bit
    type, and rows are padded behind their tokens or not at all; any other pass computes as before. What is behind a
    token does not change it; the output of the padding itself is another than the stock layers', and means nothing
    there either. Documents that are packed into one row, told by `position_ids` that begin at 0 again, do not see each
    other.

    Args:
        peft_model: the model; one without AFMoE layers is left alone.
        longest: tokens of the longest row to come. With it, all layers are recorded as CUDA graphs for a few lengths up
            to this one and replayed, which takes most of Python's time away; rows are padded to the next of these
            lengths. None: layer by layer. Packed rows always go layer by layer.
        force: also on the CPU and in any type; for tests.
        kept_tokens: micro-batches of more tokens save memory by computing attention twice.
        keep_branch: False saves the third of that memory that takes the least time to compute again: attention's
            output projection.

    Returns:
        The names of the modules whose forward was replaced. Empty when the architecture is another, when
        TRITON_SFT_PLAIN=1 is set, or when some layer has what the fused one lacks (a warning says what).
    """
    make_plain(peft_model)
    found = [(name, module) for name, module in peft_model.named_modules() if isinstance(module, AfmoeModel)]
    if ops.plain() or not found:
        return []
    name, model = found[0]
    try:
        parts = [read_layer(layer) for layer in model.layers]
    except UnsupportedLayerError as error:
        _logger.warning("training goes through the stock layers: %s", error)
        return []
    fused = _FusedTraining(model, parts, lora_layers(peft_model), force, (kept_tokens, keep_branch), longest)
    fused.install()
    # Not as a submodule, nor seen by anything that walks over modules.
    object.__setattr__(peft_model, _ATTRIBUTE, fused)
    return [name, *(f"{name}.layers.{i}" for i in range(len(parts))), f"{name}.norm"]


def make_plain(peft_model: nn.Module) -> None:
    """Undo `make_fast`; nothing happens when it was not called."""
    fused: _FusedTraining | None = peft_model.__dict__.pop(_ATTRIBUTE, None)
    if fused is not None:
        fused.remove()


def fused_passes(peft_model: nn.Module) -> int:
    """How many forward passes have gone through the fused layers since `make_fast`; 0 without."""
    fused: _FusedTraining | None = peft_model.__dict__.get(_ATTRIBUTE)
    return fused.passes if fused is not None else 0


@contextmanager
def padding_known(peft_model: nn.Module, behind: bool) -> Iterator[None]:
    """Tell the fused layers of `peft_model` whether rows are padded behind their tokens (or not at all) in the forward
    passes to come: otherwise they ask the device, which takes as long as everything that it still has to do. Nothing
    happens without fused layers."""
    fused: _FusedTraining | None = peft_model.__dict__.get(_ATTRIBUTE)
    if fused is None:
        yield
        return
    before, fused.padded_behind = fused.padded_behind, behind
    try:
        yield
    finally:
        fused.padded_behind = before


@dataclass
class _Batch:
    """What the layers of one forward pass share.

    Attributes:
        rows, tokens: the shape of the micro-batch.
        documents: who sees whom.
        keep_attention: whether attention's output is kept.
        seeds: of each layer's dropout masks.
        rope: cos and sin [N, head_dim], made by the first layer.
        padded: tokens of a row once rounded up, where all layers are replayed as one graph; None: layer by layer.
    """

    rows: int
    tokens: int
    documents: Documents
    keep_attention: bool
    seeds: list[list[int]]
    rope: tuple[Tensor, Tensor] | None = None
    padded: int | None = None


class _FusedTraining:
    """The replaced forwards of one model, and what they share."""

    def __init__(
        self,
        model: AfmoeModel,
        parts: list[LayerParts],
        adapters: list[Any],
        force: bool,
        keep: tuple[int, bool],
        longest: int | None,
    ) -> None:
        self.model, self.parts, self.adapters, self.force = model, parts, adapters, force
        self.kept_tokens, self.keep_branch = keep
        self.longest = longest
        self.graphs: StackGraphs | None = None
        self.scratch = Scratch()
        self.batch: _Batch | None = None
        self.padded_behind: bool | None = None
        self.passes = 0
        self._before: list[tuple[nn.Module, Any]] = []
        self._signature = inspect.signature(AfmoeModel.forward)

    def install(self) -> None:
        """Replace the forwards."""
        self._replace(self.model, self._model_forward)
        for layer, parts in zip(self.model.layers, self.parts, strict=True):
            self._replace(layer, self._layer_forward(parts))
        self._replace(self.model.norm, self._norm_forward)

    def remove(self) -> None:
        """Put back what was there."""
        for module, before in self._before:
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._before.clear()
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        self.scratch.release()

    def _replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._before.append((module, module.__dict__.get("forward")))
        module.forward = make(module.forward)

    def _model_forward(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            options = self._named(args, kwargs)
            batch = self._batch(options)
            if batch is None:
                return plain(*args, **kwargs)
            self.batch, self.passes = batch, self.passes + 1
            # Given masks are taken as they are: nobody builds one of tokens x tokens that nobody reads.
            options["attention_mask"] = {"full_attention": None, "sliding_attention": None}
            options["use_cache"] = False
            try:
                with _checkpointing_off(self.model):
                    return plain(**options)
            finally:
                self.batch = None

        return forward

    def _layer_forward(self, parts: LayerParts) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(plain: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                batch = self.batch
                if batch is None:
                    return plain(hidden_states, *args, **kwargs)
                if batch.padded is not None:
                    # The first layer runs them all.
                    return self._replayed(hidden_states, batch) if parts.number == 0 else hidden_states
                if batch.rope is None:
                    batch.rope = _flat_rope(kwargs["position_embeddings"], batch, hidden_states)
                call = LayerCall(
                    parts,
                    batch.documents,
                    *batch.rope,
                    batch.seeds[parts.number],
                    batch.keep_attention,
                    self.keep_branch,
                    self.scratch,
                )
                return decoder_layer(hidden_states, call)

            return forward

        return make

    def _norm_forward(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor) -> Any:
            if self.batch is None:
                return plain(hidden_states)
            norm = self.model.norm
            return _Norm.apply(hidden_states, norm.weight, norm.variance_epsilon)

        return forward

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments by name."""
        names = [name for name in self._signature.parameters if name != "self"]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _batch(self, options: dict[str, Any]) -> _Batch | None:
        """What the layers need to know of this pass; None when it has to go the stock way."""
        if not (self.model.training and torch.is_grad_enabled()) or ops.plain() or not self._computes(options):
            return None
        given = options.get("input_ids")
        rows, tokens = (given if given is not None else options["inputs_embeds"]).shape[:2]
        mask = options.get("attention_mask")
        if mask is not None and not self._padded_behind(mask):
            return None
        documents = find_documents(options.get("position_ids"), rows, tokens)
        seeds = [[0] * SEEDS] * len(self.parts)
        if any(parts.has_dropout for parts in self.parts):
            # From the CPU's generator: resuming restores it, and nobody waits for a device.
            seeds = torch.randint(2**31, (len(self.parts), SEEDS), device="cpu").tolist()
        padded = None
        if self.longest is not None and options.get("position_ids") is None and tokens <= self.longest:
            padded = rounded_length(tokens, self.longest)
        return _Batch(rows, tokens, documents, rows * (padded or tokens) <= self.kept_tokens, seeds, None, padded)

    def _padded_behind(self, mask: Any) -> bool:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return False
        return padded_behind(mask) if self.padded_behind is None else self.padded_behind

    def _replayed(self, hidden: Tensor, batch: _Batch) -> Tensor:
        """All layers, as graphs that are recorded at the first micro-batch of a length."""
        if self.graphs is None:
            parameters = [parts.parameters() for parts in self.parts]
            shape = (len(self.parts), SEEDS)
            self.graphs = StackGraphs(parameters, self._calls, shape, self.longest or 0, hidden.device)
        assert batch.padded is not None
        padded = nn.functional.pad(hidden, (0, 0, 0, batch.padded - batch.tokens))
        return self.graphs.run(padded, batch.seeds)[:, : batch.tokens]

    def _calls(self, rows: int, tokens: int, seeds: Tensor) -> list[LayerCall]:
        positions = torch.arange(tokens, device=seeds.device).unsqueeze(0)
        dtype = self.model.embed_tokens.weight.dtype
        cos, sin = self.model.rotary_emb(torch.empty(0, dtype=dtype, device=seeds.device), positions)
        cos, sin = (t.to(dtype).expand(rows, tokens, -1).reshape(rows * tokens, -1) for t in (cos, sin))
        keep = rows * tokens <= self.kept_tokens
        return [
            LayerCall(parts, Documents(None, tokens), cos, sin, seeds[place], keep, self.keep_branch, self.scratch)
            for place, parts in enumerate(self.parts)
        ]

    def _computes(self, options: dict[str, Any]) -> bool:
        """Whether fused layers can give what is asked for, as far as it can be told without the device."""
        if options.get("past_key_values") is not None or options.get("use_cache"):
            return False
        config = self.model.config
        for name in ("output_attentions", "output_router_logits"):
            if options.get(name) or (name not in options and getattr(config, name, False)):
                return False
        if any(adapter.disable_adapters or adapter.merged for adapter in self.adapters):
            return False
        weight = self.model.embed_tokens.weight
        return self.force or (weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16))


@contextmanager
def _checkpointing_off(model: AfmoeModel) -> Iterator[None]:
    """Keep transformers from checkpointing layers that already compute everything again."""
    on = [layer for layer in model.layers if layer.gradient_checkpointing]
    for layer in on:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in on:
            layer.gradient_checkpointing = True


def _flat_rope(tables: tuple[Tensor, Tensor], batch: _Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for every token of the micro-batch, [N, head_dim] in the type of `like`."""
    cos, sin = (
        table.to(like.dtype).expand(batch.rows, batch.tokens, -1).reshape(batch.rows * batch.tokens, -1)
        for table in tables
    )
    return cos, sin


class _Norm(torch.autograd.Function):
    """The model's last norm; its weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, rstd = ops.rms_norm(flat, weight, eps)
        ctx.save_for_backward(flat, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, rstd = ctx.saved_tensors
        dx = ops.rms_norm_backward(grad.reshape(flat.shape).contiguous(), flat, weight, rstd)
        return dx.view(grad.shape), None, None
