"""A worker's way to the collector: HTTP over the unix socket that the supervisor picked."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from collector.errors import Unavailable, told

BASE = "http://collector"
GRACE = 5.0  # seconds that a long poll's answer may come late
FAILURES = (aiohttp.ClientError, TimeoutError, OSError)


class Link:
    """The collector as a worker sees it. Every method raises Unavailable while the collector is down."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)
        self._session: aiohttp.ClientSession | None = None
        self._serial: int | None = None  # of the last snapshot: a version that came between two polls is news too

    @property
    def session(self) -> aiohttp.ClientSession:
        """Made on first use, because it belongs to the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self._socket, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=GRACE),
            )
        return self._session

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def snapshot(self, after: int | None, wait: float) -> dict[str, Any]:
        """The registry; with `after`, once it is newer or `wait` seconds have passed."""
        query = f"?after={after}&timeout={wait:g}" if after is not None else ""
        if after is not None and self._serial is not None:
            query += f"&serial={self._serial}"
        found: dict[str, Any] = await self._read(f"/api/deployments{query}", wait + GRACE)
        self._serial = found.get("serial")
        return found

    async def candidate(self, slot: str, candidate: str) -> str | None:
        """The text of a prompt under search, None for an unknown one."""
        path = f"/api/slots/{quote(slot, safe='')}/candidates/{quote(candidate, safe='')}"
        found = await self._read(path, GRACE, missing=None)
        return None if found is None else str(found["template"])

    async def stats(self, patience: float = 1.0) -> dict[str, Any]:
        """The collector's counters."""
        found: dict[str, Any] = await self._read("/api/stats", patience)
        return found

    async def shipper(self, patience: float = 1.0) -> dict[str, Any]:
        """What was sent to the collector, where that is on another host."""
        found: dict[str, Any] = await self._read("/shipper", patience)
        return found

    async def _read(self, path: str, patience: float, missing: Any = ...) -> Any:
        try:
            limit = aiohttp.ClientTimeout(total=patience)
            async with self.session.get(URL(BASE + path, encoded=True), timeout=limit) as response:
                body = await response.read()
        except FAILURES as error:
            raise down(error) from error
        if response.status == 404 and missing is not ...:
            return missing
        if response.status != 200:
            message, code = told(body)
            about = f"the collector answered {response.status} to {path.partition('?')[0]}"
            raise Unavailable(message or about, code=code)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Unavailable("the collector's answer is no JSON") from error


def down(error: BaseException) -> Unavailable:
    """What a client is told while the collector can't be reached."""
    return Unavailable(
        "the collector is not running or does not answer; calls are still served and recorded, "
        f"this request was not: try again ({type(error).__name__})",
        code="collector_unavailable",
    )
