"""All decoder layers as two CUDA graphs, one forwards and one backwards, for each length of micro-batch.

A layer is some two hundred launches, and Python needs longer to launch them than the GPU to run them. A graph is
recorded once and then replayed in one call. What is recorded is frozen: addresses, shapes and Python numbers. So
inputs, outputs and gradients have fixed places, seeds of dropout masks are read from memory, and lengths are rounded up
to one of a few: tokens that are added behind the real ones are seen by none of them and get no gradient.

All graphs share one memory pool, since no two of them are ever half done. The longest is recorded first: the room that
it needs is then enough for the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_sft_pipeline.training.fast.flat import place_of
from triton_sft_pipeline.training.fast.layer import LayerCall, backward_pass, forward_pass

LENGTHS = 8
"""So many lengths are recorded at most; more waste less on added tokens, and take more memory for the graphs."""

_MULTIPLE = 64

MakeCalls = Callable[[int, int, Tensor], list[LayerCall]]
"""(rows, tokens, seeds int64 [layers, seeds a layer]) -> what each layer is given."""


def rounded_length(tokens: int, longest: int) -> int:
    """`tokens` rounded up to one of `LENGTHS` evenly spaced lengths, the last of which holds `longest`.

    The same for every micro-batch and every start of a training, whatever came before: a resumed training computes
    what an uninterrupted one does.
    """
    step = -(-longest // (LENGTHS * _MULTIPLE)) * _MULTIPLE
    return -(-tokens // step) * step


@dataclass
class _Recorded:
    """The graphs of one shape and their fixed places.

    Attributes:
        forward, backward: the graphs.
        x, out: input and output of the layers [rows, tokens, H].
        grad, dx: their gradients.
        calls: what the layers were given. Its tensors are read at every replay, so they must not be freed.
        passes: forward passes so far; a backward pass belongs to the last one.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    x: Tensor
    out: Tensor
    grad: Tensor
    dx: Tensor
    calls: list[LayerCall]
    passes: int = field(default=0)


class StackGraphs:
    """Records and replays the layers of one model.

    Gradients of the adapters' weights have fixed places, too, and those become the weights' `.grad`: a backward pass
    adds to them without a second copy. Where other processes take part, autograd has to see the gradients, so that
    they are exchanged; then there are two copies.

    Args:
        parameters: the adapters' weights of every layer; weights that move are found, and everything recorded anew.
        make_calls: makes what the layers are given for a shape.
        seeds_shape: layers, seeds a layer.
        longest: tokens of the longest micro-batch to come.

    Attributes:
        pairs: every weight and the fixed place of its gradient.
        alone: whether no other process takes part.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[Tensor | None]],
        make_calls: MakeCalls,
        seeds_shape: tuple[int, int],
        longest: int,
        device: torch.device,
    ) -> None:
        self._parameters = parameters
        self._make_calls = make_calls
        self._seeds = torch.zeros(seeds_shape, dtype=torch.int64, device=device)
        self._longest = longest
        self._gradients = [[None if p is None else place_of(p) for p in layer] for layer in parameters]
        self.pairs = [
            (p, g)
            for layer, places in zip(parameters, self._gradients, strict=True)
            for p, g in zip(layer, places, strict=True)
            if p is not None and g is not None
        ]
        self._weights = [p for p, _ in self.pairs]
        self.alone = not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._places = self._addresses()

    def run(self, x: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        """The layers' output for `x` [rows, tokens, H], tokens being a rounded length; differentiable.

        Valid until the next call: the backward pass of this one has to come before it.
        """
        places = self._addresses()
        if places != self._places:
            # Weights that were loaded since stand somewhere else.
            self._recorded.clear()
            self._places = places
        key = (x.shape[0], x.shape[1])
        if key not in self._recorded:
            first = (x.shape[0], rounded_length(self._longest, self._longest))
            for shape in dict.fromkeys((first, key)):
                if shape not in self._recorded:
                    self._recorded[shape] = self._record(shape, x)
        # Pinned memory is kept by its allocator until the copy is done.
        self._seeds.copy_(torch.tensor(seeds, dtype=torch.int64).pin_memory(), non_blocking=True)
        out: Tensor = _Replay.apply(x, self._recorded[key], self, *self._differentiated(x))
        return out

    def _differentiated(self, x: Tensor) -> Sequence[Tensor]:
        """The weights that autograd has to know of. Alone, where gradients do not go through it, one is enough to have
        it call the backward pass, and none where the input does that: each takes its time."""
        if not self.alone:
            return self._weights
        return () if x.requires_grad else self._weights[:1]

    def continue_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Have the fixed places hold what the weights' gradients are so far: nothing after an optimiser step.

        Returns:
            Weights whose `.grad` is not yet their fixed place, with that place.
        """
        elsewhere, cleared = [], []
        for p, place in self.pairs:
            grad = p.grad
            if grad is place or (grad is not None and grad.data_ptr() == place.data_ptr()):
                continue
            elsewhere.append((p, place))
            if grad is None:
                cleared.append(place)
            else:
                place.copy_(grad)
        if cleared:
            torch._foreach_zero_(cleared)
        return elsewhere

    def release(self) -> None:
        """Forget all graphs; their memory goes back."""
        self._recorded.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._weights))

    def _record(self, shape: tuple[int, int], like: Tensor) -> _Recorded:
        calls = self._make_calls(*shape, self._seeds)
        x = torch.zeros((*shape, like.shape[-1]), dtype=like.dtype, device=like.device)
        grad = torch.zeros_like(x)
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            # Once unrecorded: kernels are compiled and loaded, and scratch memory grows, outside of the graphs.
            self._backward(calls, grad, self._forward(calls, x)[1])
            # Graphs cannot use what the allocator keeps for others.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Other threads, such as the one that pins batches, may go on using the device.
            with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
                out, saved = self._forward(calls, x)
            with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
                dx = self._backward(calls, grad, saved)
        return _Recorded(forward, backward, x, out, grad, dx, calls)

    def _forward(self, calls: list[LayerCall], x: Tensor) -> tuple[Tensor, list[Any]]:
        saved, hidden = [], x.view(-1, x.shape[-1])
        for call, factors in zip(calls, self._parameters, strict=True):
            out, kept = forward_pass(call, hidden, factors)
            saved.append((hidden, kept))
            hidden = out
        return hidden.view(x.shape), saved

    def _backward(self, calls: list[LayerCall], grad: Tensor, saved: list[Any]) -> Tensor:
        dx = grad.view(-1, grad.shape[-1])
        layers = zip(reversed(calls), reversed(self._parameters), reversed(self._gradients), strict=True)
        for call, factors, places in layers:
            x, kept = saved.pop()
            dx, gradients = backward_pass(call, dx, x, kept, factors)
            for place, gradient in zip(places, gradients, strict=True):
                if place is not None and gradient is not None:
                    (place.add_ if self.alone else place.copy_)(gradient)
        return dx.view(grad.shape)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: _Recorded, graphs: StackGraphs, *weights: Tensor) -> Tensor:
        recorded.x.copy_(x)
        recorded.forward.replay()
        recorded.passes += 1
        ctx.recorded, ctx.graphs, ctx.weights, ctx.number = recorded, graphs, len(weights), recorded.passes
        return recorded.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        recorded: _Recorded = ctx.recorded
        graphs: StackGraphs = ctx.graphs
        if ctx.number != recorded.passes:
            raise RuntimeError("another forward pass came before this one's backward pass; its activations are gone")
        recorded.grad.copy_(grad)
        # Not earlier: gradients may be cleared after the forward pass.
        elsewhere = graphs.continue_gradients() if graphs.alone else []
        recorded.backward.replay()
        if graphs.alone:
            for weight, place in elsewhere:
                weight.grad = place
            return recorded.dx, None, None, *(None for _ in range(ctx.weights))
        # These very tensors, which are held elsewhere, too, so that autograd copies what it keeps as .grad. Tensors
        # that nobody else holds become .grad themselves, and the next replay would write into that.
        return recorded.dx, None, None, *(place for _, place in graphs.pairs)
