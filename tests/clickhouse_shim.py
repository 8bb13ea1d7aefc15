"""ClickHouse's HTTP interface on loopback, every statement run by chdb, ClickHouse's own engine as a library.

Run by the Python of .venvs/chdb (`make chdb`): `clickhouse_shim.py FOLDER [USER PASSWORD]` prints its port. It imports
nothing of the project. Only what the interface does around the engine is done here: the database, parameters,
settings, credentials and the headers of an answer.
"""

import contextlib
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from chdb import session  # type: ignore[import-not-found]

_OWN = frozenset(("database", "query", "default_format", "wait_end_of_query"))
_INSERT = re.compile(r"\A\s*INSERT\b", re.IGNORECASE)
_EXPLAIN = re.compile(r"\A\s*EXPLAIN\b", re.IGNORECASE)
_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*\Z", re.IGNORECASE)
_CODE = re.compile(r"Code: (\d+)\.")


class Engine:
    """One session; statements run one after another."""

    def __init__(self, folder: str) -> None:
        self._session = session.Session(folder)
        self._lock = threading.Lock()

    def run(self, given: dict[str, str], body: bytes) -> tuple[bytes, str]:
        """The answer and its format. Raises RuntimeError in the engine's words."""
        sql = given["query"] if "query" in given else body.decode()
        where = {name[6:]: value for name, value in given.items() if name.startswith("param_")}
        settings = {name: value for name, value in given.items() if name not in _OWN and not name.startswith("param_")}
        kind = given.get("default_format", "TabSeparated")
        asked = _FORMAT.search(sql)
        with self._lock:
            if "database" in given:
                self._session.query(f"USE `{given['database']}`")
            answer = self._session.query(_with(sql, settings, body if "query" in given else b""), kind, params=where)
            return bytes(answer.bytes() or b""), asked[1] if asked and not _INSERT.match(sql) else kind


def _with(sql: str, settings: dict[str, str], rows: bytes) -> str:
    listed = ", ".join(f"{name} = '{value}'" for name, value in settings.items())
    if _INSERT.match(sql) and rows:
        return re.sub(r"\bFORMAT\b", f"SETTINGS {listed} FORMAT", sql, count=1) + "\n" + rows.decode()
    if not re.match(r"\A\s*(SELECT|WITH|\()", sql, re.IGNORECASE) or not listed:
        return sql
    return f"{sql}\nSETTINGS {listed}"


class Handler(BaseHTTPRequestHandler):
    """POST / as ClickHouse answers it."""

    protocol_version = "HTTP/1.1"
    engine: Engine
    account: tuple[str, str] | None = None
    server_version = "shim"

    def do_POST(self) -> None:
        """One statement."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        account = (self.headers.get("X-ClickHouse-User", "default"), self.headers.get("X-ClickHouse-Key", ""))
        if self.account is not None and account != self.account:
            self._answer(
                403, b"Code: 516. DB::Exception: Authentication failed", {"X-ClickHouse-Exception-Code": "516"}
            )
            return
        given = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        try:
            answer, kind = self.engine.run(given, body)
        except RuntimeError as error:
            code = _CODE.search(str(error))
            head = {"X-ClickHouse-Exception-Code": code[1] if code else "1002"}
            self._answer(500 if code is None else 400, str(error).encode(), head)
            return
        self._answer(200, answer, {"X-ClickHouse-Format": kind})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked was killed
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def main() -> None:
    """Serve until the end of the process."""
    Handler.engine = Engine(sys.argv[1])
    if len(sys.argv) > 3:
        Handler.account = (sys.argv[2], sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[4]) if len(sys.argv) > 4 else 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
