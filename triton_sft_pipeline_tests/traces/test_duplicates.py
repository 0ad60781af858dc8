"""Which traces count as duplicates, which of them stays, and that the order of the input changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from triton_sft_pipeline.problems import fingerprint
from triton_sft_pipeline.problems.normalise import blurred, kernel_tokens, module_tokens, shingles
from triton_sft_pipeline.traces import duplicates
from triton_sft_pipeline.traces.duplicates import Candidate, Candidates, Refusals, TraceKey, find_duplicates, form_of
from triton_sft_pipeline_tests.problems.test_normalise import KERNEL, RESPELLED
from triton_sft_pipeline_tests.traces.records import MODULE

REAL = os.environ.get("TRITON_SFT_REAL_TRACES")


def kernel(expression: str = "x * factor", block: int = 1024, extra: str = "") -> str:
    code = KERNEL.replace("x * factor", expression).replace("1024", str(block))
    return code.replace("    x = tl.load", f"{extra}    x = tl.load") if extra else code


def key(
    position: int,
    code: str = KERNEL,
    problem: str = "x * 2",
    correct: bool | None = True,
    speedup: float | None = 1.0,
    reasoning_length: int = 100,
) -> TraceKey:
    module = MODULE.format(expression=problem)
    version = f"v{position}"
    return TraceKey(
        ("t.json", position),
        f"s{position}",
        fingerprint(module),
        module,
        code,
        version,
        correct,
        speedup,
        reasoning_length,
    )


def refused(keys: list[TraceKey], similarity: float = 0.9) -> dict[int, tuple[str, str]]:
    found = find_duplicates(Candidates(keys), similarity)
    return {place[1]: refusal for place, refusal in found.items()}


def reasons(keys: list[TraceKey], similarity: float = 0.9) -> dict[int, str]:
    return {position: reason for position, (reason, _) in refused(keys, similarity).items()}


def test_a_respelled_kernel_is_a_duplicate_whatever_its_problem() -> None:
    keys = [key(0, KERNEL, "x * 2", speedup=1.5), key(1, RESPELLED, "torch.relu(x)", speedup=1.25)]
    assert refused(keys) == {1: ("duplicate", "the same kernel as s0 (t.json #0, 1.5x), but for names and layout")}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"speedup": 1.2}, {"speedup": 1.1}),
        ({"correct": True, "speedup": 0.5}, {"correct": False, "speedup": 9.0}),
        ({"correct": True, "speedup": 0.5}, {"correct": None, "speedup": None}),
        ({"speedup": 0.0}, {"speedup": None}),
        ({"reasoning_length": 10}, {"reasoning_length": 11}),
    ],
)
def test_the_fastest_correct_one_stays_and_the_shorter_reasoning_breaks_ties(better: dict, worse: dict) -> None:
    assert reasons([key(0, **worse), key(1, **better)]) == {0: "duplicate"}
    assert reasons([key(0, **better), key(1, **worse)]) == {1: "duplicate"}


def test_what_a_trace_says_breaks_ties_before_where_it_stands() -> None:
    keys = [replace(key(0), version="b"), replace(key(1), version="a")]
    assert reasons(keys) == {0: "duplicate"}
    assert reasons([replace(keys[0], version="a"), keys[1]]) == {1: "duplicate"}


def test_a_tuned_block_size_makes_a_near_duplicate_within_a_problem() -> None:
    keys = [key(0, kernel(block=1024), speedup=2.0), key(1, kernel(block=256), speedup=1.0)]
    assert refused(keys) == {1: ("near_duplicate", "100% the same kernel as s0 (t.json #0, 2x)")}


def test_near_kernels_of_different_problems_are_two_kernels() -> None:
    sigmoid, silu = kernel("tl.sigmoid(x)"), kernel("x * tl.sigmoid(x)")
    assert reasons([key(0, sigmoid), key(1, silu)], 0.85) == {1: "near_duplicate"}
    assert reasons([key(0, sigmoid, "x.sigmoid()"), key(1, silu, "x * x.sigmoid()")], 0.85) == {}


def test_near_kernels_of_near_problems_are_duplicates_and_the_sentence_says_so() -> None:
    long = " + ".join(f"torch.sin(x * {number}.5)" for number in range(20))
    keys = [key(0, kernel(block=64), f"{long} + 1", speedup=2.0), key(1, kernel(block=128), f"{long} + 3")]
    sentence = "100% the same kernel as s0 (t.json #0, 2x), whose problem is nearly the same"
    assert keys[0].problem != keys[1].problem
    assert refused(keys) == {1: ("near_duplicate", sentence)}


def sines(*changed: int) -> str:
    """A long module; each change leaves it 90 % what it was, and two changes less."""
    return " + ".join(f"torch.sin(x * {n}.{7 if n in changed else 5})" for n in range(24))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_problems_count_as_nearly_the_same_by_themselves_and_not_through_a_third(order: tuple[int, ...]) -> None:
    middle, left, right = sines(), sines(3), sines(17)
    grams = {
        module: set(shingles(blurred(module_tokens(MODULE.format(expression=module)))).tolist())
        for module in (middle, left, right)
    }
    alike = {(a, b): len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a in grams for b in grams}
    bar = (alike[left, right] + min(alike[middle, left], alike[middle, right])) / 2
    assert alike[left, right] < bar < alike[middle, left] < 1
    far = "def triton_kernel_wrapper(x):\n    return x.far().from_any().of_the().others()\n"
    keys = [key(0, far, middle), key(1, kernel(block=64), left), key(2, kernel(block=128), right)]
    assert reasons([keys[place] for place in order], bar) == {}
    # The same three, but now the middle one's kernel is like one of the others.
    for like, other in ((1, 2), (2, 1)):
        kernels = {0: kernel(block=256), like: kernel(block=64), other: far}
        keys = [key(n, kernels[n], (middle, left, right)[n], speedup=2.0 if n == 0 else 1.0) for n in range(3)]
        assert reasons([keys[place] for place in order], bar) == {like: "near_duplicate"}


def test_a_chain_of_small_steps_does_not_make_its_ends_the_same() -> None:
    extra = [f"    e{number} = pid * {number} + {number}.5\n" for number in range(6)]
    codes = [kernel(extra="".join(extra[: 2 * step])) for step in range(3)]
    grams = [set(shingles(blurred(kernel_tokens(code))).tolist()) for code in codes]
    near = [len(a & b) / len(a | b) for a, b in itertools.pairwise(grams)]
    ends = len(grams[0] & grams[2]) / len(grams[0] | grams[2])
    bar = (max(ends, 0) + min(near)) / 2
    assert ends < bar < min(near)
    # The middle one goes with the better of its neighbours; the other end stays.
    keys = [key(step, code, speedup=3.0 - step) for step, code in enumerate(codes)]
    assert reasons(keys, bar) == {1: "near_duplicate"}
    # When the middle one is the best, both ends go.
    assert reasons([key(0, codes[0]), key(1, codes[1], speedup=9.0), key(2, codes[2])], bar) == {
        0: "near_duplicate",
        2: "near_duplicate",
    }


def variants(count: int, seed: int = 3) -> list[TraceKey]:
    """Kernels with up to seven lines more, of six problems, three of them nearly the same."""
    draw = random.Random(seed)
    long = " + ".join(f"torch.sin(x * {number}.5)" for number in range(20))
    problems = ["x + 1", "torch.relu(x)", "x.sum(dim=1)", f"{long} + 1", f"{long} + 3", f"{long} + 5"]
    keys = []
    for position in range(count):
        lines = "".join(f"    e{n} = pid * {n} + {n}.5\n" for n in range(7) if draw.random() < 0.5)
        code = kernel(block=draw.choice([64, 128]), extra=lines)
        fast = draw.choice([None, 0.5, 1.0, 2.0])
        keys.append(
            key(position, code, draw.choice(problems), draw.choice([True, True, False, None]), fast, draw.randrange(3))
        )
    return keys


def plainly(keys: list[TraceKey], similarity: float) -> Refusals:
    """Every pair compared, best first: what `find_duplicates` must agree with."""

    def grams(tokens: list[str]) -> set[int]:
        return set(shingles(blurred(tokens)).tolist())

    def alike(one: set[int], other: set[int]) -> bool:
        return len(one & other) / len(one | other) >= similarity

    code = {k.place: k for k in keys}
    staying: list[Candidate] = []
    refusals: Refusals = {}
    # Equal forms first, and then the near ones among what is left, as the steps do.
    left = []
    forms: set[str] = set()
    for candidate in Candidates(keys).best_first:
        form = "\n".join(kernel_tokens(code[candidate.place].triton_code))
        if form in forms:
            refusals[candidate.place] = ("duplicate", "")
        else:
            forms.add(form)
            left.append(candidate)
    kernels = {c.place: grams(kernel_tokens(code[c.place].triton_code)) for c in left}
    modules = {c.problem: grams(module_tokens(code[c.place].pytorch_code)) for c in left}
    for c in left:
        if any(
            alike(kernels[c.place], kernels[s.place]) and alike(modules[c.problem], modules[s.problem]) for s in staying
        ):
            refusals[c.place] = ("near_duplicate", "")
        else:
            staying.append(c)
    return refusals


@pytest.mark.parametrize("similarity", [0.8, 0.9, 0.95, 1.0])
def test_the_index_finds_what_comparing_every_pair_finds(similarity: float) -> None:
    keys = variants(120)
    found = find_duplicates(Candidates(keys), similarity)
    expected = plainly(keys, similarity)
    assert {place: reason for place, (reason, _) in found.items()} == {
        place: reason for place, (reason, _) in expected.items()
    }
    counted = [reason for reason, _ in found.values()]
    assert counted.count("duplicate") > 5 and counted.count("near_duplicate") > 1 and len(found) < 115


def test_the_order_of_the_input_changes_nothing() -> None:
    keys = variants(60)
    expected = find_duplicates(Candidates(keys), 0.9)
    for seed in range(5):
        shuffled = keys[:]
        random.Random(seed).shuffle(shuffled)
        assert find_duplicates(Candidates(shuffled), 0.9) == expected


def test_n_grams_that_do_not_fit_in_memory_are_read_back_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = variants(40)
    expected = find_duplicates(Candidates(keys), 0.9)
    monkeypatch.setattr(duplicates, "_SPILL_BYTES", 1)
    candidates = Candidates(keys)
    assert find_duplicates(candidates, 0.9) == expected and candidates.forms._file._rolled


def test_a_trace_is_a_duplicate_of_one_that_stays() -> None:
    keys = variants(120)
    for reason, detail in (found := refused(keys)).values():
        named = re.search(r" as s(\d+) ", detail)
        assert named and reason in ("duplicate", "near_duplicate")
        assert reason == "duplicate" or int(named[1]) not in found


@pytest.mark.parametrize("count", [1, 60])
def test_progress_ends_with_all_that_were_compared(count: int) -> None:
    told: list[tuple[int, int]] = []
    keys = variants(count)
    refusals = find_duplicates(Candidates(keys), 0.9, lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    exact = sum(reason == "duplicate" for reason, _ in refusals.values())
    modules = {k.problem for k in keys if refusals.get(k.place, ("",))[0] != "duplicate"}
    assert told[-1][1] == len(modules) + count - exact


def test_forms_that_are_known_already_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = variants(40)
    expected = find_duplicates(Candidates(keys), 0.9)
    known = [
        replace(
            k,
            triton_code="",
            pytorch_code="",
            kernel_form=form_of(kernel_tokens(k.triton_code)),
            module_form=form_of(module_tokens(k.pytorch_code)),
        )
        for k in keys
    ]
    monkeypatch.setattr(duplicates, "kernel_tokens", None)
    assert find_duplicates(Candidates(known), 0.9) == expected


def test_no_keys_no_duplicates() -> None:
    assert find_duplicates(Candidates([])) == {}


@pytest.mark.skipif(not REAL, reason="TRITON_SFT_REAL_TRACES names no folder of real traces")
def test_in_real_repair_conversations_only_turns_that_tune_the_block_size_are_near_duplicates() -> None:
    records = json.loads((Path(REAL or "") / "qwen3_multi_turn.json").read_text(encoding="utf-8"))
    keys = [
        TraceKey(
            (record["sample_key"], turn["turn"]),
            record["sample_key"],
            fingerprint(record["pytorch_code"]),
            record["pytorch_code"],
            turn["triton_code"],
            f"{turn['turn']}",
            turn["result"]["correctness"],
        )
        for record in records
        for turn in record["turns"]
        if turn["triton_code"]
    ]
    found = find_duplicates(Candidates(keys))
    assert {place: reason for place, (reason, _) in found.items()} == {
        ("kernelbook_1174", 2): "near_duplicate",
        ("kernelbook_1174", 3): "near_duplicate",
    }
