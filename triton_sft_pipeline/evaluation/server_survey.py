"""What a server says of itself, and what the servers that we know of need to be told.

Nothing of a single answer is known here. What differs from server to server, each from its own documentation:

- vLLM and SGLang (`owned_by` in their list of models) fill what a request leaves open from the model's own
  generation_config.json, drop special tokens from the text (`<think>` is one for some tokenizers), and count tokens in
  every chunk if asked to.
- `transformers serve` (its interface description names `/load_model`) samples only if the model's own
  generation_config.json does, whatever temperature it is asked for, unless it is given a whole generation config. It
  lists the models of its cache, which need not hold the one that it serves, and its seeds hold for one request at a
  time only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.stopping import REASONING_START

VLLM, SGLANG, TRANSFORMERS = "vLLM", "SGLang", "transformers serve"
_BY_OWNER = {"vllm": VLLM, "sglang": SGLANG}
_KEPT_OF_A_MODEL = ("id", "owned_by", "root", "max_model_len")


@dataclass(frozen=True)
class Survey:
    """What a server says of itself.

    Attributes:
        software: which server it is, where that can be told.
        version: its version, where it tells it.
        listed: its models, with what stays the same from start to start (id, owned_by, root, max_model_len); None when
            it keeps no list.
    """

    software: str | None
    version: str | None
    listed: tuple[dict[str, Any], ...] | None

    @property
    def names(self) -> list[str]:
        """The names of its models."""
        return [str(model["id"]) for model in self.listed or ()]

    def entry(self, name: str) -> dict[str, Any] | None:
        """What the list says of a model; SGLang's "model:adapter" names the adapter of a listed model."""
        wanted = (name, name.rpartition(":")[0]) if self.software == SGLANG else (name,)
        return next((model for model in self.listed or () if model["id"] in wanted), None)


def api_address(url: str) -> str:
    """The address of the interface: `/v1` is added where no path is given.

    Raises:
        PipelineError: it is not the address of a server.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and parts.port != 0
    except ValueError:  # the port is no number
        usable = False
    if not usable:
        given = shown_address(url)
        raise PipelineError(f"{given!r} is not the address of a server: give one such as http://localhost:8000/v1")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))


def shown_address(address: str) -> str:
    """The address without what may be secret in it: user, password and query."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def extra_fields(software: str | None, settings: EvaluationSettings) -> dict[str, Any]:
    """The fields of a request that only this server knows: they make it draw from the model's own distribution, as
    temperature and top-p leave it, and give the text as it was written.
    """
    if software in (VLLM, SGLANG):
        neutral: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        return neutral | usage | ({"spaces_between_special_tokens": False} if software == VLLM else {})
    if software == TRANSFORMERS:
        config: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
        if settings.resolved_temperature == 0:
            config["do_sample"] = False
        else:
            config |= {"do_sample": True, "top_k": 0, "min_p": 0.0}
        return {"generation_config": json.dumps(config)}
    return {}


async def survey(client: Any) -> Survey:
    """Ask a server what it is.

    Args:
        client: an `openai.AsyncOpenAI`.

    Raises:
        openai.APIConnectionError: nothing answers.
        openai.AuthenticationError, openai.PermissionDeniedError: the key is refused.
    """
    # Not tried again: a server that is not there yet is the usual mistake, and a list that fails (`transformers serve`
    # without a cache) does so every time.
    once = client.with_options(max_retries=0, timeout=30.0)
    listed = await _listed(once)
    owners = {str(model.get("owned_by")).lower() for model in listed or ()}
    software = next((name for owner, name in _BY_OWNER.items() if owner in owners), None)
    root = server_root(str(client.base_url))
    version = None
    if software == VLLM:
        version = await _field(client, f"{root}/version", "version")
    elif software is None and "/load_model" in (await _field(client, f"{root}/openapi.json", "paths") or {}):
        software = TRANSFORMERS
    return Survey(software, str(version) if version else None, listed)


async def _listed(client: Any) -> tuple[dict[str, Any], ...] | None:
    import openai

    try:
        found = await client.get("/models", cast_to=object)
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise
    except (openai.APIStatusError, ValueError):  # no such list, or what answers is no JSON
        return None
    models = found.get("data") if isinstance(found, dict) else None
    if not isinstance(models, list):
        return None
    return tuple(
        {key: model[key] for key in _KEPT_OF_A_MODEL if model.get(key) is not None}
        for model in models
        if isinstance(model, dict) and "id" in model
    )


async def _field(client: Any, address: str, name: str) -> Any:
    """One field of what the server says at an address that not every server has, or None.

    A lost connection says nothing of what is there (a server may close it after an error), so it is made again, and is
    an error in the end: a server that is taken for another is asked in another way.
    """
    import openai

    try:
        found = await client.with_options(max_retries=2, timeout=30.0).get(address, cast_to=object)
    except (openai.APIStatusError, ValueError):
        return None
    return found.get(name) if isinstance(found, dict) else None


def server_root(address: str) -> str:
    """The address without `/v1`: where servers keep what OpenAI's interface does not have."""
    return address.rstrip("/").removesuffix("/v1")


async def opening_of(client: Any, software: str | None, name: str) -> str | None:
    """The beginning of an answer that a model's chat template writes itself ("<think>" and a newline, or "").

    vLLM and SGLang tell it (`/tokenize`); for any other server it is that of the tokenizer of the same name, if there
    is one on this machine.

    Returns:
        None when neither knows.
    """
    if software in (VLLM, SGLANG):
        return await _told_opening(client, name)
    return _local_opening(name)


async def _told_opening(client: Any, name: str) -> str | None:
    import openai

    quick = client.with_options(max_retries=2, timeout=30.0)
    root = server_root(str(client.base_url))
    messages = [{"role": "user", "content": "x"}]
    try:
        tokens = [
            (
                await quick.post(
                    f"{root}/tokenize",
                    body={"model": name, "messages": messages, "add_generation_prompt": prompting},
                    cast_to=object,
                )
            )["tokens"]
            for prompting in (False, True)
        ]
        without, rendered = tokens
        if rendered[: len(without)] != without:
            return None
        suffix = {"model": name, "tokens": rendered[len(without) :]}
        told = await quick.post(f"{root}/detokenize", body=suffix, cast_to=object)
        return _from_reasoning(told.get("prompt", told.get("text")))
    except (openai.APIStatusError, ValueError, KeyError, TypeError, AttributeError):
        return None  # an older server, or one that answers in another form


def _local_opening(name: str) -> str | None:
    from transformers import AutoTokenizer

    turn = [{"role": "user", "content": "x"}]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        without, rendered = (
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=prompting)
            for prompting in (False, True)
        )
    except Exception:  # of any kind, from an unknown name to a template that does not render: nothing is known
        return None
    return _from_reasoning(rendered[len(without) :]) if rendered.startswith(without) else None


def _from_reasoning(prompt: str) -> str:
    return prompt[prompt.find(REASONING_START) :] if REASONING_START in prompt else ""
