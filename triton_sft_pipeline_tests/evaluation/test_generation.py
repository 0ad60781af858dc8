"""Generation: what a batch must not change, where an answer ends, and that the base model is really the base."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Completion, LocalAsker, Request, generate, weights_fingerprint
from triton_sft_pipeline.evaluation.sampling import request_seed
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.stopping import StopAtTriton
from triton_sft_pipeline_tests.evaluation.models import ScriptedModel, byte_tokenizer, micro_afmoe

PROMPTS = ["relu", "a prompt that goes far beyond the sliding window of sixteen tokens " * 2, "mid " * 9, "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def afmoe(tokenizer: Any) -> Any:
    return micro_afmoe(tokenizer)


def requests(prompts: list[str], samples: int = 1, seed: int = 0) -> list[Request]:
    return [
        Request(index, sample, prompt, request_seed(seed, prompt, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_a_left_padded_greedy_batch_writes_what_one_prompt_at_a_time_writes(afmoe: Any, tokenizer: Any) -> None:
    batched = generate(afmoe, tokenizer, requests(PROMPTS), EvaluationSettings(max_new_tokens=40, batch_size=4))
    alone = generate(afmoe, tokenizer, requests(PROMPTS), EvaluationSettings(max_new_tokens=40, batch_size=1))
    assert texts(batched) == texts(alone)
    assert [c.tokens for c in batched] == [c.tokens for c in alone]
    assert len(set(texts(batched))) == len(PROMPTS)


def test_greedy_answers_are_those_of_the_librarys_own_generation(afmoe: Any, tokenizer: Any) -> None:
    import torch

    ours = generate(afmoe, tokenizer, requests(PROMPTS), EvaluationSettings(max_new_tokens=40, batch_size=4))
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        turn = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = afmoe.generate(tokens, max_new_tokens=40, do_sample=False, top_k=None, use_cache=True)
        written = tokenizer.decode(theirs[0, tokens.shape[1] :])
        assert completion.text == "<think>\n" + written.removesuffix("<|im_end|>")


def test_completions_come_back_in_the_order_of_the_requests_and_are_handed_out_as_they_end(
    afmoe: Any, tokenizer: Any
) -> None:
    settings = EvaluationSettings(max_new_tokens=4, batch_size=3, samples=2, temperature=1.0)
    seen: list[tuple[int, int]] = []
    completions = generate(
        afmoe, tokenizer, requests(PROMPTS, 2), settings, on_completion=lambda c: seen.append((c.index, c.sample))
    )
    expected = [(prompt, sample) for prompt in range(4) for sample in range(2)]
    assert [(c.index, c.sample) for c in completions] == expected
    assert sorted(seen) == expected and seen[:2] == [(1, 0), (1, 1)], "the longest prompt is asked first"


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_random_state_alone(afmoe: Any, tokenizer: Any) -> None:
    import torch

    def sampled(seed: int) -> list[str]:
        settings = EvaluationSettings(max_new_tokens=12, temperature=1.0, samples=2)
        return texts(generate(afmoe, tokenizer, requests(PROMPTS, 2, seed), settings))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampled(0)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sampled(0)
    assert first != sampled(1)
    assert first[0] != first[1], "two samples of one prompt"


def test_a_sampled_answer_depends_on_its_own_seed_and_not_on_what_shares_its_batch(afmoe: Any, tokenizer: Any) -> None:
    settings = EvaluationSettings(max_new_tokens=30, temperature=0.8, samples=3, batch_size=12)
    asked = requests(PROMPTS, 3)
    together = {(c.index, c.sample): c.text for c in generate(afmoe, tokenizer, asked, settings)}
    backwards = asked[::-1][:7]
    small = settings.model_copy(update={"batch_size": 2})
    for completion in generate(afmoe, tokenizer, backwards, small):
        assert completion.text == together[completion.index, completion.sample]


def test_the_base_model_is_the_same_model_with_its_adapter_off(tokenizer: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    settings = EvaluationSettings(max_new_tokens=24)
    model = micro_afmoe(tokenizer)
    before = texts(generate(model, tokenizer, requests(PROMPTS), settings))
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.train()
    tuned.base_model.model.lm_head.eval()

    with_adapter = texts(generate(tuned, tokenizer, requests(PROMPTS), settings))
    base = texts(generate(tuned, tokenizer, requests(PROMPTS), settings, adapter_enabled=False))
    assert base == before
    assert with_adapter != before
    assert texts(generate(tuned, tokenizer, requests(PROMPTS), settings)) == with_adapter, "the adapter is on again"
    assert tuned.training and not tuned.base_model.model.lm_head.training, "each module is in its old mode"


def test_defaults_of_the_models_own_generation_config_do_not_shape_the_answers(tokenizer: Any) -> None:
    settings = EvaluationSettings(max_new_tokens=16, temperature=0.8)
    model = micro_afmoe(tokenizer)
    before = texts(generate(model, tokenizer, requests(PROMPTS), settings))
    model.generation_config.update(top_k=1, min_p=0.9, repetition_penalty=3.0, temperature=0.1, do_sample=False)
    assert texts(generate(model, tokenizer, requests(PROMPTS), settings)) == before


def test_a_prompt_longer_than_the_model_reads_gets_an_empty_answer(tokenizer: Any) -> None:
    model = micro_afmoe(tokenizer, max_position_embeddings=64)
    long, short = generate(
        model, tokenizer, requests(["y" * 200, "x"]), EvaluationSettings(max_new_tokens=40, batch_size=1)
    )
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
        ScriptedModel(tokenizer, answers), tokenizer, requests(["alpha", "beta", "gamma"]), EvaluationSettings()
    )
    assert texts(completions) == [f"<think>\n{answer}" for answer in answers.values()]
    assert [c.stopped for c in completions] == ["stop", "eos", "stop"]
    lengths = [len(answer) for answer in answers.values()]
    assert [c.tokens for c in completions] == [lengths[0], lengths[1] + 1, lengths[2]], "the end token counts"


def test_what_follows_the_answer_is_not_generated(tokenizer: Any) -> None:
    answers = {("alpha", True): "</think><triton>1</triton> and much more", ("beta", True): "without an end"}
    model = ScriptedModel(tokenizer, answers, end=False)
    alpha, beta = generate(model, tokenizer, requests(["alpha", "beta"]), EvaluationSettings(max_new_tokens=60))
    assert (alpha.text, alpha.stopped) == ("<think>\n</think><triton>1</triton>", "stop")
    assert (beta.tokens, beta.stopped) == (60, "length")


def test_the_stop_is_found_when_its_last_token_overhangs(tokenizer: Any) -> None:
    class Pairs:
        """A tokenizer of whole pieces, one of which ends the stop in the middle of itself."""

        pieces = ("<think>", "</think>", "</tri", "ton>\n\n", "x")

        def get_vocab(self) -> dict[str, int]:
            return {piece: i for i, piece in enumerate(self.pieces)}

        def decode(self, tokens: Any) -> str:
            return "".join(self.pieces[i] for i in tokens)

    stop = StopAtTriton(Pairs(), thinking=True)
    assert stop([1, 2, 3])
    assert not stop([4, 2, 3]), "never closed its reasoning"
    assert not stop([1, 2, 4])
    assert not stop([1, 2, 3, 4]), "only the token that completes it ends a row"
    assert not stop([99]) and not stop([])


def test_a_model_that_does_not_reason_ends_at_its_kernel_too() -> None:
    tokenizer = byte_tokenizer(template="{{ messages[0].content }}{% if add_generation_prompt %}: {% endif %}")
    answers = {
        ("alpha", True): "<triton>1</triton> and more",
        ("beta", True): "<think>a </triton> draft</think><triton>2</triton> and more",
    }
    model = ScriptedModel(tokenizer, answers)
    alpha, beta = generate(model, tokenizer, requests(["alpha", "beta"]), EvaluationSettings())
    assert (alpha.text, alpha.stopped) == ("<triton>1</triton>", "stop")
    assert (beta.text, beta.stopped) == ("<think>a </triton> draft</think><triton>2</triton>", "stop")


def test_a_tokenizer_without_a_chat_template_is_refused(afmoe: Any) -> None:
    with pytest.raises(PipelineError, match="no chat template"):
        generate(afmoe, byte_tokenizer(template=None), requests(["x"]), EvaluationSettings())


def test_a_row_that_has_ended_leaves_the_batch_and_is_handed_out_at_once(tokenizer: Any) -> None:
    answers = {("alpha", True): "1" * 30, ("beta", True): "1" * 10, ("gamma", True): "1" * 20}
    model = ScriptedModel(tokenizer, answers)
    handed: list[tuple[int, int]] = []
    completions = generate(
        model,
        tokenizer,
        requests(["alpha", "beta", "gamma"]),
        EvaluationSettings(),
        on_completion=lambda c: handed.append((c.index, len(model.widths))),
    )
    assert handed == [(1, 11), (2, 21), (0, 31)]
    assert model.widths == [3] * 11 + [2] * 10 + [1] * 10
    assert all(c.seconds > 0 for c in completions)


def test_after_each_token_it_is_told_how_many_every_unfinished_answer_has(tokenizer: Any) -> None:
    model = ScriptedModel(tokenizer, {("alpha", True): "1" * 3, ("beta", True): "1"})
    told: list[tuple[str, Any]] = []
    generate(
        model,
        tokenizer,
        requests(["alpha", "beta"]),
        EvaluationSettings(),
        on_completion=lambda c: told.append(("done", c.tokens)),
        on_tokens=lambda tokens: told.append(("running", list(tokens))),
    )
    assert told == [
        ("running", [1, 1]),
        *(("running", [2]), ("done", 2)),  # one that is done is no longer told of
        ("running", [3]),
        *(("running", []), ("done", 4)),
    ]


class Crowded(ScriptedModel):
    """Has memory for so many rows, and for long answers of fewer."""

    def __init__(self, *arguments: Any, fits: int, long: int) -> None:
        super().__init__(*arguments)
        self.fits, self.long = fits, long

    def forward(self, input_ids: Any, past_key_values: Any, **inputs: Any) -> Any:
        import torch

        rows, step = input_ids.shape[0], past_key_values.step if past_key_values else 0
        if rows > self.fits or (step > 20 and rows > self.long):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **inputs)


def test_a_batch_that_does_not_fit_is_halved_and_what_has_ended_is_not_asked_again(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [f"p{i}" for i in range(8)]
    answers = {(p, True): f"{p} " + "1" * (30 if i % 2 else 5) for i, p in enumerate(prompts)}
    plain = generate(ScriptedModel(tokenizer, answers), tokenizer, requests(prompts), EvaluationSettings(batch_size=8))
    model = Crowded(tokenizer, answers, fits=4, long=1)
    handed: list[int] = []
    sizes: list[int] = []
    with caplog.at_level(logging.WARNING):
        found = generate(
            model,
            tokenizer,
            requests(prompts),
            EvaluationSettings(batch_size=8),
            on_completion=lambda c: handed.append(c.index),
            on_smaller=sizes.append,
        )
    assert texts(found) == texts(plain) and [c.tokens for c in found] == [c.tokens for c in plain]
    assert sorted(handed) == list(range(8)), "each once"
    assert sizes == [4, 2, 1] and len(caplog.records) == 3
    assert "A batch of 8 answers does not fit into the GPU's memory: going on with 4 at a time." in caplog.text


def test_the_tuned_model_is_asked_with_the_batch_size_that_fitted_the_base(tokenizer: Any) -> None:
    answers = {(p, adapter): "1" * 5 for p in ("p0", "p1", "p2", "p3") for adapter in (True, False)}
    model = Crowded(tokenizer, answers, fits=2, long=2)
    asker = LocalAsker(model, tokenizer, EvaluationSettings(batch_size=4), has_adapter=True)
    for name in asker.models:
        asker.ask(name, requests(["p0", "p1", "p2", "p3"]), lambda completion: None)
    assert model.asked == [(2, False), (2, False), (2, True), (2, True)]
    assert asker.facts()["batch_size"] == 2


def test_one_answer_that_does_not_fit_says_what_to_lower_and_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = Crowded(tokenizer, {}, fits=0, long=0)
    with pytest.raises(StepError, match=r"one answer at a time: its prompt has \d+ tokens, .*max_new_tokens is 2048"):
        generate(model, tokenizer, requests(["x"]), EvaluationSettings(batch_size=3), adapter_enabled=False)
    assert model.training and model.adapter


def test_text_appears_piece_by_piece_and_adds_up_to_the_answer(tokenizer: Any) -> None:
    answers = {("alpha", True): "é über\n</think>\n<triton>\n\u6f22 = '\U0001f600'\n</triton>"}
    pieces: list[str] = []
    [completion] = generate(
        ScriptedModel(tokenizer, answers), tokenizer, requests(["alpha"]), EvaluationSettings(), on_text=pieces.append
    )
    assert "".join(pieces) == completion.text and pieces[0] == "<think>\n"
    assert len(pieces) > 30 and not any("\ufffd" in piece for piece in pieces)
    with pytest.raises(PipelineError, match="one answer at a time, not for 2"):
        generate(
            ScriptedModel(tokenizer, answers),
            tokenizer,
            requests(["alpha"], 2),
            EvaluationSettings(),
            on_text=pieces.append,
        )


def test_half_a_character_at_the_end_of_an_answer_is_shown_as_the_answer_has_it(tokenizer: Any) -> None:
    pieces: list[str] = []
    [completion] = generate(
        ScriptedModel(tokenizer, {("alpha", True): "abc\U0001f600"}, end=False),
        tokenizer,
        requests(["alpha"]),
        EvaluationSettings(max_new_tokens=5),
        on_text=pieces.append,
    )
    assert completion.text.startswith("<think>\nabc\ufffd") and "".join(pieces) == completion.text


def test_a_model_is_known_again_by_its_weights_and_every_value_of_its_adapter(tokenizer: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = micro_afmoe(tokenizer)
    before = weights_fingerprint(model)
    assert weights_fingerprint(micro_afmoe(tokenizer)) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert weights_fingerprint(model) != before
    tuned = get_peft_model(model, LoraConfig(r=64, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = weights_fingerprint(tuned)
    last = [parameter for name, parameter in tuned.named_parameters() if "lora_A" in name][-1]
    with torch.no_grad():
        last[-1, -1] += 1
    assert last.numel() > 1024 and weights_fingerprint(tuned) != before


def test_several_samples_are_sampled_unless_a_temperature_is_given() -> None:
    assert EvaluationSettings().resolved_temperature == 0.0 and EvaluationSettings().greedy
    assert EvaluationSettings(samples=8).resolved_temperature == 0.7
    assert EvaluationSettings(samples=8, temperature=0.2).resolved_temperature == 0.2
    assert EvaluationSettings(samples=8).model_copy(update={"samples": 1}).greedy
    with pytest.raises(ValueError, match="several samples at temperature 0 are all the same answer"):
        EvaluationSettings(samples=2, temperature=0.0)
