"""The exact training text, token by token, with the loss mask drawn under it.

Trinity's own tokenizer and template are not at hand. These are the tiny base's, whose template does what Trinity's is
known to: an answer is asked for with `<|im_start|>assistant` and an open `<think>`, and every answer but the last loses
its reasoning. So what is shown here is the text of that semantics, not of Trinity's own template file.
"""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.chat.conversation import Messages
from triton_sft_pipeline.chat.show import marked, runs, token_lines
from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter
from triton_sft_pipeline.config import data_dir
from triton_sft_pipeline.training.samples import IGNORED, Sample, tokenize_rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(data_dir() / "tiny_base"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(reasoning: str, kernel: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n<triton>\n{kernel}\n</triton>"}


SINGLE = [user("Convert x + 1."), answer("Add one.", "y = x + 1")]
REPAIR = [
    user("Convert x + 1."),
    answer("Add.", "y = x"),
    user("Wrong. Fix it."),
    answer("One is missing.", "y = x + 1"),
]


def samples(tokenizer: Any, messages: Messages) -> list[Sample]:
    return tokenize_rows([{"messages": messages, "sample_key": "row"}], tokenizer, None, "train")


def mask(sample: Sample) -> list[bool]:
    return [label != IGNORED for label in sample.labels]


def drawn(tokenizer: Any, sample: Sample) -> str:
    return "\n".join(token_lines(sample.input_ids, mask(sample), tokenizer))


def text(tokenizer: Any, sample: Sample) -> str:
    return marked(runs(sample.input_ids, mask(sample), tokenizer))


DRAWN_SINGLE = """\
|<|begin_of_text|>|<|im_start|>|u|s|er|⏎|Convert|·x|·+|·1|.|<|im_end|>|⏎|
|.................|............|.|.|..|.|.......|..|..|..|.|..........|.|
|<|im_start|>|as|s|i|st|an|t|⏎|<think>|⏎|A|d|d|·one|.|⏎|</think>|⏎|⏎|<|triton|>|
|............|..|.|.|..|..|.|.|.......|.|^|^|^|^^^^|^|^|^^^^^^^^|^|^|^|^^^^^^|^|
|⏎|y|·=|·x|·+|·1|⏎|</|triton|>|<|im_end|>|⏎|
|^|^|^^|^^|^^|^^|^|^^|^^^^^^|^|^^^^^^^^^^|^|
"""


def test_a_single_turn_to_the_letter_and_the_token(tokenizer: Any) -> None:
    [sample] = samples(tokenizer, SINGLE)
    assert text(tokenizer, sample) == (
        "<|begin_of_text|><|im_start|>user\nConvert x + 1.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "{+Add one.\n</think>\n\n<triton>\ny = x + 1\n</triton><|im_end|>\n+}"
    )
    assert drawn(tokenizer, sample) + "\n" == DRAWN_SINGLE
    assert [t for t, on in zip(sample.input_ids, mask(sample), strict=True) if on] == [
        label for label in sample.labels if label != IGNORED
    ]


def test_prompt_and_completion_give_the_same_as_messages(tokenizer: Any) -> None:
    row = {"prompt": SINGLE[:1], "completion": SINGLE[1:], "sample_key": "row"}
    assert tokenize_rows([row], tokenizer, None, "train") == samples(tokenizer, SINGLE)


DRAWN_REPAIR = """\
|<|begin_of_text|>|<|im_start|>|u|s|er|⏎|Convert|·x|·+|·1|.|<|im_end|>|⏎|
|.................|............|.|.|..|.|.......|..|..|..|.|..........|.|
|<|im_start|>|as|s|i|st|an|t|⏎|<|triton|>|⏎|y|·=|·x|⏎|</|triton|>|<|im_end|>|⏎|
|............|..|.|.|..|..|.|.|.|......|.|.|.|..|..|.|..|......|.|..........|.|
|<|im_start|>|u|s|er|⏎|W|r|on|g|.|·|F|i|x|·it|.|<|im_end|>|⏎|<|im_start|>|as|s|
|............|.|.|..|.|.|.|..|.|.|.|.|.|.|...|.|..........|.|............|..|.|
|i|st|an|t|⏎|<think>|⏎|One|·is|·|m|i|ss|ing|.|⏎|</think>|⏎|⏎|<|triton|>|⏎|y|·=|
|.|..|..|.|.|.......|.|^^^|^^^|^|^|^|^^|^^^|^|^|^^^^^^^^|^|^|^|^^^^^^|^|^|^|^^|
|·x|·+|·1|⏎|</|triton|>|<|im_end|>|⏎|
|^^|^^|^^|^|^^|^^^^^^|^|^^^^^^^^^^|^|
"""


def test_a_repair_conversation_is_learned_answer_by_answer_each_as_it_was_asked_for(tokenizer: Any) -> None:
    first, last = samples(tokenizer, REPAIR)
    assert [first.key, last.key] == ["row/answer_1", "row"]
    assert text(tokenizer, first) == (
        "<|begin_of_text|><|im_start|>user\nConvert x + 1.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "{+Add.\n</think>\n\n<triton>\ny = x\n</triton><|im_end|>\n+}"
    )
    # Asked a second time, the model never sees what it thought the first time.
    assert text(tokenizer, last) == (
        "<|begin_of_text|><|im_start|>user\nConvert x + 1.<|im_end|>\n<|im_start|>assistant\n"
        "<triton>\ny = x\n</triton><|im_end|>\n"
        "<|im_start|>user\nWrong. Fix it.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "{+One is missing.\n</think>\n\n<triton>\ny = x + 1\n</triton><|im_end|>\n+}"
    )
    assert drawn(tokenizer, last) + "\n" == DRAWN_REPAIR


def test_a_template_that_only_appends_gives_one_sample_with_every_answer_learned(tokenizer: Any) -> None:
    import copy

    keeping = copy.deepcopy(tokenizer)
    keeping.chat_template = tokenizer.chat_template.replace("not loop.last and ", "false and ")
    [whole] = samples(keeping, REPAIR)
    assert whole.key == "row"
    assert text(keeping, whole) == (
        "<|begin_of_text|><|im_start|>user\nConvert x + 1.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "{+Add.\n</think>\n\n<triton>\ny = x\n</triton><|im_end|>\n+}"
        "<|im_start|>user\nWrong. Fix it.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "{+One is missing.\n</think>\n\n<triton>\ny = x + 1\n</triton><|im_end|>\n+}"
    )


def test_an_early_answer_without_a_reasoning_is_read_and_not_learned(tokenizer: Any) -> None:
    bare = {"role": "assistant", "content": "<triton>\ny = x\n</triton>"}
    [only] = samples(tokenizer, [REPAIR[0], bare, *REPAIR[2:]])
    assert text(tokenizer, only) == text(tokenizer, samples(tokenizer, REPAIR)[1])


def test_tokens_are_counted_as_the_trainer_sees_them(tokenizer: Any) -> None:
    from triton_sft_pipeline.chat.dataset import build_dataset
    from triton_sft_pipeline_tests.chat.conversations import repaired

    early = "<think>\nA long thought about x.\n</think>\n\n<triton>\ny = x\n</triton>"
    traces = [
        repaired(early * 20, early, "last", number=0),
        repaired("<triton>\ny = x\n</triton>", early, "last", number=1),
        repaired("last", number=2),
    ]
    rules = {"max_tokens": 10_000, "test_size": 0.0, "over_budget": "drop", "multi_turn": True}
    made = build_dataset(traces, token_counter(tokenizer), **rules)  # type: ignore[arg-type]
    assert [len(samples(tokenizer, e.messages)) for e in made.examples] == [3, 2, 1]
    for example in made.examples:
        found = samples(tokenizer, example.messages)
        assert example.tokens == max(len(s.input_ids) for s in found)
        assert example.completion_tokens == sum(sum(mask(s)) for s in found)
        assert example.prompt_tokens == mask(found[-1]).index(True)
