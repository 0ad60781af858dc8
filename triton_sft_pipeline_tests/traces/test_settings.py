"""What the filter may be told, and that what it is told is described."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from triton_sft_pipeline.traces.settings import FilterSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_speedup": -0.1},
        {"min_speedup": float("nan")},
        {"min_traces": 0},
        {"min_share_kept": 1.5},
        {"duplicate_similarity": 0},
        {"duplicate_similarity": 1.1},
        {"contamination": 0},
        {"contamination": 80},
        {"max_per_problem": 0},
        {"typo": 1},
    ],
)
def test_settings_out_of_range_or_unknown_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FilterSettings(**wrong)


def test_settings_cannot_be_changed_behind_the_filters_back() -> None:
    with pytest.raises(ValidationError):
        FilterSettings().require_fast_1 = True  # type: ignore[misc]


def test_the_label_filters_are_as_strict_as_those_of_the_original() -> None:
    settings = FilterSettings()
    assert settings.require_correctness and settings.require_fast_0
    assert not settings.require_fast_1 and not settings.require_fast_2 and settings.min_speedup is None


def test_what_costs_traces_beyond_their_faults_is_off_unless_asked_for() -> None:
    settings = FilterSettings()
    assert not settings.ignore_launch_bound and not settings.prefer_shorter and settings.max_per_problem is None


@pytest.mark.parametrize("name", FilterSettings.model_fields)
def test_every_setting_says_what_it_does(name: str) -> None:
    description = FilterSettings.model_fields[name].description
    assert description and description.endswith(".")
