"""A host whose collector is elsewhere: what waits, what is sent and what is answered meanwhile.

The collector is a stand-in that keeps segments with the real inbox, and can be told to answer otherwise.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from collector import backlog, shipper
from collector.client import Local
from collector.errors import Conflict, RatchetError
from collector.inbox import Inbox
from collector.journal import Journal, decode
from collector.maintenance import rebuild
from collector.outpost import Outpost, ignored
from collector.part import PART_BYTES, Part
from collector.settings import Settings
from collector.shipper import Shipper, Unsent, host_id, sent_name
from tests.unit.collector.rows import call, settings, write

KEY = "the-key"


class Collector:
    """Answers as the collector's server does. `fail` (status, headers, body) is answered instead, while it is set."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.url = ""
        self.inbox = Inbox(folder, self)
        self.fail: tuple[int, dict[str, str], dict[str, Any]] | None = None
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.left = asyncio.Event()

    def is_loaded(self, name: str) -> bool:
        return False

    @property
    def calls(self) -> list[str]:
        """The span ids of what was stored, sorted."""
        found = [path.read_bytes().splitlines() for path in self.folder.glob("*.ndjson")]
        return sorted(decode(line)["span_id"] for some in found for line in some)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append((request.method, request.raw_path, dict(request.headers)))
        if self.fail is not None:
            status, headers, told = self.fail
            return web.json_response(told, status=status, headers=headers)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            error = {
                "message": "a Ratchet key is needed",
                "type": "ratchet_error",
                "param": None,
                "code": "unauthorized",
            }
            return web.json_response({"error": error}, status=401)
        if request.path.startswith("/api/segments/"):
            return await self._take(request, body)
        if request.path == "/api/slow":
            try:
                await asyncio.sleep(30)
            finally:
                self.left.set()
        if request.path == "/api/flush":
            return web.json_response({"loaded": len(self.calls), "pending": 0})
        return web.json_response({"path": request.raw_path, "body": body.decode()}, headers={"x-of": "the collector"})

    async def _take(self, request: web.Request, body: bytes) -> web.Response:
        name = request.path.rpartition("/")[2]
        try:
            stored = await asyncio.to_thread(self.inbox.take, name, Part.read(request.headers), body)
        except RatchetError as error:
            return web.json_response(error.envelope(), status=error.status)
        return web.json_response({"segment": name, "stored": stored}, status=200 if stored else 202)


@contextlib.asynccontextmanager
async def collecting(folder: Path) -> AsyncIterator[Collector]:
    collector = Collector(folder)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", collector.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def far(data_dir: Path, url: str, key: str | None = KEY) -> Settings:
    return settings(data_dir, store={"collector": url, "collector_key": key})


@contextlib.asynccontextmanager
async def standing_in(given: Settings) -> AsyncIterator[tuple[Outpost, httpx.AsyncClient]]:
    """An outpost and a client of it, as workers are."""
    outpost = Outpost(given)
    try:
        async with outpost.app.router.lifespan_context(outpost.app):
            transport = httpx.ASGITransport(outpost.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://c") as http:
                yield outpost, http
    finally:
        outpost.close()


@contextlib.asynccontextmanager
async def shipping(folder: Path, url: str) -> AsyncIterator[Shipper]:
    """A shipper that sends when it is told to."""
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session:
        yield Shipper(folder, "0a1b2c3d", session, url)


def spans(*numbers: int) -> list[str]:
    return [call(number).span_id for number in numbers]


async def until(condition: Callable[[], Awaitable[object] | object]) -> None:
    async with asyncio.timeout(20):
        while True:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.01)


def test_what_is_sealed_is_sent_once_and_leaves_the_journal(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            for number in range(1, 10):
                write(tmp_path, call(number))
            assert backlog.measure(tmp_path / "journal").segments == 9
            assert await here.send_once() == 9
            assert there.calls == spans(*range(1, 10))
            assert backlog.measure(tmp_path / "journal") == backlog.Backlog()
            assert await here.send_once() == 0
            assert here.counters.segments == 9
            assert here.counters.packed < here.counters.bytes

    asyncio.run(story())


def test_a_long_segment_travels_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shipper.parts
    monkeypatch.setattr(shipper, "parts", lambda path: whole(path, 500))

    async def story() -> None:
        write(tmp_path, *(call(number) for number in range(1, 5)))
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            await here.send_once()
            assert there.calls == spans(1, 2, 3, 4)
            assert len(there.asked) > 3

    asyncio.run(story())


def test_a_segment_of_which_no_part_was_the_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inbox, "take", lambda *_: False)

    async def story() -> None:
        write(tmp_path, call(1))
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            with pytest.raises(Unsent, match="does not say that it is stored"):
                await here.send_once()
            assert backlog.measure(tmp_path / "journal").segments == 1

    asyncio.run(story())


def test_a_sender_killed_before_it_could_delete_sends_again_and_nothing_is_doubled(tmp_path: Path) -> None:
    async def story() -> None:
        write(tmp_path, call(1))
        (path,) = (tmp_path / "journal").glob("*.ndjson")
        content = path.read_bytes()
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            await here.send_once()
            path.write_bytes(content)
            await here.send_once()
            assert there.calls == spans(1)
            assert there.inbox.counters.known == 1
            assert not path.exists()

    asyncio.run(story())


def test_what_the_collector_refuses_is_set_aside_and_shown_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        write(tmp_path, ("deployment", {"slot": "a"}), role="collector")
        write(tmp_path, call(1))
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            await here.send_once()
            assert there.calls == spans(1)
            waiting = backlog.measure(tmp_path / "journal")
            assert (waiting.segments, waiting.refused) == (0, 1)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("answer", "after", "said"),
    [
        ((503, {"retry-after": "7"}, {"error": {"message": "no space", "code": "unavailable"}}), 7.0, "no space"),
        ((429, {"retry-after": "9999"}, {}), 60.0, "429"),
        ((503, {"retry-after": "Mon, 23 Nov 2026 07:28:00 GMT"}, {}), 0.0, "503"),
        ((404, {}, {"error": {"message": "there is no such route", "code": "not_found"}}), 0.0, "no such route"),
        ((200, {}, {"ok": True}), 0.0, "no collector"),
        ((200, {}, {"segment": "another", "stored": True}), 0.0, "no collector"),
        ((422, {}, {"error": {"message": "odd", "code": "invalid_input"}}), 0.0, "odd"),
        ((403, {}, {"error": {"message": "lacks the scope", "code": "forbidden"}}), 0.0, "store.collector_key"),
    ],
)
def test_any_other_answer_leaves_the_segment_where_it_is(
    tmp_path: Path, answer: tuple[int, dict[str, str], dict[str, Any]], after: float, said: str
) -> None:
    async def story() -> None:
        write(tmp_path, call(1))
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            there.fail = answer
            with pytest.raises(Unsent, match=said) as caught:
                await here.send_once()
            assert caught.value.after == after
            assert backlog.measure(tmp_path / "journal").segments == 1
            there.fail = None
            await here.send_once()
            assert there.calls == spans(1)

    asyncio.run(story())


def test_a_segment_that_cannot_be_read_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        write(tmp_path, call(1))
        (tmp_path / "journal" / "1795400000000000000-w0-1-00000000.ndjson").mkdir()
        async with collecting(tmp_path / "there") as there, shipping(tmp_path / "journal", there.url) as here:
            await here.send_once()
            assert there.calls == spans(1)
            assert here.counters.unreadable == 1
            assert await here.send_once() == 0, "not tried again at once"

    asyncio.run(story())


def test_no_two_hosts_send_under_one_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = host_id(tmp_path / "a"), host_id(tmp_path / "b")
    assert first != second
    assert host_id(tmp_path / "a") == first
    assert sent_name("17-w0-1-ab", first) == f"17-{first}-w0-1-ab"


@pytest.mark.parametrize("found", [b"", b"\n", b"Host", b"a-b", b"\xff", b"0" * 17])
def test_an_id_that_the_collector_would_refuse_is_told_by_its_file(tmp_path: Path, found: bytes) -> None:
    (tmp_path / "host").write_bytes(found)
    with pytest.raises(Conflict, match=r"host must hold 1 to 16 of 0-9 a-z.*restore it"):
        Outpost(far(tmp_path, "http://127.0.0.1:9"))
    (tmp_path / "host").write_text("0a1b2c3d\n")
    assert host_id(tmp_path) == "0a1b2c3d"
    Outpost(far(tmp_path, "http://127.0.0.1:9")).close()


def test_an_id_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bytes, bool]] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced.append((path.read_bytes() if path.is_file() else b"", (tmp_path / "host").exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    made = host_id(tmp_path)
    assert synced == [(made.encode(), False), (b"", True)], "the file before its name, the directory after"


def test_whatever_goes_wrong_is_tried_again_ever_more_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def broken(_: Shipper) -> int:
        raise ValueError("odd")

    async def wait_for(waiting: Coroutine[Any, Any, object], seconds: float) -> None:
        waiting.close()
        pauses.append(seconds)
        if len(pauses) == 7:
            raise asyncio.CancelledError
        raise TimeoutError

    async def story() -> None:
        async with shipping(tmp_path, "http://127.0.0.1:9") as here:
            monkeypatch.setattr(Shipper, "send_once", broken)
            monkeypatch.setattr(asyncio, "wait_for", wait_for)
            with pytest.raises(asyncio.CancelledError):
                await here.run()
            assert (here.counters.failures, here.counters.last_error) == (7, "odd")

    asyncio.run(story())
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_part_that_does_not_pack_has_time_to_cross_a_slow_line(tmp_path: Path) -> None:
    given: list[float] = []

    class Line:
        def put(self, *_: object, timeout: aiohttp.ClientTimeout, **__: object) -> None:
            given.append(timeout.total or 0.0)
            raise TimeoutError

    async def story() -> None:
        here = Shipper(tmp_path, "0a1b2c3d", Line(), "http://127.0.0.1:9")  # type: ignore[arg-type]
        for size in (1000, PART_BYTES):
            with pytest.raises(Unsent, match="TimeoutError"):
                await here._put("17-w0-1-ab", Part(0, size, size, "0" * 64), bytes(size))

    asyncio.run(story())
    assert given[0] < 61, "a collector that hangs holds up little"
    assert given[1] > shipper._LANES * PART_BYTES * 8 / 1.5e6, "all lanes full, 1.5 Mbit/s for all of them"


def test_a_flush_sends_what_was_written_and_has_it_loaded(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there, standing_in(far(tmp_path, there.url)) as (_, http):
            write(tmp_path, call(1))
            assert (await http.post("/api/flush")).json() == {"loaded": 1, "pending": 0}
            stats = (await http.get("/shipper")).json()
            assert (stats["segments"], stats["backlog"]["segments"]) == (1, 0)

    asyncio.run(story())


def test_what_the_last_writers_left_is_sent_before_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there:
            journal = Journal(tmp_path / "journal", "worker0", seal_seconds=60)
            async with standing_in(far(tmp_path, there.url)):
                journal.append("span", call(1))
                journal.close()
            assert there.calls == spans(1)

    asyncio.run(story())


def test_a_request_is_passed_on_with_this_hosts_key_and_no_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there, standing_in(far(tmp_path, there.url)) as (_, http):
            mine = {"authorization": "Bearer the-clients-own", "x-more": "yes", "cookie": "c=1"}
            answer = await http.post("/api/x%2Fy?a=%20b", content=b"{}", headers=mine)
            assert answer.json() == {"path": "/api/x%2Fy?a=%20b", "body": "{}"}
            assert answer.headers["x-of"] == "the collector"
            _, _, headers = there.asked[-1]
            assert headers["Authorization"] == f"Bearer {KEY}"
            assert headers["x-more"] == "yes"

    asyncio.run(story())


def test_a_wrong_key_is_told_by_what_to_do(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there, standing_in(far(tmp_path, there.url, "wrong")) as (_, http):
            write(tmp_path, call(1))
            answer = await http.get("/api/slots")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "collector_refused")
            assert "store.collector_key" in answer.json()["error"]["message"]

            async def told() -> bool:
                stats = (await http.get("/shipper")).json()
                return "store.collector_key" in (stats["last_error"] or "")

            await until(told)
            assert backlog.measure(tmp_path / "journal").segments == 1

    asyncio.run(story())


def test_while_the_collector_is_away_that_is_said_and_what_waits_is_sent_when_it_is_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "first") as gone:
            pass
        async with standing_in(far(tmp_path, gone.url)) as (outpost, http):
            write(tmp_path, call(1))
            answer = await http.get("/api/slots")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "collector_away")
            assert (await http.get("/api/identity")).json()["data_dir"] == str(tmp_path.resolve())
            await until(lambda: outpost.shipper.counters.failures > 0)
            async with collecting(tmp_path / "there") as there:
                outpost.shipper._url = there.url
                await until(lambda: there.calls == spans(1))

    asyncio.run(story())


def test_a_client_that_leaves_frees_the_collector(tmp_path: Path) -> None:
    async def story() -> None:
        async with collecting(tmp_path / "there") as there, standing_in(far(tmp_path, there.url)) as (outpost, _):
            left = asyncio.Event()
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/api/slow",
                "raw_path": b"/api/slow",
                "query_string": b"",
            }
            first = True

            async def receive() -> dict[str, Any]:
                nonlocal first
                if first:
                    first = False
                    return {"type": "http.request", "body": b"", "more_body": False}
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                raise AssertionError(message)

            asked = asyncio.create_task(outpost.app({**scope, "headers": []}, receive, send))  # type: ignore[arg-type]
            await until(lambda: there.asked)
            left.set()
            await asyncio.wait_for(asked, 10)
            await asyncio.wait_for(there.left.wait(), 10)

    asyncio.run(story())


def test_no_command_makes_a_store_where_segments_wait_for_a_collector(tmp_path: Path) -> None:
    outpost = Outpost(far(tmp_path, "http://127.0.0.1:9"))
    outpost.close()
    write(tmp_path, call(1))
    for command in (lambda: Local(tmp_path), lambda: rebuild(settings(tmp_path))):
        with pytest.raises(Conflict, match="with --url or RATCHET_URL"):
            command()
    assert backlog.measure(tmp_path / "journal").segments == 1


def test_a_directory_with_a_store_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ratchet.duckdb").touch()
    with pytest.raises(Conflict, match="ratchet export") as caught:
        Outpost(far(tmp_path, "http://127.0.0.1:9"))
    assert caught.value.param == "store.collector"
    (tmp_path / "ratchet.duckdb").unlink()
    outpost = Outpost(far(tmp_path, "http://127.0.0.1:9"))
    with pytest.raises(Conflict, match="a server is using"):
        Outpost(far(tmp_path, "http://127.0.0.1:9"))
    outpost.close()


def test_sections_that_only_the_collector_acts_on_are_named() -> None:
    here = Settings.model_validate({"store": {"collector": "http://127.0.0.1:9"}, "server": {"workers": 2}})
    assert ignored(here) == []
    there = Settings.model_validate({"gate": {"alpha": 0.1}, "slots": {"support": {"template": "You help."}}})
    assert ignored(there) == ["slots", "gate"]
