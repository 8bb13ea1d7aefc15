"""Our own form as tables: a folder with `spans.parquet` and `rewards.parquet`, zstd, payloads as JSON text."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collector.formats.bundle import ECHO_OF, Bundle, kinds, reward_in, reward_out, span_in, span_out
from collector.model import Reward
from collector.otel_in import Observed

SPANS, REWARDS = "spans.parquet", "rewards.parquet"
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_BATCH = 2_000


def _schema(row: type) -> pa.Schema:
    return pa.schema([(name, _ARROW[kind]) for name, kind in kinds(row).items()])


SPAN_SCHEMA, REWARD_SCHEMA = _schema(Observed).append(pa.field(ECHO_OF, pa.string())), _schema(Reward)


def write(folder: Path, episodes: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Both files; returns how many spans and rewards. Files appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [(folder / SPANS, SPAN_SCHEMA), (folder / REWARDS, REWARD_SCHEMA)]
    parts = [path.with_name(f".{path.name}.part") for path, _ in targets]
    counts = [0, 0]
    with (
        pq.ParquetWriter(parts[0], SPAN_SCHEMA, compression="zstd") as spans,
        pq.ParquetWriter(parts[1], REWARD_SCHEMA, compression="zstd") as rewards,
    ):
        writers = ((spans, SPAN_SCHEMA), (rewards, REWARD_SCHEMA))
        for batch in _batches(episodes):
            for index, (rows, (writer, schema)) in enumerate(zip(batch, writers, strict=True)):
                writer.write_table(pa.Table.from_pylist(rows, schema))
                counts[index] += len(rows)
    for part, (path, _) in zip(parts, targets, strict=True):
        part.replace(path)
    return counts[0], counts[1]


def _batches(episodes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    spans: list[dict[str, Any]] = []
    rewards: list[dict[str, Any]] = []
    for episode in episodes:
        spans += [_flat(row) for row in (*episode["spans"], *episode["echoes"])]
        rewards += [reward_out(row) for row in episode["rewards"]]
        if len(spans) >= _BATCH:
            yield spans, rewards
            spans, rewards = [], []
    yield spans, rewards


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its payloads as text, masked."""
    made = {**span_in(span_out(row)), ECHO_OF: row.get(ECHO_OF)}
    return {name: made.get(name) for name in SPAN_SCHEMA.names}


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a row of a table is ours."""
    return {"span_id", "episode_id", "operation", "start_ns"} <= set(found) or {"reward_id", "target_kind"} <= set(
        found
    )


def read(found: Mapping[str, Any]) -> Bundle:
    """A row of either table. Raises BadInput that names the column."""
    return Bundle([], [reward_in(found)]) if "reward_id" in found else Bundle([span_in(found)], [])
