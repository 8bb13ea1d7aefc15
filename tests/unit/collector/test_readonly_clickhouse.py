"""What of a statement's tree, as ClickHouse tells it, lets it through."""

import pytest

from collector.errors import QueryError
from collector.readonly_clickhouse import check, one_select


class Told:
    """A server that parses everything into one tree."""

    def __init__(self, tree: str) -> None:
        self.tree = tree
        self.asked = ""

    def text(self, sql: str) -> str:
        self.asked = sql
        return self.tree


HEAD = "SelectWithUnionQuery (children 1)\n ExpressionList (children 1)\n  SelectQuery (children 2)\n"
FROM = (
    "   TablesInSelectQuery (children 1)\n    TablesInSelectQueryElement (children 1)\n"
    "     TableExpression (children 1)\n"
)


@pytest.mark.parametrize(
    "tree",
    [
        HEAD + FROM + "      TableIdentifier spans_v (alias s)\n",
        HEAD + FROM + "      Function numbers (children 1)\n",
        HEAD + "   ExpressionList (children 1)\n    Function count (children 1)\n",
        HEAD + "   ExpressionList (children 1)\n    Identifier s.episode_id\n",
        HEAD + "   Literal UInt64_5\n",
    ],
)
def test_a_select_over_the_views_passes(tree: str) -> None:
    check(Told(tree), "SELECT 1")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("InsertQuery   (children 2)\n", "only SELECT"),
        ("Explain EXPLAIN (children 1)\n", "only SELECT"),
        ("", "only SELECT"),
        (HEAD + FROM + "      Function url (children 1)\n", "table functions"),
        (HEAD + FROM + "      TableIdentifier system.users\n", "only this database"),
        (
            HEAD + "   Function in (children 1)\n    ExpressionList\n     Identifier system.users\n",
            "only this database",
        ),
        (HEAD + "   ExpressionList (children 1)\n    Function file (children 1)\n", "file"),
        (HEAD + "   ExpressionList (children 1)\n    Function dictGet (children 1)\n", "dictget"),
        (HEAD + "   Set\n", "SETTINGS"),
        (HEAD + " Identifier CSV\n", "FORMAT"),
        (HEAD + " Literal '/tmp/x'\n", "OUTFILE"),
    ],
)
def test_whatever_reaches_elsewhere_is_refused(tree: str, said: str) -> None:
    with pytest.raises(QueryError, match=said):
        check(Told(tree), "SELECT 1")


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "SELECT ';'; DROP TABLE calls", "SELECT 1 /* ; */ ; x"])
def test_two_statements_are_refused(sql: str) -> None:
    with pytest.raises(QueryError, match="one statement"):
        one_select(Told(HEAD), sql)


@pytest.mark.parametrize("sql", ["SELECT ';'", "SELECT 1 -- ;", "SELECT 1;\n", "SELECT 'it\\'s;', `a;b`"])
def test_a_semicolon_that_ends_nothing_is_none(sql: str) -> None:
    server = Told(HEAD)
    assert one_select(server, sql) == sql.strip().rstrip(";").rstrip()
    assert server.asked.startswith("EXPLAIN AST ")
