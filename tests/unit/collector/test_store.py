import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector import fold, rewards, store
from collector.errors import Conflict, QueryError
from collector.loader import Loader
from collector.otel_in import Observed
from collector.settings import Storage
from collector.store import Store
from tests.unit.collector.rows import call, write


def opened(data_dir: Path, weights: dict[str, float] | None = None, **section: Any) -> Store:
    (data_dir / "journal").mkdir(parents=True, exist_ok=True)
    weights = {"reward": 1.0} if weights is None else weights
    return Store(data_dir / "ratchet.duckdb", data_dir / "journal", Storage(**section), weights)


def loaded(data_dir: Path, *events: Any, **given: Any) -> Store:
    write(data_dir, *events)
    made = opened(data_dir, **given)
    Loader(made, data_dir / "journal").load_once()
    return made


def rows(made: Store, sql: str) -> list[list[Any]]:
    found: list[list[Any]] = made.query(sql, 10_000).json()["rows"]
    return found


@pytest.fixture
def small(tmp_path: Path) -> Any:
    made = loaded(tmp_path, *(call(number) for number in range(3)), query_timeout=0.3)
    yield made
    made.close()


def reward(number: int, kind: str, target: str, value: float = 1.0, **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"reward_id": f"rw-{number}", "target_kind": kind, "target_id": target, "value": value, "ts_ns": number}
    return "reward", {"name": "reward", "source": "code", **body, **fields}


def test_public_columns_are_there(small: Store) -> None:
    public = {
        "spans_v": "span_id trace_id parent_span_id episode_id step source operation start_ns end_ns ttft_ms status "
        "http_status error_type provider request_model response_model response_id finish_reason stream input_tokens "
        "output_tokens cost_usd prompt_slot prompt_version adapter_slot adapter_version propensity input_messages "
        "output_messages",
        "rewards_v": "reward_id target_kind target_id episode_id span_id name value source ts_ns",
        "episodes_v": "episode_id start_ns end_ns steps input_tokens output_tokens cost_usd errors reward prompt_slot "
        "prompt_version",
        "versions_v": "slot version kind hash parent created_ns job_id note",
    }
    for view, columns in public.items():
        found = small.query(f"SELECT * FROM {view} LIMIT 0", 1).json()["columns"]
        assert set(columns.split()) <= set(found), view


def test_the_exchange_and_the_table_have_the_same_fields(small: Store) -> None:
    spans = set(small.query("SELECT * FROM spans", 1).json()["columns"])
    payloads = set(small.query("SELECT * FROM payloads", 1).json()["columns"])
    assert (spans | payloads) - {"batch", "day"} == {field.name for field in fields(Observed)}


def test_steps_count_from_zero_in_the_order_of_their_start(tmp_path: Path) -> None:
    made = loaded(
        tmp_path, call(3, start_ns=30), call(1, start_ns=10), call(2, start_ns=10), call(9, episode_id="ep-b")
    )
    order = rows(made, "SELECT span_id, step FROM spans_v WHERE episode_id = 'ep-a' ORDER BY step")
    assert order == [[f"{1:016x}", 0], [f"{2:016x}", 1], [f"{3:016x}", 2]]
    made.close()


def test_an_episode_sums_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    made = loaded(
        tmp_path,
        call(1, input_tokens=5, prompt_slot="s", prompt_version=2),
        call(2, input_tokens=7, status="error", error_type="timeout", prompt_slot="s", prompt_version=2),
    )
    (row,) = made._rows("SELECT * FROM episodes_v")
    assert row == {
        "episode_id": "ep-a",
        "start_ns": 1001,
        "end_ns": 2002,
        "steps": 2,
        "input_tokens": 12,
        "output_tokens": None,
        "cost_usd": None,
        "errors": 1,
        "reward": None,
        "prompt_slot": "s",
        "prompt_version": 2,
        "prompt_candidate": None,
    }
    made.close()


def test_rewards_find_their_episode_by_each_kind_of_target(tmp_path: Path) -> None:
    made = loaded(
        tmp_path,
        call(1),
        call(2, episode_id="ep-b", trace_id="t2"),
        reward(1, "episode", "ep-a"),
        reward(2, "span", f"{2:016x}"),
        reward(3, "response", "chatcmpl-1"),
        reward(4, "trace", "t2"),
        reward(5, "response", "chatcmpl-unknown"),
        reward(6, "episode", "ep-unknown"),
    )
    assert rows(made, "SELECT reward_id, episode_id, span_id FROM rewards_v ORDER BY reward_id") == [
        ["rw-1", "ep-a", None],
        ["rw-2", "ep-b", f"{2:016x}"],
        ["rw-3", "ep-a", f"{1:016x}"],
        ["rw-4", "ep-b", None],
        ["rw-5", None, None],
        ["rw-6", "ep-unknown", None],
    ]
    assert [row["reward_id"] for row in made.unmatched_rewards(10)] == ["rw-6", "rw-5"]
    assert made.stats()["unmatched_rewards"] == 2
    made.close()


def test_of_spans_with_one_response_id_the_latest_gets_the_reward(tmp_path: Path) -> None:
    twin = {"response_id": "chatcmpl-x"}
    made = loaded(
        tmp_path,
        call(1, **twin),
        call(2, episode_id="ep-b", start_ns=9_000, **twin),
        reward(1, "response", "chatcmpl-x"),
    )
    assert rows(made, "SELECT episode_id FROM rewards_v") == [["ep-b"]]
    made.close()


def test_a_reward_that_came_before_its_span_counts_once_the_span_is_there(tmp_path: Path) -> None:
    made = loaded(tmp_path, reward(1, "response", "chatcmpl-1", 0.5))
    assert rows(made, "SELECT episode_id FROM rewards_v") == [[None]]
    write(tmp_path, call(1))
    Loader(made, tmp_path / "journal").load_once()
    assert rows(made, "SELECT reward FROM episodes_v") == [[0.5]]
    made.close()


def test_episodes_of_a_version_are_found_among_the_newest_and_among_all(tmp_path: Path) -> None:
    old = [call(number, episode_id=f"ep-{number:04}", prompt_slot="s", prompt_version=1) for number in range(3)]
    new = [
        call(number, episode_id=f"ep-{number:04}", prompt_slot="s", prompt_version=2) for number in range(100, 1_200)
    ]
    made = loaded(tmp_path, *old, *new, reward(1, "episode", "ep-0001", 0.5))
    anything = {"before_ns": None, "before_id": None, "min_reward": None, "max_reward": None, "status": None}

    def found(slot: str | None, version: int | None, limit: int = 5) -> list[str]:
        page = made.episodes(**anything, slot=slot, version=version, limit=limit)
        return [row["episode_id"] for row in page]

    assert found("s", 2) == [f"ep-{number:04}" for number in range(1_199, 1_194, -1)]
    assert found("s", 1) == found(None, 1) == ["ep-0002", "ep-0001", "ep-0000"], "older than the newest thousand"
    assert found("s", 3) == found("other", None) == found("other", 1) == []
    page = made.episodes(**{**anything, "before_ns": 1_002, "before_id": "ep-0002"}, slot="s", version=None, limit=5)
    assert [(row["episode_id"], row["reward"]) for row in page] == [("ep-0001", 0.5), ("ep-0000", None)]
    made.close()


TARGETS = st.sampled_from(
    [
        ("episode", "ep-a"),
        ("episode", "ep-b"),
        ("span", f"{1:016x}"),
        ("span", f"{2:016x}"),
        ("span", "gone"),
        ("response", "chatcmpl-1"),
        ("response", "chatcmpl-2"),
        ("response", "gone"),
        ("trace", "ta"),
        ("trace", "tb"),
    ]
)
EPISODE_OF = {
    "ep-a": "ep-a",
    "ep-b": "ep-b",
    f"{1:016x}": "ep-a",
    f"{2:016x}": "ep-b",
    "chatcmpl-1": "ep-a",
    "chatcmpl-2": "ep-b",
    "ta": "ep-a",
    "tb": "ep-b",
}
JUDGEMENTS = st.lists(
    st.tuples(
        TARGETS,
        st.sampled_from(["reward", "style", "unweighted"]),
        st.integers(-4, 4),
        st.integers(0, 3),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def judged_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    calls = [call(1, trace_id="ta"), call(2, episode_id="ep-b", trace_id="tb")]
    made = loaded(tmp_path_factory.mktemp("store"), *calls, weights={"reward": 1.0, "style": 0.25})
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(JUDGEMENTS)
def test_the_view_and_the_function_combine_rewards_alike(judged_store: Store, judged: list[Any]) -> None:
    bodies = [
        reward(index, kind, target, float(value), name=name, ts_ns=ts_ns)[1]
        for index, ((kind, target), name, value, ts_ns) in enumerate(judged)
    ]
    columns = ("reward_id", "target_kind", "target_id", "name", "value", "ts_ns")
    with judged_store._cursor() as cursor:
        cursor.execute("BEGIN")
        for body in bodies:
            values = [body[column] for column in columns]
            cursor.execute(
                "INSERT INTO rewards (reward_id, target_kind, target_id, name, value, ts_ns) VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
        fold.fold(cursor, judged_store._batch)
        found = dict(cursor.execute("SELECT episode_id, reward FROM episodes_v").fetchall())
        cursor.execute("ROLLBACK")
    for episode in ("ep-a", "ep-b"):
        own = [body for body in bodies if EPISODE_OF.get(body["target_id"]) == episode]
        expected = rewards.combine(own, {"reward": 1.0, "style": 0.25})
        assert found[episode] == (None if expected is None else pytest.approx(expected))


def test_another_process_with_the_file_is_a_conflict(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: Any, **__: Any) -> Any:
        raise store.duckdb.IOException("IO Error: Could not set lock on file")

    monkeypatch.setattr(store.duckdb, "connect", locked)
    with pytest.raises(Conflict, match="another process"):
        Store(small.path, small._journal, Storage(), {})


@pytest.mark.parametrize("damage", ["database", "wal"])
def test_a_broken_file_is_moved_aside_and_built_anew(tmp_path: Path, damage: str) -> None:
    # Text that does not repeat: the engine's checksum of its log is an XOR of words, in which equal ones cancel out.
    texts = [random.Random(number).randbytes(2500).hex() for number in range(50)]
    made = loaded(tmp_path / "dead", *(call(number, tools=text) for number, text in enumerate(texts)))
    shutil.copytree(tmp_path / "dead", tmp_path / "found")  # as a kill -9 leaves it: the rows are in the WAL only
    made.close()
    path = tmp_path / "found" / ("ratchet.duckdb" if damage == "database" else "ratchet.duckdb.wal")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3 if damage == "wal" else 0)
        file.write(b"\0" * 4096)
    again = opened(tmp_path / "found")
    # A log that ends where the damage begins is read up to there: its transactions are whole, the rest is loaded again.
    assert again.rebuilt == 1 or damage == "wal"
    assert len(list((tmp_path / "found").glob("*.corrupt-*"))) >= again.rebuilt
    assert Loader(again, tmp_path / "found" / "journal").load_once() == 50
    assert rows(again, "SELECT count(*) FROM spans") == [[50]]
    again.close()


def test_another_schema_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(tmp_path, call(1))
    made.close()
    monkeypatch.setattr(store, "SCHEMA_HASH", "of tomorrow")
    again = opened(tmp_path)
    assert again.rebuilt == 1
    assert again.loaded() == set()
    again.close()


def test_weights_are_those_of_the_settings_at_each_start(tmp_path: Path) -> None:
    made = loaded(tmp_path, call(1), reward(1, "episode", "ep-a", 2.0), weights={"reward": 1.0})
    assert rows(made, "SELECT reward FROM episodes_v") == [[2.0]]
    made.close()
    made = opened(tmp_path, weights={"reward": 0.5})
    assert rows(made, "SELECT reward FROM episodes_v") == [[1.0]]
    made.close()


def test_values_are_safe_for_json(small: Store) -> None:
    sql = (
        "SELECT 1::BIGINT AS a, 1.5::DECIMAL(5,2) AS b, DATE '2026-01-02' AS c, TIMESTAMP '2026-01-02 03:04:05' AS d, "
        "'ab'::BLOB AS e, 'nan'::DOUBLE AS f, 'inf'::DOUBLE AS g, NULL AS h, [1, 2] AS i, {'x': 1.0::DOUBLE} AS j, "
        "true AS k, TIMESTAMPTZ '2026-01-02 03:04:05+00' AS l, uuid() IS NOT NULL AS m, INTERVAL 1 DAY AS n, "
        "170141183460469231731687303715884105727::HUGEINT AS o, TIME '01:02:03' AS p"
    )
    (row,) = rows(small, sql)
    assert row[:13] == [
        1,
        "1.50",
        "2026-01-02",
        "2026-01-02 03:04:05.000000",
        "6162",
        None,
        None,
        None,
        [1, 2],
        {"x": 1.0},
        True,
        row[11],
        True,
    ]
    assert row[11].startswith("2026-01-02 03:04:05")
    assert orjson.dumps(row[13:])


def test_the_limit_cuts_and_says_so(small: Store) -> None:
    assert small.query("SELECT * FROM range(10)", 10).truncated is False
    cut = small.query("SELECT range AS n FROM range(11) ORDER BY n DESC", 10)
    assert cut.truncated
    assert cut.json()["rows"] == [[number] for number in range(10, 0, -1)]


def test_arrow_holds_the_same_rows(small: Store) -> None:
    table = small.query("SELECT span_id, start_ns FROM spans_v ORDER BY start_ns", 2)
    with pa.ipc.open_stream(table.arrow()) as reader:
        assert reader.read_all().to_pylist() == [
            {"span_id": f"{number:016x}", "start_ns": 1000 + number} for number in range(2)
        ]


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SELECT 1; SELECT 2",
        "INSERT INTO spans DEFAULT VALUES",
        "WITH gone AS (DELETE FROM spans RETURNING span_id) SELECT * FROM gone",
        "DROP TABLE spans",
        "COPY spans TO '/tmp/stolen.csv'",
        "ATTACH '/tmp/other.db'",
        "SET memory_limit = '100GB'",
        "PRAGMA database_list",
        "CALL checkpoint()",
        "INSTALL httpfs",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM 'https://example.org/a.parquet'",
        "SELECT $1",
        "SELECT * FROM nothing",
        "SELEC 1",
        "EXPLAIN ANALYZE SELECT 1",
    ],
)
def test_only_one_harmless_select_is_answered(small: Store, sql: str) -> None:
    with pytest.raises(QueryError):
        small.query(sql, 10)
    assert rows(small, "SELECT count(*) FROM spans") == [[3]]


def test_a_query_that_takes_too_long_is_stopped(small: Store) -> None:
    with pytest.raises(QueryError, match=r"stopped after 0\.3 s") as caught:
        small.query("SELECT count(*) FROM range(100000000000) a, range(100000) b", 10)
    assert caught.value.code == "query_timeout"
    assert rows(small, "SELECT 1") == [[1]]


def test_reading_does_not_wait_for_a_loader_in_its_transaction(small: Store) -> None:
    with small._cursor() as busy:
        busy.execute("BEGIN")
        busy.execute("INSERT INTO spans (span_id) VALUES ('x')")
        assert rows(small, "SELECT count(*) FROM spans") == [[3]]
        busy.execute("ROLLBACK")


def test_a_snapshot_does_not_see_what_is_committed_after_it_began(tmp_path: Path) -> None:
    made = loaded(tmp_path, call(1))

    def ask(read: Any) -> int:
        with made._cursor() as other:
            other.execute("DELETE FROM spans")
        return int(read("SELECT count(*) AS n FROM spans", {})[0]["n"])

    assert made.reading(ask) == 1
    assert rows(made, "SELECT count(*) FROM spans") == [[0]]
    made.close()
