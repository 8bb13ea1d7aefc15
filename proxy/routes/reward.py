"""`POST /reward`: validated and journalled by the worker itself, so it works while the collector is down."""

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from collector import rewards
from proxy import limits
from proxy.routes.base import Context, headers_of, json_response


async def post(context: Context, request: Request) -> Response:
    """202 with the reward's id (an array for an array) once it is on disk.

    Raises BadInput (422) that names the field, and Unavailable (503) when the disk does not take it.
    """
    declared = headers_of(request.scope).get(b"content-length")
    raw = await limits.read_body(request.receive, declared, context.body_limit)
    body = rewards.read(raw)
    parsed = rewards.parse(body, time.time_ns())
    await asyncio.gather(*(asyncio.wrap_future(context.journal.append_durable("reward", one)) for one in parsed))
    ids = [{"reward_id": one.reward_id} for one in parsed]
    return json_response(ids if isinstance(body, list) else ids[0], 202)
