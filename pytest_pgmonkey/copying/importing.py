"""`import_csv`: blocks of the file go to COPY as they are, in one transaction."""

from __future__ import annotations

import re
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..errors import CSVError
from .files import BLOCK, Source
from .records import (
    guard_end_marker,
    other_delimiter,
    read_head,
    split_record,
    without_blank_end,
)
from .rejection import Import, describe, use_delimiter
from .settings import (
    CSVResult,
    UsageError,
    borrowed,
    local_settings,
    make_columns,
    make_dialect,
    make_encoding,
    no_progress,
    require_sync,
)
from .tables import find_table, parse_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from ..handles import Handle
    from .files import CSVFile
    from .records import Head
    from .settings import Dialect, Progress
    from .tables import Name, Table

#: From then on a record that is a bare `\\.` is a value like others.
_NO_END_MARKER = 180000
_LONGEST_NAME = 63
_MOST_COLUMNS = 1600


def import_csv(
    handle: Handle,
    file: CSVFile,
    *,
    table: str,
    columns: Sequence[str] | None = None,
    header: bool = True,
    delimiter: str = ",",
    quotechar: str = '"',
    null: str = "",
    encoding: str | None = None,
    create_table: bool = False,
    infer_types: bool = False,
    lowercase: bool = True,
    truncate: bool = False,
    progress: Progress | None = None,
) -> CSVResult:
    """Import a CSV file into a table by COPY: all of its rows, or none.

    Inside a block of the handle it is part of the block's transaction, behind a savepoint.
    Otherwise, and in autocommit mode, it commits by itself.

    `handle` is of type `normal` or `pool`. `file` is a path (`.gz` files are decompressed), or an
    open file in binary or text mode, which is read to its end and stays open. `table` is `table`
    or `schema.table`; it is tried as written, then in lower case. A name in SQL quotes is only
    tried as written.

    `columns` names the file's columns, replacing the header. `header=False` says that there is no
    header. `null` is the unquoted text that means NULL. `encoding` is a Python or PostgreSQL name;
    by default the file's byte order mark decides, else UTF-8.

    `create_table` creates a missing table with text columns, or with `infer_types` with types that
    fit all values. `lowercase=False` keeps the header's names for it. `truncate` empties the table
    first. `progress` is called with the bytes read and the total, or `None` if it is unknown.

    Raises `CSVError` with the place in the file if nothing was imported, and the handle's errors if
    it cannot connect.
    """
    require_sync(handle, "import_csv")
    dialect = make_dialect(delimiter, quotechar, null)
    named = make_columns(columns)
    if infer_types and not create_table:
        raise UsageError("`infer_types` belongs to `create_table`")
    name = parse_name(table)
    plan = Plan(dialect, named, header, create_table, infer_types, lowercase, truncate)
    source = Source(file, make_encoding(encoding))
    with source.open() as blocks, ExitStack() as opened:
        importer = _Importer(plan, source, progress or no_progress, opened)
        return importer.load(handle, name, blocks)


@dataclass(frozen=True)
class Plan:
    """What an import is asked to do."""

    dialect: Dialect
    columns: list[str] | None
    header: bool
    create_table: bool
    infer_types: bool
    lowercase: bool
    truncate: bool


class _Importer:
    """One import over one connection."""

    conn: Connection[Any]

    def __init__(self, plan: Plan, source: Source, progress: Progress, opened: ExitStack) -> None:
        self.plan = plan
        self.dialect = plan.dialect
        self.source = source
        self.progress = progress
        self.opened = opened
        self.copied: Import | None = None
        #: What to do about a header of one name that looks like several.
        self.doubt: str | None = None

    def load(self, handle: Handle, name: Name, blocks: Iterator[bytes]) -> CSVResult:
        lines, labels = 0, self.plan.columns
        if self.plan.header or self.plan.create_table:
            head = read_head(blocks, self.dialect.quote, self.source.name)
            labels = self.labels(head)
            lines = head.lines if self.plan.header else 0
            blocks = head.rest if self.plan.header else chain([head.data], head.rest)
        with borrowed(handle) as self.conn:
            try:
                # What the server says is read as UTF-8, whatever the file is.
                with (
                    self.conn.transaction(),
                    local_settings(self.conn, {"client_encoding": "UTF8"}),
                ):
                    return self.fill(name, labels, lines, blocks)
            except psycopg.Error as error:
                if self.copied is not None:
                    raise describe(error, self.copied, self.conn) from error
                raise CSVError(f"{name}: {error.diag.message_primary or error}") from error

    def fill(
        self, name: Name, labels: list[str] | None, lines: int, blocks: Iterator[bytes]
    ) -> CSVResult:
        table = find_table(self.conn, name)
        if table is None:
            table, blocks = self.create(name, labels, blocks)
            columns = list(table.columns)
        else:
            columns = self.columns(table, labels)
            if self.plan.truncate:
                self.conn.execute(sql.SQL("TRUNCATE {}").format(table.identifier))
        self.copied = Import(self.source, self.dialect, table, columns, self.plan.header, lines)
        rows = self.copy(self.copied, blocks)
        return CSVResult(rows, str(table), tuple(columns))

    def copy(self, into: Import, blocks: Iterator[bytes]) -> int:
        if len(into.columns) > 1:  # With one, an empty line is a row.
            blocks = without_blank_end(blocks)
        if self.conn.info.server_version < _NO_END_MARKER:
            blocks = guard_end_marker(blocks, self.dialect.quote)
        statement = sql.SQL("COPY {} ({}) FROM STDIN WITH ({})").format(
            into.table.identifier,
            sql.SQL(", ").join(map(sql.Identifier, into.columns)),
            self.dialect.options(self.source.encoding),
        )
        with self.conn.cursor() as cursor:
            with cursor.copy(statement) as copy:
                for block in self.shown(blocks):
                    copy.write(block)
            return cursor.rowcount

    def shown(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        total = self.source.total
        for block in blocks:
            yield block
            self.progress(self.source.done, total)

    # --- names ---

    def wrong(self, problem: str, hint: str | None = None, line: int | None = None) -> CSVError:
        name = self.source.name
        return CSVError(f"{name}: {problem}", hint, file=name, line=line)

    def wrong_label(self, number: int, problem: str, hint: str | None = None) -> CSVError:
        where = "header" if self.plan.columns is None else "`columns`"
        return self.wrong(f"{where}, value {number}: {problem}", hint)

    def labels(self, head: Head) -> list[str]:
        """Give the names that the file's values go by."""
        if head.record is None:
            raise self.wrong("is empty, and has no first record")
        line = head.record.line
        if head.record.unended:
            raise self.wrong(f"line {line}: a quoted value never ends", line=line)
        fields = split_record(head.record.data, self.dialect)
        values = len(fields)
        other = other_delimiter(head.record.data, self.dialect) if values == 1 else None
        hint = other and use_delimiter(other)
        named = self.plan.columns
        if named is not None and len(named) != values:
            found = "1 value" if values == 1 else f"{values} values"
            problem = f"line {line} has {found}, `columns` names {len(named)}"
            raise self.wrong(problem, hint, line)
        if values > _MOST_COLUMNS:
            problem = f"has {values} columns, and a table of PostgreSQL at most {_MOST_COLUMNS}"
            raise self.wrong(problem, line=line)
        if named is not None:
            return named
        if not self.plan.header:
            return [f"column_{number}" for number in range(1, values + 1)]
        self.doubt = hint
        return [self.label(field.value, number) for number, field in enumerate(fields, 1)]

    def label(self, value: bytes, number: int) -> str:
        encoding = self.source.encoding
        try:
            name = value.decode(encoding.data_codec)
        except UnicodeDecodeError:
            problem = f"is not {encoding.name}"
            raise self.wrong_label(number, problem, "`encoding` names another") from None
        if not name.strip():
            raise self.wrong_label(number, "has no name")
        return name

    def columns(self, table: Table, labels: list[str] | None) -> list[str]:
        """Find the table's columns of the file's values, in the order of the file."""
        if labels is None or (not self.plan.header and self.plan.columns is None):
            return table.stored
        columns = [self.column(label, number, table) for number, label in enumerate(labels, 1)]
        self.refuse_doubles(columns)
        return columns

    def column(self, label: str, number: int, table: Table) -> str:
        """Find a column by its name as it stands, else by the same letters in lower case."""
        alike = [name for name in table.columns if _normal(name) == _normal(label)]
        if label not in table.columns and len(alike) != 1:
            self.refuse_doubtful(label)
            from difflib import get_close_matches

            near = get_close_matches(_normal(label), table.columns, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(table.columns)}"
            raise self.wrong_label(number, f"table {table} has no column {label!r} ({hint})")
        column = label if label in table.columns else alike[0]
        if table.columns[column]:
            hint = "its values cannot be imported: leave it out of the file"
            raise self.wrong_label(number, f"column {column!r} is generated; {hint}")
        return column

    def refuse_doubtful(self, label: str, otherwise: str = "") -> None:
        if self.doubt is not None:
            raise self.wrong(f"the header is one name, {label!r}", self.doubt + otherwise)

    def refuse_doubles(self, columns: list[str]) -> None:
        for number, column in enumerate(columns, 1):
            if column in columns[: number - 1]:
                raise self.wrong_label(number, f"column {column!r} is named twice")

    # --- a new table ---

    def create(
        self, name: Name, labels: list[str] | None, blocks: Iterator[bytes]
    ) -> tuple[Table, Iterator[bytes]]:
        """Create the table, and give the data of the file that is still to be copied."""
        if not self.plan.create_table:
            problem = f"table {name} does not exist, or this role may not use its schema"
            raise CSVError(problem, "create_table=True creates it")
        assert labels is not None
        columns = list(map(_normal, labels)) if self.plan.lowercase else labels
        self.check_new(columns, labels)
        types = ["text"] * len(columns)
        if self.plan.infer_types:
            types, blocks = self.infer(blocks, len(columns))
        definitions = (
            sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(type_))
            for column, type_ in zip(columns, types, strict=True)
        )
        self.conn.execute(
            sql.SQL("CREATE TABLE {} ({})").format(name.identifier, sql.SQL(", ").join(definitions))
        )
        table = find_table(self.conn, name)
        assert table is not None
        return table, blocks

    def check_new(self, columns: list[str], labels: list[str]) -> None:
        self.refuse_doubtful(labels[0], "; if it is one name, columns=NAME says so")
        self.refuse_doubles(columns)
        for number, column in enumerate(columns, 1):
            if len(column.encode()) > _LONGEST_NAME:
                problem = f"{column!r} is longer than PostgreSQL's {_LONGEST_NAME} bytes"
                raise self.wrong_label(number, problem)

    def infer(self, blocks: Iterator[bytes], columns: int) -> tuple[list[str], Iterator[bytes]]:
        """Find types in all of the data, and give the data once more."""
        # Its patterns take time to make.
        from .inference import infer_types as types_of

        if columns > 1:
            blocks = without_blank_end(blocks)
        if not self.source.repeatable:
            from tempfile import TemporaryFile

            spool = self.opened.enter_context(TemporaryFile())  # noqa: SIM115
            noted = self.shown(_noted(blocks, spool))
            types = types_of(noted, columns, self.dialect)
            deque(noted, 0)
            spool.seek(0)
            return types, iter(partial(spool.read, BLOCK), b"")
        types = types_of(self.shown(blocks), columns, self.dialect)
        self.source = self.source.again()
        blocks = self.opened.enter_context(self.source.open())
        if self.plan.header:
            blocks = read_head(blocks, self.dialect.quote, self.source.name).rest
        return types, blocks


def _noted(blocks: Iterator[bytes], spool: IO[bytes]) -> Iterator[bytes]:
    for block in blocks:
        spool.write(block)
        yield block


def _normal(label: str) -> str:
    return re.sub(r"\W", "_", label.strip().lower())
