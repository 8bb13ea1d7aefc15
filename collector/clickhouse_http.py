"""ClickHouse's HTTP interface: statements with bound parameters, rows in, Arrow out, its errors as ours.

A statement is always a constant; values travel as `param_name` beside it, credentials in headers.
"""

import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote_plus, unquote, urlsplit

import httpx
import pyarrow as pa

from collector.errors import BadRows, QueryError, RatchetError, Unavailable

_SCHEMES = {"clickhouse": ("http", 8123), "clickhouses": ("https", 8443)}
_CONNECT_SECONDS = 3.0
_PATIENCE_SECONDS = 60.0
_BEHIND_SECONDS = 1.0  # after a failure to reach it, it is left alone for so long
_IN_MEMORY = 8 << 20
_ROOM = 40_000  # characters of a URL for one list; httpx takes 64 Ki of a query
_QUOTED = 600  # characters of an error message that are told
# Codes of errors that lie in the rows, not in the server; see ClickHouse's ErrorCodes.cpp.
_OF_ROWS = frozenset((6, 20, 25, 26, 27, 33, 38, 41, 53, 69, 70, 72, 117, 130, 131, 321, 349, 441, 467, 675))
_OF_SERVER = frozenset((3, 76, 74, 75, 159, 201, 202, 203, 209, 210, 236, 241, 242, 243, 252, 394, 425, 499, 999))
_TIMEOUT = 159
_QUERY_MEMORY = ("Memory limit (for query)", "Query memory limit")  # not the whole server's
_ARROW = {
    "default_format": "ArrowStream",
    "output_format_arrow_string_as_string": 1,
    "output_format_arrow_compression_method": "none",
}

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0"})


class Failed(RatchetError):
    """A statement that the server refused. `number` is its own code of the error."""

    code = "clickhouse"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Address:
    """Where a server is. `name` is what may be shown of it."""

    base: str
    database: str
    headers: Mapping[str, str]
    name: str


def address(url: str) -> Address:
    """The parts of `clickhouse://[user[:password]@]host[:port]/database` (clickhouses: over TLS). Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError("must be clickhouse://[user[:password]@]host[:port]/database, or clickhouses:// for TLS")
    scheme, port = _SCHEMES[parts.scheme]
    database = unquote(parts.path.strip("/")) or "default"
    if "/" in database or parts.query or parts.fragment:
        raise ValueError("must end in the database's name, with nothing behind it")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    where = f"{host}:{parts.port or port}"
    headers = {}
    if parts.username:
        headers["X-ClickHouse-User"] = unquote(parts.username)
    if parts.password:
        headers["X-ClickHouse-Key"] = unquote(parts.password)
    return Address(f"{scheme}://{where}/", database, headers, f"{where}/{database}")


class Server:
    """One database of a server. Thread-safe. Every call raises Unavailable while it can't be reached."""

    def __init__(self, url: str, patience: float = _PATIENCE_SECONDS) -> None:
        self.address = address(url)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each request, with all its parameters
        self._patience = patience
        self._http = httpx.Client(
            base_url=self.address.base,
            headers=dict(self.address.headers),
            timeout=httpx.Timeout(patience, connect=_CONNECT_SECONDS),
            trust_env=False,
        )
        self._lock = threading.Lock()
        self._left_alone = 0.0
        self._last = ""

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def run(self, sql: str, where: Mapping[str, Any] | None = None, *, database: bool = True) -> None:
        """A statement without an answer. Raises Failed, Unavailable."""
        self._ask(sql, where or {}, {}, database=database).close()

    def insert(self, sql: str, rows: bytes, token: str | None) -> None:
        """Insert rows of JSON, all or none. With a `token`, the same one again changes nothing.

        Raises BadRows where a line does not fit, Failed, Unavailable.
        """
        given: dict[str, Any] = {**_AS_TEXT, **({} if token is None else {"insert_deduplication_token": token})}
        try:
            self._ask(sql, {}, given, rows).close()
        except Failed as error:
            if error.number in _OF_ROWS:
                raise BadRows(error.message) from None
            raise

    def rows(self, sql: str, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The rows of a SELECT. Raises Failed, Unavailable."""
        with self._ask(sql, where or {}, {"readonly": 1, **_ARROW}) as answer:
            found: list[dict[str, Any]] = pa.ipc.open_stream(answer).read_all().to_pylist()
        return found

    def text(self, sql: str) -> str:
        """The answer as text, of a statement that may be a user's. Raises Failed, Unavailable."""
        with self._ask(sql, {}, {"readonly": 1, "default_format": "TSVRaw"}) as answer:
            return bytes(answer.read()).decode(errors="replace")

    def query(self, sql: str, settings: Mapping[str, Any]) -> IO[bytes]:
        """A user's SELECT as an Arrow stream in a file. Raises QueryError, Unavailable."""
        try:
            return self._ask(sql, {}, {"readonly": 1, **_ARROW, **settings})
        except Failed as error:
            if error.number == _TIMEOUT:
                raise QueryError(f"it took too long; narrow the query: {error.message}", code="query_timeout") from None
            raise QueryError(error.message, param="sql") from None
        except Unavailable as error:
            if any(said in error.message for said in _QUERY_MEMORY):
                raise QueryError(f"it needs too much memory; narrow the query: {error.message}", param="sql") from None
            raise

    def _ask(
        self,
        sql: str,
        where: Mapping[str, Any],
        settings: Mapping[str, Any],
        body: bytes | None = None,
        *,
        database: bool = True,
    ) -> IO[bytes]:
        params = {f"param_{name}": parameter(value) for name, value in where.items()}
        params |= {name: str(value) for name, value in settings.items()} | {"wait_end_of_query": "1"}
        if database:
            params["database"] = self.address.database
        if body is not None:
            params["query"] = sql
        self._check_reachable()
        try:
            return self._send(params, sql.encode() if body is None else body)
        except httpx.InvalidURL as error:
            raise Failed(f"the question is too long: {error}", 0) from None
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _send(self, params: Mapping[str, str], body: bytes) -> IO[bytes]:
        with self._http.stream("POST", "/", params=params, content=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise self._failed(response)
            asked = params.get("default_format")
            if asked is not None and response.headers.get("X-ClickHouse-Format", asked) != asked:
                raise QueryError("give no FORMAT; the answer is Arrow or JSON, as you accept it", param="sql")
            answer = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (the caller closes it)
            for piece in response.iter_bytes():
                answer.write(piece)
        answer.seek(0)
        return answer

    def _check_reachable(self) -> None:
        with self._lock:
            if time.monotonic() < self._left_alone:
                raise Unavailable(self._last)

    def _unreachable(self, error: Exception) -> Unavailable:
        said = str(error) or type(error).__name__
        with self._lock:
            self._left_alone = time.monotonic() + _BEHIND_SECONDS
            self._last = f"ClickHouse at {self.address.name} does not answer: {said}"
            return Unavailable(self._last)

    def _failed(self, response: httpx.Response) -> RatchetError:
        said = " ".join(response.text.split())[:_QUOTED]
        number = int(response.headers.get("X-ClickHouse-Exception-Code") or 0)
        if number in _OF_SERVER - {_TIMEOUT} or (not number and response.status_code >= 500):
            return Unavailable(f"ClickHouse at {self.address.name} cannot do it now: {said}")
        return Failed(said, number)


# JSON values of any kind as the text that they are in the line, for columns of text.
_AS_TEXT = {
    "async_insert": 0,
    "input_format_parallel_parsing": 0,
    "input_format_skip_unknown_fields": 1,
    "input_format_json_read_arrays_as_strings": 1,
    "input_format_json_read_bools_as_strings": 1,
    "input_format_json_read_numbers_as_strings": 1,
    "input_format_json_read_objects_as_strings": 1,
    "input_format_max_block_size_bytes": 0,
    "max_insert_block_size": 10_000_000,
}


def parameter(value: Any) -> str:
    """A value as ClickHouse reads the text of a parameter: escaped, and within arrays quoted."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return _escaped(value)
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Sequence):
        return "[" + ",".join(_quoted(one) for one in value) + "]"
    return str(value)


def _quoted(value: Any) -> str:
    return "'" + _escaped(value).replace("'", "\\'") + "'" if isinstance(value, str) else parameter(value)


def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)


def chunks(values: Iterable[str], size: int) -> Iterator[list[str]]:
    """The values, at most `size` at a time and no longer than fits: parameters travel in the URL, of bounded length."""
    some: list[str] = []
    room = _ROOM
    for value in values:
        cost = len(quote_plus(_quoted(value))) + len("%2C")
        if some and (len(some) >= size or cost > room):
            yield some
            some, room = [], _ROOM
        some.append(value)
        room -= cost
    if some:
        yield some
