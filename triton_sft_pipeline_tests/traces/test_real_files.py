"""The funnel of real trace files, to the record. They are not part of the project: TRITON_SFT_REAL_TRACES names the
folder that they lie in.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.config import held_out_problems, load_config
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces import Filtered, filter_location

REAL = Path(os.environ.get("TRITON_SFT_REAL_TRACES", "."))
SINGLE, REPAIRS, CUT_OFF = (
    "gpt_oss_120b_single_turn.json",
    "qwen3_multi_turn.json",
    "glm45_multi_turn_truncated.json",
)

pytestmark = pytest.mark.skipif(
    "TRITON_SFT_REAL_TRACES" not in os.environ, reason="TRITON_SFT_REAL_TRACES names no folder of real traces"
)


def funnel_of(location: Path, **changes: Any) -> Filtered:
    """What `triton-sft filter` makes of it, by default or with changed settings."""
    config = load_config(overrides={f"filter.{name}": value for name, value in changes.items()}, environ={})
    return filter_location(location, config.filter, held_out_problems(config))


@pytest.fixture(scope="module")
def everything() -> Filtered:
    return funnel_of(REAL)


def test_of_all_three_files_every_record_is_accounted_for(everything: Filtered) -> None:
    assert everything.funnel["read"] == everything.accounted == 214
    assert everything.funnel["kept"] == 102
    assert everything.funnel["quarantined"] == {}
    assert everything.funnel["dropped"] == {
        "no_kernel": 105,
        "contradictory_label": 2,
        "no_reasoning": 2,
        "unreadable_answer": 2,
        "torch_fallback": 1,
    }


def test_every_place_of_every_file_is_kept_or_dropped_once(everything: Filtered) -> None:
    traces = [*everything.kept, *(dropped.trace for dropped in everything.dropped)]
    assert Counter((Path(t.file).name, t.position) for t in traces) == Counter(
        (name, position) for name, count in ((SINGLE, 100), (REPAIRS, 9), (CUT_OFF, 105)) for position in range(count)
    )


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        (SINGLE, 96, {"contradictory_label": 2, "unreadable_answer": 2}),
        (REPAIRS, 6, {"no_reasoning": 2, "torch_fallback": 1}),
        (CUT_OFF, 0, {"no_kernel": 105}),
    ],
)
def test_each_file_alone_gives_the_same_as_among_the_others(
    name: str, kept: int, dropped: dict[str, int], everything: Filtered
) -> None:
    found = funnel_of(REAL / name)
    assert (found.kept_count, found.funnel["dropped"]) == (kept, dropped)
    assert {t.version for t in found.kept} == {t.version for t in everything.kept if Path(t.file).name == name}


def test_each_dropped_record_says_why(everything: Filtered) -> None:
    said = {
        (Path(d.trace.file).name, d.trace.position, d.trace.sample_key): (d.reason, d.detail)
        for d in everything.dropped
        if d.reason != "no_kernel"
    }
    no_reasoning = "no model_reasoning, reasoning or thinking, and none in full_completion"
    unreadable = "the reasoning holds </think>, where a reader takes it to end"
    assert said == {
        (SINGLE, 4, "kernelbook_735"): (
            "contradictory_label",
            "labelled correct, with an error: TypeError: triton_kernel_wrapper() missing 1 required positional "
            "argument: 'scale'",
        ),
        (SINGLE, 20, "kernelbook_1386"): (
            "contradictory_label",
            "labelled correct, with an error: AttributeError: 'int' object has no attribute 'data'",
        ),
        (SINGLE, 42, "kernelbook_1174"): ("unreadable_answer", unreadable),
        (SINGLE, 78, "kernelbook_146"): ("unreadable_answer", unreadable),
        (REPAIRS, 1, "kernelbook_1174"): ("no_reasoning", no_reasoning),
        (REPAIRS, 2, "kernelbench_80"): (
            "torch_fallback",
            "torch.nn.functional.linear does the module's matrix product",
        ),
        (REPAIRS, 8, "kernelbench_9"): ("no_reasoning", no_reasoning),
    }
    failed = [d for d in everything.dropped if d.reason == "no_kernel"]
    assert {(Path(d.trace.file).name, d.detail) for d in failed} == {(CUT_OFF, "there is no code: Generation failed")}


def test_the_file_that_breaks_off_says_where_and_strict_refuses_it(everything: Filtered) -> None:
    (found,) = everything.breaks
    assert (Path(found.file).name, found.byte, found.position) == (CUT_OFF, 1_279_643, 105)
    # From there on there is nothing but the beginning of one more record.
    rest = (REAL / CUT_OFF).read_bytes()[found.byte :]
    assert rest.startswith(b"{") and rest.count(b'"sample_key"') == 1
    with pytest.raises(PipelineError, match=r"breaks off at byte 1,279,643, in record 105"):
        funnel_of(REAL / CUT_OFF, strict=True)


def test_code_and_reasoning_are_found_where_they_are(everything: Filtered) -> None:
    assert Counter((t.kernel_field, t.reasoning_field) for t in everything.kept) == {
        ("triton_code", "model_reasoning"): 56,
        ("triton_code", "thinking"): 40,
        ("turn 2", "full_completion prose"): 4,
        ("turn 3", "full_completion prose"): 2,
    }


def test_a_conversation_is_remembered_for_its_best_turn_not_its_last(everything: Filtered) -> None:
    kept = {t.sample_key: t for t in everything.kept if t.num_turns}
    assert {key: (t.turn, t.num_turns) for key, t in kept.items()} == {
        "kernelbook_242": (2, 2),
        "kernelbook_485": (3, 3),
        "kernelbook_558": (2, 4),
        "kernelbook_632": (3, 4),
        "kernelbook_899": (2, 2),
        "kernelbook_1491": (2, 4),
    }
    for record in json.loads((REAL / REPAIRS).read_text("utf-8")):
        if record["sample_key"] in kept:
            best = max(turn["result"]["speedup"] for turn in record["turns"] if turn["result"]["correctness"])
            assert kept[record["sample_key"]].speedup == best


@pytest.mark.parametrize(
    ("changes", "kept", "dropped"),
    [
        ({"require_fast_1": True}, 48, {"fast_1": 59}),
        ({"require_fast_1": True, "ignore_launch_bound": True}, 47, {"fast_1": 59, "launch_bound_speed": 1}),
        ({"max_per_problem": 1}, 74, {"max_per_problem": 28}),
        ({"prefer_shorter": True}, 94, {"longer_reasoning": 8}),
        ({"prose_is_reasoning": False}, 96, {"no_reasoning": 8}),
        ({"duplicate_similarity": 0.7}, 101, {"near_duplicate": 1}),
    ],
)
def test_what_the_other_settings_make_of_them(changes: dict[str, Any], kept: int, dropped: dict[str, int]) -> None:
    found = funnel_of(REAL, **changes)
    assert found.accounted == found.read == 214
    assert found.kept_count == kept
    assert {reason: found.funnel["dropped"].get(reason) for reason in dropped} == dropped
