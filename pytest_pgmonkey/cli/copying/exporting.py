"""What `pgexport` does: what COPY gives goes to the file as it is."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from psycopg import Error, errors, sql
from psycopg.pq import ExecStatus
from psycopg.waiting import Wait

from ...config import load_config
from ..running import CommandError, say, session
from . import settings
from .encodings import UTF8
from .files import Target, open_target
from .progress import progress
from .tables import find_table, parse_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterator

    from psycopg import Connection
    from psycopg.pq.abc import PGconn

    from .tables import Name, Table

# What text is unambiguous in, as pg_dump has it.
_STYLES = {"datestyle": "ISO", "intervalstyle": "postgres", "extra_float_digits": "1"}


def run(args: argparse.Namespace) -> int:
    """Export a table or a query."""
    name = parse_name(args.table) if args.table is not None else None
    path = args.file or (_file_name(name.table) if name else "-")
    settings.apply_sidecar(args, path)
    dialect = settings.dialect(args)
    encoding = settings.encoding(args) or UTF8
    if args.query is not None and args.columns:
        args.parser.error("--columns belongs to --table: a query names its columns itself")
    with session(args) as conn:
        conn.read_only = True
        conn.execute("SET client_encoding TO 'UTF8'")
        with conn.transaction():
            _unambiguous(conn, args)
            statement = sql.SQL("COPY {} TO STDOUT WITH (HEADER {}, {})").format(
                _query(args) if name is None else _columns(conn, args, name),
                args.header is not False,
                dialect.options(encoding),
            )
            with _naming(args), open_target(path, encoding) as target:
                rows = _copy(conn, statement, target, path)
    message = f"exported {rows} {'row' if rows == 1 else 'rows'} to "
    if path == "-":
        say(f"{message}standard output")
    else:
        sys.stdout.write(f"{message}{path}\n")
    return 0


def _file_name(table: str) -> str:
    """Name the file of a table, in this directory and on any file system."""
    return re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", table) + ".csv"


@contextmanager
def _naming(args: argparse.Namespace) -> Iterator[None]:
    """Say of what the server complains: not of the configuration."""
    try:
        yield
    except Error as error:
        what = args.table or "--query"
        message = f"{what}: {error.diag.message_primary or error}"
        raise CommandError(message) from error


def _unambiguous(conn: Connection[Any], args: argparse.Namespace) -> None:
    """Have values written so that they can be read again, unless the file says how."""
    chosen = load_config(args.path).get("sync_settings") or {}
    for name, value in _STYLES.items():
        if name not in map(str.lower, chosen):
            conn.execute("SELECT pg_catalog.set_config(%s, %s, true)", [name, value])


# --- what is exported ---


def _query(args: argparse.Namespace) -> sql.Composable:
    # On lines of its own: it may end with a comment.
    query = args.query.strip().rstrip(";")
    return sql.SQL("(\n{}\n)").format(sql.SQL(query))


def _columns(conn: Connection[Any], args: argparse.Namespace, name: Name) -> sql.Composable:
    table = find_table(conn, name)
    if table is None:
        raise CommandError(f"table {name} does not exist, or this role may not use its schema")
    columns = args.columns or table.stored
    for column in columns:
        if column not in table.columns:
            has = ", ".join(table.columns)
            raise CommandError(f"table {table} has no column {column!r} (it has {has})")
    left_out = [column for column in table.columns if column not in columns]
    if left_out and not args.columns:
        say(f"generated columns are left out: {', '.join(left_out)}; --columns exports them")
    listed = sql.SQL(", ").join(map(sql.Identifier, columns))
    if _is_plain(table, columns):
        return sql.SQL("{} ({})").format(table.identifier, listed)
    return sql.SQL("(SELECT {} FROM {})").format(listed, table.identifier)


def _is_plain(table: Table, columns: list[str]) -> bool:
    """Whether COPY gives all rows of this table by its name alone, and these columns."""
    return table.kind == "r" and not table.has_children and set(columns) <= set(table.stored)


# --- the copy ---


def _copy(conn: Connection[Any], statement: sql.Composed, target: Target, path: str) -> int:
    with conn.cursor() as cursor, progress(path) as show, cursor.copy(statement):
        # Not `Copy.read()`: it waits for each row, which takes longer than all the rest.
        return conn.wait(_rows(conn.pgconn, target, show))


def _rows(pgconn: PGconn, target: Target, show: Callable[[int], None]) -> Generator[Wait, Any, int]:
    """Write all that libpq has received, then wait for more, until the server has ended."""
    # Once for each row: whatever else is done here shows in the whole command's time.
    rows: list[Any] = []
    get, done = pgconn.get_copy_data, 0
    add = rows.append
    while True:
        size, data = get(1)
        if size > 0:
            add(data)
            continue
        done += target.write(rows)
        show(done)
        rows.clear()
        if size < 0:
            break
        yield Wait.R
        pgconn.consume_input()
    return (yield from _outcome(pgconn))


def _outcome(pgconn: PGconn) -> Generator[Wait, Any, int]:
    # All of them: with one left over the connection could not be rolled back.
    results = []
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            break
        results.append(result)
    for result in results:
        if result.status != ExecStatus.COMMAND_OK:
            raise errors.error_from_result(result)
    return results[0].command_tuples or 0
