"""`GET /v1/models`: the configured models and those of the default upstream."""

import asyncio
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from collector.errors import RatchetError
from proxy.errors import UpstreamTimeout
from proxy.routes.base import Context, json_response
from proxy.upstream import Request as Outgoing
from proxy.upstream import headers_for

PATIENCE = 10.0  # seconds for the upstream's own list


async def listed(context: Context, request: Request) -> Response:
    """The configured models first, then the upstream's. An upstream that fails counts only when none is configured."""
    own = [_model(name) for name in context.upstream.models]
    try:
        answer = await _ask(context, request, "models")
    except RatchetError:
        if not own:
            raise
        return json_response({"object": "list", "data": own})
    if not own:
        return answer
    theirs = [model for model in _data(answer) if model.get("id") not in context.upstream.models]
    return json_response({"object": "list", "data": [*own, *theirs]})


async def one(context: Context, request: Request) -> Response:
    """One model by its name; what is not configured is the upstream's to answer."""
    name = request.path_params["model"]
    if name in context.upstream.models:
        return json_response(_model(name))
    return await _ask(context, request, request.scope["raw_path"].decode("latin-1").partition("models/")[2], "models/")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ratchet"}


def _data(answer: Response) -> list[dict[str, Any]]:
    try:
        body = orjson.loads(answer.body) if answer.status_code == 200 else None
    except orjson.JSONDecodeError:
        return []
    data = body.get("data") if isinstance(body, dict) else None
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []


async def _ask(context: Context, request: Request, name: str, prefix: str = "") -> Response:
    """The upstream's answer as it is. Raises UpstreamError or UpstreamTimeout."""
    target = context.upstream.route("openai", None)
    headers = headers_for(target, request.scope["headers"], keyed=context.guard.keyed, unpacked=False)
    query = request.scope["query_string"].decode("latin-1")
    try:
        async with asyncio.timeout(PATIENCE):
            reply = await context.upstream.send(Outgoing(target, "GET", prefix + name, query, headers))
            try:
                body = await reply.read()
            finally:
                reply.close()
    except TimeoutError as error:
        raise UpstreamTimeout("the upstream did not list its models in time") from error
    response = Response(body, reply.status)
    kept = [pair for pair in reply.headers if pair[0] != b"content-length"]
    response.raw_headers = [*kept, (b"content-length", b"%d" % len(body))]
    return response
