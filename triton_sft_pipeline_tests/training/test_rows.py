"""Rows of the chat dataset's files, as the trainer reads them: either form."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.chat.dataset import write_dataset
from triton_sft_pipeline.chat.settings import Form
from triton_sft_pipeline.training.run import read_rows
from triton_sft_pipeline_tests.chat.examples import built, trace


@pytest.mark.parametrize(
    ("form", "columns"), [("prompt_completion", ["prompt", "completion"]), ("messages", ["messages"])]
)
def test_rows_of_either_form_are_read_with_what_is_learned_and_a_name(
    tmp_path: Path, form: Form, columns: list[str]
) -> None:
    dataset = built([trace(n) for n in range(4)])
    write_dataset(dataset, tmp_path, form)
    rows = read_rows(tmp_path, "train")
    assert [list(row) for row in rows] == [[*columns, "sample_key"]] * 3
    said = [message for column in columns for message in rows[0][column]]
    assert said == dataset.split("train")[0].messages
