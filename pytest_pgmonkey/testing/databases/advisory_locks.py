"""Advisory locks, by which the runs that share a server know of each other."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["claim", "exclusive", "lock_shared", "unlock_shared"]

_POLL: Final = 0.05
# An advisory lock belongs to the database in which it was taken, and excludes nobody who works
# from another one: those are only to be seen here.
_OTHERS: Final = """\
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND (classid::bigint << 32) | objid::bigint = %s
    AND pid IS DISTINCT FROM pg_catalog.pg_backend_pid() AND mode = ANY(%s)
)
"""
_SHARED: Final = "ShareLock"
_EXCLUSIVE: Final = "ExclusiveLock"


def _key(name: str) -> int:
    """Give the number of a lock; positive, 60 bits."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


def lock_shared(conn: Connection[Any], name: str) -> None:
    """Hold a lock together with others, until the session ends or releases it."""
    key = _key(name)
    conn.execute("SELECT pg_catalog.pg_advisory_lock_shared(%s)", [key])
    while _is_held_by_others(conn, key, _EXCLUSIVE):
        time.sleep(_POLL)


def unlock_shared(conn: Connection[Any], name: str) -> None:
    """Hold it no longer."""
    conn.execute("SELECT pg_catalog.pg_advisory_unlock_shared(%s)", [_key(name)])


@contextmanager
def claim(conn: Connection[Any], name: str) -> Iterator[bool]:
    """Keep all others from holding a lock for a block; gives `False` where one does already."""
    key = _key(name)
    (taken,) = _row(conn, "SELECT pg_catalog.pg_try_advisory_lock(%s)", key)
    try:
        # First the lock, then the look at others, who do the same: one of two sees the other.
        yield taken and not _is_held_by_others(conn, key, _SHARED, _EXCLUSIVE)
    finally:
        if taken and not conn.closed:
            conn.execute("SELECT pg_catalog.pg_advisory_unlock(%s)", [key])


@contextmanager
def exclusive(conn: Connection[Any], name: str) -> Iterator[None]:
    """Wait for a lock and have it alone for a block, among those in the same database."""
    key = _key(name)
    conn.execute("SELECT pg_catalog.pg_advisory_lock(%s)", [key])
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute("SELECT pg_catalog.pg_advisory_unlock(%s)", [key])


def _is_held_by_others(conn: Connection[Any], key: int, *modes: str) -> bool:
    (held,) = _row(conn, _OTHERS, key, list(modes))
    return bool(held)


def _row(conn: Connection[Any], query: str, *params: Any) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = conn.execute(query, params).fetchone()
    assert row is not None  # each of the queries gives one
    return row
