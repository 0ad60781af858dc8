"""`docs/traces.md` names every reason and every setting, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import triton_sft_pipeline
from triton_sft_pipeline.traces.decontamination import HELD_OUT
from triton_sft_pipeline.traces.duplicates import EXACT, NEAR
from triton_sft_pipeline.traces.filters import label_steps, quality_steps
from triton_sft_pipeline.traces.selection import LONGER, TOO_MANY
from triton_sft_pipeline.traces.settings import FilterSettings

DOCUMENT = Path(triton_sft_pipeline.__file__).parents[1] / "docs" / "traces.md"
ROW = re.compile(r"\| `(\w+)` \| [^|]* \| `(\w+)`, (\S+) \|")


def rows() -> dict[str, tuple[str, str]]:
    """Reason -> (setting, default) of the steps' tables."""
    return {reason: (setting, default) for reason, setting, default in ROW.findall(DOCUMENT.read_text("utf-8"))}


def test_every_step_of_the_filter_is_documented_and_no_other() -> None:
    everything = FilterSettings(require_fast_1=True, require_fast_2=True, min_speedup=1, ignore_launch_bound=True)
    steps = [reason for reason, _ in (*label_steps(everything), *quality_steps(everything))]
    # Without a setting: a trace without a result has no label that a setting could speak of.
    steps.remove("no_result")
    assert list(rows()) == [*steps, HELD_OUT, EXACT, NEAR, LONGER, TOO_MANY]


def test_the_documented_defaults_are_those_of_the_settings() -> None:
    said = {True: "on", False: "off", None: "none"}
    for setting, default in rows().values():
        value = getattr(FilterSettings(), setting)
        assert default == said.get(value, str(value)), setting


def test_every_setting_of_the_filter_is_documented() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert [name for name in FilterSettings.model_fields if f"`{name}`" not in text] == []
