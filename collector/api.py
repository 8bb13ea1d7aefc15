"""The collector over HTTP: thin routes around `service.Collector`. Whatever touches a disk runs in a thread."""

import asyncio
import contextlib
import logging
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collector import bodies, polling, rewards
from collector.errors import BadInput, RatchetError
from collector.part import Part
from collector.readers import pooled
from collector.results import ARROW
from collector.service import MAX_PAGE, MAX_SAMPLE, Collector

MAX_BODY_BYTES = 32 << 20

log = logging.getLogger(__name__)


async def _service(request: Request) -> Collector:
    collector: Collector = request.app.state.collector
    return collector


Service = Annotated[Collector, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="rows on a page")]
Cursor = Annotated[str | None, Query(description="`next` of the page before")]


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as JSON. A 503 says when to come again."""
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def create(collector: Collector) -> FastAPI:
    """The application. `app.state.closing` (asyncio.Event) ends waiting polls when it is set."""
    app = FastAPI(
        title="Ratchet collector", openapi_url="/api/openapi.json", docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.collector = collector
    for router in (registry, writing, reading):
        app.include_router(router)
    app.add_middleware(BodyLimit)
    app.add_exception_handler(RatchetError, _on_ratchet_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_crash)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> Any:
    app.state.closing = asyncio.Event()
    yield


registry = APIRouter(prefix="/api", tags=["registry"])


@registry.get("/slots")
def slots(collector: Service) -> Response:
    """Every slot with what is live."""
    return json_response({"slots": collector.slots()})


@registry.get("/slots/discover")
def discover(
    collector: Service,
    sample: Annotated[int, Query(ge=1, le=MAX_SAMPLE, description="calls to look at, the newest first")] = 4_000,
    least_calls: Annotated[int, Query(ge=1, description="calls that must have sent a prompt")] = 1,
) -> Response:
    """Templates of the prompts that no slot knows."""
    return json_response(collector.discover(sample, least_calls))


@registry.post("/slots/{slot}/adopt", status_code=201)
def adopt(collector: Service, slot: str, body: bodies.AdoptBody) -> Response:
    """Make a slot of a proposal or a template; it is live at once and changes nothing."""
    return json_response(collector.adopt(slot, body), 201)


@registry.get("/slots/{slot}/versions")
def versions(collector: Service, slot: str) -> Response:
    """The versions of a slot, ascending."""
    return json_response({"slot": slot, "versions": collector.versions(slot)})


@registry.get("/slots/{slot}/versions/{version}")
def version(collector: Service, slot: str, version: int) -> Response:
    """One version."""
    return json_response(collector.version(slot, version))


@registry.post("/slots/{slot}/versions", status_code=201)
def add_version(collector: Service, slot: str, body: bodies.VersionBody) -> Response:
    """Register a version; the same content again gives the existing number."""
    return json_response(collector.add_version(slot, body), 201)


@registry.post("/slots/{slot}/candidates", status_code=201)
def add_candidate(collector: Service, slot: str, body: bodies.CandidateBody) -> Response:
    """Register a prompt under search."""
    return json_response({"slot": slot, "candidate": collector.add_candidate(slot, body.template)}, 201)


@registry.get("/slots/{slot}/candidates/{candidate}")
def candidate(collector: Service, slot: str, candidate: str) -> Response:
    """The template of a candidate."""
    template = collector.candidate(slot, candidate)
    return json_response({"slot": slot, "candidate": candidate, "template": template})


@registry.post("/slots/{slot}/promote")
def promote(collector: Service, slot: str, body: bodies.PromoteBody) -> Response:
    """Deal new episodes to a version."""
    return json_response({"revision": collector.promote(slot, body)})


@registry.post("/slots/{slot}/hold")
def hold(collector: Service, slot: str, body: bodies.HoldBody) -> Response:
    """Have engines serve an adapter version for calls that are pinned to it."""
    return json_response({"served": collector.hold(slot, body)})


@registry.post("/slots/{slot}/rollback")
def rollback(collector: Service, slot: str, body: bodies.DecisionBody | None = None) -> Response:
    """Back to what was live before the last promote."""
    return json_response({"revision": collector.rollback(slot, body or bodies.DecisionBody())})


@registry.get("/keys")
def keys(collector: Service) -> Response:
    """Every key, without its secret."""
    return json_response(collector.keys())


@registry.post("/keys", status_code=201)
def create_key(collector: Service, body: bodies.KeyBody) -> Response:
    """Make a key. The answer is the only place where its secret ever stands."""
    return json_response(collector.create_key(body), 201)


@registry.delete("/keys/{key}")
def revoke_key(collector: Service, key: str) -> Response:
    """Revoke the key of that id or name; workers refuse it within a second."""
    return json_response(collector.revoke_key(key))


@registry.get("/slots/{slot}/deployments")
def log_of_slot(collector: Service, slot: str) -> Response:
    """The audit log of a slot, ascending."""
    collector.versions(slot)
    return json_response({"slot": slot, "deployments": collector.deployments(slot)})


@registry.get("/deployments")
async def deployments(
    collector: Service,
    request: Request,
    after: Annotated[int | None, Query(description="the revision that the caller has")] = None,
    serial: Annotated[int | None, Query(description="the serial that the caller has")] = None,
    seconds: Annotated[float, Query(alias="timeout", ge=0, le=60, description="longest wait")] = polling.MAX_SECONDS,
) -> Response:
    """The registry's snapshot. With `after`, waits (<= 25 s) until it is another than the caller's."""
    return json_response(await polling.poll(collector, request.app.state.closing, after, serial, seconds))


writing = APIRouter(tags=["writing"])


@writing.post("/reward", status_code=202)
async def reward(collector: Service, request: Request) -> Response:
    """One reward or an array of them; answered once on disk."""
    return json_response(await run_in_threadpool(collector.reward, rewards.read(await request.body())), 202)


@writing.post("/api/events", status_code=202)
async def events(collector: Service, request: Request) -> Response:
    """Job and evaluation events; answered once on disk."""
    return json_response({"accepted": await run_in_threadpool(collector.events, await _body(request))}, 202)


@writing.put("/api/segments/{name}")
async def segment(collector: Service, name: str, request: Request) -> Response:
    """A part of a segment of another host's journal; answered once on disk: 200 whole, 202 more parts to come."""
    part = Part.read(request.headers)
    stored = await run_in_threadpool(collector.inbox.take, name, part, await request.body())
    return json_response({"segment": name, "stored": stored}, 200 if stored else 202)


@writing.post("/api/flush")
def flush(collector: Service) -> Response:
    """Wait until what was journalled before can be read."""
    return json_response(collector.flush())


@writing.post("/api/import")
async def import_rows(collector: Service, request: Request) -> Response:
    """Rows of another store; those that are known already are left alone. Answered once on disk."""
    return json_response(await run_in_threadpool(collector.import_rows, await _body(request)))


@writing.post("/api/store/compact")
def compact(collector: Service, body: bodies.CompactBody) -> Response:
    """Move old days of the journal to Parquet files."""
    return json_response(collector.compact(body.days, body.dry_run))


@writing.post("/api/store/retain")
def retain(collector: Service, body: bodies.RetainBody) -> Response:
    """Delete the spans, payloads and rewards of older days."""
    return json_response(collector.retain(body.days, body.dry_run))


reading = APIRouter(prefix="/api", tags=["reading"])


@reading.post("/export")
@pooled
def export(collector: Service, body: bodies.ExportBody) -> Response:
    """Whole episodes with all their rows, newest first."""
    return json_response(collector.export(body))


@reading.get("/episodes")
@pooled
def episodes(
    collector: Service,
    limit: Limit = 50,
    cursor: Cursor = None,
    slot: str | None = None,
    version: int | None = None,
    min_reward: float | None = None,
    max_reward: float | None = None,
    status: Literal["ok", "error"] | None = None,
) -> Response:
    """Episodes, newest first."""
    where = {"slot": slot, "version": version, "min_reward": min_reward, "max_reward": max_reward}
    return json_response(collector.episodes(limit, cursor, **where, status=status))


@reading.get("/episodes/{episode_id}")
@pooled
def episode(collector: Service, episode_id: str) -> Response:
    """One episode: its steps in order, and its rewards."""
    return json_response(collector.episode(episode_id))


@reading.get("/episodes/{episode_id}/otlp")
@pooled
def episode_otlp(collector: Service, episode_id: str) -> Response:
    """The calls of an episode as OTLP/JSON, to post to any OpenTelemetry backend."""
    return json_response(collector.episode_otlp(episode_id))


@reading.get("/spans")
@pooled
def spans(
    collector: Service,
    limit: Limit = 50,
    cursor: Cursor = None,
    episode_id: str | None = None,
    slot: str | None = None,
    version: int | None = None,
    status: Literal["ok", "error", "cancelled"] | None = None,
) -> Response:
    """Calls without their payloads, newest first."""
    where = {"episode_id": episode_id, "slot": slot, "version": version, "status": status}
    return json_response(collector.spans(limit, cursor, **where))


@reading.get("/rewards/unmatched")
@pooled
def unmatched(collector: Service, limit: Limit = 50) -> Response:
    """Rewards whose target has not been seen, newest first."""
    return json_response({"rewards": collector.unmatched_rewards(limit)})


@reading.get("/jobs")
@pooled
def jobs(collector: Service) -> Response:
    """The latest state of every job, newest first."""
    return json_response({"jobs": collector.jobs()})


@reading.get("/jobs/{job_id}")
@pooled
def job(collector: Service, job_id: str) -> Response:
    """The latest state of a job."""
    return json_response(collector.job(job_id))


@reading.get("/evaluations")
@pooled
def evaluations(collector: Service, job_id: str | None = None) -> Response:
    """Paid rollouts, by time."""
    return json_response({"evaluations": collector.evaluations(job_id)})


@reading.post("/query")
@pooled
def query(collector: Service, body: bodies.QueryBody, request: Request) -> Response:
    """One SELECT, as JSON or as an Arrow IPC stream (`Accept: application/vnd.apache.arrow.stream`). What does not fit
    into one answer is had with `cursor`: the `next` of the answer, or its header `x-ratchet-next`."""
    if body.cursor is not None:
        table = collector.more(body.cursor, body.page)
    else:
        table = collector.query(body.sql or "", body.limit, body.page)
    if ARROW in request.headers.get("accept", ""):
        headers = {"x-ratchet-truncated": str(table.truncated).lower()}
        if table.next is not None:
            headers["x-ratchet-next"] = table.next
        return Response(table.arrow(), media_type=ARROW, headers=headers)
    return json_response(table.json())


@reading.get("/identity")
def identity(collector: Service) -> Response:
    """Whose collector this is."""
    return json_response(collector.identity())


@reading.get("/stats")
def stats(collector: Service) -> Response:
    """Counters."""
    return json_response(collector.stats())


async def _body(request: Request) -> Any:
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        raise BadInput("body: is not JSON", param="body") from None


class BodyLimit:
    """Reads a body before anything else does, and refuses more than MAX_BODY_BYTES with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        message: Message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                refusal = BadInput(
                    f"the body is larger than {MAX_BODY_BYTES >> 20} MB", param="body", code="body_too_large"
                )
                await json_response(refusal.envelope(), 413)(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def _on_ratchet_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RatchetError):
        raise error
    return json_response(error.envelope(), error.status)


async def _on_invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return json_response(bodies.explain(error.errors()).envelope(), BadInput.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    told = RatchetError(f"{request.method} {request.url.path}: {error.detail}", code=_CODES.get(error.status_code))
    return json_response(told.envelope(), error.status_code)


async def _on_crash(request: Request, error: Exception) -> Response:
    """The boundary of the HTTP API: what was not foreseen is logged, and answered in the same envelope."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return json_response(RatchetError("internal error; see the collector's log").envelope(), 500)


_CODES = {404: "not_found", 405: "method_not_allowed"}
