"""Asking models that an OpenAI-compatible server holds: vLLM, SGLang, `transformers serve`, or any other.

The `openai` client connects, and tries again with back-off what fails for a moment (no connection, 408, 409, 429,
5xx). Here is what an evaluation needs beyond that: many answers under way at once, the rule of where an answer ends,
and what to do about a server that cannot go on. Knows nothing of problems or verdicts.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.evaluation.server_survey import (
    TRANSFORMERS,
    Survey,
    api_address,
    extra_fields,
    opening_of,
    shown_address,
    survey,
)
from triton_sft_pipeline.evaluation.server_text import StreamedAnswer
from triton_sft_pipeline.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from triton_sft_pipeline.evaluation.generation import OnTokens, Request

SILENCE_S = 1800.0
"""Seconds without a word from the server after which a connection counts as broken. A server that answers one request
at a time keeps the others waiting for as long as their predecessors take.
"""
BROKEN_ANSWERS = 2
"""Times that an answer is asked for again, from its beginning, after it broke off in the middle."""

# What an answer can do without. A server that refuses one of them by name is asked without it from then on.
_OPTIONAL = {
    *("seed", "stream_options", "top_k", "min_p", "repetition_penalty", "generation_config"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
}
_CONTEXT = re.compile(r"context[ _-]?(length|size|window)", re.IGNORECASE)
_ENDS = {"length": "length", "stop": "eos", "tool_calls": "eos", "content_filter": "eos"}
_GOES_ON = "every answer that had arrived is kept: start it again and run the same command, which goes on from there"


class ServerAsker:
    """Asks one server for the answers of one or two models.

    The address, the key, the names of the models and every field of a request are tried out once, with an answer of
    one token a model, before anything else is asked.

    A seed is sent with each request; whether it decides the answer is up to the server (`transformers serve` keeps one
    random state for all that it answers at the same time). Without one, temperature 0 is the way to repeatable answers.

    Args:
        url: the server's address, with or without its `/v1`.
        models: role ("base", "tuned") -> the name under which the server knows the model.
        settings: how to generate; the batch size is the server's own affair.
        api_key: default: `OPENAI_API_KEY`. It is sent to the server and appears nowhere else.
        concurrency: answers that are under way at the same time.
        retries: times that the client tries again what failed for a moment; 5 take about 15 s.
        opening: the beginning of an answer that the chat template writes itself ("<think>" and a newline, or "");
            default: what the server or the tokenizer of that name on this machine says of it.

    Attributes:
        models: the roles.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, str],
        settings: EvaluationSettings,
        api_key: str | None = None,
        concurrency: int = 16,
        *,
        retries: int = 5,
        opening: str | None = None,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise PipelineError(
                "asking a server needs the openai package: pip install 'triton-sft-pipeline[server]', or leave out "
                "--server"
            )
        if concurrency < 1:
            raise PipelineError(f"concurrency is {concurrency}: ask for at least one answer at a time")
        self._address = api_address(url)
        self._shown = shown_address(self._address)
        self.models = tuple(models)
        self._names = dict(models)
        self._settings = settings
        self._key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        self._concurrency, self._retries, self._opening = concurrency, retries, opening
        self._survey: Survey | None = None
        self._openings: dict[str, str | None] = {}
        self._left_out: set[str] = set()
        self._limit = "max_tokens"

    def facts(self) -> dict[str, Any]:
        """What the report says of where the answers came from: {"server": ...}. The same for every start of the same
        server; asks it if that was not done yet.

        Raises:
            PipelineError: the server cannot be asked; see `ask`.
        """
        found = self._surveyed()
        about = {
            role: {
                "name": name,
                **{key: value for key, value in (found.entry(name) or {}).items() if key != "id"},
                "opening": self._openings.get(name),
            }
            for role, name in self._names.items()
        }
        facts = {"url": self._shown, "software": found.software, "version": found.version, "models": about}
        return {"server": {**facts, "left_out": sorted(self._left_out)}}

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: OnTokens | None = None,
    ) -> None:
        """Ask for all answers, and hand each to `on_completion` the moment it ends, in this thread.

        `Completion.seconds` is the time since the previous answer ended, so that they add up to the time spent.
        Tokens are the server's count; of an answer that was closed at its `</triton>` by a server that counts only at
        the end, they are the pieces that arrived (a token each, usually), and `prompt_tokens` is 0.

        Args:
            model: a role.
            requests: what to ask.
            on_completion: keeps an answer. What it raises ends everything.
            on_tokens: told the pieces that have arrived of each answer under way.

        Raises:
            PipelineError: before anything was asked: no server there, the key is refused, or no model of that name.
            StepError: the server went away or cannot go on. What had ended was handed over; asking for the rest goes
                on.
        """
        self._surveyed()
        if requests:
            self._run(self._ask_all(self._names[model], requests, on_completion, on_tokens))

    # ----- the connection -----

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    def _client(self) -> Any:
        import openai

        return openai.AsyncOpenAI(
            base_url=self._address,
            api_key=self._key or "none",  # the client wants one, a server of one's own does not
            max_retries=self._retries,
            timeout=openai.Timeout(SILENCE_S, connect=10.0),
        )

    def _surveyed(self) -> Survey:
        if self._survey is None:
            self._run(self._look())
        assert self._survey is not None
        return self._survey

    async def _look(self) -> None:
        import openai

        async with self._client() as client:
            try:
                found = await survey(client)
            except openai.APIError as error:
                raise self._unusable(error, None) from error
            for name in dict.fromkeys(self._names.values()):
                await self._try_out(client, found, name)
            self._survey = found

    async def _try_out(self, client: Any, found: Survey, name: str) -> None:
        """Ask a model for one token, with every field that will be sent: a mistake shows now, not after hours."""
        import openai

        # Only this server's list may lack what it serves. Some others answer a wrong name with whatever they hold.
        if found.names and found.software != TRANSFORMERS and found.entry(name) is None:
            raise self._unknown(name, found)
        body = {**self._body(name, "x", 0, extra_fields(found.software, self._settings)), "max_tokens": 1}
        try:
            if stream := await self._open(client, body):
                async for _ in stream:
                    pass
            known = self._opening is not None
            self._openings[name] = self._opening if known else await opening_of(client, found.software, name)
        except (openai.APIError, ValueError) as error:
            raise self._unusable(error, name, found) from error

    # ----- answers -----

    async def _ask_all(
        self,
        name: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: OnTokens | None,
    ) -> None:
        waiting = iter(requests)
        under_way: dict[Request, int] = {}
        mark = time.perf_counter()

        def tell() -> None:
            if on_tokens:
                on_tokens(list(under_way.values()))

        async def work(client: Any) -> None:
            nonlocal mark
            for request in waiting:

                def arrived(pieces: int, request: Request = request) -> None:
                    under_way[request] = pieces
                    tell()

                answer = await self._answer(client, name, request, arrived)
                under_way.pop(request, None)
                tell()
                now = time.perf_counter()
                elapsed, mark = now - mark, now
                on_completion(Completion(request.index, request.sample, *answer, elapsed))

        async with self._client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self._concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                # The first failure ends all: the connections of the others are closed, and the server stops writing.
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(
        self, client: Any, name: str, request: Request, arrived: Callable[[int], None]
    ) -> tuple[str, int, int, str]:
        """Text, tokens of the prompt, tokens of the answer, reason of stopping."""
        import openai

        assert self._survey is not None
        extra = extra_fields(self._survey.software, self._settings)
        body = self._body(name, request.prompt, request.seed, extra)
        opening = self._openings.get(name)
        failure: Exception = ValueError("it ended without saying why")
        for _ in range(1 + BROKEN_ANSWERS):
            try:
                stream = await self._open(client, body)
            except openai.APIError as error:
                raise self._gone(error) from error
            if stream is None:  # the prompt alone is longer than the model reads
                return opening or "", 0, 0, "length"
            try:
                if answer := await self._read(stream, opening, arrived):
                    return answer
            except (openai.APIError, ValueError) as error:  # broken off, or no longer JSON
                failure = error
        raise self._gone(failure) from failure

    async def _read(
        self, stream: Any, opening: str | None, arrived: Callable[[int], None]
    ) -> tuple[str, int, int, str] | None:
        """One answer as it arrives; None when it ended without a reason that ends an answer."""
        answer = StreamedAnswer(opening)
        usage, finish, pieces = None, None, 0
        async with stream:
            async for chunk in stream:
                usage = getattr(chunk, "usage", None) or usage
                for choice in chunk.choices or ():
                    reasoning, content = _piece(choice.delta)
                    pieces += bool(reasoning or content)
                    finish = choice.finish_reason or finish
                    if answer.add(reasoning, content):
                        finish = "triton"
                arrived(pieces)
                if finish == "triton":
                    break
                if finish is None and pieces > self._settings.max_new_tokens:  # a server that knows no limit
                    finish = "length"
                    break
        text, stopped = answer.finish()
        end = "stop" if stopped else _ENDS.get(finish or "")
        if end is None:
            return None
        counted = (getattr(usage, "prompt_tokens", None) or 0, getattr(usage, "completion_tokens", None) or pieces)
        return text, *counted, end

    # ----- one request -----

    def _body(self, name: str, prompt: str, seed: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        temperature = self._settings.resolved_temperature
        return {
            "model": name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._settings.max_new_tokens,
            "temperature": temperature,
            "top_p": self._settings.top_p if temperature else 1.0,
            "seed": seed % (1 << 31),  # 31 bits: what every server takes
            "stream_options": {"include_usage": True},
            **extra,
        }

    async def _open(self, client: Any, body: Mapping[str, Any]) -> Any:
        """A stream of chunks; None when the prompt leaves no room for an answer.

        What a server refuses by name is left out, if an answer can do without it, and a limit beyond the model's
        context is left to the server: what it allows then is what is left of the context.
        """
        import openai

        fields = {key: value for key, value in body.items() if key not in self._left_out}
        while True:
            sent = {self._limit if key == "max_tokens" else key: value for key, value in fields.items()}
            model, messages = sent.pop("model"), sent.pop("messages")
            try:
                return await client.chat.completions.create(
                    model=model, messages=messages, stream=True, extra_body=sent
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                said = self._said(error)
                if _CONTEXT.search(said):
                    if "max_tokens" not in fields:
                        return None
                    del fields["max_tokens"]
                elif self._limit == "max_tokens" and "max_completion_tokens" in said:
                    self._limit = "max_completion_tokens"
                elif refused := next((key for key in _OPTIONAL & fields.keys() if _names(said, key)), None):
                    self._left_out.add(refused)
                    del fields[refused]
                else:
                    raise

    # ----- what went wrong -----

    def _said(self, error: Exception) -> str:
        """What the server said, in one line, without the key."""
        body = getattr(error, "body", None)
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body.get("error")
        said = " ".join(str(body or getattr(error, "message", None) or error or type(error).__name__).split())
        if self._key:
            said = said.replace(self._key, "(the key)")
        return said if len(said) <= 300 else f"{said[:299]}…"

    def _unknown(self, name: str, found: Survey | None, said: str = "") -> PipelineError:
        names = found.names if found else []
        has = f"it lists {', '.join(names[:20])}" if names else "it does not say which it has"
        reason = f" ({said})" if said else ""
        return PipelineError(
            f"the server at {self._shown} has no model {name!r}{reason}; {has}. Name one that it serves with --model "
            "and --tuned-model."
        )

    def _unusable(self, error: Exception, name: str | None, found: Survey | None = None) -> PipelineError:
        """Why nothing can be asked of this server."""
        import openai

        said = self._said(error)
        if isinstance(error, openai.APIConnectionError):
            cause = str(error.__cause__ or error) or said
            return PipelineError(
                f"no server answers at {self._shown} ({cause}): start it, or give its address with --server"
            )
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return PipelineError(
                f"the server at {self._shown} refuses the key ({status}): set OPENAI_API_KEY to one that it takes"
            )
        if status == 404 and not (found and found.names) and str(name) not in said:
            return PipelineError(
                f"what answers at {self._shown} is no OpenAI-compatible server (404 {said}): the address usually ends "
                "in /v1"
            )
        if name is not None and status is not None and (status < 500 or (found and found.entry(name) is None)):
            return self._unknown(name, found, f"{status} {said}")
        return StepError(f"the server at {self._shown} cannot answer: {said}. Its log says why.")

    def _gone(self, error: Exception) -> StepError:
        """Why a server that did answer cannot go on."""
        import openai

        said = self._said(error)
        status = getattr(error, "status_code", None)
        if status == 429:
            return StepError(
                f"the server at {self._shown} refuses more requests (429 {said}): lower --concurrency or wait a while; "
                f"{_GOES_ON}"
            )
        if status is not None:
            return StepError(
                f"the server at {self._shown} fails with {status} ({said}): see its log, and when it is well again, "
                f"run the same command, which goes on: every answer that had arrived is kept"
            )
        if isinstance(error, openai.APITimeoutError):
            return StepError(f"the server at {self._shown} was silent for {SILENCE_S:.0f} s; {_GOES_ON}")
        cause = str(error.__cause__ or "") or said
        return StepError(f"the server at {self._shown} went away in the middle ({cause}); {_GOES_ON}")


def _piece(delta: Any) -> tuple[str, str]:
    """Reasoning and content of one chunk: SGLang, `transformers serve` and vLLM before 0.11.1 call the former
    `reasoning_content`, later vLLM `reasoning`.
    """
    found = (getattr(delta, name, None) for name in ("reasoning_content", "reasoning"))
    reasoning = next((text for text in found if isinstance(text, str) and text), "")
    content = getattr(delta, "content", None)
    return reasoning, content if isinstance(content, str) else ""


def _names(said: str, field: str) -> bool:
    return re.search(rf"\b{field}\b", said) is not None
