"""Long results: a page at a time, from one snapshot, bounded in bytes."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from collector import paging, results
from collector.client import Local, Remote
from collector.errors import NotFound, QueryError
from collector.service import Collector
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.serving import served


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("store")
    write(folder, *(call(number) for number in range(20)))
    made = Collector(settings(folder, store={"query_timeout": 0.5}), background=False)
    yield made
    made.close()


def pages(collector: Collector, sql: str, limit: int, page: int) -> list[list[Any]]:
    table = collector.query(sql, limit, page)
    found = [[row[0] for row in table.json()["rows"]]]
    while table.next is not None:
        assert table.truncated
        table = collector.more(table.next, page)
        found.append([row[0] for row in table.json()["rows"]])
    return found


@hypothesis_settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 9000), limit=st.integers(1, 9000), page=st.integers(1500, 5000))
def test_pages_joined_are_the_result(collector: Collector, rows: int, limit: int, page: int) -> None:
    found = pages(collector, f"SELECT range FROM range({rows}) ORDER BY 1", limit, page)
    assert [one for part in found for one in part] == list(range(min(rows, limit)))
    assert all(len(part) == page for part in found[:-1])


def test_an_answer_is_bounded_in_bytes_whatever_its_limit(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging.Open.page, "__defaults__", (100_000,))
    table = collector.query("SELECT repeat('x', 1000) AS t FROM range(1000)", 1_000_000)
    assert 50 < table.data.num_rows < 150
    rows = table.data.num_rows
    while table.next is not None:
        table = collector.more(table.next)
        assert table.data.nbytes < 200_000
        rows += table.data.num_rows
    assert (rows, table.truncated) == (1000, False)
    assert collector.query("SELECT repeat('x', 1000000) AS t", 10).data.num_rows == 1, (
        "a row that is larger comes alone"
    )


def test_a_cursor_reads_the_snapshot_of_its_first_page(tmp_path: Path) -> None:
    write(tmp_path, *(call(number) for number in range(10)))
    collector = Collector(settings(tmp_path), background=False)
    first = collector.query("SELECT span_id FROM spans ORDER BY 1", 100, 6)
    write(tmp_path, *(call(number) for number in range(10, 20)))
    collector.flush()
    assert first.next is not None
    assert collector.more(first.next).data.num_rows == 4
    with pytest.raises(NotFound, match="cursor"):
        collector.more(first.next)
    collector.close()


def test_few_queries_are_open_at_a_time_and_none_for_long(collector: Collector) -> None:
    tokens = [collector.query("SELECT * FROM range(10)", 10, 3).next for _ in range(9)]
    with pytest.raises(NotFound):
        collector.more(str(tokens[0]))
    collector.store._cursors.sweep(idle=0.0)
    with pytest.raises(NotFound):
        collector.more(str(tokens[-1]))


def test_a_later_page_is_stopped_in_time_too(collector: Collector) -> None:
    slow = (
        "SELECT range, (SELECT count(*) FROM range(3000000) b WHERE b.range % (a.range + 7) = 3) FROM range(400000) a"
    )
    with pytest.raises(QueryError) as caught:
        pages(collector, f"SELECT 1 AS x UNION ALL SELECT count(*) FROM ({slow})", 10_000, 1)
    assert caught.value.code == "query_timeout"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_ndjson('{journal}/*.ndjson')",
        "SELECT * FROM journal_spans(['{journal}/x.ndjson'], 1000)",
        "SELECT (SELECT content FROM read_text('{journal}/x'))",
        "SELECT * FROM '{journal}/x.ndjson'",
        "SELECT * FROM glob('{journal}/*')",
        "WITH x AS (SELECT * FROM parquet_metadata('{journal}/x')) SELECT * FROM x",
        "SELECT getenv('HOME')",
        "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM duckdb_secrets()",
        "PIVOT spans ON status USING count(*)",
    ],
)
def test_no_function_reads_files_not_even_those_of_the_store(collector: Collector, sql: str) -> None:
    with pytest.raises(QueryError):
        collector.query(sql.format(journal=collector.data_dir / "journal"), 10)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM spans_v SELECT count(*)",
        "SUMMARIZE episodes_v",
        "DESCRIBE spans_v",
        "SHOW TABLES",
        'WITH "my x" AS (SELECT 1) SELECT * FROM "my x"',
        "SELECT unnest([1, 2]), i FROM range(3) AS r(i)",
        "SELECT json_extract(input_messages, '$[0].role') FROM spans_v",
        "SELECT * FROM main.spans_v",
    ],
)
def test_what_only_reads_the_store_is_answered(collector: Collector, sql: str) -> None:
    assert collector.query(sql, 100).data.num_rows >= 1


def test_clients_join_pages_and_arrow_names_the_next(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging.Open.page, "__defaults__", (20_000,))
    expected = [[number] for number in range(9000)]
    sql = "SELECT range FROM range(9000) ORDER BY 1"
    with served(collector) as transport:
        remote = Remote("http://server", transport=transport)
        assert remote.query(sql, 10_000) == {"columns": ["range"], "rows": expected, "truncated": False}
        assert remote.query(sql, 5000)["truncated"] is True
        http = httpx.Client(base_url="http://server", transport=transport)
        headers = {"accept": "application/vnd.apache.arrow.stream"}
        answer = http.post("/api/query", json={"sql": sql, "limit": 9000, "page": 4000}, headers=headers)
        numbers = []
        while True:
            with pa.ipc.open_stream(answer.content) as reader:
                numbers += reader.read_all().column(0).to_pylist()
            token = answer.headers.get("x-ratchet-next")
            if token is None:
                break
            answer = http.post("/api/query", json={"cursor": token, "page": 4000}, headers=headers)
        assert numbers == list(range(9000))
        assert http.post("/api/query", json={"cursor": "gone"}).status_code == 404
        assert http.post("/api/query", json={}).status_code == 422
        http.close()
        remote.close()


def test_slow_queries_do_not_hold_up_the_registry(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release = threading.Event()
    monkeypatch.setattr(collector, "query", lambda *_: release.wait(60) and results.Table(pa.table({"a": [1]}), False))
    with served(collector) as transport:
        remote = Remote("http://server", transport=transport)
        threads = [threading.Thread(target=remote.query, args=("SELECT 1",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        assert remote.slots() == []
        assert remote.identity()["data_dir"]
        release.set()
        for thread in threads:
            thread.join(60)
        remote.close()


def test_a_closed_store_gives_whole_results_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging.Open.page, "__defaults__", (20_000,))
    local = Local(tmp_path, settings(tmp_path))
    assert len(local.query("SELECT range FROM range(9000)", 9000)["rows"]) == 9000
    local.close()
