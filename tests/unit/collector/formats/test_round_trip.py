"""Export, import into a fresh data directory: identical episodes. The same file again adds nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.formats import jsonl, otlp, parquet
from collector.formats.bundle import Bundle, reward_in, reward_out, span_in, span_out
from collector.formats.reader import Outcome, read
from tests.unit.collector.formats.world import everything, filled, opened
from tests.unit.collector.rows import scalar


def exported(data_dir: Path, limit: int = 3) -> list[dict[str, Any]]:
    """Every episode, by pages."""
    local, found, cursor = opened(data_dir), [], None
    while True:
        page = local.export(limit, cursor)
        found += page["episodes"]
        cursor = page["next"]
        if cursor is None:
            local.close()
            return found


def imported(data_dir: Path, path: Path) -> dict[str, int]:
    local, outcome = opened(data_dir), Outcome()
    totals = {"spans": 0, "rewards": 0, "known": 0}
    for bundle in read(path, outcome):
        added = local.import_rows(bundle.spans, bundle.rewards)
        totals = {name: totals[name] + added[name] for name in totals}
    local.close()
    assert outcome.faults == []
    return totals


def lines(write: Callable[[dict[str, Any]], bytes]) -> Callable[[Path, list[dict[str, Any]]], Path]:
    def to_file(folder: Path, episodes: list[dict[str, Any]]) -> Path:
        (folder / "out.jsonl").write_bytes(b"".join(map(write, episodes)))
        return folder / "out.jsonl"

    return to_file


def tables(folder: Path, episodes: list[dict[str, Any]]) -> Path:
    parquet.write(folder / "out", episodes)
    return folder / "out"


FORMATS = {"jsonl": lines(jsonl.line), "otlp": lines(otlp.line), "parquet": tables}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_exported_and_imported_is_the_same(tmp_path: Path, kind: str) -> None:
    source, copy = filled(tmp_path / "source"), tmp_path / "copy"
    before = everything(source)
    assert len(before) == 6
    path = FORMATS[kind](tmp_path, exported(source))
    first = imported(copy, path)
    assert (first["spans"], first["rewards"], first["known"]) == (13, 4, 0)
    assert everything(copy) == before
    assert imported(copy, path) == {"spans": 0, "rewards": 0, "known": 17}
    # What was in the store as recorded calls is there as such: into the store it came from it adds nothing either.
    assert imported(source, path)["spans"] == 0


def test_the_columns_that_training_needs_come_along(tmp_path: Path) -> None:
    source, copy = filled(tmp_path / "source"), tmp_path / "copy"
    for kind, write in FORMATS.items():
        target = copy / kind
        imported(target, write(tmp_path, exported(source)))
        local = opened(target)
        columns = "token_ids, logprobs, propensity, request_bytes, source"
        sql = f"SELECT {columns} FROM spans_v WHERE span_id = '000000000000000b'"
        (row,) = local.query(sql)["rows"]
        assert (json.loads(row[0]), json.loads(row[1])) == ({"prompt": [1, 2], "completion": [[3]]}, [[-0.5]]), kind
        assert row[2:] == [0.5, 100, "proxy"], kind
        assert scalar(local.collector, "SELECT count(*) FROM echoes") == 1, kind
        local.close()


def test_filters_choose_episodes(tmp_path: Path) -> None:
    local = opened(filled(tmp_path))
    chosen = {
        "slot": local.export(slot="s"),
        "reward": local.export(min_reward=0.9),
        "since": local.export(since_ns=1_530),
        "ids": local.export(1, episodes=["ep-v", "none", "ep-t"]),
    }
    assert [one["episode_id"] for one in chosen["slot"]["episodes"]] == ["ep-t"]
    assert [one["episode_id"] for one in chosen["reward"]["episodes"]] == ["ep-t"]
    assert [one["episode_id"] for one in chosen["since"]["episodes"]] == ["ep-w", "ep-v"]
    assert ([one["episode_id"] for one in chosen["ids"]["episodes"]], chosen["ids"]["next"]) == (["ep-v"], "1")
    assert (
        local.export(2, chosen["ids"]["next"], episodes=["ep-v", "none", "ep-t"])["episodes"][0]["episode_id"] == "ep-t"
    )
    local.close()


def test_no_secret_leaves_with_an_export(tmp_path: Path) -> None:
    secret = "sk-abcdefghijklmnop1234567890"
    row = {"span_id": "0" * 15 + "1", "input_messages": json.dumps([{"role": "user", "content": secret}])}
    assert secret not in json.dumps(span_out(row))
    assert secret not in json.dumps(reward_out({"reward_id": "r", "explanation": f"used {secret}"}))


texts = st.text(max_size=12).filter(lambda text: "\ud800" not in text)
payloads = (
    st.none()
    | texts
    | st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=5,
    ).map(json.dumps)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(payloads, payloads, texts, st.integers(0, (1 << 63) - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_row_comes_back_as_it_was(given_: str | None, gave: str | None, name: str, ns: int, value: float) -> None:
    row = {"span_id": "ab" * 8, "trace_id": "cd" * 16, "episode_id": "e", "operation": "chat", "status": "ok"}
    row |= {"start_ns": ns, "end_ns": ns, "route": "/x", "source": "proxy", "episode_source": "url", "attempts": 1}
    row |= {"input_messages": given_, "output_messages": gave, "error_type": name or None, "cost_usd": value}
    judged = {"reward_id": "r", "target_kind": "span", "target_id": "ab" * 8, "value": value, "ts_ns": ns, "name": "n"}
    page = {"episode_id": "e", "reward": None, "spans": [row], "echoes": [], "rewards": [{**judged, "source": "llm"}]}
    back = jsonl.read(json.loads(jsonl.line(page)))
    assert isinstance(back, Bundle)
    (span,), (reward,) = back.spans, back.rewards
    for column, held in row.items():
        if column in ("input_messages", "output_messages") and held is not None and held[:1] in ("[", "{"):
            assert _same(span[column], held)
        else:
            assert span.get(column) == held
    assert reward == {**judged, "source": "llm"}


def _same(one: str, other: str) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except json.JSONDecodeError:
        return one == other


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"span_id": "x"}, "span_id"),
        ({"start_ns": "1"}, "start_ns"),
        ({"status": "fine"}, "status"),
        ({"trace_id": None}, "trace_id"),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_column(change: dict[str, Any], named: str) -> None:
    row = {"span_id": "ab" * 8, "trace_id": "cd" * 16, "episode_id": "e", "operation": "chat", "status": "ok"}
    from collector.errors import BadInput

    with pytest.raises(BadInput, match=named):
        span_in({**row, "start_ns": 1, "end_ns": 2, **change})
    with pytest.raises(BadInput, match="value"):
        reward_in({"target_kind": "span", "target_id": "x", "value": True, "ts_ns": 1})
