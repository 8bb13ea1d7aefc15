"""The relay's side of the upstream: both clients keep the same promises, and aiohttp does what the own one can't."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from collector.errors import ConfigError
from collector.settings import Settings, load
from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.reply import RawReply
from proxy.upstream import Request, Upstream, headers_for
from tests.fake_upstream import FakeUpstream, Reply, chat_events, json_reply, sse_reply


@pytest.fixture(scope="module")
def server() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(params=["raw", "aiohttp"])
def client(request: pytest.FixtureRequest, server: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server.requests.clear()
    return str(request.param)


def sending(
    use: Callable[[Upstream, Request], Awaitable[Any]], base: str, client: str = "raw", /, **options: Any
) -> tuple[Any, Request]:
    """What `use` makes of an upstream at `base` and a request for it; and the request."""
    more: dict[str, Any] = {key: options.pop(key) for key in ("method", "tail", "query", "body") if key in options}
    settings = Settings.model_validate({"upstream": {"default": base, "client": client, **options}})

    async def main() -> tuple[Any, Request]:
        upstream = Upstream(settings, {})
        target = upstream.route("openai", None)
        given = [(b"host", b"proxy"), (b"x-a", b"caf\xe9"), (b"connection", b"x-b"), (b"x-b", b"1"), (b"X-A", b"2")]
        headers = headers_for(target, given, keyed=False, unpacked=False)
        request = Request(
            target, more.pop("method", "POST"), more.pop("tail", "chat/completions"), headers=headers, **more
        )
        try:
            return await use(upstream, request), request
        finally:
            await upstream.close()

    return asyncio.run(main())


async def read(upstream: Upstream, request: Request) -> tuple[Any, bytes]:
    reply = await upstream.send(request)
    try:
        return reply, await reply.read()
    finally:
        reply.close()


def test_the_wire_is_the_same_over_both_clients(server: FakeUpstream, client: str) -> None:
    server.reply(json_reply(b'{"a": 1.0}', 201, headers=[("X-Req", "1"), ("Keep-Alive", "timeout=5")]))
    (reply, body), request = sending(read, server.url, client, query="a=%20b&c", body=b'{"x": 1e2}')
    assert isinstance(reply, RawReply) == (client == "raw")
    assert (reply.status, body, reply.stream, reply.encoding, request.attempts) == (
        201,
        b'{"a": 1.0}',
        False,
        "identity",
        1,
    )
    assert reply.headers[:2] == [(b"content-type", b"application/json"), (b"x-req", b"1")]
    assert b"keep-alive" not in dict(reply.headers)
    got = server.requests[-1]
    assert (got.method, got.target, got.body) == ("POST", "/v1/chat/completions?a=%20b&c", b'{"x": 1e2}')
    assert got.headers["host"] == server.url.split("/")[2]
    assert got.headers["accept-encoding"] == "identity"
    assert "x-b" not in got.headers and got.headers["x-a"] == "2"


def test_a_stream_comes_in_pieces_and_can_be_left(server: FakeUpstream, client: str) -> None:
    events = chat_events()

    async def some(upstream: Upstream, request: Request) -> tuple[bool, bytes]:
        reply = await upstream.send(request)
        try:
            return reply.stream, await anext(reply.chunks())
        finally:
            reply.close()

    server.reply(sse_reply(events, end="hang"))
    (stream, first), _ = sending(some, server.url, client)
    assert stream and first and b"".join(events).startswith(first)
    assert server.requests[-1].gone.wait(30)


def test_an_answer_cut_off_is_broken_and_not_asked_for_again(server: FakeUpstream, client: str) -> None:
    server.reply(Reply(parts=(b"{", b'"a": 1}'), chunked=True, end="close"))
    with pytest.raises(UpstreamError) as caught:
        sending(read, server.url, client)
    assert caught.value.code == "upstream_broken"
    assert len(server.requests) == 1


def test_silence_is_a_timeout(server: FakeUpstream, client: str) -> None:
    server.reply(Reply(parts=(5.0,), end="hang"))
    with pytest.raises(UpstreamTimeout):
        sending(read, server.url, client, read_timeout=0.05)


@pytest.mark.parametrize("retries", [0, 1])
def test_an_upstream_that_is_not_there_is_tried_as_often_as_configured(client: str, retries: int) -> None:
    attempts = []

    async def use(upstream: Upstream, request: Request) -> None:
        try:
            await upstream.send(request)
        finally:
            attempts.append(request.attempts)

    with pytest.raises(UpstreamError, match=r"the upstream 127\.0\.0\.1 can't be reached"):
        sending(use, "http://127.0.0.1:9/v1", client, retries=retries)
    assert attempts == [retries + 1]


def test_a_path_of_any_bytes_arrives_encoded(server: FakeUpstream) -> None:
    server.reply(json_reply({}))
    sending(read, server.url, tail="files/caf\xc3\xa9%20x", method="GET")
    assert server.requests[-1].target == "/v1/files/caf%C3%A9%20x"


def test_a_proxy_of_the_environment_is_aiohttps(server: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.reply(json_reply({}))
    (reply, body), _ = sending(read, "http://elsewhere.invalid/v1")
    assert not isinstance(reply, RawReply) and body == b"{}"
    assert server.requests[-1].target == "http://elsewhere.invalid/v1/chat/completions"


def test_a_base_url_with_credentials_is_aiohttps(server: FakeUpstream, client: str) -> None:
    server.reply(json_reply({}))
    (reply, _), _ = sending(read, server.url.replace("//", "//user:secret@"), client)
    assert not isinstance(reply, RawReply)
    assert server.requests[-1].headers["authorization"].startswith("Basic ")


def test_the_client_is_one_of_two() -> None:
    assert Settings().upstream.client == "raw"
    with pytest.raises(ConfigError, match=r"upstream\.client"):
        load(flags={"upstream.client": "curl"}, environ={})
