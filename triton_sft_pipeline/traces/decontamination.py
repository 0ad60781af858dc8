"""Keeps what the evaluation asks out of the training data: traces about a held-out problem, or nearly about one.

A module is a held-out one when their fingerprints or their normal forms are equal, and nearly one when it holds most of
its token 5-grams, those left out that any module has. So a renamed, re-typed or re-arranged copy is found, and so is a
copy inside something larger. What computes the same in another way is not.

Knows problems and how code is normalised, and nothing of files or labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from triton_sft_pipeline.problems import Problem, fingerprint
from triton_sft_pipeline.traces.normalise import blurred, module_tokens, shingles, tokens_hash
from triton_sft_pipeline.traces.record import Trace

HELD_OUT = "held_out_problem"

_EMPTY_MODULE = """
import torch

class Model(torch.nn.Module):
    def __init__(self{parameters}):
        super().__init__()

    def forward(self{inputs}):
        return x
"""


@dataclass(frozen=True)
class Contact:
    """Which held-out problem a module touches, and how.

    Attributes:
        name: the held-out problem's key.
        how: "fingerprint", "normal_form" or "overlap".
        overlap: share of the held-out module's own token 5-grams that the other module holds; 1.0 for the first two.
    """

    name: str
    how: str
    overlap: float

    def __str__(self) -> str:
        """A sentence for `dropped.jsonl`."""
        if self.how == "fingerprint":
            return f"the same module as the held-out problem {self.name}"
        if self.how == "normal_form":
            return f"the same module as the held-out problem {self.name}, but for names and layout"
        return f"holds {self.overlap:.0%} of the held-out problem {self.name}"


class HeldOut:
    """The held-out problems, ready to be asked about one module after another.

    Args:
        problems: as `load_problems` gives them.
        overlap: from this share of a held-out module's own token 5-grams on, a module is nearly that problem; in
            (0, 1].
    """

    def __init__(self, problems: Iterable[Problem], overlap: float = 0.8) -> None:
        self._overlap = overlap
        self._by_fingerprint: dict[str, str] = {}
        self._by_form: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._holders: dict[int, list[str]] = {}
        for problem in sorted(problems, key=lambda problem: problem.key):
            tokens = module_tokens(problem.pytorch_code)
            self._by_fingerprint.setdefault(fingerprint(problem.pytorch_code), problem.key)
            self._by_form.setdefault(tokens_hash(tokens), problem.key)
            grams = _own_grams(tokens)
            self._sizes[problem.key] = len(grams)
            for gram in grams:
                self._holders.setdefault(gram, []).append(problem.key)

    def touched_by(self, pytorch_code: str, problem: str | None = None) -> Contact | None:
        """The held-out problem that a module is, or nearly is: the nearest, when there are several.

        Args:
            problem: the module's fingerprint when it is known already (`Trace.problem`).
        """
        name = self._by_fingerprint.get(problem or fingerprint(pytorch_code))
        if name is not None:
            return Contact(name, "fingerprint", 1.0)
        tokens = module_tokens(pytorch_code)
        name = self._by_form.get(tokens_hash(tokens))
        if name is not None:
            return Contact(name, "normal_form", 1.0)
        shared = Counter(name for gram in _own_grams(tokens) for name in self._holders.get(gram, ()))
        share, name = max(((count / self._sizes[name], name) for name, count in shared.items()), default=(0.0, ""))
        return Contact(name, "overlap", share) if name and share >= self._overlap else None


def decontamination_step(held_out: HeldOut) -> tuple[str, Callable[[Trace], str | None]]:
    """A per-trace step (see `filters.Step`): "held_out_problem" and what asks a trace. Answers are remembered by
    problem, since the traces of one problem share its module.
    """
    answers: dict[str, str | None] = {}

    def ask(trace: Trace) -> str | None:
        if trace.problem not in answers:
            contact = held_out.touched_by(trace.pytorch_code, trace.problem)
            answers[trace.problem] = str(contact) if contact else None
        return answers[trace.problem]

    return HELD_OUT, ask


def _own_grams(tokens: list[str]) -> set[int]:
    """The token 5-grams of a module that do not come with every module."""
    return _grams(tokens) - _everyones_grams()


def _grams(tokens: list[str]) -> set[int]:
    return set(shingles(blurred(tokens)).tolist())


@lru_cache(maxsize=1)
def _everyones_grams() -> frozenset[int]:
    """The 5-grams of modules that compute nothing, with one to three inputs and none to two parameters."""
    codes = [
        _EMPTY_MODULE.format(inputs=inputs, parameters=parameters)
        for inputs in (", x", ", x, y", ", x, y, z")
        for parameters in ("", ", a", ", a, b")
    ]
    return frozenset().union(*(_grams(module_tokens(code)) for code in codes))
