"""The types of a new table's columns, found by the server in all of their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

_DATE = r"(?!0000)\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
_TIME = r"([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d{1,6})?)?"
_ZONE = r"(Z|[+-](0\d|1[0-4])(:?[0-5]\d)?)"
_NUMBER = r"-?(0|[1-9]\d*)"
# The 30th of February has the form of a date: the day is judged by its month.
_REAL_DAY = (
    "substr(VALUE, 9, 2)::int <= extract(day FROM make_date(substr(VALUE, 1, 4)::int,"
    " substr(VALUE, 6, 2)::int, 1) + interval '1 month - 1 day')"
)


_NO_MINUS_ZERO = r"VALUE !~ '^-0(\.0*)?([eE].*)?$'"


def _form(pattern: str) -> str:
    return f"VALUE ~ '^{pattern}$'"


def _if(form: str, condition: str) -> str:
    # Not AND: nothing may be cast that has not the form.
    return f"CASE WHEN {form} THEN {condition} ELSE false END"


def _within(number: str, bits: int) -> str:
    return f"VALUE::{number} BETWEEN {-(2 ** (bits - 1))} AND {2 ** (bits - 1) - 1}"


#: Types and what all values of theirs fulfil, narrow ones first. "007" and "-0" are no numbers:
#: as one they would not come back as they were.
_CANDIDATES: Sequence[tuple[str, str]] = (
    ("boolean", _form("([tT][rR][uU][eE]|[fF][aA][lL][sS][eE])")),
    ("integer", _if(_form(r"(0|-?[1-9]\d{0,9})"), _within("bigint", 32))),
    ("bigint", _if(_form(r"(0|-?[1-9]\d{0,18})"), _within("numeric", 64))),
    (
        "numeric",
        _form(rf"{_NUMBER}(\.\d+)?") + f" AND {_NO_MINUS_ZERO} AND length(VALUE) < 1000",
    ),
    (
        "double precision",
        _form(rf"{_NUMBER}(\.\d+)?([eE][+-]?\d{{1,2}})?")
        # More digits than it can hold are kept as text.
        + f" AND {_NO_MINUS_ZERO}"
        + r" AND length(translate(split_part(lower(VALUE), 'e', 1), '-.', '')) <= 15",
    ),
    ("date", _if(_form(_DATE), _REAL_DAY)),
    ("timestamp", _if(_form(f"{_DATE}([ T]{_TIME})?"), _REAL_DAY)),
    ("timestamp with time zone", _if(_form(f"{_DATE}[ T]{_TIME}{_ZONE}"), _REAL_DAY)),
    ("uuid", _form("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")),
)
# A row of the result may have 1664 columns.
_AT_ONCE = 200


def infer_types(conn: Connection[Any], table: sql.Identifier, columns: Sequence[str]) -> None:
    """Give text columns the first type that holds all of their values, where there is one."""
    changes = [
        sql.SQL("ALTER {0} TYPE {1} USING {0}::{1}").format(sql.Identifier(column), sql.SQL(type_))
        for column, type_ in _types(conn, table, columns)
    ]
    if changes:
        listed = sql.SQL(", ").join(changes)
        conn.execute(sql.SQL("ALTER TABLE {} {}").format(table, listed))


def _types(
    conn: Connection[Any], table: sql.Identifier, columns: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for start in range(0, len(columns), _AT_ONCE):
        some = columns[start : start + _AT_ONCE]
        tests = sql.SQL(", ").join(_tests(conn, column) for column in some)
        row = conn.execute(sql.SQL("SELECT {} FROM {}").format(tests, table)).fetchone()
        assert row is not None
        for column, fulfilled in zip(some, row, strict=True):
            if True in fulfilled:
                yield column, _CANDIDATES[fulfilled.index(True)][0]


def _tests(conn: Connection[Any], column: str) -> sql.SQL:
    value = sql.Identifier(column).as_string(conn)
    tests = (
        f"bool_and({condition.replace('VALUE', value)}) FILTER (WHERE {value} IS NOT NULL)"
        for _, condition in _CANDIDATES
    )
    return sql.SQL(f"ARRAY[{', '.join(tests)}]")
