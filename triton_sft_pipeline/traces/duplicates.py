"""Kernels that are the same, or nearly: of each such group the fastest correct one stays.

The same: equal normal forms (`normalise.kernel_tokens`), whatever the problems. Nearly the same: enough token 5-grams
in common, and problems that are the same or nearly the same too. The second half matters: a sigmoid kernel and a SiLU
kernel share 91 % of their 5-grams, and a person would call them two kernels.

MinHash (datasketch) and locality-sensitive hashing only say which pairs to look at; what is found is decided by the
exact Jaccard similarity of the pair. Knows nothing of files.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

from triton_sft_pipeline.problems.normalise import blurred, kernel_tokens, module_tokens, shingles, tokens_hash

Place = tuple[str, int]
"""Where a trace stood: file and 0-based position."""

Refusals = dict[Place, tuple[str, str]]
"""For each trace that a step drops: the reason, a word for the funnel, and a sentence about this very trace."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

Form = tuple[bytes, bytes]
"""A normal form as it is compared: its hash and its n-grams; see `form_of`."""

EXACT = "duplicate"
NEAR = "near_duplicate"

# Of two sets with a Jaccard similarity of 0.9, 14 bands of 8 rows miss each other once in 2,600 times, of 0.95 once in
# four million: (1 - s**rows)**bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). datasketch's own
# choice for 0.9, 5 bands of 25, would miss two in three; wrong candidates cost little here.
_BANDS, _ROWS = 14, 8
# Sets compared in one go: some megabytes.
_AT_ONCE = 1_000
# What fits stays in memory.
_SPILL_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TraceKey:
    """What the set steps need of a trace.

    Attributes:
        place: unique among the keys of one call.
        sample_key: what the trace is called in sentences.
        problem: fingerprint of the problem (`Trace.problem`).
        pytorch_code, triton_code: read once and not kept.
        version: `Trace.version`: breaks ties by what a trace says, so that the order of the input changes nothing.
        correct: the label; None counts as not correct.
        speedup: the label; None counts as slowest.
        reasoning_length: in characters.
        kernel_form, module_form: of the two codes, when they are known already; else they are made of them.
    """

    place: Place
    sample_key: str
    problem: str
    pytorch_code: str
    triton_code: str
    version: str
    correct: bool | None = True
    speedup: float | None = None
    reasoning_length: int = 0
    kernel_form: Form | None = None
    module_form: Form | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trace as the set steps see it.

    Attributes:
        rank: smaller is better: correct, then fast, then a short reasoning, then what the trace says, then its place.
        kernel: number of the kernel's normal form; equal numbers are equal kernels.
        module: number of the normal form of the problem's module.
    """

    place: Place
    sample_key: str
    problem: str
    correct: bool
    speedup: float | None
    reasoning_length: int
    rank: tuple[Any, ...]
    kernel: int
    module: int

    def __str__(self) -> str:
        speed = "" if self.speedup is None else f", {self.speedup:.3g}x"
        return f"{self.sample_key} ({self.place[0]} #{self.place[1]}{speed})"


class Candidates:
    """Reads keys into candidates, best first, and keeps what tells their kernels and modules apart.

    Holds about 600 bytes of memory a trace; the n-grams lie in a temporary file that goes with the object.

    Args:
        keys: taken one at a time.
        compare: whether anybody will ask for duplicates; without it no code is parsed, and all kernels count as one.
    """

    def __init__(self, keys: Iterable[TraceKey], compare: bool = True) -> None:
        self.forms = _Forms()
        modules: dict[str, int] = {}
        found = []
        for key in keys:
            kernel = module = 0
            if compare:
                kernel = self.forms.number(key.kernel_form or form_of(kernel_tokens(key.triton_code)))
                if key.problem not in modules:
                    form = key.module_form or form_of(module_tokens(key.pytorch_code))
                    modules[key.problem] = self.forms.number(form)
                module = modules[key.problem]
            found.append(_candidate(key, kernel, module))
        self.best_first: list[Candidate] = sorted(found, key=lambda candidate: candidate.rank)


def form_of(tokens: list[str]) -> Form:
    """The hash and the n-grams of a normal form (`normalise.kernel_tokens` or `module_tokens`)."""
    return bytes.fromhex(tokens_hash(tokens)), shingles(blurred(tokens)).tobytes()


def find_duplicates(candidates: Candidates, similarity: float = 0.9, progress: Progress | None = None) -> Refusals:
    """The traces whose kernel a better trace has too.

    Args:
        candidates: all traces.
        similarity: Jaccard similarity of two kernels' sets of token 5-grams from which they are nearly the same; so
            for two problems' modules. In (0, 1]; 1 asks for equal sets.
        progress: told how many of the kernels and modules were compared.

    Returns:
        Place -> ("duplicate" | "near_duplicate", detail). The detail names the trace that stays.
    """
    refusals: Refusals = {}
    left: list[Candidate] = []
    first_with: dict[int, Candidate] = {}
    for candidate in candidates.best_first:
        better = first_with.setdefault(candidate.kernel, candidate)
        if better is candidate:
            left.append(candidate)
        else:
            refusals[candidate.place] = (EXACT, f"the same kernel as {better}, but for names and layout")
    modules = sorted({candidate.module for candidate in left})
    done, total = 0, len(modules) + len(left)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for block in _blocks(left, modules, candidates.forms, similarity, advance):
        if len(block) > 1:
            refusals |= _near_duplicates(block, candidates.forms, similarity)
        advance(len(block))
    return refusals


def _candidate(key: TraceKey, kernel: int, module: int) -> Candidate:
    correct, speedup = key.correct is True, key.speedup
    slowness = inf if speedup is None else -speedup
    rank = (not correct, slowness, key.reasoning_length, key.version, key.place)
    return Candidate(
        key.place, key.sample_key, key.problem, correct, speedup, key.reasoning_length, rank, kernel, module
    )


def _blocks(
    candidates: list[Candidate], modules: list[int], forms: _Forms, similarity: float, advance: Callable[[int], None]
) -> list[list[Candidate]]:
    """The candidates (best first) by problem, with problems joined that are nearly the same."""
    leader: dict[int, int] = {}

    def lead(module: int) -> int:
        while leader[module] != module:
            leader[module] = module = leader[leader[module]]
        return module

    index = _Index(modules, forms, similarity)
    for module in modules:
        leader[module] = module
        for other, _ in index.similar(module):
            leader[lead(other)] = lead(module)
        index.add(module)
        advance(1)
    blocks: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        blocks.setdefault(lead(candidate.module), []).append(candidate)
    return list(blocks.values())


def _near_duplicates(block: list[Candidate], forms: _Forms, similarity: float) -> Refusals:
    """Each that is nearly the same as a better one that stays: no chain of small steps makes two far ones the same."""
    refusals: Refusals = {}
    staying: dict[int, Candidate] = {}
    index = _Index([candidate.kernel for candidate in block], forms, similarity)
    for candidate in block:
        near = [
            (shared, staying[kernel])
            for kernel, shared in index.similar(candidate.kernel)
            if _same_problem(candidate, staying[kernel], forms, similarity)
        ]
        if near:
            shared, better = min(near, key=lambda found: (-found[0], found[1].rank))
            also = "" if candidate.problem == better.problem else ", whose problem is nearly the same"
            refusals[candidate.place] = (NEAR, f"{shared:.0%} the same kernel as {better}{also}")
        else:
            staying[candidate.kernel] = candidate
            index.add(candidate.kernel)
    return refusals


def _same_problem(one: Candidate, other: Candidate, forms: _Forms, similarity: float) -> bool:
    return one.module == other.module or forms.jaccard(one.module, other.module) >= similarity


class _Forms:
    """Normal forms by number, and the n-grams of each in a temporary file."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._ends = array("q", [0])
        # Closed, and on a disk deleted, with this object.
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPILL_BYTES)  # noqa: SIM115

    def number(self, form: Form) -> int:
        """The number of a normal form: of the same form, the same number."""
        digest, grams = form
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = len(self._numbers)
            self._file.seek(self._ends[-1])
            self._file.write(grams)
            self._ends.append(self._ends[-1] + len(grams))
        return number

    def size(self, number: int) -> int:
        """How many n-grams a form has."""
        return (self._ends[number + 1] - self._ends[number]) // 8

    def grams(self, number: int) -> Any:
        """The n-grams of a form, as `normalise.shingles` gave them."""
        import numpy as np

        self._file.seek(self._ends[number])
        return np.frombuffer(self._file.read(8 * self.size(number)), dtype=np.uint64)

    def jaccard(self, one: int, other: int) -> float:
        """The exact Jaccard similarity of two forms' n-grams."""
        return _jaccard(self.grams(one), [self.grams(other)])[0]


class _Index:
    """Finds the forms among those added that are at least `similarity` like another.

    Locality-sensitive hashing by bands. All forms are known beforehand, so a bucket that only one of them falls into
    is never made, and a form costs 230 bytes; datasketch's own index, which is made for forms that come one by one,
    takes 4 KB.

    Args:
        numbers: of the forms that may be added or asked about, each once.
    """

    def __init__(self, numbers: list[int], forms: _Forms, similarity: float) -> None:
        self._forms, self._similarity = forms, similarity
        self._row = {number: row for row, number in enumerate(numbers)}
        self._buckets = _shared_buckets(_bands(numbers, forms))
        self._members: dict[int, array[int]] = {}

    def similar(self, number: int) -> list[tuple[int, float]]:
        """(number, exact Jaccard similarity) of each added form that is alike."""
        mine, size_of = self._forms.grams(number), self._forms.size
        candidates = {other for bucket in self._buckets_of(number) for other in self._members.get(bucket, ())}
        near = [
            other
            for other in sorted(candidates)
            if min(size_of(other), len(mine)) >= self._similarity * max(size_of(other), len(mine))
        ]
        found = []
        for start in range(0, len(near), _AT_ONCE):
            some = near[start : start + _AT_ONCE]
            shares = _jaccard(mine, [self._forms.grams(other) for other in some])
            found += [(other, share) for other, share in zip(some, shares, strict=True) if share >= self._similarity]
        return found

    def add(self, number: int) -> None:
        """Let later calls find this form."""
        for bucket in self._buckets_of(number):
            self._members.setdefault(bucket, array("q")).append(number)

    def _buckets_of(self, number: int) -> list[int]:
        return [bucket for bucket in self._buckets[self._row[number]].tolist() if bucket >= 0]


def _bands(numbers: list[int], forms: _Forms) -> Any:
    """A hash of each band of each form's MinHash: (forms, _BANDS), int64."""
    import numpy as np
    from datasketch import MinHash

    length = _BANDS * _ROWS
    permutations = MinHash(num_perm=length, scheme="affine64").permutations
    bands = np.empty((len(numbers), _BANDS), dtype=np.int64)
    for row, number in enumerate(numbers):
        signature = MinHash(num_perm=length, hashfunc=_itself, permutations=permutations, scheme="affine64")
        signature.update_batch(forms.grams(number))
        bands[row] = [hash(band.tobytes()) for band in signature.hashvalues.reshape(_BANDS, _ROWS)]
    return bands


def _shared_buckets(bands: Any) -> Any:
    """The number of the bucket that each form falls into in each band, or -1 where it is alone: as `bands`, int64."""
    import numpy as np

    buckets = np.empty_like(bands)
    before = 0
    for band in range(_BANDS):
        _, bucket, sizes = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        buckets[:, band] = np.where(sizes[bucket] > 1, bucket + before, -1)
        before += len(sizes)
    return buckets


def _itself(value: Any) -> Any:
    """The n-grams are hashes already."""
    return value


def _jaccard(one: Any, others: list[Any]) -> list[float]:
    """The exact Jaccard similarity of one sorted set to each of some others; of two empty ones, 1."""
    import numpy as np

    if not len(one):
        return [0.0 if len(other) else 1.0 for other in others]
    together = np.concatenate(others)
    shared = one[np.minimum(np.searchsorted(one, together), len(one) - 1)] == together
    counts = np.concatenate([[0], np.cumsum(shared)])
    ends = np.cumsum([len(other) for other in others])
    found, end_before = [], 0
    for end in ends.tolist():
        both = int(counts[end] - counts[end_before])
        found.append(both / (len(one) + end - end_before - both))
        end_before = end
    return found
