"""A time in which nobody in the test does anything."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from psycopg import pq

from ...errors import SandboxError
from .core.turns import BusyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.backend import Backend
    from .core.outer import OuterTransaction

__all__ = ["Standstill"]

_AGAIN: Final = 0.005
_STATUS: Final = pq.TransactionStatus


class Standstill:
    """The time in which no member's operation begins.

    Those that run are waited for, for so many seconds; then it begins with a call of `begin`.
    Raises BusyError where somebody is in the middle of something, and SandboxError where nothing
    can be done in the transaction.
    """

    def __init__(
        self, outer: OuterTransaction, patience: float, begin: Callable[[Backend], None]
    ) -> None:
        self.outer: Final = outer
        self.thread: Final = threading.get_ident()
        self.over: Final = threading.Event()
        self.status: int | None = None
        with outer.joining:
            self.backend: Final[Backend] = outer.backend
            if self.backend.look is not None:
                raise BusyError("somebody else looks at the test just now")
            self.backend.look = self
        try:
            self._wait(patience)
            begin(self.backend)
        except BaseException:
            self.end()
            raise

    def _wait(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while (obstacle := self._obstacle()) and time.monotonic() < deadline:
            time.sleep(_AGAIN)
        if obstacle:
            raise BusyError(obstacle)
        self.backend.run_blocking()
        if hindrance := self._hindrance():
            raise SandboxError(hindrance)
        self.status = self.backend.pgconn.transaction_status

    def _obstacle(self) -> str:
        """Tell what of the test is under way; empty where nothing is."""
        for member in list(self.backend.members):
            if member.streaming or member.pipelined or member.transaction.in_pipeline:
                return f"{member.name} is in the middle of a COPY, a stream or a pipeline"
            if member.busy:
                return f"a statement of {member.name} is running"
            if member.transaction.portal_is_open:
                return f"a portal of {member.name} is open"
        return ""

    def _hindrance(self) -> str:
        backend = self.backend
        if backend.dead or backend.forked:
            return "its session is lost"
        if backend.unsettled:
            return "something in it was interrupted, by a time-out for one"
        if backend.pgconn.transaction_status == _STATUS.INERROR:
            return "its transaction has failed, and reads nothing before it is rolled back"
        if backend.pgconn.transaction_status == _STATUS.ACTIVE:
            return "a statement is under way"
        return ""

    @property
    def is_ours(self) -> bool:
        """Whether it is the running thread's."""
        return threading.get_ident() == self.thread

    def give_way(self) -> None:
        """Wait for its end."""
        self.over.wait()

    def end(self) -> None:
        """Let the test go on."""
        self.backend.look = None
        self.over.set()
