"""The next token of every row of a batch, greedy or sampled, so that an answer depends on its own seed alone.

A row has one uniform number a step, from a generator of its own, and takes the token at which the cumulative
probability of the most likely tokens passes it (inverse transform sampling: L. Devroye 1986, "Non-Uniform Random
Variate Generation", chapter II.2). So neither a row's neighbours nor its place in the batch matter, and no more than
one number is drawn a token. The numbers are drawn on the CPU: the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def request_seed(seed: int, key: str, sample: int) -> int:
    """The seed of one answer: of the evaluation's seed, the problem's key and the sample's number, and nothing else.

    Returns:
        A number below 2**56: the same for every model, order, batch and resumed run.
    """
    text = f"{seed}:{sample}:{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


class Sampler:
    """Chooses tokens for rows that may end one by one.

    Args:
        seeds: one a row.
        steps: how often it is called at most.
        temperature: 0 takes the most likely token and draws nothing.
        top_p: above 0, at most 1: only the smallest set of most likely tokens whose probability is at least this is
            sampled from; the most likely one is always in it (A. Holtzman et al. 2020, "The Curious Case of Neural Text
            Degeneration").
        device: where the logits are.
    """

    def __init__(self, seeds: Sequence[int], steps: int, temperature: float, top_p: float, device: Any) -> None:
        import torch

        self._temperature, self._top_p, self._step = temperature, top_p, 0
        self._drawn: Any = None
        if temperature > 0.0:
            drawn = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self._drawn = torch.stack(drawn).to(device)

    def __call__(self, logits: Any) -> Any:
        """The next token of each row, [rows]; `logits` is [rows, vocabulary], a row for each that still runs."""
        if self._drawn is None:
            return logits.argmax(dim=-1)
        chosen = sampled(logits.float() / self._temperature, self._top_p, self._drawn[:, self._step])
        self._step += 1
        return chosen

    def keep(self, rows: Any) -> None:
        """Go on with these rows alone, in this order; `rows` are places among those that still run."""
        if self._drawn is not None:
            self._drawn = self._drawn[rows]


def sampled(logits: Any, top_p: float, drawn: Any) -> Any:
    """The token of each row [rows] that a number from [0, 1) stands for.

    Args:
        logits: [rows, vocabulary], already divided by the temperature.
        top_p: as in `Sampler`.
        drawn: [rows].
    """
    import torch

    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    reached = probabilities.cumsum(dim=-1)
    # The nucleus: what has less than `top_p` before it.
    size = (reached - probabilities < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    mass = reached.gather(-1, size - 1)
    place = torch.searchsorted(reached, drawn[:, None] * mass, right=True)
    return order.gather(-1, place.clamp(max=size - 1))[:, 0]
