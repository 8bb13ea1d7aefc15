"""What users may ask ClickHouse in SQL: one SELECT over this database, with no function that reads elsewhere.

The server parses the statement and tells its tree; nothing is run for that. What passes here is run as `readonly`,
in which the server itself refuses to write, to change settings and to use table functions that read files or hosts.
"""

import re
from collections.abc import Iterator
from typing import Protocol

from collector.errors import QueryError, RatchetError, Unavailable

_TABLE_FUNCTIONS = frozenset(("numbers", "generateseries", "generate_series", "values", "zeros", "one", "null"))
_FORBIDDEN = frozenset(
    ("file", "hascolumnintable", "getmacro", "getserverport", "getserversetting", "tcpport", "showcertificate")
)
_FORBIDDEN_BEGINNINGS = ("dict", "joinget", "ai", "catboost", "filesystem")
_ELSEWHERE = re.compile(r"^(?:Table)?Identifier\s+`?(system|information_schema)`?\.", re.IGNORECASE)
_FUNCTION = re.compile(r"^Function\s+(\S+)")
_TABLE = re.compile(r"^TableIdentifier\s+(\S+)")


class Parser(Protocol):
    """Whoever can parse: the server."""

    def text(self, sql: str) -> str:
        """The answer to a statement as text."""
        ...


# What may hold a semicolon: texts, quoted names, comments.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.)*"|`(?:[^`\\]|\\.)*`|--[^\n]*|/\*.*?\*/""", re.DOTALL)


def one_select(server: Parser, sql: str) -> str:
    """The statement as it may be run. Raises QueryError, which says what is not allowed; Unavailable."""
    sql = sql.strip().rstrip(";").rstrip()
    if ";" in _QUOTED.sub("", sql):
        raise QueryError("give exactly one statement", param="sql")
    check(server, sql)
    return sql


def check(server: Parser, sql: str) -> None:
    """Raises QueryError where the tree of a single statement holds what is not allowed; Unavailable."""
    try:
        tree = server.text(f"EXPLAIN AST {sql}")
    except Unavailable:
        raise
    except RatchetError as error:
        raise QueryError(error.message, param="sql") from None
    nodes = list(_nodes(tree))
    if not nodes or not nodes[0][1].startswith(("SelectWithUnionQuery", "SelectIntersectExceptQuery")):
        raise QueryError("only SELECT can be asked here; the store is read-only", param="sql")
    above: list[str] = []
    for depth, node in nodes:
        del above[depth:]
        _check(node, above)
        above.append(node)


def _nodes(tree: str) -> Iterator[tuple[int, str]]:
    """`(depth, node)` of each line. A text with line ends in it may add lines, and can hide none."""
    for line in tree.splitlines():
        node = line.lstrip(" ")
        if node:
            yield len(line) - len(node), node


def _check(node: str, above: list[str]) -> None:
    if len(above) == 1 and node.startswith(("Set", "Identifier", "Literal")) and not node.startswith("Select"):
        raise QueryError("give no SETTINGS, FORMAT or INTO OUTFILE", param="sql")
    if node == "Set":
        raise QueryError("give no SETTINGS; the limits of the configuration hold", param="sql")
    table = _TABLE.match(node)
    if _ELSEWHERE.match(node) or (table and "." in table[1]):
        raise QueryError(f"{node.split()[-1]}: only this database's tables and views can be asked", param="sql")
    function = _FUNCTION.match(node)
    if function is None:
        return
    name = function[1].lower()
    if above and above[-1].startswith("TableExpression") and name not in _TABLE_FUNCTIONS:
        raise QueryError(f"{name}: table functions that read files or hosts cannot be asked here", param="sql")
    if name in _FORBIDDEN or name.startswith(_FORBIDDEN_BEGINNINGS):
        raise QueryError(f"{name}: cannot be asked here", param="sql")
