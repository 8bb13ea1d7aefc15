"""What users may ask in SQL: one SELECT over tables and views, with no function that reads a file or the network."""

from collections.abc import Iterator
from typing import Any

import duckdb
import orjson

from collector.errors import QueryError

# Everything else that can stand in FROM with brackets may read files, settings or other databases.
_TABLE_FUNCTIONS = frozenset(("range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"))
# Scalar functions that tell about the process, or run text as SQL.
_FORBIDDEN = frozenset(("getenv", "query", "query_table", "read_text", "read_blob", "pragma_user_agent"))
_LIKE_A_FILE = frozenset("./\\:*?[")


def one_select(con: Any, sql: str) -> Any:
    """The statement. Raises QueryError, which says what is not allowed."""
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryError(str(error), param="sql") from None
    if len(statements) != 1:
        raise QueryError(f"give exactly one statement, not {len(statements)}", param="sql")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise QueryError("only SELECT can be asked here; the store is read-only", param="sql")
    if statements[0].named_parameters:
        raise QueryError("parameters cannot be given here; write the values", param="sql")
    ((text,),) = con.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    tree = orjson.loads(text)
    if tree.get("error"):
        raise QueryError(str(tree.get("error_message")), param="sql")
    for node in _nodes(tree):
        _check(node)
    return statements[0]


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the tree, without recursion: the depth is the user's."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _check(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if kind == "TABLE_FUNCTION":
        name = str((node.get("function") or {}).get("function_name", "")).lower()
        if name not in _TABLE_FUNCTIONS:
            raise QueryError(f"{name}: table functions that read files or settings cannot be asked here", param="sql")
    elif kind == "BASE_TABLE" and _LIKE_A_FILE.intersection(str(node.get("table_name", ""))):
        raise QueryError(f"{node.get('table_name')}: there is no such table or view", param="sql")
    elif node.get("class") == "FUNCTION" and str(node.get("function_name", "")).lower() in _FORBIDDEN:
        raise QueryError(f"{node['function_name']}: cannot be asked here", param="sql")
