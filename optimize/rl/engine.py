"""The engine's HTTP server: a local model behind `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/healthz`.

The event loop only reads, queues and writes; tokenizing runs in a thread pool and the model in the batcher's thread.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from collector.errors import BadInput, NotFound, RatchetError
from optimize.rl.answers import Answer
from optimize.rl.batcher import Batcher, Delta, Row
from optimize.rl.chat import Prompt, render
from optimize.rl.hotload import HotLoads
from optimize.rl.model import LanguageModel
from optimize.rl.sample import Sampling
from optimize.rl.text import Vocabulary
from optimize.rl.wire import BadRequest, Call, read_chat, read_completion

Queue = asyncio.Queue[tuple[int, Delta | RatchetError]]
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
LARGEST_BODY = 16 << 20


class Engine:
    """One model under one or more names: its own, and one per adapter."""

    def __init__(
        self,
        model: LanguageModel,
        name: str,
        *,
        max_batch: int = 16,
        adapters_root: Path | None = None,
        base: Path | None = None,
    ) -> None:
        """`adapters_root`: the folder from which adapters may be loaded while serving; None: from nowhere. `base`: the
        model's own folder, by which their manifests are checked."""
        self.model, self.name = model, name
        self.batcher = Batcher(model, max_batch=max_batch)
        self._vocabulary = Vocabulary(model.tokenizer)
        self._created = int(time.time())
        self.loads = HotLoads(model.adapters, self.batcher, name, adapters_root, base)
        self.requests = 0  # calls for an answer that arrived here, refused ones included

    def app(self) -> Starlette:
        """The ASGI application; its lifespan runs the batcher."""
        routes = [
            Route("/v1/chat/completions", _answered(self.chat), methods=["POST"]),
            Route("/v1/completions", _answered(self.completions), methods=["POST"]),
            Route("/v1/models", _answered(self.models)),
            Route("/v1/load_lora_adapter", _answered(self.load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", _answered(self.unload), methods=["POST"]),
            Route("/healthz", _answered(self.health)),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={404: _not_found, 405: _not_found})

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        await asyncio.to_thread(self.batcher.close)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.requests += 1
        return await self._serve(request, read_chat(await _body(request)))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        self.requests += 1
        return await self._serve(request, read_completion(await _body(request)))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        names = [self.name, *self.model.adapters.names]
        data = [{"id": name, "object": "model", "created": self._created, "owned_by": "ratchet"} for name in names]
        return _json({"object": "list", "data": data})

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter: vLLM's route and names."""
        return _json(await self.loads.load(await _body(request)))

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter: answers when the last answer with it has ended."""
        return _json(await self.loads.unload(await _body(request)))

    async def health(self, _: Request) -> Response:
        """GET /healthz."""
        running, waiting = self.batcher.load
        state = {"running": running, "waiting": waiting, "requests": self.requests}
        return _json({"status": "ok", "model": self.name, **state})

    async def _serve(self, request: Request, call: Call) -> Response:
        if call.model != self.name and call.model not in self.model.adapters.names:
            known = ", ".join([self.name, *self.model.adapters.names])
            raise NotFound(
                f"the model `{call.model}` does not exist; served here: {known}", param="model", code="model_not_found"
            )
        prompts, options = await asyncio.to_thread(self._prepare, call)
        answer = Answer(call, prompts, self._vocabulary)
        queue: Queue = asyncio.Queue()
        rows = self._rows(call, prompts, options, queue)
        self.batcher.submit(rows)
        try:
            if call.stream:
                first = await _unless_gone(request, _first(queue))
                return _Stream(self._stream(answer, queue, first), lambda: self.batcher.cancel(rows))
            await _unless_gone(request, _collect(answer, queue))
            return _json(answer.whole())
        except BaseException:
            self.batcher.cancel(rows)
            raise

    def _prepare(self, call: Call) -> tuple[list[list[int]], Prompt]:
        """Token ids of every prompt, and how the first (for chat, the only) was rendered."""
        options = render(call.messages, self.model.tokenizer) if call.chat else Prompt("")
        texts: Sequence[str | Sequence[int]] = [options.text] if call.chat else call.prompts
        prompts = [self._encode(text, options.special) for text in texts]
        for prompt in prompts:
            if len(prompt) >= self.model.context:
                raise BadRequest(
                    f"the prompt has {len(prompt)} tokens; the context length is {self.model.context}, answer included",
                    param="messages" if call.chat else "prompt",
                    code="context_length_exceeded",
                )
        return prompts, options

    def _encode(self, text: str | Sequence[int], special: bool) -> list[int]:
        if isinstance(text, str):
            ids: list[int] = self.model.tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids
        else:
            ids = list(text)
            if max(ids) >= self.model.vocabulary:
                raise BadRequest(f"`prompt` holds a token id beyond {self.model.vocabulary - 1}", param="prompt")
        if not ids:
            raise BadRequest("`prompt` is empty", param="prompt")
        return ids

    def _rows(self, call: Call, prompts: Sequence[Sequence[int]], options: Prompt, queue: Queue) -> list[Row]:
        loop = asyncio.get_running_loop()
        stop = options.stop if call.stop is None else call.stop
        sampling = Sampling(0, call.temperature, call.top_p, call.seed, stop, call.logprobs)
        adapter = None if call.model == self.name else call.model

        def emitter(index: int) -> Callable[[Delta | RatchetError], None]:
            return lambda event: _post(loop, queue, (index, event))

        rows = []
        for index in range(len(prompts) * call.n):
            prompt = prompts[index // call.n]
            room = self.model.context - len(prompt)
            most = replace(sampling, max_tokens=min(call.max_tokens or room, room))
            rows.append(Row(prompt, most, emitter(index), index=index, adapter=adapter, lead=options.lead))
        return rows

    async def _stream(self, answer: Answer, queue: Queue, first: tuple[int, Delta]) -> AsyncIterator[bytes]:
        for chunk in answer.opening():
            yield _event(chunk)
        news: list[tuple[int, Delta | RatchetError]] = [first]
        while True:
            for index in sorted({index for index, _ in news}):
                fresh = [event for at, event in news if at == index]
                if failed := next((event for event in fresh if isinstance(event, RatchetError)), None):
                    yield _event(failed.envelope())
                    return
                for chunk in answer.chunk(index, [event for event in fresh if isinstance(event, Delta)]):
                    yield _event(chunk)
            if all(choice.finish for choice in answer.choices):
                break
            news = [await queue.get()]
            while not queue.empty():
                news.append(queue.get_nowait())
        for chunk in answer.closing():
            yield _event(chunk)
        yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; `done` is called however the stream ends."""

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _body(request: Request) -> Any:
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST_BODY:
            raise BadRequest(f"the body is larger than {LARGEST_BODY >> 20} MiB")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


async def _collect(answer: Answer, queue: Queue) -> None:
    while not all(choice.finish for choice in answer.choices):
        index, event = await queue.get()
        if isinstance(event, RatchetError):
            raise event
        answer.choices[index].add(event)


async def _first(queue: Queue) -> tuple[int, Delta]:
    """The first event, waited for before the status is sent, so that a failure is still a status."""
    index, event = await queue.get()
    if isinstance(event, RatchetError):
        raise event
    return index, event


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientDisconnect as soon as nobody waits for it any more."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _post(loop: asyncio.AbstractEventLoop, queue: Queue, item: tuple[int, Delta | RatchetError]) -> None:
    # A loop that is closed already has nobody to tell.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(queue.put_nowait, item)


def _answered(handler: Handler) -> Handler:
    """Ratchet's errors as answers in OpenAI's envelope."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except RatchetError as error:
            status = 400 if isinstance(error, BadInput) else error.status
            return _json(error.envelope(), status)

    return answer


async def _not_found(request: Request, _: Exception) -> Response:
    return _json(NotFound(f"no such route: {request.method} {request.url.path}").envelope(), 404)


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
