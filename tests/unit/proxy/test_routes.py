"""The cold routes, over ASGI, with a stand-in for the collector on a unix socket and a scripted upstream."""

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from collector.journal import Journal, decode
from collector.settings import Key, ModelEntry, Server, Settings
from collector.settings import Upstream as UpstreamSettings
from proxy.app import App
from proxy.auth import Guard
from proxy.link import Link
from proxy.routes import KNOWN, cold, ops
from proxy.routes.base import Context
from proxy.server import CONNECTION
from proxy.table import Table
from proxy.upstream import Upstream
from proxy.versions import Snapshot, Versions
from tests.fake_upstream import FakeUpstream, error_reply, json_reply

KEYS = tuple(Key(name=scope, key=f"{scope}-key", scopes=frozenset({scope})) for scope in ("agent", "reward", "admin"))  # type: ignore[arg-type]
LOADER = {"lag_s": 0.0, "lines": 7, "quarantined": 1, "unreadable": 0}
STATS = {"revision": 0, "spans": 5, "loader": LOADER}


class Collector:
    """Stands in for the collector: remembers requests, answers what it was told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.stats: dict[str, Any] = STATS
        self.sent: dict[str, Any] = {}
        self.status = 200
        self.break_off = False
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.raw_path, body, dict(request.headers)))
        if request.path == "/api/stats":
            return web.json_response(self.stats)
        if request.path == "/shipper":
            return web.json_response(self.sent)
        if request.path == "/api/slow":
            try:
                await asyncio.sleep(30)
            finally:
                self.left.set()
        response = web.StreamResponse(status=self.status, headers={"content-type": "application/x-test"})
        await response.prepare(request)
        await response.write(b"first ")
        if self.break_off:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(b"second")
        return response


Talk = Callable[[httpx.AsyncClient, Context, Collector], Awaitable[None]]


def talk(act: Talk, directory: Path, settings: Settings | None = None, *, collector: bool = True) -> None:
    """Run `act` against a whole worker's application: the hot routes in front of the cold ones."""

    async def main() -> None:
        settings_ = settings or Settings()
        fake = Collector()
        with tempfile.TemporaryDirectory() as short, Table(directory / "table", 64) as table:
            runner = web.AppRunner(_application(fake), handler_cancellation=True)
            await runner.setup()
            if collector:
                await web.UnixSite(runner, f"{short}/c.sock").start()
            link = Link(Path(short, "c.sock"))
            journal = Journal(directory / "journal", "test")
            upstream = Upstream(settings_, {})
            versions = Versions(link.snapshot, directory / "deployments.json")
            context = Context(settings_, journal, versions, upstream, link, Guard(settings_.server), Path(short))
            app = App(settings_, journal, versions, upstream, table, cold(context))
            transport = httpx.ASGITransport(app)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4000") as client:
                    await act(client, context, fake)
            finally:
                await link.close()
                await upstream.close()
                await runner.cleanup()
                journal.close()

    asyncio.run(main())


def _application(fake: Collector) -> web.Application:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", fake.answer)
    return application


def journalled(directory: Path) -> list[dict[str, Any]]:
    files = sorted((directory / "journal").glob("*.ndjson"))
    return [decode(line) for file in files for line in file.read_bytes().splitlines()]


def test_a_reward_is_on_disk_when_it_is_acknowledged(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.post("/reward", json={"episode_id": "e", "value": 1, "idempotency_key": "k"})
        assert answer.status_code == 202
        assert context.journal.synced == 1
        again = await client.post("/reward", json={"episode_id": "e", "value": 1, "idempotency_key": "k"})
        assert again.json() == answer.json()

    talk(act, tmp_path, collector=False)
    first, second = journalled(tmp_path)
    assert first["event"] == "reward" and first["value"] == 1.0
    assert first["reward_id"] == second["reward_id"]


def test_an_array_of_rewards_answers_an_array(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.post("/reward", json=[{"episode_id": f"e{i}", "value": i} for i in range(3)])
        assert answer.status_code == 202
        assert len({one["reward_id"] for one in answer.json()}) == 3

    talk(act, tmp_path)
    assert [line["target_id"] for line in journalled(tmp_path)] == ["e0", "e1", "e2"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"episode_id": "e"}', "value"),
        (b'{"episode_id": "e", "value": "1"}', "value"),
        (b'[{"episode_id": "e", "value": 1}, {"value": 1}]', "[1].episode_id"),
        (b'{"episode_id": "e", "value": NaN}', "value"),
        (b'[{"episode_id": "e", "value": -Infinity}]', "[0].value"),
        (b'{"episode_id": "e", "value": 1e999}', "value"),
        (b"not json", "body"),
        (b"[" * 100_000, "body"),
        ('{"episode_id": "e", "value": 1}'.encode("utf-16"), "body"),
        (b"[]", "body"),
    ],
)
def test_bad_rewards_name_the_field_and_store_nothing(tmp_path: Path, body: bytes, param: str) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.post("/reward", content=body)
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["type"] == "ratchet_error"

    talk(act, tmp_path)
    assert journalled(tmp_path) == []


def test_a_reward_that_the_disk_refuses_is_a_503(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        context.journal.close()
        answer = await client.post("/reward", json={"episode_id": "e", "value": 1})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert answer.headers["retry-after"] == "1"
        health = await client.get("/healthz")
        assert health.status_code == 503
        assert "journal" in health.json()["problems"][0]

    talk(act, tmp_path)


def test_a_reward_larger_than_the_limit_is_a_413(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.post("/reward", content=b"[" + b" " * 20_000)
        assert answer.status_code == 413

    talk(act, tmp_path, Settings(server=Server(max_body_mb=0.01)))


@pytest.mark.parametrize("prefix", ["", "/e/episode-1", "/e/episode-1/with/slot@2"])
def test_the_api_is_forwarded_as_it_is(tmp_path: Path, prefix: str) -> None:
    async def act(client: httpx.AsyncClient, context: Context, collector: Collector) -> None:
        collector.status = 201
        answer = await client.request(
            "PATCH",
            f"{prefix}/api/slots/a%2Fb?x=1&y=%20",
            content=b"\x00bytes",
            headers={"accept": "text/x", "cookie": "secret"},
        )
        assert (answer.status_code, answer.content) == (201, b"first second")
        assert answer.headers["content-type"] == "application/x-test"
        method, path, body, headers = collector.requests[0]
        assert (method, path, body) == ("PATCH", "/api/slots/a%2Fb?x=1&y=%20", b"\x00bytes")
        assert headers["Accept"] == "text/x"
        assert "Cookie" not in headers

    talk(act, tmp_path)


def test_keys_do_not_travel_to_the_collector(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, collector: Collector) -> None:
        await client.get("/api/slots", headers={"authorization": "Bearer admin-key"})
        assert "admin-key" not in str(collector.requests)

    talk(act, tmp_path, Settings(server=Server(keys=KEYS)))


def test_the_api_says_that_the_collector_is_down(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.get("/api/slots")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "collector_unavailable"
        assert "calls are still served" in answer.json()["error"]["message"]

    talk(act, tmp_path, collector=False)


def test_an_answer_that_the_collector_breaks_off_is_not_ended_cleanly(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, collector: Collector) -> None:
        collector.break_off = True
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        messages = iter([{"type": "http.request", "body": b""}])

        async def receive() -> Any:
            message = next(messages, None)
            return message if message is not None else await asyncio.Event().wait()

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/x",
            "raw_path": b"/api/x",
            "query_string": b"",
            "headers": [],
        }
        await cold(context)(scope, receive, send)
        assert sent[0]["status"] == 200
        assert not any(message.get("more_body") is not True for message in sent[1:])

    talk(act, tmp_path)


def test_a_client_that_leaves_ends_the_collectors_work(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, collector: Collector) -> None:
        connection = SimpleNamespace(disconnected=False, on_gone=None)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def leave() -> None:
            while not collector.requests:
                await asyncio.sleep(0.005)
            connection.on_gone()

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there to read")

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/slow",
            "raw_path": b"/api/slow",
            "query_string": b"",
            "headers": [],
            "extensions": {CONNECTION: connection},
        }
        leaving = asyncio.ensure_future(leave())
        await asyncio.wait_for(cold(context)(scope, receive, send), 5)
        await leaving
        assert await asyncio.wait_for(collector.left.wait(), 5)

    talk(act, tmp_path)


def configured(upstream: str, *names: str) -> Settings:
    entries = tuple(ModelEntry(model_name=name, litellm_params={"model": f"openai/{name}"}) for name in names)
    return Settings(upstream=UpstreamSettings(default=upstream), model_list=entries)


def test_without_configured_models_the_upstreams_list_is_passed_on(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        for path in ("/v1/models", "/models", "/e/some/v1/models"):
            answer = await client.get(path, headers={"authorization": "Bearer sk-client"})
            assert [model["id"] for model in answer.json()["data"]] == ["fake-model"]
        assert upstream.requests[0].headers["authorization"] == "Bearer sk-client"
        assert upstream.requests[0].path == "/v1/models"
        await client.get("/v1/models/org/name")
        assert upstream.requests[-1].path == "/v1/models/org/name"

    with FakeUpstream() as upstream:
        talk(act, tmp_path, configured(upstream.url))


def test_configured_models_come_first_and_once(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        listed = (await client.get("/v1/models")).json()
        assert [(model["id"], model["owned_by"]) for model in listed["data"]] == [
            ("mine", "ratchet"),
            ("fake-model", "ratchet"),
            ("other", "fake"),
        ]
        assert (await client.get("/v1/models/mine")).json()["owned_by"] == "ratchet"

    data = [{"id": name, "object": "model", "owned_by": "fake"} for name in ("fake-model", "other")]
    with FakeUpstream(json_reply({"object": "list", "data": data})) as upstream:
        talk(act, tmp_path, configured(upstream.url, "mine", "fake-model"))


def test_a_failing_upstream_leaves_the_configured_models(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        upstream.reply(error_reply(401, "no key", "invalid_request_error"))
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["mine"]

    with FakeUpstream() as upstream:
        talk(act, tmp_path, configured(upstream.url, "mine"))
    talk(nobody_there, tmp_path, configured("http://127.0.0.1:9/v1", "mine"))


async def nobody_there(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["mine"]


def test_a_failing_upstream_and_no_configured_model_is_the_upstreams_error(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        upstream.reply(error_reply(401, "no key", "invalid_request_error"))
        answer = await client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["message"]) == (401, "no key")

    async def unreachable(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        assert (await client.get("/v1/models")).status_code == 502

    with FakeUpstream() as upstream:
        talk(act, tmp_path, configured(upstream.url))
    talk(unreachable, tmp_path, configured("http://127.0.0.1:9/v1"))


def test_healthz_asks_nobody_and_says_when_it_drains(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        assert (await client.get("/healthz")).status_code == 200
        context.draining = True
        answer = await client.get("/healthz")
        assert answer.status_code == 503
        assert "draining" in answer.json()["problems"][0]

    talk(act, tmp_path, collector=False)


def test_readyz_says_what_is_missing(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, collector: Collector) -> None:
        assert (await client.get("/readyz")).json() == {
            "status": "ready",
            "problems": [],
            "revision": 0,
            "lag_seconds": 0.0,
        }
        collector.stats = {"revision": 3, "loader": {"lag_s": 31.0}}
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert len(answer.json()["problems"]) == 2
        context.versions.current = Snapshot(revision=3)
        collector.stats = {"revision": 3, "loader": {"lag_s": 1.0}}
        assert (await client.get("/readyz")).status_code == 200

    async def down(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        assert (await client.get("/readyz")).status_code == 503

    talk(act, tmp_path)
    talk(down, tmp_path, collector=False)


def test_a_host_whose_collector_is_elsewhere_shows_what_waits_for_it(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, fake: Collector) -> None:
        fake.sent = {"segments": 3, "bytes": 300, "packed": 60, "failures": 1}
        (tmp_path / "journal" / "1-w0-1-00.ndjson").write_bytes(b"x" * 70)
        assert (await client.get("/healthz")).json()["backlog"]["bytes"] == 70
        assert (await client.get("/readyz")).status_code == 200
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families((await client.get("/metrics")).text)
            for sample in family.samples
        }
        assert values["ratchet_shipper_backlog_bytes"] == 70
        assert values["ratchet_shipper_packed_bytes_total"] == 60
        assert "ratchet_store_spans" not in values, "the collector tells that"
        os.utime(tmp_path / "journal" / "1-w0-1-00.ndjson", (1, 1))
        (tmp_path / "journal" / "refused").mkdir()
        (tmp_path / "journal" / "refused" / "0-w0-1-00.ndjson").touch()
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        waiting, refused = answer.json()["problems"]
        assert "1 segments wait" in waiting
        assert "journal/refused" in refused

    talk(act, tmp_path, Settings.model_validate({"store": {"data_dir": tmp_path, "collector": "http://127.0.0.1:9"}}))


def test_metrics_are_prometheus_text_of_all_workers(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        (context.runtime / "state.json").write_bytes(orjson.dumps({"restarts": {"worker1": 2}}))
        ops.publish(context)
        (context.runtime / "worker0.prom").rename(context.runtime / "worker1.prom")
        text = (context.runtime / "worker1.prom").read_text().replace('worker="0"', 'worker="1"')
        (context.runtime / "worker1.prom").write_text(text)
        await client.post("/reward", json={"episode_id": "e", "value": 1})
        ops.Count(context).update()
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        assert samples["ratchet_journal_lines_total", (("fate", "written"), ("worker", "0"))] >= 1
        assert samples["ratchet_restarts_total", (("process", "worker1"),)] == 2
        assert samples["ratchet_store_lines_total", (("fate", "loaded"),)] == 7
        assert samples["ratchet_store_lines_total", (("fate", "quarantined"),)] == 1
        assert samples["ratchet_store_lag_seconds", ()] == 0
        assert {labels for name, labels in samples if name == "ratchet_calls_in_flight"} == {
            (("worker", "0"),),
            (("worker", "1"),),
        }
        assert "gen_ai_client_operation_duration_seconds" in answer.text
        kinds = re.findall(r"^# TYPE (\S+)", answer.text, re.MULTILINE)
        assert len(kinds) == len(set(kinds))

    talk(act, tmp_path, Settings(server=Server(workers=2)))


def test_the_root_says_what_this_is(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        assert (await client.get("/")).json()["use"] == "OPENAI_BASE_URL=http://127.0.0.1:4000/v1"

    talk(act, tmp_path)


def test_the_root_tells_anybody_so_no_password(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.get("/")
        assert answer.json()["upstream"] == "http://llm.example:8000/v1"
        assert "hunter2" not in answer.text

    talk(act, tmp_path, Settings(upstream=UpstreamSettings(default="http://me:hunter2@llm.example:8000/v1")))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completion", "/chat/completions"),
        ("/rewards", "/reward"),
        ("/health", "/healthz"),
        ("/apis/slots", "/api/slots"),
        ("/xyz/zyx", "OPENAI_BASE_URL"),
    ],
)
def test_an_unknown_path_names_the_nearest_route(tmp_path: Path, path: str, hint: str) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.get(path)
        assert answer.status_code == 404
        assert hint in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "ratchet_error"

    talk(act, tmp_path)


def test_a_wrong_method_says_which_is_right(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.get("/reward")
        assert answer.status_code == 405
        assert "POST" in answer.json()["error"]["message"]

    talk(act, tmp_path)


@pytest.mark.parametrize("path", ["/v1/responses", "/"])
def test_a_websocket_is_refused_clearly(tmp_path: Path, path: str) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        answer = await client.get(path, headers={"connection": "upgrade", "upgrade": "websocket"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "websocket_unsupported"

    talk(act, tmp_path)


def test_an_unforeseen_failure_is_an_envelope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        monkeypatch.setattr(context.link, "stats", lambda: 1 / 0)
        transport = httpx.ASGITransport(cold(context), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4000") as lenient:
            answer = await lenient.get("/readyz")
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "ratchet_error"

    talk(act, tmp_path)


# Route x key -> allowed? None: no key at all.
MATRIX = {
    ("POST", "/reward"): {"reward", "admin"},
    ("POST", "/v1/reward"): {"reward", "admin"},
    ("POST", "/v1/traces"): {"agent", "admin"},
    ("POST", "/v1/logs"): {"agent", "reward", "admin"},
    ("GET", "/api/slots"): {"admin"},
    ("GET", "/api/keys"): {"admin"},
    ("POST", "/api/keys"): {"admin"},
    ("DELETE", "/api/keys/key-1"): {"admin"},
    ("POST", "/api/slots/x/promote"): {"admin"},
    ("GET", "/v1/models"): {"agent", "admin"},
    ("GET", "/v1/models/mine"): {"agent", "admin"},
    ("GET", "/models"): {"agent", "admin"},
    ("GET", "/models/mine"): {"agent", "admin"},
    ("GET", "/metrics"): {"admin"},
    ("GET", "/healthz"): {None, "unknown", "agent", "reward", "admin"},
    ("GET", "/readyz"): {None, "unknown", "agent", "reward", "admin"},
    ("GET", "/"): {None, "unknown", "agent", "reward", "admin"},
}


def test_every_route_answers_to_its_scopes_and_to_no_other(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        for (method, path), allowed in MATRIX.items():
            for key in (None, "unknown", "agent", "reward", "admin"):
                headers = {"authorization": f"Bearer {key}-key"} if key else {}
                body = json.dumps({"episode_id": "e", "value": 1}) if path.endswith("/reward") else None
                answer = await client.request(method, path, headers=headers, content=body)
                refused = 401 if key in (None, "unknown") else 403
                assert (answer.status_code != refused) == (key in allowed), (method, path, key, answer.text)

    settings = configured("http://127.0.0.1:9/v1", "mine").model_copy(update={"server": Server(keys=KEYS)})
    talk(act, tmp_path, settings)


def test_the_matrix_knows_every_cold_route(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _: Collector) -> None:
        served = {re.sub(r"\{.*", "", route.path) for route in cold(context).routes}  # type: ignore[attr-defined]
        tested = {path for _, path in MATRIX}
        assert all(any(path.startswith(prefix.rstrip("/")) for path in tested) for prefix in served)
        assert "/reward" in KNOWN

    talk(act, tmp_path)
