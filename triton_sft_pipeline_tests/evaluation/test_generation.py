"""Generation: what a batch must not change, where an answer ends, and that the base model is really the base."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Completion, StopAtTriton, generate
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline_tests.evaluation.models import ScriptedModel, byte_tokenizer, micro_afmoe

PROMPTS = ["relu", "a prompt that goes far beyond the sliding window of sixteen tokens " * 2, "mid " * 9, "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def afmoe(tokenizer: Any) -> Any:
    return micro_afmoe(tokenizer)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_a_left_padded_greedy_batch_writes_what_one_prompt_at_a_time_writes(afmoe: Any, tokenizer: Any) -> None:
    batched = generate(afmoe, tokenizer, PROMPTS, EvaluationSettings(max_new_tokens=40, batch_size=4))
    alone = [
        generate(afmoe, tokenizer, [prompt], EvaluationSettings(max_new_tokens=40, batch_size=1))[0]
        for prompt in PROMPTS
    ]
    assert texts(batched) == texts(alone)
    assert [c.tokens for c in batched] == [c.tokens for c in alone]
    assert len(set(texts(batched))) == len(PROMPTS)


def test_completions_come_back_in_the_order_of_the_prompts_with_every_sample(afmoe: Any, tokenizer: Any) -> None:
    settings = EvaluationSettings(max_new_tokens=4, batch_size=3, samples=2, temperature=1.0)
    seen: list[tuple[int, int]] = []
    steps: list[tuple[int, int]] = []
    completions = generate(
        afmoe,
        tokenizer,
        PROMPTS,
        settings,
        on_completion=lambda c: seen.append((c.index, c.sample)),
        progress=lambda done, total: steps.append((done, total)),
    )
    expected = [(prompt, sample) for prompt in range(4) for sample in range(2)]
    assert [(c.index, c.sample) for c in completions] == expected
    assert sorted(seen) == expected and seen[0] == (1, 0), "the longest prompt is asked first"
    assert steps == [(3, 8), (6, 8), (8, 8)]


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_random_state_alone(afmoe: Any, tokenizer: Any) -> None:
    import torch

    def sampled(seed: int) -> list[str]:
        settings = EvaluationSettings(max_new_tokens=12, temperature=1.0, seed=seed, samples=2)
        return texts(generate(afmoe, tokenizer, PROMPTS, settings))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampled(0)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sampled(0)
    assert first != sampled(1)
    assert first[0] != first[1], "two samples of one prompt"


def test_the_base_model_is_the_same_model_with_its_adapter_off(tokenizer: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    settings = EvaluationSettings(max_new_tokens=24)
    model = micro_afmoe(tokenizer)
    before = texts(generate(model, tokenizer, PROMPTS, settings))
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.train()
    tuned.base_model.model.lm_head.eval()

    with_adapter = texts(generate(tuned, tokenizer, PROMPTS, settings))
    base = texts(generate(tuned, tokenizer, PROMPTS, settings, adapter_enabled=False))
    assert base == before
    assert with_adapter != before
    assert texts(generate(tuned, tokenizer, PROMPTS, settings)) == with_adapter, "the adapter is on again"
    assert tuned.training and not tuned.base_model.model.lm_head.training, "each module is in its old mode"


def test_defaults_of_the_models_own_generation_config_do_not_shape_the_answers(tokenizer: Any) -> None:
    settings = EvaluationSettings(max_new_tokens=16, temperature=0.8)
    model = micro_afmoe(tokenizer)
    before = texts(generate(model, tokenizer, PROMPTS, settings))
    model.generation_config.update(top_k=1, min_p=0.9, repetition_penalty=3.0, temperature=0.1, do_sample=False)
    assert texts(generate(model, tokenizer, PROMPTS, settings)) == before


def test_a_prompt_longer_than_the_model_reads_gets_an_empty_answer(tokenizer: Any) -> None:
    model = micro_afmoe(tokenizer, max_position_embeddings=64)
    long, short = generate(model, tokenizer, ["y" * 200, "x"], EvaluationSettings(max_new_tokens=40, batch_size=1))
    assert (long.text, long.tokens, long.stopped) == ("<think>\n", 0, "length")
    assert short.prompt_tokens + short.tokens <= 64
    assert short.tokens > 0


def test_each_row_ends_where_it_has_answered(tokenizer: Any) -> None:
    answers = {
        ("alpha", True): "easy\n</think>\n\n<triton>\npass\n</triton>",
        ("beta", True): "hard",
        ("gamma", True): "a <triton> draft </triton> is no answer\n</think>\n<triton>\nx = 1\n</triton>",
    }
    completions = generate(
        ScriptedModel(tokenizer, answers), tokenizer, ["alpha", "beta", "gamma"], EvaluationSettings()
    )
    assert texts(completions) == [f"<think>\n{answer}" for answer in answers.values()]
    assert [c.stopped for c in completions] == ["stop", "eos", "stop"]
    lengths = [len(answer) for answer in answers.values()]
    assert [c.tokens for c in completions] == [lengths[0], lengths[1] + 1, lengths[2]], "the end token counts"


def test_what_follows_the_answer_is_not_generated(tokenizer: Any) -> None:
    answers = {("alpha", True): "</think><triton>1</triton> and much more", ("beta", True): "without an end"}
    model = ScriptedModel(tokenizer, answers, end=False)
    alpha, beta = generate(model, tokenizer, ["alpha", "beta"], EvaluationSettings(max_new_tokens=60))
    assert (alpha.text, alpha.stopped) == ("<think>\n</think><triton>1</triton>", "stop")
    assert (beta.tokens, beta.stopped) == (60, "length")


def test_the_stop_is_found_when_its_last_token_overhangs(tokenizer: Any) -> None:
    import torch

    class Pairs:
        """A tokenizer of whole pieces, one of which ends the stop in the middle of itself."""

        pieces = ("<think>", "</think>", "</tri", "ton>\n\n", "x")

        def get_vocab(self) -> dict[str, int]:
            return {piece: i for i, piece in enumerate(self.pieces)}

        def decode(self, tokens: Any) -> str:
            return "".join(self.pieces[i] for i in tokens)

    stop = StopAtTriton(Pairs(), prompt_length=1, thinking=True)
    rows = torch.tensor([[4, 1, 2, 3], [4, 4, 2, 3], [4, 1, 2, 4]])
    assert stop(rows).tolist() == [True, False, False], "the second row never closed its reasoning"
    assert stop(torch.cat([rows, torch.tensor([[99], [4], [99]])], dim=1)).tolist() == [True, False, False]
    assert stop.ends == {0: 3}


def test_a_model_that_does_not_reason_ends_at_its_kernel_too() -> None:
    tokenizer = byte_tokenizer(template="{{ messages[0].content }}{% if add_generation_prompt %}: {% endif %}")
    answers = {
        ("alpha", True): "<triton>1</triton> and more",
        ("beta", True): "<think>a </triton> draft</think><triton>2</triton> and more",
    }
    model = ScriptedModel(tokenizer, answers)
    alpha, beta = generate(model, tokenizer, ["alpha", "beta"], EvaluationSettings())
    assert (alpha.text, alpha.stopped) == ("<triton>1</triton>", "stop")
    assert (beta.text, beta.stopped) == ("<think>a </triton> draft</think><triton>2</triton>", "stop")


def test_a_tokenizer_without_a_chat_template_is_refused(afmoe: Any) -> None:
    with pytest.raises(PipelineError, match="no chat template"):
        generate(afmoe, byte_tokenizer(template=None), ["x"], EvaluationSettings())


def test_a_batch_that_does_not_fit_says_what_to_lower_and_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    import torch

    class TooLarge(ScriptedModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model = TooLarge(tokenizer, {})
    with pytest.raises(StepError, match=r"evaluation\.batch_size 3 .*: lower one of them"):
        generate(model, tokenizer, ["x"], EvaluationSettings(batch_size=3), adapter_enabled=False)
    assert model.training and model.adapter
