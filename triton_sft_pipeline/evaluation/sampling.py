"""The next token of every row of a batch, greedy or sampled, so that an answer depends on its own seed alone.

Sampling is the Gumbel-max trick: with independent g_i = -log(E_i), E_i exponential, argmax(log p_i + g_i) is token i
with probability p_i (E. J. Gumbel 1954, "Statistical Theory of Extreme Values and Some Practical Applications"; for
language models: W. Kool, H. van Hoof, M. Welling 2019, "Stochastic Beams and Where to Find Them"). Each row draws its
noise from a generator of its own, a whole vocabulary a step, so neither its neighbours nor its place in the batch
matter.
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


def nucleus(logits: Any, top_p: float) -> Any:
    """The logits with everything outside the nucleus at minus infinity.

    The nucleus is the smallest set of most likely tokens whose probability is at least `top_p`; the most likely token
    is always in it (A. Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").

    Args:
        logits: [rows, vocabulary], already divided by the temperature.
        top_p: above 0, at most 1; 1 keeps everything.
    """
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= top_p
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


class Sampler:
    """Chooses tokens for rows that may end one by one.

    Args:
        seeds: one a row.
        temperature: 0 takes the most likely token and draws nothing.
        top_p: see `nucleus`.
        device: where the logits are. A CPU and a GPU draw different numbers from one seed.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, device: Any) -> None:
        import torch

        self._temperature, self._top_p = temperature, top_p
        self._generators = [] if temperature == 0.0 else [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Any) -> Any:
        """The next token of each row, [rows]; `logits` is [rows, vocabulary], a row for each that still runs."""
        import torch

        if self._temperature == 0.0:
            return logits.argmax(dim=-1)
        kept = nucleus(logits.float() / self._temperature, self._top_p)
        noise = torch.empty_like(kept)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return (kept - noise.log_()).argmax(dim=-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]
