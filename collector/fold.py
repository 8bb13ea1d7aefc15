"""The table `episodes`: one row an episode, brought up to date before it is read, so that a page costs a page.

What was loaded since the last time is folded in: new spans add to the rows of their episodes, all other rows stay as
they are. Episodes whose spans were moved stand in `_dirty` and are counted anew.
"""

from typing import Any

_STATE = """
SELECT (SELECT coalesce(max(batch), -1) FROM _folds), (SELECT coalesce(max(fold), 0) + 1 FROM _folds),
  (SELECT count(*) FROM _dirty)
"""
_FOLD = """
INSERT INTO episodes BY NAME
WITH parts AS (
  SELECT * FROM span_sums(batch_above := $after) WHERE episode_id NOT IN (SELECT episode_id FROM _dirty)
),
known AS (
  SELECT * EXCLUDE (fold) FROM episodes
  WHERE episode_id IN (SELECT episode_id FROM parts) AND episode_id NOT IN (SELECT episode_id FROM _dirty)
)
SELECT episode_id, min(start_ns) AS start_ns, max(end_ns) AS end_ns, CAST(sum(steps) AS INTEGER) AS steps,
  CAST(sum(input_tokens) AS BIGINT) AS input_tokens, CAST(sum(output_tokens) AS BIGINT) AS output_tokens,
  sum(cost_usd) AS cost_usd, CAST(sum(errors) AS INTEGER) AS errors, min(prompt_ns) AS prompt_ns,
  arg_min(prompt, prompt_ns) AS prompt, $fold AS fold
FROM (SELECT * FROM parts UNION ALL BY NAME SELECT * FROM known) GROUP BY episode_id ORDER BY start_ns
"""
_RECOUNT = """
INSERT INTO episodes BY NAME
SELECT *, $fold AS fold FROM span_sums(batch_above := -1) WHERE episode_id IN (SELECT episode_id FROM _dirty)
"""
_REPLACE = """
DELETE FROM episodes WHERE fold < $fold AND (
  episode_id IN (SELECT episode_id FROM episodes WHERE fold = $fold) OR episode_id IN (SELECT episode_id FROM _dirty))
"""


def behind(cursor: Any, upto: int) -> bool:
    """Whether something was loaded, up to the batch `upto`, or moved that `episodes` does not have."""
    after, _, dirty = cursor.execute(_STATE).fetchall()[0]
    return bool(upto > after or dirty)


def fold(cursor: Any, upto: int) -> None:
    """Bring `episodes` up to date, `upto` being the latest batch, within the caller's transaction."""
    after, number, dirty = cursor.execute(_STATE).fetchall()[0]
    if upto <= after and not dirty:
        return
    if upto > after:
        cursor.execute(_FOLD, {"after": after, "fold": number})
    if dirty:
        cursor.execute(_RECOUNT, {"fold": number})
    cursor.execute(_REPLACE, {"fold": number})
    if dirty:
        cursor.execute("DELETE FROM _dirty")
    cursor.execute("DELETE FROM _folds")
    cursor.execute("INSERT INTO _folds VALUES (?, ?)", [number, upto])


def forget(cursor: Any) -> None:
    """Empty `episodes`; the next `fold` counts everything anew."""
    cursor.execute("DELETE FROM episodes")
    cursor.execute("DELETE FROM _folds")
    cursor.execute("DELETE FROM _dirty")
