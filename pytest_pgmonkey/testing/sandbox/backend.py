"""The one PostgreSQL session of a test process: commands sent ahead, and where its savepoints stand."""

from __future__ import annotations

import os
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ...errors import SandboxError
from .internals import (
    Template,
    deliver_notice,
    error_from_result,
    execute,
    forget_prepared,
    set_notice_handler,
)
from .turns import Turn

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from psycopg.pq.abc import PGconn, PGresult

    from .borrower import Borrower, SessionSetting

SAVEPOINT: Final = b"SAVEPOINT _pgmonkey"
REFRESH: Final = b"RELEASE _pgmonkey; SAVEPOINT _pgmonkey"
UNDO: Final = b"ROLLBACK TO _pgmonkey"
_TEST: Final = b"SAVEPOINT _pgmonkey_test"

_STATUS: Final = pq.TransactionStatus
_FATAL: Final = pq.ExecStatus.FATAL_ERROR
_COPY: Final = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)


class Level(Enum):
    """How deep the session stands in its outer transaction."""

    NONE = auto()  # nothing of the test: no outer transaction, or only that of a wider scope
    DIRECT = auto()  # the only work in it is one virtual transaction, without a savepoint
    BARE = auto()  # committed work, and no savepoint after it yet
    STANDING = auto()  # a savepoint stands after the committed work


class EscapeError(SandboxError):
    """The outer transaction has ended although the test is still running."""


class Backend:
    """One PGconn shared by every connection that a test borrows.

    A command that needs no answer is posted: sent without waiting, and its answer collected
    before the next one. So a commit costs no round trip.
    """

    def __init__(self, conninfo: Mapping[str, str]) -> None:
        self.root: Final[psycopg.Connection[Any]] = psycopg.Connection.connect(
            **conninfo,  # type: ignore[arg-type]
            autocommit=True,
        )
        self.pgconn: Final[PGconn] = self.root.pgconn
        self.template = Template(self.pgconn)
        set_notice_handler(self.pgconn, self._on_notice)
        self.pid: Final = os.getpid()
        self.turn = Turn()
        self.lent: dict[Borrower, None] = {}
        self.abandoned: list[Borrower] = []
        self.level = Level.NONE
        self.isolation = b""
        self.scopes = 0
        self.settings_of: object | None = None
        self.deferrable: list[tuple[str, bool]] | None = None
        self.escaped: EscapeError | None = None
        self._awaiting = False
        self._backlog: list[bytes] = []

    @property
    def dead(self) -> bool:
        """Whether the server's side of the session is gone."""
        return bool(self.pgconn.status == pq.ConnStatus.BAD)

    @property
    def behind(self) -> bool:
        """Whether answers must be collected before the next command."""
        return self._awaiting

    def _on_notice(self, result: PGresult) -> None:
        holder = self.turn.holder
        conn = holder.wrapper() if holder is not None else None
        if conn is not None:
            deliver_notice(conn, result)

    def post(self, command: bytes) -> None:
        """Send a command now and collect its answer later."""
        if self._awaiting:
            self._backlog.append(command)
        elif not self.dead:
            self.pgconn.send_query(command)
            self.pgconn.flush()
            self._awaiting = True

    def collect(self) -> Generator[Any, Any, None]:
        """Fetch the answers of what was posted; raises the first error among them."""
        pgconn = self.pgconn
        pgconn.consume_input()
        self._awaiting = False
        _raise_first((yield from execute(pgconn)))
        if self._backlog:
            commands, self._backlog = self._backlog, []
            yield from self.run(b"; ".join(commands))

    def run(self, command: bytes) -> Generator[Any, Any, list[PGresult]]:
        """Send commands of our own and wait for their answers."""
        self.pgconn.send_query(command)
        results: list[PGresult] = yield from execute(self.pgconn)
        _raise_first(results)
        return results

    def send_again(self, setting: SessionSetting) -> Generator[Any, Any, None]:
        """Repeat a statement that set something of the session."""
        if setting.params is None:
            self.pgconn.send_query(setting.query)
        else:
            self.pgconn.send_query_params(
                setting.query,
                setting.params,
                param_types=setting.types,
                param_formats=setting.formats,
            )
        _raise_first((yield from execute(self.pgconn)))

    def run_blocking(self, command: bytes = b"") -> list[PGresult]:
        """Collect what was posted, then run a command, from code outside any borrower."""
        if self._awaiting:
            self.root.wait(self.collect())
        return self.root.wait(self.run(command)) if command else []

    def stand(self) -> bytes:
        """Give the command, if any, after which a fresh savepoint stands."""
        level, self.level = self.level, Level.STANDING
        if level is Level.NONE:
            self.isolation = b""
            return (_TEST if self.scopes else b"BEGIN") + b"; " + SAVEPOINT
        return SAVEPOINT if level is Level.BARE else b""

    def interrupt(self) -> None:
        """End a COPY or a stream that its borrower left in the middle."""
        pgconn = self.pgconn
        try:
            pgconn.get_cancel().cancel()
            result = pgconn.get_result()
            while result is not None:
                if result.status == pq.ExecStatus.COPY_IN:
                    pgconn.put_copy_end(b"the connection was closed")
                elif result.status in _COPY:
                    while pgconn.get_copy_data(0)[0] > 0:
                        pass
                result = pgconn.get_result()
        except psycopg.Error:
            # What is wrong with the session shows at its next use.
            return

    def forget_prepared(self) -> None:
        """Let every borrower forget prepared statements that the server no longer has."""
        for borrower in self.lent:
            conn = borrower.wrapper()
            if conn is not None:
                forget_prepared(conn)

    def close(self) -> None:
        """End the session."""
        self.root.close()


def _raise_first(results: list[PGresult]) -> None:
    for result in results:
        if result.status == _FATAL:
            raise error_from_result(result)
