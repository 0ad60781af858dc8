"""Sampling beside a plain implementation: the same choices, the right shares, and nothing that depends on the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest

from triton_sft_pipeline.evaluation.sampling import Sampler, request_seed, sampled

LOGITS = [2.0, 1.5, 1.0, 0.0, -0.5, -3.0]


def plain_nucleus(logits: list[float], top_p: float) -> dict[int, float]:
    """The most likely tokens with their probabilities, one after the other, until they have the mass."""
    total = sum(math.exp(x) for x in logits)
    kept: dict[int, float] = {}
    for token in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if kept and sum(kept.values()) >= top_p:
            break
        kept[token] = math.exp(logits[token]) / total
    return kept


def plain_sampling(logits: list[float], temperature: float, top_p: float, drawn: float) -> int:
    """The token whose piece of the nucleus' mass, laid end to end from the most likely on, holds the drawn number."""
    kept = plain_nucleus([x / temperature for x in logits], top_p)
    left = drawn * sum(kept.values())
    for token, probability in kept.items():
        left -= probability
        if left < 0:
            return token
    return token


def uniform(seed: int, steps: int) -> list[float]:
    import torch

    return torch.rand(steps, generator=torch.Generator().manual_seed(seed)).tolist()


def tensor(rows: list[list[float]]) -> Any:
    import torch

    return torch.tensor(rows)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.95), (1.0, 1.0), (1.3, 0.5), (0.2, 0.9)])
def test_a_row_takes_what_the_plain_implementation_takes(temperature: float, top_p: float) -> None:
    seeds, steps = [3, 4, 5], 200
    sampler = Sampler(seeds, steps, temperature, top_p, "cpu")
    rows = [LOGITS, LOGITS[::-1], [0.1 * x for x in LOGITS]]
    chosen = [sampler(tensor(rows)).tolist() for _ in range(steps)]
    for row, seed in enumerate(seeds):
        plain = [plain_sampling(rows[row], temperature, top_p, drawn) for drawn in uniform(seed, steps)]
        assert [step[row] for step in chosen] == plain


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.95), (1.0, 1.0), (1.5, 0.8)])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, top_p: float) -> None:
    rows, steps = 100, 200
    sampler = Sampler([request_seed(0, "p", row) for row in range(rows)], steps, temperature, top_p, "cpu")
    counts = [0] * len(LOGITS)
    for _ in range(steps):
        for token in sampler(tensor([LOGITS] * rows)).tolist():
            counts[token] += 1
    kept = plain_nucleus([x / temperature for x in LOGITS], top_p)
    expected = {i: rows * steps * probability / sum(kept.values()) for i, probability in kept.items()}
    assert all(count == 0 for i, count in enumerate(counts) if i not in kept)
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in kept)
    # 99.9 % point of chi-square with five degrees of freedom, an upper bound for fewer.
    assert chi_square < 20.515


def test_the_nucleus_is_the_smallest_set_with_the_mass_and_never_empty() -> None:
    import torch

    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probabilities]

    def kept(top_p: float) -> list[int]:
        drawn = torch.linspace(0, 1 - 1e-6, 500)
        return sorted(set(sampled(tensor([logits] * 500), top_p, drawn).tolist()))

    assert kept(0.01) == [0]
    assert kept(0.5 - 1e-4) == [0]
    assert kept(0.6) == [0, 1]
    assert kept(0.9) == [0, 1, 2]
    assert kept(1.0) == [0, 1, 2, 3]


def test_a_number_just_below_one_is_a_token_of_the_nucleus() -> None:
    import torch

    logits = torch.randn(16, 700, generator=torch.Generator().manual_seed(0))
    drawn = torch.full((16,), 1 - 2**-24)
    for top_p in (1.0, 0.95):
        chosen = sampled(logits, top_p, drawn).tolist()
        for row, token in enumerate(chosen):
            assert token in plain_nucleus(logits[row].tolist(), top_p + 1e-5)


def test_a_row_draws_the_same_alone_beside_others_and_after_others_have_left() -> None:
    def drawn(seeds: list[int], row: int, leave_after: int | None = None, steps: int = 40) -> list[int]:
        sampler, found, running = Sampler(seeds, steps, 1.0, 0.95, "cpu"), [], list(range(len(seeds)))
        for step in range(40):
            found.append(sampler(tensor([LOGITS] * len(running))).tolist()[running.index(row)])
            if step == leave_after:
                sampler.keep([running.index(row)])
                running = [row]
        return found

    alone = drawn([7], 0)
    assert drawn([1, 2, 7, 9], 2) == alone
    assert drawn([7, 1], 0, leave_after=5) == alone
    assert drawn([1, 7], 1, leave_after=5) == alone
    # A batch with more room draws more numbers, but the first ones are the same.
    assert drawn([1, 7], 1, steps=333) == alone
    assert drawn([8], 0) != alone


def test_greedy_takes_the_most_likely_token_and_rows_may_leave() -> None:
    sampler = Sampler([1, 2], 5, 0.0, 0.95, "cpu")
    assert sampler(tensor([LOGITS, LOGITS[::-1]])).tolist() == [0, 5]
    sampler.keep([1])
    assert sampler(tensor([LOGITS[::-1]])).tolist() == [5]


def test_a_seed_is_of_the_key_the_sample_and_the_evaluations_seed() -> None:
    seeds = {
        request_seed(seed, key, sample) for seed in (0, 1) for key in ("a", "b", "a:1", "\ud800") for sample in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**56 for seed in seeds)
    assert request_seed(0, "level3/23_Name", 1) == 21656332440856470, "another process has the same"
