"""Providers that don't speak OpenAI's dialect, through the LiteLLM SDK: the one file that imports it, on first use."""

import asyncio
import importlib
import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson

from collector import redact
from proxy import orders
from proxy.dialects.base import Json
from proxy.errors import BadRequest, Header, UpstreamError, UpstreamTimeout
from proxy.prepare import parse
from proxy.upstream import Request

log = logging.getLogger(__name__)
# What a client may ask for. Everything else in a body stays out.
_COMMON = frozenset(("temperature", "top_p", "n", "stream", "stream_options", "stop", "max_tokens", "presence_penalty",
                     "frequency_penalty", "logit_bias", "user", "seed", "logprobs"))  # fmt: skip
_CHAT = _COMMON | {"messages", "max_completion_tokens", "response_format", "tools", "tool_choice", "functions",
                   "parallel_tool_calls", "top_logprobs", "function_call", "reasoning_effort", "thinking",
                   "modalities", "prediction", "audio"}  # fmt: skip
_TEXT = _COMMON | {"prompt", "echo", "best_of", "suffix"}
_EMBEDDING = frozenset(("input", "dimensions", "encoding_format", "user"))
_CALLS = {
    "chat": ("acompletion", _CHAT),
    "text_completion": ("atext_completion", _TEXT),
    "embeddings": ("aembedding", _EMBEDDING),
}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          408: "timeout_error", 422: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip
_JSON: list[Header] = [(b"content-type", b"application/json")]
_SSE: list[Header] = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_MISSING = re.compile(r"No module named '[\w.]+'$")
_lock = asyncio.Lock()
_closing: set[asyncio.Future[Any]] = set()


class Translated:
    """An answer in OpenAI's dialect, made from a provider's. Reading raises UpstreamError or UpstreamTimeout."""

    encoding = "identity"
    length: int | None = 0  # it is all there
    complete = False  # a stream's end isn't known before it is asked for

    def __init__(
        self, status: int, headers: list[Header], body: bytes = b"", source: Any = None, first: Any = None
    ) -> None:
        self.status = status
        self.headers = headers
        self.stream = source is not None
        self.cost_usd: float | None = None
        self._body = body
        self._source = source
        self._first = first  # of the stream's chunks, taken from the source already

    async def read(self) -> bytes:
        """The whole body."""
        return self._body

    async def chunks(self) -> AsyncIterator[bytes]:
        """One event a chunk, then `[DONE]`."""
        if self._source is None:
            yield self._body
            return
        try:
            if self._first is not None:
                yield self._event(self._first)
            async for chunk in self._source:
                yield self._event(chunk)
        except Exception as error:
            if not _is_provider_error(error):
                raise
            raise _as_ratchet(error) from error
        yield b"data: [DONE]\n\n"

    def decoded(self, body: bytes) -> bytes:
        """It is readable as it is."""
        return body

    def _event(self, chunk: Any) -> bytes:
        return b"data: " + orjson.dumps(self._chunk(chunk.model_dump())) + b"\n\n"

    def _chunk(self, raw: Json) -> Json:
        """A chunk as OpenAI would send it: the one that tells the usage has no choices."""
        chunk = _clean(raw)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            cost = usage.get("cost")
            self.cost_usd = float(cost) if isinstance(cost, int | float) else self.cost_usd
            if not any(choice.get("delta") or choice.get("finish_reason") for choice in chunk.get("choices") or ()):
                chunk["choices"] = []
        return chunk

    def close(self) -> None:
        """Cancels a stream that was not read to its end."""
        source, self._source = self._source, None
        if source is not None:
            closing = asyncio.ensure_future(source.aclose())
            _closing.add(closing)
            closing.add_done_callback(_closed)


def _closed(closing: asyncio.Future[Any]) -> None:
    _closing.discard(closing)
    if not closing.cancelled() and closing.exception() is not None:
        log.info("a translated stream did not close cleanly: %s", closing.exception())


async def send(request: Request, operation: str) -> Translated:
    """The answer to a call, errors of the provider as OpenAI's envelope with their status. Raises BadRequest for what
    can't be translated."""
    if operation not in _CALLS:
        raise BadRequest(f"this model is translated, which isn't possible for {operation}; use chat/completions")
    body = parse(request.body)
    if body is None:
        raise BadRequest("the body must be a JSON object")
    orders.refuse(body)
    litellm = await _library()
    name, allowed = _CALLS[operation]
    given: Json = {key: value for key, value in body.items() if key in allowed}
    # The client's own retries and the proxy's are enough; a third layer would bill a call again.
    params = {"num_retries": 0, "max_retries": 0, **given, **(request.target.params or {})}
    request.attempts += 1
    try:
        answer = await getattr(litellm, name)(**params)
        first = await _first(answer) if given.get("stream") is True else None
    except Exception as error:
        if not _is_provider_error(error):
            raise
        return _failed(error)
    if given.get("stream") is True:
        return Translated(200, _SSE, source=answer, first=first)
    translated = Translated(200, _JSON, _dump(answer))
    cost = getattr(answer, "_hidden_params", {}).get("response_cost")
    translated.cost_usd = float(cost) if isinstance(cost, int | float) else None
    return translated


async def _first(source: Any) -> Any:
    """The first chunk of a stream, None where it has none. Some providers are asked only now, and an error of theirs
    must still become an answer with its status."""
    try:
        return await anext(aiter(source), None)
    except BaseException:
        Translated(200, [], source=source).close()
        raise


async def close() -> None:
    """Closes the connections of LiteLLM's clients, which belong to the running loop."""
    litellm: Any = sys.modules.get("litellm")
    if litellm is not None:
        await asyncio.gather(*_closing, return_exceptions=True)
        await litellm.close_litellm_async_clients()
        litellm.in_memory_llm_clients_cache.flush_cache()
        # Some streams are asked for with this one, which is in no cache. It stays usable, its connections end.
        transport = getattr(litellm.module_level_aclient.client, "_transport", None)
        if transport is not None:
            await transport.aclose()


async def _library() -> Any:
    """LiteLLM takes seconds to import: in a thread, so that other calls go on, and with its price map from the package,
    not from the network."""
    async with _lock:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm: Any = await asyncio.to_thread(importlib.import_module, "litellm")
        litellm.suppress_debug_info = True
        litellm.telemetry = False
        return litellm


def _dump(answer: Any) -> bytes:
    """LiteLLM's objects leave out what OpenAI would send as null; `finish_reason` and `content` stay."""
    return orjson.dumps(_clean(answer.model_dump()))


def _clean(answer: Json) -> Json:
    kept = {key: value for key, value in answer.items() if value is not None}
    for choice in kept.get("choices") or ():
        for part in ("message", "delta"):
            if isinstance(choice.get(part), dict):
                inner = choice[part]
                choice[part] = {
                    k: v for k, v in inner.items() if v is not None or (k == "content" and part == "message")
                }
    return kept


def _is_provider_error(error: BaseException) -> bool:
    """LiteLLM's exceptions all carry the status of the provider's answer, or one that stands for it."""
    return isinstance(getattr(error, "status_code", None), int)


def _failed(error: Any) -> Translated:
    status = error.status_code if 400 <= error.status_code < 600 else 502
    kind = _KINDS.get(status, "api_error")
    message = _told(error)
    body = orjson.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": getattr(error, "code", None)}}
    )
    retry = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    return Translated(status, [*_JSON, *([(b"retry-after", str(retry).encode())] if retry else [])], body)


def _told(error: Any) -> str:
    """What an error says, without the stack that LiteLLM may put behind it, and without secrets."""
    message, _ = redact.text(str(getattr(error, "message", "") or error).partition("\nTraceback")[0])
    missing = _MISSING.search(message)
    return f"{message}: install it beside Ratchet to use this provider" if missing else message


def _as_ratchet(error: Any) -> UpstreamError:
    kind = UpstreamTimeout if error.status_code in (408, 504) else UpstreamError
    return kind(_told(error), code=_KINDS.get(error.status_code, "upstream_broken"))
