import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from collector import bodies, front
from collector.service import Collector
from tests.unit.collector.rows import settings


@contextlib.asynccontextmanager
async def started(collector: Collector) -> AsyncIterator[tuple[front.Front, httpx.AsyncClient]]:
    app = front.create(collector)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
            yield app.state.front, client


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(settings(tmp_path, slots={"s": {"template": "x"}}), background=False)
    yield made
    made.close()


@pytest.mark.parametrize("query", ["", "?after=0&serial=0&timeout=20", "?timeout=0.5"])
def test_a_worker_s_poll_needs_no_api(collector: Collector, query: str) -> None:
    async def run() -> None:
        async with started(collector) as (served, client):
            found = await client.get(f"/api/deployments{query}")
            assert found.json() == collector.snapshot()
            assert found.headers["content-type"] == "application/json"
            assert served._made is None

    asyncio.run(run())


def test_a_poll_that_waits_is_ended_by_a_change(collector: Collector) -> None:
    async def run() -> None:
        async with started(collector) as (_, client):
            now = collector.snapshot()
            query = f"?after={now['revision']}&serial={now['serial']}&timeout=20"
            waiting = asyncio.create_task(client.get(f"/api/deployments{query}"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await asyncio.to_thread(collector.add_version, "s", bodies.VersionBody(template="y"))
            assert (await waiting).json() == collector.snapshot() != now

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "status"), [("/api/slots", 200), ("/api/deployments?after=x", 422), ("/api/deployments?timeout=61", 422)]
)
def test_all_else_is_the_api_s(collector: Collector, path: str, status: int) -> None:
    async def run() -> None:
        async with started(collector) as (served, client):
            both = await asyncio.gather(client.get(path), client.get(path))
            assert [one.status_code for one in both] == [status, status]
            assert served._made is not None

    asyncio.run(run())


def test_a_start_imports_no_more_than_it_needs() -> None:
    heavy = "('fastapi', 'httpx', 'pyarrow', 'numpy', 'opentelemetry', 'litellm')"
    script = f"import sys, collector.__main__, collector.front; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
