"""Where in a file the server found what it refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import errors

from .files import Source
from .records import Field, Record, find_record, find_values, newlines, read_head, split_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg
    from psycopg import Connection

    from .settings import Dialect
    from .tables import Table

__all__ = ["Import", "describe"]


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


def describe(error: psycopg.Error, import_: Import, conn: Connection[Any]) -> str:
    """Say in one line what was refused, and where it stands: file, line, column and value."""
    line, column = _context(error, import_)
    column = column or _culprit(error, import_, conn)
    if line:
        record = _read_again(import_, lambda data: find_record(data, import_.dialect.quote, line))
    else:
        record, column = _by_key(error, import_, column)
    what = _what(error, import_, record)
    if record is None:
        return f"{import_.source.name}: {_place_without_record(import_, line, column)}{what}"
    index = _index(error, import_, record, column)
    return f"{import_.source.name}: {_place(import_, record, index)}: {what}"


# --- what the server says ---


def _context(error: psycopg.Error, import_: Import) -> tuple[int | None, str | None]:
    """Find the server's line and column; the words between them are in the server's language."""
    pattern = rf"^COPY {re.escape(import_.table.name)},\D*(\d+)(?:, \S+ )?"
    match = re.search(pattern, error.diag.context or "", re.MULTILINE)
    if match is None:
        return None, None
    rest = (error.diag.context or "")[match.end() :]
    near = [name for name in import_.columns if rest.startswith(f"{name}:")]
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
    rows = conn.execute(query, arguments).fetchall()
    return rows[0][0] if len(rows) == 1 else None


def _what(error: psycopg.Error, import_: Import, record: Record | None) -> str:
    if record is not None and isinstance(error, errors.BadCopyFileFormat):
        if record.unended:
            return "a quoted value begins here and never ends"
        found, wanted = len(split_record(record.data, import_.dialect)), len(import_.columns)
        if found != wanted:
            against = "the header names" if import_.has_header else "the columns are"
            return f"the row has {_values(found)}, {against} {wanted}"
    parts = [error.diag.message_primary or str(error), error.diag.message_detail]
    text = ": ".join(part for part in parts if part)
    if isinstance(error, errors.CharacterNotInRepertoire | errors.UntranslatableCharacter):
        text += f" (read as {import_.source.encoding.name}; --encoding names another)"
    return text


def _values(number: int) -> str:
    return "1 value" if number == 1 else f"{number} values"


# --- where it stands ---


def _read_again(import_: Import, find: Callable[[Iterator[bytes]], Record | None]) -> Record | None:
    """Read the file once more to find a record in it."""
    if not import_.source.repeatable:
        return None
    source = Source(import_.source.path, import_.source.encoding)
    with source.open() as blocks:
        if import_.has_header:
            blocks = read_head(blocks, import_.dialect.quote, source.name).rest()
        record = find(blocks)
    if record is None:
        return None
    return Record(record.line + import_.lines_before, record.data, record.unended)


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


def _index(error: psycopg.Error, import_: Import, record: Record, column: str | None) -> int | None:
    """Give the position of the value in its record."""
    fields = split_record(record.data, import_.dialect)
    if isinstance(error, errors.BadCopyFileFormat):
        last = len(fields) - 1
        return last if record.unended else min(last, len(import_.columns))
    if column in import_.columns:
        return import_.columns.index(column)
    if isinstance(error, errors.CharacterNotInRepertoire):
        return _undecodable(fields, import_.source.encoding.data_codec)
    return None


def _undecodable(fields: list[Field], codec: str) -> int | None:
    for index, field in enumerate(fields):
        try:
            text = field.value.decode(codec)
        except UnicodeDecodeError:
            return index
        if "\0" in text:
            return index
    return None


def _place(import_: Import, record: Record, index: int | None) -> str:
    if index is None:
        return f"line {record.line}"
    fields = split_record(record.data, import_.dialect)
    if index >= len(fields):
        return f"line {record.line}"
    before = record.data[: fields[index].start]
    line = record.line + newlines(before)
    on_line = re.split(rb"[\r\n]", before)[-1]
    character = len(on_line.decode(import_.source.encoding.data_codec, "replace")) + 1
    named = f"column {import_.columns[index]}, " if index < len(import_.columns) else ""
    return f"line {line}, {named}value {index + 1} (character {character})"


def _place_without_record(import_: Import, line: int | None, column: str | None) -> str:
    parts = [f"line {line + import_.lines_before}"] if line else []
    if column in import_.columns:
        parts.append(f"column {column}, value {import_.columns.index(column) + 1}")
    return f"{', '.join(parts)}: " if parts else ""
