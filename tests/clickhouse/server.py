"""A ClickHouse for tests: chdb behind the shim of tests/clickhouse_shim.py, as a child process on loopback."""

import contextlib
import secrets
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venvs" / "chdb" / "bin" / "python"
ABSENT = "needs ClickHouse's engine in .venvs/chdb (0.9 GB): run `make test-clickhouse`"
USER, PASSWORD = "ratchet", "s3cret:/word"


class Server:
    """A running one. `url(database)` is what `store.url` wants."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Begin to answer, on the port that it had before."""
        argv = [str(PYTHON), "-P", str(ROOT / "tests/clickhouse_shim.py"), str(self._folder), USER, PASSWORD]
        self._process = subprocess.Popen([*argv, str(self._port)], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def stop(self) -> None:
        """Answer no more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the process that holds the engine."""
        assert self._process is not None
        return self._process.pid

    def url(self, database: str | None = None) -> str:
        """The URL of a database, of a new one unless told."""
        return f"clickhouse://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{self._port}/{database or fresh()}"

    def ask(self, database: str, sql: str, **settings: str) -> str:
        """A statement past the store: the answer as text."""
        query = urlencode({"database": database, **settings})
        headers = {"X-ClickHouse-User": USER, "X-ClickHouse-Key": PASSWORD}
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/?{query}", sql.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())


def fresh() -> str:
    """A database's name that nobody has."""
    return f"r{secrets.token_hex(6)}"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A server until the block ends."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()
