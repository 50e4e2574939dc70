"""Where in a file the server found what it refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from psycopg import errors
from psycopg.rows import tuple_row

from ..errors import CSVError
from .records import (
    Field,
    Record,
    find_record,
    find_values,
    newlines,
    other_delimiter,
    read_head,
    split_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg
    from psycopg import Connection

    from .files import Source
    from .settings import Dialect
    from .tables import Table


def use_delimiter(delimiter: str) -> str:
    """Say how a file with another delimiter is imported."""
    return f"it seems to have {delimiter!r} between its values: delimiter={delimiter!r} says so"


@dataclass(frozen=True)
class Import:
    """What was being read, and into what."""

    source: Source
    dialect: Dialect
    table: Table
    #: The table's columns, in the order of the file.
    columns: list[str]
    has_header: bool
    #: The lines before the first record.
    lines_before: int


def describe(error: psycopg.Error, import_: Import, conn: Connection[Any]) -> CSVError:
    """Say in one line what was refused, and where it stands: file, line, column and value."""
    number, column = _context(error, import_)
    column = column or _culprit(error, import_, conn)
    if number:
        record = _read_again(import_, lambda data: find_record(data, import_.dialect.quote, number))
    else:
        record, column = _by_key(error, import_, column)
    problem, hint = _what(error, import_, record)
    name = import_.source.name
    if record is None:
        where, line = _place_without_record(import_, number, column)
        return CSVError(f"{name}: {where}{problem}", hint, file=name, line=line, column=column)
    where, line, column = _place(error, import_, record, column)
    return CSVError(f"{name}: {where}: {problem}", hint, file=name, line=line, column=column)


# --- what the server says ---


def _context(error: psycopg.Error, import_: Import) -> tuple[int | None, str | None]:
    """Find the server's line and column; the words between them are in the server's language."""
    context = error.diag.context or ""
    pattern = rf"^COPY {re.escape(import_.table.name)},\D*(\d+)(?:, \S+ )?"
    match = re.search(pattern, context, re.MULTILINE)
    if match is None:
        return None, None
    near = [name for name in import_.columns if context.startswith(f"{name}:", match.end())]
    return int(match[1]), max(near, key=len, default=None)


def _culprit(error: psycopg.Error, import_: Import, conn: Connection[Any]) -> str | None:
    """Find the column of a constraint on one column."""
    if error.diag.column_name:
        return error.diag.column_name
    if not error.diag.constraint_name or conn.closed:
        return None
    query = """
        SELECT a.attname
        FROM pg_catalog.pg_attribute AS a
        LEFT JOIN pg_catalog.pg_constraint AS c
          ON c.conrelid = a.attrelid AND c.conname = %(name)s
        LEFT JOIN (pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS r
                   ON r.oid = i.indexrelid AND r.relname = %(name)s)
          ON i.indrelid = a.attrelid
        WHERE a.attrelid = %(table)s AND a.attnum = ANY (COALESCE(c.conkey, i.indkey))
    """
    arguments = {"name": error.diag.constraint_name, "table": import_.table.oid}
    rows = conn.cursor(row_factory=tuple_row).execute(query, arguments).fetchall()
    return rows[0][0] if len(rows) == 1 else None


def _what(error: psycopg.Error, import_: Import, record: Record | None) -> tuple[str, str | None]:
    """Give the problem, and what to do about it."""
    hint = None
    if record is not None:
        found, wanted = len(split_record(record.data, import_.dialect)), len(import_.columns)
        if found == 1 < wanted and (other := other_delimiter(record.data, import_.dialect)):
            hint = use_delimiter(other)
        if isinstance(error, errors.BadCopyFileFormat):
            if record.unended:
                return "a quoted value begins here and never ends", None
            if found != wanted:
                values = "1 value" if found == 1 else f"{found} values"
                against = "the header names" if import_.has_header else "the columns are"
                return f"the row has {values}, {against} {wanted}", hint
    parts = [error.diag.message_primary or str(error), error.diag.message_detail]
    text = ": ".join(filter(None, parts))
    if isinstance(error, errors.CharacterNotInRepertoire | errors.UntranslatableCharacter):
        text += f" (read as {import_.source.encoding.name})"
        hint = "`encoding` names another"
    return text, hint


# --- where it stands ---


def _read_again(import_: Import, find: Callable[[Iterator[bytes]], Record | None]) -> Record | None:
    """Read the file once more to find a record in it."""
    if not import_.source.repeatable:
        return None
    source = import_.source.again()
    with source.open() as blocks:
        if import_.has_header:
            blocks = read_head(blocks, import_.dialect.quote, source.name).rest
        record = find(blocks)
    return record and replace(record, line=record.line + import_.lines_before)


def _by_key(
    error: psycopg.Error, import_: Import, column: str | None
) -> tuple[Record | None, str | None]:
    """Find the record of a constraint that is judged at the end, by the key that it names."""
    match = re.search(r"\((.+?)\)=\((.*)\)", error.diag.message_detail or "")
    if match is None:
        return None, column
    names, values = match[1].split(", "), match[2].split(", ")
    if len(names) != len(values) or not set(names) <= set(import_.columns):
        return None, column
    codec = import_.source.encoding.data_codec
    wanted = {
        import_.columns.index(name): value.encode(codec, "replace")
        for name, value in zip(names, values, strict=True)
    }
    record = _read_again(import_, lambda data: find_values(data, import_.dialect, wanted))
    return record, column or names[0]


def _place(
    error: psycopg.Error, import_: Import, record: Record, column: str | None
) -> tuple[str, int, str | None]:
    """Give the place in words, its line and its column."""
    fields = split_record(record.data, import_.dialect)
    index = _index(error, import_, record, fields, column)
    if index is None or index >= len(fields):
        return f"line {record.line}", record.line, column
    before = record.data[: fields[index].start]
    line = record.line + newlines(before)
    on_line = re.split(rb"[\r\n]", before)[-1]
    character = len(on_line.decode(import_.source.encoding.data_codec, "replace")) + 1
    column = import_.columns[index] if index < len(import_.columns) else None
    named = f"column {column}, " if column is not None else ""
    return f"line {line}, {named}value {index + 1} (character {character})", line, column


def _index(
    error: psycopg.Error, import_: Import, record: Record, fields: list[Field], column: str | None
) -> int | None:
    """Give the position of the value in its record."""
    if isinstance(error, errors.BadCopyFileFormat):
        last = len(fields) - 1
        return last if record.unended else min(last, len(import_.columns))
    if column in import_.columns:
        return import_.columns.index(column)
    if isinstance(error, errors.CharacterNotInRepertoire):
        codec = import_.source.encoding.data_codec
        bad = (i for i, field in enumerate(fields) if not _is_text(field.value, codec))
        return next(bad, None)
    return None


def _is_text(value: bytes, codec: str) -> bool:
    try:
        return "\0" not in value.decode(codec)
    except UnicodeDecodeError:
        return False


def _place_without_record(
    import_: Import, line: int | None, column: str | None
) -> tuple[str, int | None]:
    line = line + import_.lines_before if line else None
    parts = [f"line {line}"] if line else []
    if column in import_.columns:
        parts.append(f"column {column}, value {import_.columns.index(column) + 1}")
    return f"{', '.join(parts)}: " if parts else "", line
