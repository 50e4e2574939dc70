"""What `pgimport` does: blocks of the file go to COPY as they are, in one transaction."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..common import CommandError
from ..failures import failures, hider
from ..session import session
from . import settings
from .files import Source
from .progress import Progress
from .records import guard_end_marker, read_head, split_record
from .rejection import Import, describe
from .tables import find_table, parse_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from .records import Head
    from .settings import Dialect
    from .tables import Name, Table

__all__ = ["run"]

#: From then on a record that is a bare `\\.` is a value like others.
_NO_END_MARKER = 180000
_LONGEST_NAME = 63


def run(args: argparse.Namespace) -> int:
    with failures(args):
        settings.apply_sidecar(args, args.file)
    dialect = settings.dialect(args)
    if args.infer_types and not args.create_table:
        args.parser.error("--infer-types belongs to --create-table")
    name = parse_name(args.table)
    source = Source(args.file, settings.encoding(args))
    with source.open() as blocks, failures(args), session(args) as conn:
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
        head = None
        if self.has_header or self.args.create_table:
            head = read_head(blocks, self.dialect.quote, self.source.name)
            blocks = head.rest() if self.has_header else head.whole()
        labels = self.labels(head)
        # What the server says is read as UTF-8, whatever the file is.
        self.conn.execute("SET client_encoding TO 'UTF8'")
        try:
            with self.conn.transaction():
                return self.fill(name, labels, head, blocks)
        except psycopg.Error as error:
            if self.copied is None:
                raise
            message = describe(error, self.copied, self.conn)
            raise CommandError(message, error, hider(self.args)) from None

    def fill(
        self, name: Name, labels: list[str] | None, head: Head | None, blocks: Iterator[bytes]
    ) -> tuple[int, Table]:
        table = find_table(self.conn, name)
        created = table is None
        if table is None:
            table = self.create(name, labels)
        columns = self.columns(table, labels, created)
        if self.args.truncate and not created:
            self.conn.execute(sql.SQL("TRUNCATE {}").format(table.identifier))
        lines = head.lines if head and self.has_header else 0
        self.copied = Import(self.source, self.dialect, table, columns, self.has_header, lines)
        rows = self.copy(table, columns, blocks)
        if created and self.args.infer_types:
            from .inference import infer_types

            infer_types(self.conn, table.identifier, columns)
        return rows, table

    def copy(self, table: Table, columns: Sequence[str], blocks: Iterator[bytes]) -> int:
        if self.conn.info.server_version < _NO_END_MARKER:
            blocks = guard_end_marker(blocks, self.dialect.quote)
        statement = sql.SQL(
            "COPY {} ({}) FROM STDIN "
            "WITH (FORMAT csv, DELIMITER {}, QUOTE {}, NULL {}, ENCODING {})"
        ).format(
            table.identifier,
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            self.dialect.delimiter,
            self.dialect.quotechar,
            self.dialect.null,
            self.source.encoding.sent_as,
        )
        with self.conn.cursor() as cursor, Progress(self.source.name, self.source.total) as bar:
            with cursor.copy(statement) as copy:
                for block in blocks:
                    copy.write(block)
                    bar.update(self.source.done)
            return cursor.rowcount

    # --- names ---

    def labels(self, head: Head | None) -> list[str] | None:
        """Give the names that the file's values go by; `None`: the table's, in its order."""
        named: list[str] | None = self.args.columns
        if head is None:
            return named
        if head.record is None:
            raise CommandError(f"{self.source.name}: is empty, and has no first record")
        if head.record.unended:
            raise CommandError(
                f"{self.source.name}: line {head.record.line}: a quoted value never ends"
            )
        fields = split_record(head.record.data, self.dialect)
        if named is not None and len(named) != len(fields):
            raise CommandError(
                f"{self.source.name}: line {head.record.line} has {len(fields)} values, "
                f"--columns names {len(named)}"
            )
        if named is not None or not self.has_header:
            return named or [f"column_{number}" for number in range(1, len(fields) + 1)]
        return [self.label(field.value, number) for number, field in enumerate(fields, 1)]

    def label(self, value: bytes, number: int) -> str:
        try:
            name = value.decode(self.source.encoding.data_codec)
        except UnicodeDecodeError:
            raise CommandError(
                f"{self.source.name}: header, value {number}: "
                f"is not {self.source.encoding.name}; --encoding names another"
            ) from None
        if not name.strip():
            raise CommandError(f"{self.source.name}: header, value {number}: has no name")
        return name

    def columns(self, table: Table, labels: list[str] | None, created: bool) -> list[str]:
        """Find the table's columns of the file's values, in the order of the file."""
        if created:
            return table.names
        if labels is None or (not self.has_header and self.args.columns is None):
            return table.stored
        columns: list[str] = []
        for number, label in enumerate(labels, 1):
            column = _matching(label, table)
            if column is None:
                raise self.wrong_label(number, _unknown(label, table))
            if column in columns:
                raise self.wrong_label(number, f"column {column!r} is named twice")
            if column not in table.stored:
                hint = "its values cannot be imported: leave it out of the file"
                raise self.wrong_label(number, f"column {column!r} is generated; {hint}")
            columns.append(column)
        return columns

    def wrong_label(self, number: int, problem: str) -> CommandError:
        where = "header" if self.args.columns is None else "--columns"
        return CommandError(f"{self.source.name}: {where}, value {number}: {problem}")

    # --- a new table ---

    def create(self, name: Name, labels: list[str] | None) -> Table:
        if not self.args.create_table:
            raise CommandError(
                f"table {name} does not exist, or this role may not use its schema; "
                "--create-table creates it"
            )
        assert labels is not None
        columns = labels if self.args.lowercase is False else list(map(_normal, labels))
        for number, column in enumerate(columns, 1):
            if columns.index(column) != number - 1:
                raise self.wrong_label(number, f"column {column!r} is named twice")
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


def _matching(label: str, table: Table) -> str | None:
    """Find a column by its name as it stands, else by the same letters in lower case."""
    if label in table.names:
        return label
    near = [name for name in table.names if _normal(name) == _normal(label)]
    return near[0] if len(near) == 1 else None


def _unknown(label: str, table: Table) -> str:
    near = get_close_matches(_normal(label), table.names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(table.names)}"
    return f"table {table} has no column {label!r} ({hint})"
