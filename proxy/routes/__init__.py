"""Everything but the relayed calls: rewards, the collector's API, models, operations."""

import difflib
import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from collector.errors import NotFound, RatchetError
from proxy.routes import models, ops, otlp, reward
from proxy.routes.base import Context, WrongMethod, error_response, guarded
from proxy.routes.forward import Forward

log = logging.getLogger(__name__)

# What a mistyped path is compared with: first what agents call.
KNOWN = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/models",
    "/reward",
    "/v1/traces",
    "/v1/logs",
    "/api/slots",
    "/api/episodes",
    "/api/spans",
    "/api/query",
    "/api/stats",
    "/api/jobs",
    "/api/deployments",
    "/healthz",
    "/readyz",
    "/metrics",
    "/",
)


def cold(context: Context) -> Starlette:
    """The application for the routes that are not relayed. Its errors have OpenAI's envelope."""
    listed = guarded(context, "agent", models.listed)
    one = guarded(context, "agent", models.one)
    telemetry = otlp.Intake(context)
    routes = [
        Route("/reward", guarded(context, "reward", reward.post), methods=["POST"]),
        # An agent that appends to its base URL ends here: its reward must not go to the upstream and be lost.
        Route("/v1/reward", guarded(context, "reward", reward.post), methods=["POST"]),
        Route("/v1/traces", telemetry.endpoint("traces"), methods=["POST"]),
        Route("/v1/logs", telemetry.endpoint("logs"), methods=["POST"]),
        Route("/api/{path:path}", Forward(context)),
        Route("/v1/models", listed, methods=["GET"]),
        Route("/models", listed, methods=["GET"]),
        Route("/v1/models/{model:path}", one, methods=["GET"]),
        Route("/models/{model:path}", one, methods=["GET"]),
        Route("/healthz", ops.endpoint(context, ops.healthz), methods=["GET"]),
        Route("/readyz", ops.endpoint(context, ops.readyz), methods=["GET"]),
        Route("/metrics", guarded(context, "admin", ops.metrics), methods=["GET"]),
        Route("/", ops.endpoint(context, ops.about), methods=["GET"]),
    ]
    handlers = {RatchetError: _on_ratchet_error, HTTPException: _on_http_error, Exception: _on_crash}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def nearest(path: str) -> str:
    """A sentence that helps whoever mistyped a path."""
    trimmed = path.rstrip("/") or "/"
    close = difflib.get_close_matches(trimmed, [*KNOWN, *(known.removeprefix("/v1") for known in KNOWN)], 1, 0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "point OPENAI_BASE_URL at /v1; rewards go to /reward, the rest is under /api"


async def _on_ratchet_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RatchetError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    path = request.scope["path"]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        told: RatchetError = WrongMethod(f"{request.method} is not served at {path}; it takes {allowed}")
    elif error.status_code == 404:
        told = NotFound(f"there is no {request.method} {path[:200]}; {nearest(path)}", code="route_not_found")
    else:
        told = RatchetError(error.detail)
        told.status = error.status_code
    return error_response(told)


async def _on_crash(request: Request, error: Exception) -> Response:
    """The boundary of these routes: what was not foreseen is logged, and answered in the same envelope."""
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return error_response(RatchetError("an internal error of the proxy; its log says more"))
