"""What `pgimport` does: blocks of the file go to COPY as they are, in one transaction."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from itertools import chain
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..running import CommandError, session
from . import settings
from .files import Source
from .inference import infer_types
from .progress import progress
from .records import guard_end_marker, read_head, split_record
from .rejection import Import, describe
from .tables import find_table, parse_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from psycopg import Connection

    from .records import Head
    from .settings import Dialect
    from .tables import Name, Table

#: From then on a record that is a bare `\\.` is a value like others.
_NO_END_MARKER = 180000
_LONGEST_NAME = 63


def run(args: argparse.Namespace) -> int:
    """Import a file."""
    settings.apply_sidecar(args, args.file)
    dialect = settings.dialect(args)
    if args.infer_types and not args.create_table:
        args.parser.error("--infer-types belongs to --create-table")
    name = parse_name(args.table)
    source = Source(args.file, settings.encoding(args))
    with source.open() as blocks, session(args) as conn:
        rows, table = _Importer(args, conn, source, dialect).load(name, blocks)
    sys.stdout.write(f"imported {rows} {'row' if rows == 1 else 'rows'} into {table}\n")
    return 0


class _Importer:
    """One import over one connection."""

    def __init__(
        self, args: argparse.Namespace, conn: Connection[Any], source: Source, dialect: Dialect
    ) -> None:
        self.args = args
        self.conn = conn
        self.source = source
        self.dialect = dialect
        self.has_header = args.header is not False
        self.copied: Import | None = None

    def load(self, name: Name, blocks: Iterator[bytes]) -> tuple[int, Table]:
        lines, labels = 0, self.args.columns
        if self.has_header or self.args.create_table:
            head = read_head(blocks, self.dialect.quote, self.source.name)
            labels = self.labels(head)
            lines = head.lines if self.has_header else 0
            blocks = head.rest if self.has_header else chain([head.data], head.rest)
        # What the server says is read as UTF-8, whatever the file is.
        self.conn.execute("SET client_encoding TO 'UTF8'")
        try:
            with self.conn.transaction():
                return self.fill(name, labels, lines, blocks)
        except psycopg.Error as error:
            if self.copied is None:
                raise
            raise CommandError(describe(error, self.copied, self.conn)) from error

    def fill(
        self, name: Name, labels: list[str] | None, lines: int, blocks: Iterator[bytes]
    ) -> tuple[int, Table]:
        found = find_table(self.conn, name)
        table = found or self.create(name, labels)
        columns = self.columns(table, labels) if found else list(table.columns)
        if self.args.truncate and found:
            self.conn.execute(sql.SQL("TRUNCATE {}").format(table.identifier))
        self.copied = Import(self.source, self.dialect, table, columns, self.has_header, lines)
        rows = self.copy(self.copied, blocks)
        if self.args.infer_types and not found:
            infer_types(self.conn, table.identifier, columns)
        return rows, table

    def copy(self, into: Import, blocks: Iterator[bytes]) -> int:
        if self.conn.info.server_version < _NO_END_MARKER:
            blocks = guard_end_marker(blocks, self.dialect.quote)
        statement = sql.SQL("COPY {} ({}) FROM STDIN WITH ({})").format(
            into.table.identifier,
            sql.SQL(", ").join(map(sql.Identifier, into.columns)),
            self.dialect.options(self.source.encoding),
        )
        with self.conn.cursor() as cursor, progress(self.source.name, self.source.total) as show:
            with cursor.copy(statement) as copy:
                for block in blocks:
                    copy.write(block)
                    show(self.source.done)
            return cursor.rowcount

    # --- names ---

    def wrong(self, problem: str) -> CommandError:
        return CommandError(f"{self.source.name}: {problem}")

    def wrong_label(self, number: int, problem: str) -> CommandError:
        where = "header" if self.args.columns is None else "--columns"
        return self.wrong(f"{where}, value {number}: {problem}")

    def labels(self, head: Head) -> list[str]:
        """Give the names that the file's values go by."""
        if head.record is None:
            raise self.wrong("is empty, and has no first record")
        line = f"line {head.record.line}"
        if head.record.unended:
            raise self.wrong(f"{line}: a quoted value never ends")
        fields = split_record(head.record.data, self.dialect)
        named: list[str] | None = self.args.columns
        if named is not None and len(named) != len(fields):
            raise self.wrong(f"{line} has {len(fields)} values, --columns names {len(named)}")
        if named is not None:
            return named
        if not self.has_header:
            return [f"column_{number}" for number in range(1, len(fields) + 1)]
        return [self.label(field.value, number) for number, field in enumerate(fields, 1)]

    def label(self, value: bytes, number: int) -> str:
        encoding = self.source.encoding
        try:
            name = value.decode(encoding.data_codec)
        except UnicodeDecodeError:
            problem = f"is not {encoding.name}; --encoding names another"
            raise self.wrong_label(number, problem) from None
        if not name.strip():
            raise self.wrong_label(number, "has no name")
        return name

    def columns(self, table: Table, labels: list[str] | None) -> list[str]:
        """Find the table's columns of the file's values, in the order of the file."""
        if labels is None or (not self.has_header and self.args.columns is None):
            return table.stored
        columns = [self.column(label, number, table) for number, label in enumerate(labels, 1)]
        self.refuse_doubles(columns)
        return columns

    def column(self, label: str, number: int, table: Table) -> str:
        """Find a column by its name as it stands, else by the same letters in lower case."""
        alike = [name for name in table.columns if _normal(name) == _normal(label)]
        if label not in table.columns and len(alike) != 1:
            near = get_close_matches(_normal(label), table.columns, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(table.columns)}"
            raise self.wrong_label(number, f"table {table} has no column {label!r} ({hint})")
        column = label if label in table.columns else alike[0]
        if table.columns[column]:
            hint = "its values cannot be imported: leave it out of the file"
            raise self.wrong_label(number, f"column {column!r} is generated; {hint}")
        return column

    def refuse_doubles(self, columns: list[str]) -> None:
        for number, column in enumerate(columns, 1):
            if column in columns[: number - 1]:
                raise self.wrong_label(number, f"column {column!r} is named twice")

    # --- a new table ---

    def create(self, name: Name, labels: list[str] | None) -> Table:
        if not self.args.create_table:
            raise CommandError(
                f"table {name} does not exist, or this role may not use its schema; "
                "--create-table creates it"
            )
        assert labels is not None
        columns = labels if self.args.lowercase is False else list(map(_normal, labels))
        self.refuse_doubles(columns)
        for number, column in enumerate(columns, 1):
            if len(column.encode()) > _LONGEST_NAME:
                problem = f"{column!r} is longer than PostgreSQL's {_LONGEST_NAME} bytes"
                raise self.wrong_label(number, problem)
        definitions = (sql.SQL("{} text").format(sql.Identifier(column)) for column in columns)
        self.conn.execute(
            sql.SQL("CREATE TABLE {} ({})").format(name.identifier, sql.SQL(", ").join(definitions))
        )
        table = find_table(self.conn, name)
        assert table is not None
        return table


def _normal(label: str) -> str:
    return re.sub(r"\W", "_", label.strip().lower())
