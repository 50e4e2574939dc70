"""Tables by the names that people type, and what COPY must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import sql

from ..common import CommandError

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["Column", "Name", "Table", "find_table", "parse_name"]


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
class Column:
    """One column."""

    name: str
    generated: bool


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
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    @property
    def stored(self) -> list[str]:
        """The columns that COPY writes to: not those that are generated."""
        return [column.name for column in self.columns if not column.generated]


def parse_name(text: str) -> Name:
    """Read `table`, `schema.table` or the same in SQL's quotes."""
    parts, quoted, rest = [], False, text
    while True:
        if rest.startswith('"'):
            part, rest = _quoted(rest, text)
            quoted = True
        else:
            part, dot, rest = rest.partition(".")
            rest = dot + rest
        parts.append(part)
        if not rest:
            break
        if not rest.startswith("."):
            raise CommandError(f"{text!r} is no table's name")
        rest = rest[1:]
    if len(parts) > 2 or not all(parts):
        raise CommandError(f"{text!r} is no table's name: it may be table or schema.table")
    return Name(parts[0] if len(parts) == 2 else None, parts[-1], quoted)


def _quoted(text: str, whole: str) -> tuple[str, str]:
    part, at = "", 1
    while at < len(text):
        if text[at] != '"':
            part += text[at]
        elif text[at + 1 : at + 2] == '"':
            part += '"'
            at += 1
        else:
            return part, text[at + 1 :]
        at += 1
    raise CommandError(f"{whole!r} has a quote that never ends")


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
    for schema, table in spellings:
        row = conn.execute(_FIND, {"schema": schema, "table": table}).fetchone()
        if row is not None:
            columns = tuple(Column(*each) for each in conn.execute(_COLUMNS, [row[0]]))
            oid, found_in, found, kind, has_children = row
            return Table(oid, found_in, found, kind, has_children, columns)
    return None
