"""What is drawn is the text to the letter, and the mask lies under the right tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.chat.show import marked, painted, runs, token_lines
from triton_sft_pipeline_tests.evaluation.models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


TOKENIZER = byte_tokenizer()


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.booleans()), max_size=8))
def test_stretches_join_to_the_whole_text(parts: list[tuple[str, bool]]) -> None:
    encoded = [(TOKENIZER(text, add_special_tokens=False)["input_ids"], on) for text, on in parts]
    ids = [i for tokens, _ in encoded for i in tokens]
    mask = [on for tokens, on in encoded for _ in tokens]
    stretches = runs(ids, mask, TOKENIZER)
    assert "".join(text for text, _ in stretches) == "".join(text for text, _ in parts)
    assert all(one[1] != after[1] for one, after in pairwise(stretches))
    assert marked(stretches).replace("{+", "").replace("+}", "") == "".join(t for t, _ in parts).replace(
        "{+", ""
    ).replace("+}", "")


def test_special_tokens_are_shown(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>a", add_special_tokens=False)["input_ids"]
    assert marked(runs(ids, [False, True], tokenizer)) == "<|im_start|>{+a+}"


def test_colour_begins_anew_on_every_line_and_empty_lines_have_none() -> None:
    assert painted([("a\n\nb", True), ("c\n", False)], lambda t, on: f"<{t}>" if on else f"[{t}]") == "<a>\n\n<b>[c]\n"


def test_a_token_that_is_part_of_a_character_is_shown_as_the_tokenizer_spells_it(tokenizer: Any) -> None:
    ids = tokenizer("é x\n", add_special_tokens=False)["input_ids"]
    mask = [True, True, False, True, False]
    assert token_lines(ids, mask, tokenizer) == [
        "|\u00c3|\u00a9|\u00b7|x|\u23ce|",
        "|^|^|.|^|.|",
    ]


def test_lines_break_between_tokens_and_above_and_below_stay_in_step(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>" * 3 + "ab", add_special_tokens=False)["input_ids"]
    lines = token_lines(ids, [False, False, False, True, True], tokenizer, width=30)
    assert lines == [
        "|<|im_start|>|<|im_start|>|",
        "|............|............|",
        "|<|im_start|>|a|b|",
        "|............|^|^|",
    ]
    assert token_lines(ids[:1], [True], tokenizer, width=5) == ["|<|im_start|>|", "|^^^^^^^^^^^^|"]
