"""The client of ClickHouse's HTTP interface, against a server that answers what it is told."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from collector.clickhouse_http import Failed, Server, address, chunks, parameter
from collector.errors import BadRows, ConfigError, QueryError, Unavailable
from collector.settings import load

URL = "clickhouse://me:p%3Aw%2F@{where}/db"


class Scripted(BaseHTTPRequestHandler):
    """Answers each request with the next of `answers`: (status, code of the exception, body)."""

    answers: list[tuple[int, int | None, bytes]]
    seen: list[tuple[dict[str, list[str]], dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((parse_qs(urlsplit(self.path).query), dict(self.headers), body))
        status, code, answer = self.answers.pop(0)
        self.send_response(status)
        if code is not None:
            self.send_header("X-ClickHouse-Exception-Code", str(code))
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def scripted() -> Iterator[tuple[type[Scripted], str]]:
    handler = type("Handler", (Scripted,), {"answers": [], "seen": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, URL.format(where=f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def test_the_url_has_its_parts() -> None:
    plain = address("clickhouse://host/db")
    assert (plain.base, plain.database, plain.headers) == ("http://host:8123/", "db", {})
    full = address("clickhouses://a%40b:c%2Fd@[::1]:9000/db")
    assert (full.base, full.name) == ("https://[::1]:9000/", "[::1]:9000/db")
    assert full.headers == {"X-ClickHouse-User": "a@b", "X-ClickHouse-Key": "c/d"}


@pytest.mark.parametrize(
    "url", ["http://host/db", "clickhouse:///db", "clickhouse://host/a/b", "clickhouse://host/a?b=1"]
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must"):
        address(url)


def test_a_wrong_store_url_names_the_field_and_not_the_password() -> None:
    with pytest.raises(ConfigError, match=r"store\.url") as told:
        load(flags={"store.url": "postgres://me:hunter2@host/db"}, environ={})
    assert "hunter2" not in told.value.message


def test_settings_show_no_password_and_the_servers_processes_get_it() -> None:
    found = load(flags={"store.url": "clickhouse://me:hunter2@host/db"}, environ={})
    assert "hunter2" not in repr(found)
    assert "hunter2" in found.model_dump_json()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\\N"),
        ("a\tb\n\\'", "a\\tb\\n\\\\'"),
        (["it's", "\\"], "['it\\'s','\\\\']"),
        ([], "[]"),
        (7, "7"),
        (0.5, "0.5"),
        (True, "1"),
        (float("inf"), "inf"),
    ],
)
def test_a_parameter_is_written_as_clickhouse_reads_it(value: Any, text: str) -> None:
    assert parameter(value) == text


def test_values_and_credentials_travel_beside_the_statement(scripted: tuple[type[Scripted], str]) -> None:
    handler, url = scripted
    handler.answers = [(200, None, b"")]
    server = Server(url)
    server.run("SELECT {x:String}", {"x": "'; DROP"})
    server.close()
    ((query, headers, body),) = handler.seen
    assert body == b"SELECT {x:String}"
    assert (query["param_x"], query["database"]) == (["'; DROP"], ["db"])
    assert (headers["X-ClickHouse-User"], headers["X-ClickHouse-Key"]) == ("me", "p:w/")
    assert "p:w/" not in str(query)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(400, 27, BadRows), (404, 60, Failed), (500, 252, Unavailable), (502, None, Unavailable)],
)
def test_a_refused_insert_says_whose_fault_it_is(
    scripted: tuple[type[Scripted], str], status: int, code: int | None, kind: type[Exception]
) -> None:
    handler, url = scripted
    handler.answers = [(status, code, b"Code: 1. DB::Exception: why")]
    server = Server(url)
    with pytest.raises(kind, match="why"):
        server.insert("INSERT INTO t FORMAT JSONEachRow", b"{}", "token")
    server.close()
    assert handler.seen[0][0]["insert_deduplication_token"] == ["token"]


@pytest.mark.parametrize(("code", "told"), [(159, "query_timeout"), (47, "invalid_query")])
def test_a_users_query_that_fails_is_told_as_such(scripted: tuple[type[Scripted], str], code: int, told: str) -> None:
    handler, url = scripted
    handler.answers = [(400, code, b"Code: 1. DB::Exception: why")]
    server = Server(url)
    with pytest.raises(QueryError, match="why") as error:
        server.query("SELECT nope", {})
    server.close()
    assert error.value.code == told
    assert handler.seen[0][0]["readonly"] == ["1"]


def test_who_cannot_be_reached_is_named_without_its_password() -> None:
    server = Server(URL.format(where="127.0.0.1:1"))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1/db does not answer") as error:
            server.run("SELECT 1")
        assert "p:w" not in error.value.message
    server.close()


@pytest.mark.parametrize("ids", [["語" * 256] * 50, ["x" * 200 + str(n) for n in range(1000)], ["'\\"] * 3000, ["a"]])
def test_a_list_of_ids_is_cut_so_that_each_part_can_be_sent(
    scripted: tuple[type[Scripted], str], ids: list[str]
) -> None:
    handler, url = scripted
    parts = list(chunks(ids, 1000))
    assert [one for part in parts for one in part] == ids
    assert all(0 < len(part) <= 1000 for part in parts)
    handler.answers = [(200, None, b"")] * len(parts)
    server = Server(url)
    for part in parts:
        server.run("SELECT {ids:Array(String)}", {"ids": part})
    server.close()


def test_a_question_that_is_too_long_is_an_error_of_ours() -> None:
    server = Server("clickhouse://127.0.0.1:1/db")
    with pytest.raises(Failed, match="too long"):
        server.run("SELECT 1", {"x": "y" * 70_000})
    server.close()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Query memory limit exceeded: would use 2 GiB", QueryError),
        ("Memory limit (for query) exceeded: would use 2 GiB", QueryError),
        ("(total) memory limit exceeded: would use 20 GiB", Unavailable),
    ],
)
def test_only_a_users_own_bound_on_memory_is_the_users_error(
    scripted: tuple[type[Scripted], str], said: str, kind: type[Exception]
) -> None:
    handler, url = scripted
    handler.answers = [(500, 241, said.encode())]
    server = Server(url)
    with pytest.raises(kind, match="would use"):
        server.query("SELECT 1", {})
    server.close()
