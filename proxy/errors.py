"""What the proxy itself answers when it can't relay: each a RatchetError with its HTTP status."""

from typing import Any

import orjson

from collector.errors import BadInput, RatchetError, Unavailable

Header = tuple[bytes, bytes]


class BadRequest(BadInput):
    """400: the request can't be understood well enough to relay it."""

    status = 400
    code = "bad_request"


class Unauthorized(RatchetError):
    """401: no key, or an unknown one."""

    status = 401
    code = "invalid_api_key"


class Forbidden(RatchetError):
    """403: the key lacks the needed scope, or the Host header names a host that isn't served here."""

    status = 403
    code = "host_not_allowed"


class TooSlow(RatchetError):
    """408: the request did not arrive in time."""

    status = 408
    code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("the request came too slowly (server.slow_client_timeout)")


class TooLarge(RatchetError):
    """413: the body, packed or unpacked, is over the limit. `unread`: the client may still be sending it."""

    status = 413
    code = "body_too_large"
    unread = False


class HeadersTooLarge(RatchetError):
    """431: too many header bytes."""

    status = 431
    code = "headers_too_large"


class Limited(RatchetError):
    """429: a key has used what it may; `seconds` until it may again. Budgets: an SDK is told not to try again."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, seconds: int, *, code: str) -> None:
        super().__init__(message, param="authorization", code=code)
        self.seconds = seconds


class Overloaded(Unavailable):
    """503: too many calls at once; try again."""

    code = "overloaded"


class UpstreamError(RatchetError):
    """502: the upstream could not be reached, or broke off before its answer was whole. `untouched`: nothing of the
    call got there, or nothing came of it, so that sending it again can't bill it twice."""

    status = 502
    code = "upstream_unreachable"
    untouched = False


class UpstreamTimeout(UpstreamError):
    """504: the upstream took too long to connect or to go on."""

    status = 504
    code = "upstream_timeout"


class ClientGone(Exception):
    """The client hung up before its answer was complete: nobody is left to be told."""


class Broken(Exception):
    """The upstream broke off after the client had got a part of the answer: the connection has to end unclean."""

    def __init__(self, error: RatchetError) -> None:
        super().__init__(error.message)
        self.error = error


def reply(error: RatchetError, extra: list[Header] | None = None) -> tuple[int, list[Header], bytes]:
    """`(status, headers, body)` of the envelope."""
    body = orjson.dumps(error.envelope())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(extra or [])]
    if error.status == 503:
        headers.append((b"retry-after", b"1"))
    if isinstance(error, Limited):
        headers.append((b"retry-after", b"%d" % error.seconds))
        if error.code == "budget_exceeded":
            headers.append((b"x-should-retry", b"false"))
    return error.status, headers, body


async def respond(send: Any, error: RatchetError, extra: list[Header] | None = None) -> None:
    """Sends the envelope as a whole answer over ASGI."""
    status, headers, body = reply(error, extra)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
