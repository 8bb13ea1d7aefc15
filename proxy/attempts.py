"""A call that another target may take over: two attempts in all, and the second only where the first did nothing.

That is: the connection could not be made or was dead at once, or the answer was 429 or 503, and not a byte of it has
been passed on. A target that was silent for longer may have done the work, and would be billed twice.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy import inject, metrics
from proxy.balance import BUSY
from proxy.errors import UpstreamError
from proxy.record import Call
from proxy.upstream import Request, Target, Upstream, headers_for

A = TypeVar("A")
Attempt = Callable[[Request, Call], Awaitable[A]]


async def send(upstream: Upstream, request: Request, call: Call, attempt: Attempt[A]) -> A:
    """The answer of the first target, or of the one that takes over. Raises what the last attempt raised."""
    plain, again = request.body, upstream.retries > 0
    try:
        answer = await attempt(request, call)
    except UpstreamError as error:
        other = _other(upstream, request, call)
        if not error.untouched or not again:
            raise
        _aim(request, call, plain, other or request.target)
        return await attempt(request, call)
    if getattr(answer, "status", 200) not in BUSY:
        return answer
    other = _other(upstream, request, call)
    if other is None or not again:
        return answer
    answer.close()  # type: ignore[attr-defined]  # every answer can be let go of
    _aim(request, call, plain, other)
    return await attempt(request, call)


def _other(upstream: Upstream, request: Request, call: Call) -> Target | None:
    return upstream.after(request.service, call.reading.model or "", request.target)


def _aim(request: Request, call: Call, plain: bytes, target: Target) -> None:
    """Makes the request one for `target`: its name for the model, its credentials."""
    metrics.TAKEN_OVER.inc()
    model = call.adapter.served if call.adapter else target.model
    if model is not None and call.body is not None:
        plain = inject.replace(plain, call.body, ("model",), model)
    request.target, request.body = target, plain
    request.headers = headers_for(target, request.given, keyed=request.keyed, unpacked=request.unpacked)
    call.provider, call.upstream_model, call.hidden = target.provider, model, None
