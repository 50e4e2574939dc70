"""The format of a CSV file, and the arguments and result of an import or export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..errors import CSVError, PGMonkeyError
from ..handles import Handle
from .encodings import find_encoding
from .names import as_sign, refuse_doubles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from psycopg import Connection

    from .encodings import Encoding


#: Called with the bytes done and the total, or `None` if the total is unknown.
Progress: TypeAlias = Callable[[int, int | None], None]


class UsageError(CSVError, ValueError):
    """Invalid arguments, or a combination that is not allowed."""


@dataclass(frozen=True)
class CSVResult:
    """The result of an import or export."""

    #: How many.
    rows: int
    #: `schema.table`, `None` for a query.
    table: str | None
    #: The table's columns, in the file's order; empty for a query.
    columns: tuple[str, ...]
    #: Generated columns that the export left out.
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """The delimiter, quote character and NULL text of a CSV file."""

    delimiter: str
    quotechar: str
    null: str

    @property
    def quote(self) -> bytes:
        return self.quotechar.encode()

    @property
    def separator(self) -> bytes:
        return self.delimiter.encode()

    def options(self, encoding: Encoding) -> sql.Composed:
        """Return them as options of COPY."""
        options = "FORMAT csv, DELIMITER {}, QUOTE {}, NULL {}, ENCODING {}"
        values = (self.delimiter, self.quotechar, self.null, encoding.sent_as)
        return sql.SQL(options).format(*values)


def make_dialect(delimiter: str, quotechar: str, null: str) -> Dialect:
    """Check the delimiter, quote character and NULL text, and their combination."""
    signs = {"delimiter": delimiter, "quotechar": quotechar}
    for name, value in signs.items():
        try:
            signs[name] = as_sign(value)
        except ValueError as error:
            raise UsageError(f"`{name}` {error}") from None
    if signs["delimiter"] == signs["quotechar"]:
        raise UsageError("`delimiter` and `quotechar` must differ")
    if set(null) & {*signs.values(), "\r", "\n"}:
        raise UsageError(
            "`null` must hold neither the delimiter nor the quote character nor a line end"
        )
    return Dialect(**signs, null=null)


def make_encoding(name: str | None) -> Encoding | None:
    """Return the requested encoding, if any."""
    try:
        return None if name is None else find_encoding(name)
    except LookupError:
        raise CSVError(
            f"unknown encoding {name!r}", "give a name that Python or PostgreSQL knows"
        ) from None


def make_columns(names: Sequence[str] | None) -> list[str] | None:
    """Check a list of columns."""
    if names is None:
        return None
    if isinstance(names, str) or not names:
        raise UsageError("`columns` must be a list of names")
    try:
        refuse_doubles(list(names))
    except ValueError as error:
        raise UsageError(f"`columns`: {error}") from None
    return list(names)


def require_sync(handle: object, function: str) -> None:
    """Raise unless this is a sync handle."""
    if not isinstance(handle, Handle):
        raise PGMonkeyError(
            f"{function} takes a handle of the types normal and pool, not {handle!r}: "
            f"in a coroutine, pass it one by asyncio.to_thread({function}, handle, …)"
        )


@contextmanager
def borrowed(handle: Handle) -> Iterator[Connection[Any]]:
    """Yield the surrounding block's connection, or a new one.

    A `transaction()` on it is a savepoint in the block's transaction, also at the block's start.
    """
    joins = handle._blocks.visible() is not None
    with handle._here() as conn:
        idle = conn.info.transaction_status == TransactionStatus.IDLE
        if joins and idle and not conn.autocommit:
            conn.execute("SELECT 1")
        yield conn


def no_progress(done: int, total: int | None) -> None:
    """Report no progress."""


@contextmanager
def local_settings(conn: Connection[Any], wanted: Mapping[str, str]) -> Iterator[None]:
    """Hold settings for a block inside a transaction, and put the former ones back at its end.

    A failing block's savepoint or transaction puts them back by itself.
    """
    cursor = conn.cursor(row_factory=tuple_row)
    one = "pg_catalog.current_setting(%s), pg_catalog.set_config(%s, %s, true)"
    former = {}
    for name, value in wanted.items():
        row = cursor.execute(f"SELECT {one}", [name, name, value]).fetchone()
        assert row is not None
        former[name] = row[0]
    yield
    for name, value in former.items():
        if value != wanted[name]:
            cursor.execute("SELECT pg_catalog.set_config(%s, %s, true)", [name, value])
