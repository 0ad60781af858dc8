"""Asking a server: a real `transformers serve` with the shipped base model, and what other servers do by their own
documentation, from a small one that fails on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.chat.prompt import user_message
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Completion, Request, generate
from triton_sft_pipeline.evaluation.server import ServerAsker
from triton_sft_pipeline.evaluation.server_survey import api_address, shown_address
from triton_sft_pipeline.evaluation.server_text import StreamedAnswer
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline_tests.evaluation.servers import (
    TINY_BASE,
    RealServer,
    ScriptedServer,
    chunk,
    free_port,
    real_server,
    said,
    scripted,
)

__all__ = ["real_server"]

CODES = ["def forward(self, x):\n    return torch.relu(x)", "def forward(self, a, b):\n    return a @ b", "x = 1"]
REQUESTS = [Request(i, 0, user_message(code), seed=i + (1 << 55)) for i, code in enumerate(CODES)]
KERNEL = "<triton>\ndef f(): pass\n</triton>"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def ask(asker: ServerAsker, requests: list[Request], model: str = "base") -> list[Completion]:
    found: list[Completion] = []
    asker.ask(model, requests, found.append)
    return sorted(found, key=lambda c: (c.index, c.sample))


def scripted_asker(server: ScriptedServer, settings: EvaluationSettings | None = None, **options: Any) -> ServerAsker:
    options = {"retries": 2, "opening": "", **options}
    return ServerAsker(server.url, {"base": "tiny"}, settings or EvaluationSettings(), **options)


# ----- the real server -----


@pytest.mark.slow
def test_a_real_server_writes_at_temperature_0_what_the_same_model_writes_here(real_server: RealServer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = EvaluationSettings(max_new_tokens=60)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    here = generate(model, tokenizer, REQUESTS, settings)
    asker = ServerAsker(real_server.url, {"base": real_server.model}, settings, concurrency=3)
    there = ask(asker, REQUESTS)
    assert [c.text for c in there] == [c.text for c in here], "the <think> of the template included"
    assert all(c.text.startswith("<think>\n") for c in there) and len({c.text for c in there}) == len(REQUESTS)
    assert [(c.prompt_tokens, c.tokens, c.stopped) for c in there] == [
        (c.prompt_tokens, c.tokens, c.stopped) for c in here
    ]


@pytest.mark.slow
def test_two_roles_and_several_samples_are_asked_concurrently(real_server: RealServer) -> None:
    settings = EvaluationSettings(max_new_tokens=12, samples=3, temperature=3.0, top_p=1.0)
    asker = ServerAsker(real_server.url, {"base": real_server.model, "tuned": real_server.model}, settings)
    requests = [Request(i, s, user_message(CODES[i]), seed=10 * i + s) for i in range(2) for s in range(3)]
    assert asker.models == ("base", "tuned")
    for role in asker.models:
        found = ask(asker, requests, role)
        assert [(c.index, c.sample) for c in found] == [(r.index, r.sample) for r in requests]
        assert all(c.tokens == 12 and c.stopped == "length" and c.seconds >= 0 for c in found)
        assert len({c.text for c in found}) == 6, "it samples, although the model's own config does not"


@pytest.mark.slow
def test_a_real_server_says_what_it_is(real_server: RealServer) -> None:
    asker = ServerAsker(real_server.url, {"base": real_server.model}, EvaluationSettings())
    facts = asker.facts()["server"]
    assert (facts["url"], facts["software"], facts["left_out"]) == (real_server.url, "transformers serve", [])
    assert facts["models"]["base"] == {"name": real_server.model, "opening": "<think>\n"}


@pytest.mark.slow
def test_a_name_that_a_real_server_does_not_have_is_refused_with_what_it_says(real_server: RealServer) -> None:
    asker = ServerAsker(real_server.url, {"base": "somebody/else"}, EvaluationSettings())
    with pytest.raises(PipelineError, match=r"no model 'somebody/else' \(400 Server is pinned to .*--model"):
        ask(asker, REQUESTS)


@pytest.mark.slow
def test_a_real_server_that_is_killed_in_the_middle_keeps_what_ended_and_goes_on_when_it_is_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = RealServer(TINY_BASE, tmp_path_factory.mktemp("serve"), free_port())
    try:
        settings = EvaluationSettings(max_new_tokens=40, samples=2)
        requests = [Request(i, s, user_message(CODES[i]), seed=i) for i in range(3) for s in range(2)]
        asker = ServerAsker(server.url, {"base": server.model}, settings, concurrency=2, retries=1)
        kept: list[Completion] = []

        def keep(completion: Completion) -> None:
            kept.append(completion)
            if len(kept) == 2:
                server.kill()

        with pytest.raises(StepError, match=rf"127\.0\.0\.1:{server.port}/v1 went away .*kept: .*the same command"):
            asker.ask("base", requests, keep)
        done = {(c.index, c.sample) for c in kept}
        assert 2 <= len(done) == len(kept) < len(requests)

        server.start()
        missing = [r for r in requests if (r.index, r.sample) not in done]
        asker.ask("base", missing, kept.append)
        assert sorted((c.index, c.sample) for c in kept) == [(r.index, r.sample) for r in requests]
        assert all(c.tokens for c in kept)
    finally:
        server.kill()


# ----- what is sent -----


def test_seed_temperature_and_top_p_are_sent_and_the_probe_sends_them_too() -> None:
    with scripted(lambda *_: said("ok")) as server:
        settings = EvaluationSettings(max_new_tokens=77, samples=2, top_p=0.9)
        ask(scripted_asker(server, settings), [Request(0, 0, "hello", seed=(1 << 40) + 5)])
        probe, asked = server.asked
    assert asked["messages"] == [{"role": "user", "content": "hello"}]
    wanted = {"model": "tiny", "max_tokens": 77, "temperature": 0.7, "top_p": 0.9, "seed": 5, "stream": True}
    assert {key: asked[key] for key in wanted} == wanted
    assert probe.keys() == asked.keys() and probe["max_tokens"] == 1


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_vllm_and_sglang_are_told_to_draw_from_the_models_own_distribution(owner: str) -> None:
    with scripted(lambda *_: said("ok"), owner=owner, version=(200, {"version": "0.32.0"})) as server:
        asker = scripted_asker(server)
        facts = asker.facts()["server"]
        again = ServerAsker(server.url, {"base": "tiny"}, EvaluationSettings(), opening="").facts()["server"]
        sent = server.asked[0]
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (-1, 0.0, 1.0)
    assert sent["skip_special_tokens"] is False and sent["stream_options"]["continuous_usage_stats"] is True
    assert (facts["software"], facts["version"]) == {"vllm": ("vLLM", "0.32.0"), "sglang": ("SGLang", None)}[owner]
    assert facts["models"]["base"] == {"name": "tiny", "owned_by": owner, "root": "r", "opening": ""}
    assert facts == again, "nothing in it changes from start to start"


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with scripted(lambda *_: (400, {"error": {"message": "sk-secret is a bad key for tiny"}})) as server:
        asker = scripted_asker(server)
        with pytest.raises(PipelineError) as caught:
            asker.facts()
    assert server.keys == ["Bearer sk-secret"]
    assert "secret" not in str(caught.value) and "(the key)" in str(caught.value)
    assert "secret" not in repr(asker)


def test_fields_that_a_server_refuses_by_name_are_left_out_and_reported() -> None:
    def reply(_: ScriptedServer, body: dict[str, Any]) -> tuple[int, Any]:
        if "seed" in body:
            return 422, {"detail": "Unexpected fields in the request: {'seed'}"}
        if "stream_options" in body:
            return 400, {"error": {"message": "Unrecognized request argument supplied: stream_options"}}
        if "max_tokens" in body:
            return 400, {"error": {"message": "'max_tokens' is not supported. Use 'max_completion_tokens' instead."}}
        return said("ok")

    with scripted(reply) as server:
        asker = scripted_asker(server, EvaluationSettings(max_new_tokens=9))
        assert asker.facts()["server"]["left_out"] == ["seed", "stream_options"]
        probes = len(server.asked)
        assert ask(asker, REQUESTS[:1])[0].text == "ok"
        assert len(server.asked) == probes + 1, "what was learned holds"
        assert server.asked[-1]["max_completion_tokens"] == 9 and "max_tokens" not in server.asked[-1]


def test_what_shapes_the_answers_is_never_left_out() -> None:
    with scripted(lambda *_: (400, {"error": {"message": "temperature does not support 0.0"}})) as server:
        with pytest.raises(PipelineError, match=r"temperature does not support 0.0"):
            scripted_asker(server).facts()
        assert len(server.asked) == 1


@pytest.mark.parametrize("fits", [True, False])
def test_an_answer_gets_what_is_left_of_the_context_or_is_empty(fits: bool) -> None:
    def reply(_: ScriptedServer, body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][0]["content"] == "x" or (fits and "max_tokens" not in body):
            return said("cut", finish="length")
        return 400, {"message": "This model's maximum context length is 2048 tokens, but you asked for max_tokens=4096"}

    with scripted(reply) as server:
        answer = ask(scripted_asker(server, opening="<think>\n"), REQUESTS[:1])[0]
    assert (answer.text, answer.stopped) == ("<think>\ncut" if fits else "<think>\n", "length")
    assert answer.tokens == (1 if fits else 0)


# ----- where an answer ends -----


def test_the_connection_is_closed_at_the_kernels_end_and_a_draft_in_the_reasoning_is_none() -> None:
    def reply(server: ScriptedServer, body: dict[str, Any]) -> tuple[int, Any]:
        pieces = ["a ", "<triton>draft</tri", "ton>", "\n</think>\n", KERNEL, " and much more", " still"]
        return 200, [chunk(piece, usage=(50, i + 1)) for i, piece in enumerate(pieces)]

    with scripted(reply) as server:
        answer = ask(scripted_asker(server, opening="<think>\n"), REQUESTS[:1])[0]
    assert answer.text == f"<think>\na <triton>draft</triton>\n</think>\n{KERNEL}"
    assert (answer.stopped, answer.tokens, answer.prompt_tokens) == ("stop", 5, 50)


def test_tokens_are_counted_from_the_pieces_where_the_server_counts_only_at_the_end() -> None:
    with scripted(lambda *_: said("<triton>", "x", "</triton>", "more", usage=(7, 99))) as server:
        cut = ask(scripted_asker(server), REQUESTS[:1])[0]
    with scripted(lambda *_: said("no", "kernel", usage=(7, 99))) as server:
        whole = ask(scripted_asker(server), REQUESTS[:1])[0]
    assert (cut.text, cut.stopped, cut.tokens, cut.prompt_tokens) == ("<triton>x</triton>", "stop", 3, 0)
    assert (whole.text, whole.stopped, whole.tokens, whole.prompt_tokens) == ("nokernel", "eos", 99, 7)


def test_a_server_that_knows_no_limit_is_cut_off() -> None:
    with scripted(lambda *_: said(*["word "] * 50)) as server:
        answer = ask(scripted_asker(server, EvaluationSettings(max_new_tokens=8)), REQUESTS[:1])[0]
    assert answer.stopped == "length" and answer.text.count("word") == 9


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_that_a_server_tells_apart_becomes_the_think_part(field: str) -> None:
    deltas = [chunk(**{field: "First "}), chunk(**{field: "a </triton> draft\n"}), chunk("\n\n<triton>1</triton> x")]
    with scripted(lambda *_: (200, [*deltas, chunk(finish="stop")])) as server:
        answer = ask(scripted_asker(server, opening=None), REQUESTS[:1])[0]
    assert answer.text == "<think>\nFirst a </triton> draft\n</think>\n\n<triton>1</triton>"


@pytest.mark.parametrize(
    ("opening", "reasoning", "content", "text", "stopped"),
    [
        ("", "", "<triton>1</triton> x", "<triton>1</triton>", True),
        ("", "", "<think>a </triton></think> b", "<think>a </triton></think> b", False),
        ("<think>\n", "", "a </triton>", "<think>\na </triton>", False),
        ("<think>\n", "", "<think>a</think></triton>", "<think>a</think></triton>", True),
        (None, "", "a </think>b</triton> x", "<think>\na </think>b</triton>", True),
        (None, "", "a </triton> b </think>c", "<think>\na </triton> b </think>c", False),
        (None, "", "b</triton> x", "b</triton>", True),
        (None, "", "no end", "no end", False),
        ("<think>\n", "cut off", "", "<think>\ncut off", False),
        (None, "\nstripped", "<triton>1</triton>", "<think>\nstripped\n</think>\n\n<triton>1</triton>", True),
        (None, "<think>own", "</think>1</triton>", "<think>own</think>1</triton>", True),
        ("<think>\n", "", "", "<think>\n", False),
    ],
)
def test_an_answer_is_put_together_as_the_model_wrote_it(
    opening: str | None, reasoning: str, content: str, text: str, stopped: bool
) -> None:
    answer = StreamedAnswer(opening)
    for piece in reasoning:
        assert not answer.add(piece, "")
    for piece in content:
        if answer.add("", piece):
            break
    assert answer.finish() == (text, stopped)


def test_the_opening_is_the_one_that_vllm_tells() -> None:
    vocabulary = {1: "user x ", 2: "<|assistant|>", 3: "<think>\n"}

    def tokenize(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"tokens": [1, 2, 3] if body["add_generation_prompt"] else [1]}

    def detokenize(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"prompt": "".join(vocabulary[token] for token in body["tokens"])}

    pages = {"tokenize": tokenize, "detokenize": detokenize}
    with scripted(lambda *_: said("thought"), owner="vllm", **pages) as server:
        asker = scripted_asker(server, opening=None)
        assert asker.facts()["server"]["models"]["base"]["opening"] == "<think>\n"
        assert ask(asker, REQUESTS[:1])[0].text == "<think>\nthought"


# ----- what goes wrong -----


def test_a_failure_for_a_moment_while_the_server_is_looked_at_does_not_make_it_another_server() -> None:
    lost: list[str] = []

    def flaky() -> tuple[int, Any]:
        lost.append("once")
        return (503, {}) if len(lost) == 1 else (200, {"paths": {"/load_model": {}}})

    with scripted(lambda *_: said("ok")) as server:
        server.pages["/openapi.json"] = flaky
        assert scripted_asker(server).facts()["server"]["software"] == "transformers serve"
        assert "generation_config" in server.asked[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_for_a_moment_is_tried_again(status: int) -> None:
    def reply(server: ScriptedServer, _: Any) -> tuple[int, Any]:
        return said("at last") if len(server.asked) % 3 == 0 else (status, {"error": {"message": "busy"}})

    with scripted(reply) as server:
        answers = ask(scripted_asker(server, retries=2, concurrency=1), REQUESTS)
        assert [a.text for a in answers] == ["at last"] * 3
        assert len(server.asked) == 3 + 3 * 3


@pytest.mark.parametrize(("status", "words"), [(429, "lower --concurrency"), (500, "see its log")])
def test_what_keeps_failing_says_that_the_same_command_goes_on(status: int, words: str) -> None:
    def reply(server: ScriptedServer, _: Any) -> tuple[int, Any]:
        return said("fine") if len(server.asked) < 3 else (status, {"error": {"message": "overloaded"}})

    kept: list[Completion] = []
    with scripted(reply) as server, pytest.raises(StepError) as caught:
        scripted_asker(server, retries=1, concurrency=1).ask("base", REQUESTS, kept.append)
    message = str(caught.value)
    assert server.url in message and "overloaded" in message and words in message and "same command" in message
    assert [c.index for c in kept] == [0], "what had ended was handed over"


def test_an_answer_that_breaks_off_is_asked_for_again_with_the_same_seed() -> None:
    def reply(server: ScriptedServer, _: Any) -> tuple[int, Any]:
        return {
            1: said("probe"),
            2: (200, [chunk("half an ans")]),  # the connection ends
            3: (200, [chunk("half"), {"error": {"message": "the engine stumbled"}}]),
        }.get(len(server.asked), said("whole"))

    with scripted(reply) as server:
        answer = ask(scripted_asker(server), REQUESTS[:1])[0]
        assert [body["seed"] for body in server.asked[1:]] == [REQUESTS[0].seed % (1 << 31)] * 3
    assert (answer.text, answer.tokens) == ("whole", 1)


def test_an_answer_that_breaks_off_every_time_is_an_error_with_the_reason() -> None:
    def reply(server: ScriptedServer, _: Any) -> tuple[int, Any]:
        return said("probe") if len(server.asked) == 1 else (200, [{"error": {"message": "out of memory"}}])

    with scripted(reply) as server, pytest.raises(StepError, match=r"out of memory.*kept"):
        ask(scripted_asker(server), REQUESTS[:1])
    assert len(server.asked) == 1 + 3


def test_nothing_more_is_asked_after_a_failure() -> None:
    def reply(server: ScriptedServer, body: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"message": "no"}) if body["messages"][0]["content"] == "bad" else said("ok")

    kept: list[Completion] = []
    requests = [Request(0, 0, "good", 0), Request(1, 0, "bad", 0), *(Request(i, 0, "good", 0) for i in range(2, 50))]
    with scripted(reply) as server, pytest.raises(StepError, match="400"):
        scripted_asker(server, concurrency=1).ask("base", requests, kept.append)
    assert [c.index for c in kept] == [0] and len(server.asked) == 3


def test_while_answers_arrive_it_is_told_how_long_each_has_become() -> None:
    def reply(server: ScriptedServer, _: Any) -> tuple[int, Any]:
        return said("probe") if len(server.asked) == 1 else (200, [chunk("a"), chunk("b"), chunk("c", "stop")])

    told: list[list[int]] = []
    with scripted(reply) as server:
        asker = scripted_asker(server, concurrency=1)
        asker.ask("base", REQUESTS[:2], lambda _: None, lambda tokens: told.append(list(tokens)))
    assert told == [*([1], [2], [3], []), *([1], [2], [3], [])]


def test_what_keeping_an_answer_raises_ends_everything() -> None:
    def full(_: Completion) -> None:
        raise StepError("disk full")

    with scripted(lambda *_: said("ok")) as server, pytest.raises(StepError, match="disk full"):
        scripted_asker(server, concurrency=2).ask("base", REQUESTS, full)


def test_no_server_at_the_address_is_said_at_once() -> None:
    asker = ServerAsker(f"localhost:{free_port()}", {"base": "tiny"}, EvaluationSettings())
    with pytest.raises(PipelineError, match=r"no server answers at http://localhost:\d+/v1 .*--server") as caught:
        asker.facts()
    assert not isinstance(caught.value, StepError), "nothing was run"


def test_a_web_page_is_no_server() -> None:
    with scripted(lambda *_: (404, {"detail": "Not Found"})) as server:
        server.pages = {"/v1/models": (200, "<html>hello</html>")}
        with pytest.raises(PipelineError, match=r"no OpenAI-compatible server .*ends in /v1"):
            scripted_asker(server).facts()


def test_a_name_that_is_not_served_is_refused_with_those_that_are() -> None:
    with scripted(lambda *_: said("ok"), models=("tiny", "tiny-tuned"), owner="sglang") as server:
        models = {"base": "tiny", "tuned": "tiny-tunde"}
        asker = ServerAsker(server.url, models, EvaluationSettings(), opening="")
        with pytest.raises(PipelineError, match=r"no model 'tiny-tunde'; it lists tiny, tiny-tuned. Name one"):
            ask(asker, REQUESTS)
        assert all(body["max_tokens"] == 1 for body in server.asked), "before anything was asked"
        adapter = ServerAsker(server.url, {"base": "tiny", "tuned": "tiny:lora"}, EvaluationSettings(), opening="")
        assert adapter.facts()["server"]["models"]["tuned"]["name"] == "tiny:lora"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["list", "chat"])
def test_a_refused_key_says_which_variable_to_set(status: int, where: str) -> None:
    refusal = (status, {"error": {"message": "Unauthorized"}})
    with scripted(lambda *_: refusal) as server:
        if where == "list":
            server.pages["/v1/models"] = refusal
        with pytest.raises(PipelineError, match=rf"refuses the key \({status}\): set OPENAI_API_KEY"):
            scripted_asker(server).facts()
        assert len(server.asked) == (where == "chat")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/proxy/openai", "https://h/proxy/openai"),
    ],
)
def test_an_address_is_completed(given: str, address: str) -> None:
    assert api_address(given) == address


def test_user_and_password_of_an_address_are_not_shown() -> None:
    assert shown_address(api_address("http://me:hidden@h:1")) == "http://h:1/v1"


@pytest.mark.parametrize("given", ["", "http://", "ftp://h", "http://h:port", "http://h/v1?key=hidden"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(PipelineError, match="is not the address of a server") as caught:
        api_address(given)
    assert "hidden" not in str(caught.value)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PipelineError, match=r"pip install 'triton-sft-pipeline\[server\]'"):
        ServerAsker("http://h", {"base": "x"}, EvaluationSettings())
