"""The floor: the best relay that one usually writes in Python. Raw ASGI, uvicorn (uvloop, httptools), aiohttp, orjson.

It reads which model is asked for and whether a stream is wanted, forwards the body as it came with two headers, and
passes the answer on as it comes. It checks no key, injects nothing, and records nothing.

    python -m bench.gateway.floor UPSTREAM_URL        prints its port
"""

import asyncio
import socket
import sys
from typing import Any

import aiohttp
import orjson
import uvicorn

KNOWN = frozenset({"bench-model"})
_JSON = [(b"content-type", b"application/json")]
_UNKNOWN = b'{"error":{"message":"unknown model","type":"invalid_request_error"}}'


class Floor:
    """The ASGI application."""

    def __init__(self, session: aiohttp.ClientSession, upstream: str) -> None:
        self._session = session
        self._url = upstream + "/chat/completions"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One call."""
        body = await _body(receive)
        asked = orjson.loads(body)
        if asked["model"] not in KNOWN:
            await _send(send, 404, _JSON, _UNKNOWN)
            return
        headers = {"content-type": "application/json", "authorization": "Bearer upstream-key"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            kind = [(b"content-type", answer.headers["content-type"].encode())]
            if not asked.get("stream"):
                await _send(send, answer.status, kind, await answer.read())
                return
            await send({"type": "http.response.start", "status": answer.status, "headers": kind})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _body(receive: Any) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        whole: bytes = message["body"]
        return whole
    parts = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        parts.append(message["body"])
    return b"".join(parts)


async def _send(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def main(upstream: str) -> None:
    """Serve until killed."""
    connector = aiohttp.TCPConnector(limit=0)
    jar = aiohttp.DummyCookieJar()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=jar, timeout=timeout, auto_decompress=False
    ) as session:
        app = Floor(session, upstream)
        config = uvicorn.Config(app, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_config=None)
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            print(f"port {listener.getsockname()[1]}", flush=True)
            await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
