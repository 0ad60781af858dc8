"""Tells whether a module is another one, or nearly is: what keeps the problems that evaluation asks apart from those
that are trained on.

A module is a held-out one when their fingerprints or their normal forms are equal, and nearly one when it holds most of
its token 5-grams, those left out that any module has. So a renamed, re-typed or re-arranged copy is found, and so is a
copy inside something larger. What computes the same in another way is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from triton_sft_pipeline.problems.fingerprints import fingerprint
from triton_sft_pipeline.problems.loading import Problem
from triton_sft_pipeline.problems.normalise import blurred, module_tokens, shingles, tokens_hash

OVERLAP = 0.8
"""From this share of a module's own token 5-grams on, another module is nearly that one."""

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

    def __init__(self, problems: Iterable[Problem], overlap: float = OVERLAP) -> None:
        self._overlap = overlap
        self._by_fingerprint: dict[str, list[str]] = {}
        self._by_form: dict[str, list[str]] = {}
        self._sizes: dict[str, int] = {}
        self._holders: dict[int, list[str]] = {}
        for problem in sorted(problems, key=lambda problem: problem.key):
            tokens = module_tokens(problem.pytorch_code)
            self._by_fingerprint.setdefault(fingerprint(problem.pytorch_code), []).append(problem.key)
            self._by_form.setdefault(tokens_hash(tokens), []).append(problem.key)
            grams = _own_grams(tokens)
            self._sizes[problem.key] = len(grams)
            for gram in grams:
                self._holders.setdefault(gram, []).append(problem.key)

    def touched_by(self, pytorch_code: str, problem: str | None = None) -> Contact | None:
        """The held-out problem that a module is, or nearly is: the nearest, when there are several.

        Args:
            problem: the module's fingerprint when it is known already (`Trace.problem`).
        """
        names = self._by_fingerprint.get(problem or fingerprint(pytorch_code))
        if names:
            return Contact(names[0], "fingerprint", 1.0)
        tokens = module_tokens(pytorch_code)
        names = self._by_form.get(tokens_hash(tokens))
        if names:
            return Contact(names[0], "normal_form", 1.0)
        share, name = max(((share, name) for name, share in self._shares(tokens)), default=(0.0, ""))
        return Contact(name, "overlap", share) if name and share >= self._overlap else None

    def all_touched_by(self, pytorch_code: str, problem: str | None = None) -> list[Contact]:
        """Every held-out problem that a module is, or nearly is, each once, with the nearest way in which it is.

        Args:
            problem: as for `touched_by`.
        """
        tokens = module_tokens(pytorch_code)
        found = {n: Contact(n, "overlap", share) for n, share in self._shares(tokens) if share >= self._overlap}
        for how, names in (
            ("normal_form", self._by_form.get(tokens_hash(tokens), ())),
            ("fingerprint", self._by_fingerprint.get(problem or fingerprint(pytorch_code), ())),
        ):
            found |= {name: Contact(name, how, 1.0) for name in names}
        return [found[name] for name in sorted(found)]

    def _shares(self, tokens: list[str]) -> list[tuple[str, float]]:
        """(held-out problem, share of its own 5-grams that are among these tokens) of each that has any."""
        shared = Counter(name for gram in _own_grams(tokens) for name in self._holders.get(gram, ()))
        return [(name, count / self._sizes[name]) for name, count in shared.items()]


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
