"""The store measured beside what one would use without it: rows as they are in DuckDB and SQLite."""
