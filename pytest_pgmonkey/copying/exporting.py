"""`export_csv`: what COPY gives goes to the file as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psycopg import Error, errors, sql
from psycopg.pq import ExecStatus
from psycopg.waiting import Wait

from ..errors import CSVError
from .files import open_target
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
    from collections.abc import Generator, Sequence

    from psycopg import Connection
    from psycopg.pq.abc import PGconn

    from ..handles import Handle
    from .files import CSVFile, Target
    from .settings import Progress
    from .tables import Name, Table

# What text is unambiguous in, as pg_dump has it.
_STYLES = {"datestyle": "ISO", "intervalstyle": "postgres", "extra_float_digits": "1"}


def export_csv(
    handle: Handle,
    file: CSVFile,
    *,
    table: str | None = None,
    query: str | sql.Composable | None = None,
    columns: Sequence[str] | None = None,
    header: bool = True,
    delimiter: str = ",",
    quotechar: str = '"',
    null: str = "",
    encoding: str | None = None,
    progress: Progress | None = None,
) -> CSVResult:
    """Export a table, a view or a read-only query to a CSV file by COPY.

    Inside a block of the handle it uses the block's connection, and sees what the block has
    written. Otherwise it uses a new connection.

    `handle` is of type `normal` or `pool`. `file` is a path (`.gz` files are compressed), or an
    open file in binary or text mode. A path is replaced when the export is complete; an open file
    stays open. Pass either `table` or `query`. `table` is `table` or `schema.table`; it is tried
    as written, then in lower case. A name in SQL quotes is only tried as written.

    `columns` chooses the table's columns and their order. The default is all columns but generated
    ones, which `CSVResult.left_out` lists. `null` is the text for NULL. `encoding` is a Python or
    PostgreSQL name, by default UTF-8. `progress` is called with the bytes written so far and
    `None`.

    Raises `CSVError` if nothing was exported, and the handle's errors if it cannot connect. Dates
    are in ISO style unless `sync_settings` says otherwise.
    """
    require_sync(handle, "export_csv")
    dialect = make_dialect(delimiter, quotechar, null)
    named = make_columns(columns)
    if (table is None) == (query is None):
        raise UsageError("either `table` or `query` is needed, and not both")
    if query is not None and named is not None:
        raise UsageError("`columns` belongs to `table`: a query names its columns itself")
    encoded = make_encoding(encoding)
    name = None if table is None else parse_name(table)
    try:
        with borrowed(handle) as conn, conn.transaction():
            conn.execute("SET TRANSACTION READ ONLY")
            with local_settings(conn, _settings(handle)):
                source, result = _table(conn, name, named) if name else _query(query)
                with open_target(file, encoded) as target:
                    options = dialect.options(target.encoding)
                    statement = sql.SQL("COPY {} TO STDOUT WITH (HEADER {}, {})")
                    copy = statement.format(source, header, options)
                    rows = _copy(conn, copy, target, progress or no_progress)
    except Error as error:
        problem = f"{name or '`query`'}: {error.diag.message_primary or error}"
        raise CSVError(problem) from error
    return replace(result, rows=rows)


def _settings(handle: Handle) -> dict[str, str]:
    """Have values written so that they can be read again, unless the file says how."""
    chosen = {*map(str.lower, handle.config.get("sync_settings") or ())}
    styles = {name: value for name, value in _STYLES.items() if name not in chosen}
    return {"client_encoding": "UTF8", **styles}


# --- what is exported ---


def _query(query: str | sql.Composable | None) -> tuple[sql.Composable, CSVResult]:
    text = query if isinstance(query, sql.Composable) else sql.SQL(_bare(query or ""))
    # On lines of its own: it may end with a comment.
    return sql.SQL("(\n{}\n)").format(text), CSVResult(0, None, ())


def _bare(query: str) -> str:
    return query.strip().rstrip(";")


def _table(
    conn: Connection[Any], name: Name, named: list[str] | None
) -> tuple[sql.Composable, CSVResult]:
    table = find_table(conn, name)
    if table is None:
        raise CSVError(f"table {name} does not exist, or this role may not use its schema")
    columns = named or table.stored
    for column in columns:
        if column not in table.columns:
            has = ", ".join(table.columns)
            raise CSVError(f"table {table} has no column {column!r} (it has {has})", column=column)
    left_out = [] if named else [one for one in table.columns if one not in columns]
    result = CSVResult(0, str(table), tuple(columns), tuple(left_out))
    listed = sql.SQL(", ").join(map(sql.Identifier, columns))
    if _is_plain(table, columns):
        return sql.SQL("{} ({})").format(table.identifier, listed), result
    return sql.SQL("(SELECT {} FROM {})").format(listed, table.identifier), result


def _is_plain(table: Table, columns: list[str]) -> bool:
    """Whether COPY gives all rows of this table by its name alone, and these columns."""
    return table.kind == "r" and not table.has_children and set(columns) <= set(table.stored)


# --- the copy ---


def _copy(
    conn: Connection[Any], statement: sql.Composed, target: Target, progress: Progress
) -> int:
    with conn.cursor() as cursor, cursor.copy(statement):
        # Not `Copy.read()`: it waits for each row, which takes longer than all the rest.
        return conn.wait(_rows(conn.pgconn, target, progress))


def _rows(pgconn: PGconn, target: Target, show: Progress) -> Generator[Wait, Any, int]:
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
        starved = not rows
        done += target.write(rows)
        show(done, None)
        rows.clear()
        if size < 0:
            break
        if starved:  # Mostly more is there already, and to ask for it costs a system call.
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
