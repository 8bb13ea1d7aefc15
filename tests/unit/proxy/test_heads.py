"""Heads that were read before: which are kept, and that one is found by nothing but its own bytes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.heads import MOST, Heads, cut
from proxy.paths import parse

LINES = [b"host: localhost", b"content-type: application/json", b"Content-Length: 2"]


def head(lines: list[bytes], first: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([first, *lines, b"", b""])


def learnt(lines: list[bytes], path: str = "/v1/chat/completions", version: str = "1.1") -> bool:
    heads, parts = Heads(), cut(head(lines) + b"{}")
    assert parts is not None
    heads.learn(parts[0], scope(lines, version), dict(scope(lines)["headers"]), parse("POST", path))
    return parts[0] in heads


def scope(lines: list[bytes], version: str = "1.1") -> dict[str, Any]:
    pairs = [line.partition(b":") for line in lines]
    headers = [(name.lower(), value.strip()) for name, _, value in pairs]
    return {"headers": headers, "raw_path": b"/", "query_string": b"", "http_version": version}


def test_a_plain_head_is_kept_and_found_again_whatever_the_length() -> None:
    assert learnt(LINES)
    one, other = cut(head(LINES) + b"{}"), cut(head([*LINES[:2], b"Content-Length: 300"]) + b"x" * 300)
    assert one is not None and other is not None
    assert (one[0], one[1:]) == (other[0], (b"2", b"{}"))
    assert other[1:] == (b"300", b"x" * 300)


@pytest.mark.parametrize(
    "line",
    [
        b"transfer-encoding: chunked",
        b"expect: 100-continue",
        b"upgrade: h2c",
        b"content-encoding: gzip",
        b"connection: close",
        b"connection: x-a, keep-alive",
        b"content-length: 2",
        b"x-ratchet-slot: s",
        b"x-stainless-retry-count: 1",
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"idempotency-key: k",
    ],
)
def test_a_head_that_says_more_than_usual_is_not_kept(line: bytes) -> None:
    assert not learnt([*LINES, line])


def test_a_head_with_two_connection_headers_is_not_kept() -> None:
    assert learnt([*LINES, b"Connection: keep-alive"])
    assert not learnt([*LINES, b"Connection: close", b"Connection: keep-alive"])


def test_a_length_that_could_be_mistaken_is_not_kept() -> None:
    assert not learnt([b"x-length: 5", *LINES])
    assert not learnt([*LINES[:2], b"content-length:2", b"x-length: 5"])


def test_other_paths_versions_and_heads_with_bare_line_ends_are_not_kept() -> None:
    assert not learnt(LINES, "/v1/files")
    assert not learnt(LINES, "/e/ep/with/s@1/v1/chat/completions")
    assert not learnt(LINES, version="1.0")
    assert not learnt([*LINES, b"a: b\nc: d"])


def test_only_so_many_are_kept() -> None:
    heads = Heads()
    for number in range(MOST + 10):
        lines = [*LINES, b"x-a: %d" % number]
        parts = cut(head(lines))
        assert parts is not None
        given_headers = dict(scope(lines)["headers"])
        heads.learn(parts[0], scope(lines), given_headers, parse("POST", "/v1/chat/completions"))
    assert len(heads) == MOST


@given(st.binary(max_size=200))
def test_any_bytes_can_be_cut(data: bytes) -> None:
    parts = cut(data)
    if parts is not None:
        before, digits, body = parts
        assert digits not in (b"\r\n",)
        assert data.endswith(body)
        assert len(before) + len(digits) + len(body) <= len(data)
