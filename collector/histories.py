"""Long histories: payloads of agents that send all that was said again with each call, sorted to cost what is new.

zstd finds what repeats, but not far back: where many agents with long histories take turns, the last call of the same
episode lies megabytes away. So such payloads wait in `fresh_payloads`, and a stretch of them at a time moves to
`payloads`, sorted by episode. Every row stays whole, no reader joins anything. Short payloads go there at once.
"""

from collections.abc import Sequence
from typing import Any

from collector.inserts import Segment

_LONG_BYTES = 12_000  # of a journal line, in the mean of a batch
STRETCH_BYTES = 64 << 20

_WAITING = "SELECT count(*) FROM fresh_payloads"
# A new table: rows that are deleted leave their room in the file only with all of their row group.
_MOVE = (
    "INSERT INTO payloads BY NAME FROM fresh_payloads ORDER BY episode_id, start_ns, span_id",
    """CREATE OR REPLACE TABLE fresh_payloads (
  span_id VARCHAR, episode_id VARCHAR, start_ns BIGINT,
  input_messages VARCHAR USING COMPRESSION zstd, output_messages VARCHAR USING COMPRESSION zstd,
  tools VARCHAR USING COMPRESSION zstd, token_ids VARCHAR USING COMPRESSION zstd,
  logprobs VARCHAR USING COMPRESSION zstd, attributes VARCHAR USING COMPRESSION zstd, day INTEGER)""",
)


def are_long(segments: Sequence[Segment]) -> bool:
    """Whether the payloads of these segments are worth sorting."""
    return sum(one.bytes for one in segments) >= _LONG_BYTES * max(1, sum(one.lines for one in segments))


def waiting(cursor: Any) -> int:
    """About how many bytes wait to be sorted."""
    ((rows,),) = cursor.execute(_WAITING).fetchall()
    return int(rows) * _LONG_BYTES


def settle(cursor: Any) -> None:
    """Sort what waits into its place, within the caller's transaction."""
    for statement in _MOVE:
        cursor.execute(statement)
