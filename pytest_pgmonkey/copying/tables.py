"""Tables by the names that people type, and what COPY must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import sql
from psycopg.rows import tuple_row

from ..errors import CSVError
from .names import split_names

if TYPE_CHECKING:
    from psycopg import Connection


@dataclass(frozen=True)
class Name:
    """A table's name as it was typed; unquoted ones may stand for their lower case."""

    schema: str | None
    table: str
    quoted: bool

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}" if self.schema else self.table

    @property
    def identifier(self) -> sql.Identifier:
        parts = (self.schema, self.table) if self.schema else (self.table,)
        return sql.Identifier(*parts)


@dataclass(frozen=True)
class Table:
    """A table, view or the like that exists."""

    oid: int
    schema: str
    name: str
    #: pg_class.relkind
    kind: str
    #: Other tables inherit from it.
    has_children: bool
    #: By name: whether the column is generated.
    columns: dict[str, bool]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def stored(self) -> list[str]:
        """The columns that COPY writes to: not those that are generated."""
        return [name for name, generated in self.columns.items() if not generated]


def parse_name(text: str) -> Name:
    """Read `table`, `schema.table` or the same in SQL's quotes."""
    parts = split_names(text, ".")
    if len(parts) not in (1, 2):
        raise CSVError(f"{text!r} is no table's name: it may be table or schema.table")
    return Name(parts[0] if len(parts) == 2 else None, parts[-1], '"' in text)


_FIND = """
    SELECT c.oid, n.nspname, c.relname, c.relkind::text,
           c.relhassubclass AND EXISTS (
               SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhparent = c.oid)
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname = %(table)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND CASE WHEN %(schema)s::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
               ELSE n.nspname = %(schema)s END
"""
_COLUMNS = """
    SELECT attname, attgenerated <> ''
    FROM pg_catalog.pg_attribute
    WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
"""


def find_table(conn: Connection[Any], name: Name) -> Table | None:
    """Find a table; a name without quotes is tried as it stands, then in lower case."""
    spellings = [(name.schema, name.table)]
    if not name.quoted:
        spellings.append((name.schema and name.schema.lower(), name.table.lower()))
    cursor = conn.cursor(row_factory=tuple_row)
    for schema, table in spellings:
        row = cursor.execute(_FIND, {"schema": schema, "table": table}).fetchone()
        if row is not None:
            columns: dict[str, bool] = dict(cursor.execute(_COLUMNS, [row[0]]).fetchall())
            oid, found_in, found, kind, has_children = row
            return Table(oid, found_in, found, kind, has_children, columns)
    return None
