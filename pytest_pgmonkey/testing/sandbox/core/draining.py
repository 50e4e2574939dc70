"""Bring a session to rest that was left in the middle of something, never waiting without end."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

_COPY_OUT: Final = (pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)
_COPY: Final = (pq.ExecStatus.COPY_IN, *_COPY_OUT)
_MOST_EMPTY: Final = 3
_MOMENT: Final = 0.1
_FAILS: Final = b"RELEASE _pgmonkey_nothing"


def is_at_rest(pgconn: PGconn) -> bool:
    """Whether nothing runs, nothing is unread, and pipeline mode is off."""
    return bool(
        pgconn.transaction_status != pq.TransactionStatus.ACTIVE
        and pgconn.pipeline_status == pq.PipelineStatus.OFF
    )


def drain(conn: psycopg.Connection[Any], patience: float) -> bool:
    """Cancel what runs and read what is unread; gives whether that was done in `patience` seconds.

    `PQgetResult()` is called only where it cannot block: no signal gets through to who waits in it.
    """
    try:
        return _Drain(conn, time.monotonic() + patience).run()
    except psycopg.Error:
        return False


class _Drain:
    """One attempt, with a deadline on the monotonic clock."""

    def __init__(self, conn: psycopg.Connection[Any], deadline: float) -> None:
        self._conn = conn
        self._pgconn = conn.pgconn
        self._deadline = deadline
        self._synced = False
        self._empty = 0  # how often there was no result, one after the other

    def run(self) -> bool:
        """Give whether the session is at rest."""
        pgconn = self._pgconn
        if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            self._cancel()
        self._sync()
        while not is_at_rest(pgconn):
            if pgconn.is_busy():
                if not self._wait():
                    return False
                pgconn.consume_input()
            elif not self._take(pgconn.get_result()):
                return False
        return True

    def _cancel(self) -> None:
        self._conn.cancel_safe(timeout=max(_MOMENT, self._deadline - time.monotonic()))

    def _take(self, result: PGresult | None) -> bool:
        if result is None:
            self._sync()
            self._empty += 1
            return self._empty < _MOST_EMPTY
        self._empty = 0
        if result.status in _COPY and self._pgconn.pipeline_status != pq.PipelineStatus.OFF:
            return False  # the server has ignored syncs, and libpq counts them
        if result.status == pq.ExecStatus.COPY_IN:
            self._pgconn.put_copy_end(b"the connection was closed")
        elif result.status in _COPY_OUT:
            return self._skip_copy()
        elif result.status == pq.ExecStatus.PIPELINE_SYNC:
            self._leave_pipeline()
        return True

    def _sync(self) -> None:
        """Undo what a pipeline has done, and let the server answer: it may wait for a sync."""
        if self._synced or self._pgconn.pipeline_status == pq.PipelineStatus.OFF:
            return
        self._pgconn.send_query_params(_FAILS, None)
        self._pgconn.pipeline_sync()
        self._synced = True

    def _leave_pipeline(self) -> None:
        try:
            self._pgconn.exit_pipeline_mode()
        except psycopg.OperationalError:
            return  # more was queued behind this sync

    def _skip_copy(self) -> bool:
        while (length := self._pgconn.get_copy_data(1)[0]) >= 0:
            if length == 0:
                if not self._wait():
                    return False
                self._pgconn.consume_input()
        return True

    def _wait(self) -> bool:
        """Wait a moment for the socket; gives whether there was time."""
        if time.monotonic() > self._deadline:
            return False
        socket = self._pgconn.socket
        unsent = [socket] if self._pgconn.flush() else []
        if not any(select.select([socket], unsent, [], _MOMENT)):
            # One that comes before its statement has begun is lost.
            self._cancel()
        return True
