"""What a handle borrows from while a test runs: connections lent as its type lends them."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

from psycopg.pq import TransactionStatus
from psycopg_pool import (
    AsyncConnectionPool,
    ConnectionPool,
    PoolClosed,
    PoolTimeout,
    TooManyRequests,
)

from ....connecting import adrive, drive, hook_steps
from ...file_settings import session_settings
from ..core.member import CLOSED
from ..core.waiting import Queue
from .connections import AsyncSandboxConnection, SandboxConnection
from .internals import leave_pool, pool_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ....config import ConnectionSpec
    from ....connecting import Hook, Steps
    from ....handles import AsyncHandle, Handle
    from ..core.waiting import Waiter

logger = logging.getLogger("pytest_pgmonkey")

_REMEMBERED: Final = 256
_SIZES: Final = ("min_size", "max_size")
#: Seconds between the first tries of a pool's `check` function, as psycopg_pool has it.
_BACKOFF: Final = 1.0

_settings_of_specs: dict[int, tuple[ConnectionSpec, tuple[tuple[str, str], ...]]] = {}


def _cached_settings(spec: ConnectionSpec) -> tuple[tuple[str, str], ...]:
    # By identity: to hash a configuration takes longer than to read it.
    found = _settings_of_specs.get(id(spec))
    if found is None:
        if len(_settings_of_specs) >= _REMEMBERED:
            _settings_of_specs.clear()
        found = _settings_of_specs[id(spec)] = spec, session_settings(spec)
    return found[1]


class _Slots(Queue):
    """How many connections of a pool are out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.taken = 0

    def _take(self, token: object) -> bool:  # noqa: ARG002 - everyone is alike
        if self.taken >= self.size:
            return False
        self.taken += 1
        return True

    def free(self) -> None:
        with self._mutex:
            self.taken -= 1
            self._grant()

    def resize(self, size: int) -> None:
        with self._mutex:
            self.size = size
            self._grant()

    def _abandon(self, waiter: Waiter) -> None:  # noqa: ARG002
        self.free()


@cache
def _sizes(**options: Any) -> tuple[int, int]:
    """Give a pool's limits as psycopg_pool completes and judges them."""
    pool = ConnectionPool(open=False, **options)
    return pool.min_size, pool.max_size


class _Lender:
    """What every kind of source shares: a connection is made for its borrower, and ends with it."""

    #: The pool that a source is, `None` where its type has none.
    pool: Any = None
    is_used = False
    closed = False
    _slots: Any = None

    def __init__(self, lend: Callable[..., Any], handle: Handle | AsyncHandle) -> None:
        connector = handle._connector
        self.spec: Final = handle.spec
        self._lend_connection = lend
        self._settings = _cached_settings(handle.spec)
        self._hook = connector.hook
        self._autocommit = connector.autocommit

    @property
    def is_gone(self) -> bool:
        """Whether it was closed in this test."""
        return self.closed

    def _lend(self, cls: type[Any]) -> Any:
        conn = self._lend_connection(
            cls, self._settings, autocommit=self._autocommit, pool=self.pool
        )
        conn._slots = self._slots
        if self._settings:
            conn._spec = self.spec
        return conn

    def _take_back(self, conn: Any) -> None:
        if not conn._member.ended:
            conn._member.close(CLOSED)
        slots, conn._slots = conn._slots, None
        if slots is not None:
            slots.free()

    def renew(self) -> None:
        """End with the test, and be as new."""
        self.is_used = False


class _LenderPool(_Lender):
    """What both kinds of pool share: psycopg_pool's limits, numbers, states and errors.

    A connection is made when it is borrowed: none is ever in the pool, to be checked or drained.
    """

    min_size = max_size = 0
    name: str
    timeout: float
    max_waiting: int
    _base: Callable[..., None]
    _sleep: Callable[[float], Any]

    def __init__(self, lend: Callable[..., Any], handle: Handle | AsyncHandle) -> None:
        super().__init__(lend, handle)
        options = {"name": f"sandbox-{self.spec.type}", **dict(self.spec.pool)}
        self._base(open=False, **options)
        self.pool = self
        self._reset: Any = options.get("reset")
        self._check: Any = options.get("check")
        self._sizes = _sizes(**{key: options[key] for key in _SIZES if key in options})
        self._start()

    def _start(self) -> None:
        self.closed = False
        self.min_size, self.max_size = self._sizes
        self._slots = _Slots(self.max_size)
        self._requests = 0

    def renew(self) -> None:
        """End with the test, and be as new: who still waits for a connection gets none."""
        super().renew()
        slots = self._slots
        self._start()
        slots.cancel_waiting()

    # The states

    def _refuse_reopening(self) -> None:
        if self.closed:
            raise PoolClosed("pool has already been opened/closed and cannot be reused")

    def _refuse_closed(self) -> None:
        if self.closed:
            raise PoolClosed(f"the pool {self.name!r} is already closed")

    def _close(self) -> None:
        self.closed = True
        self._slots.cancel_waiting()

    def _resize(self, min_size: int, max_size: int | None) -> None:
        self.min_size, self.max_size = _sizes(min_size=min_size, max_size=max_size)
        self._slots.resize(self.max_size)

    # Connections out and back

    def _refuse_to_wait(self) -> None:
        self._refuse_closed()
        if self.max_waiting and self._slots.waiting >= self.max_waiting:
            raise TooManyRequests(
                f"the pool {self.name!r} has already {self._slots.waiting} requests waiting"
            )

    def _not_given(self, timeout: float) -> Exception:
        if self.closed:
            return PoolClosed(f"the pool {self.name!r} is closed")
        return PoolTimeout(f"couldn't get a connection after {timeout:.2f} sec")

    def _give(self, cls: type[Any]) -> Any:
        try:
            self._refuse_closed()
            conn = self._lend(cls)
        except BaseException:
            self._slots.free()
            raise
        self._requests += 1
        return conn

    def _checked_steps(self, timeout: float | None, borrow: Callable[[float], Any]) -> Steps[Any]:
        """Borrow until the `check` function is content, with growing delays, as psycopg_pool."""
        limit = self.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        delay = 0.0
        while (left := end - time.monotonic()) > 0:
            conn = yield partial(borrow, left)
            try:
                yield partial(self._check, conn)
            except BaseException as error:
                self._take_back(conn)
                if not isinstance(error, Exception):
                    raise
                logger.info("connection failed check: %s", error)
            else:
                return conn
            yield partial(self._sleep, min(delay, left))
            delay = 2 * delay or _BACKOFF
        raise self._not_given(limit)

    def _is_out(self, conn: Any) -> bool:
        """Refuse what was not borrowed here; false where its `close()` has given it back."""
        pool = pool_of(conn)
        if pool is self:
            return True
        if getattr(conn, "_closed_into", None) is self:
            return False
        whose = f"it comes from pool {pool.name!r}" if pool else "it doesn't come from any pool"
        raise ValueError(f"can't return connection to pool {self.name!r}, {whose}: {conn}")

    def _take_back(self, conn: Any) -> None:
        member = conn._member
        if not member.ended and member.status != TransactionStatus.IDLE:
            logger.warning("rolling back returned connection: %s", conn)
        leave_pool(conn)
        super()._take_back(conn)

    def _reset_steps(self, conn: Any) -> Steps[None]:
        """Do what psycopg_pool does with a connection that comes back to a pool with `reset`."""
        if not conn._member.ended:
            try:
                if conn.info.transaction_status != TransactionStatus.IDLE:
                    yield conn.rollback
                yield partial(self._reset, conn)
            except Exception as error:
                logger.warning("error resetting connection: %s", error)
        self._take_back(conn)

    # The numbers

    def get_stats(self) -> dict[str, int]:
        """Give psycopg_pool's numbers of the pool as it stands."""
        return {
            "pool_min": self.min_size,
            "pool_max": self.max_size,
            "pool_size": max(self.min_size, self._slots.taken),
            "pool_available": max(self.min_size - self._slots.taken, 0),
            "requests_waiting": self._slots.waiting,
            "requests_num": self._requests,
        }

    def pop_stats(self) -> dict[str, int]:
        """Give the numbers and count anew."""
        stats = self.get_stats()
        self._requests = 0
        return stats


class SandboxSource(_Lender):
    """Lends `SandboxConnection`s to a `Handle`."""

    def getconn(self, timeout: float | None = None) -> SandboxConnection:  # noqa: ARG002 - nothing to wait for
        """Borrow a connection."""
        conn: SandboxConnection = self._lend(SandboxConnection)
        if self._hook is not None:
            self._call_hook(conn, self._hook)
        return conn

    def _call_hook(self, conn: SandboxConnection, hook: Hook) -> None:
        try:
            drive(hook_steps(conn, hook))
        except BaseException:
            self._take_back(conn)
            raise

    def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        self._take_back(conn)

    def close(self) -> None:
        """Nothing to close: each connection is its borrower's."""


class SandboxPool(_LenderPool, SandboxSource, ConnectionPool[Any]):
    """Lends `SandboxConnection`s as psycopg_pool's `ConnectionPool` does, to a handle or to all."""

    _base = ConnectionPool.__init__
    _sleep = staticmethod(time.sleep)

    def getconn(self, timeout: float | None = None) -> SandboxConnection:
        """Borrow a connection; raises PoolTimeout when `max_size` are out for too long."""
        if self._check is None:
            return self._borrow(timeout)
        conn: SandboxConnection = drive(self._checked_steps(timeout, self._borrow))
        return conn

    def _borrow(self, timeout: float | None) -> SandboxConnection:
        if not self._slots.take(self):
            self._refuse_to_wait()
            limit = self.timeout if timeout is None else timeout
            if not self._slots.block(self, limit):
                raise self._not_given(limit)
        conn: SandboxConnection = self._give(SandboxConnection)
        if self._hook is not None:
            self._call_hook(conn, self._hook)
        return conn

    def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        if not self._is_out(conn):
            return
        if self._reset is None or self.closed:
            self._take_back(conn)
        else:
            drive(self._reset_steps(conn))

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:  # noqa: ARG002 - psycopg_pool's
        """Do nothing: the pool is open until it is closed."""
        self._refuse_reopening()

    def wait(self, timeout: float = 30.0) -> None:  # noqa: ARG002
        """Do nothing: there is nothing to wait for."""
        self._refuse_closed()

    def close(self, timeout: float = 5.0) -> None:  # noqa: ARG002
        """Close the pool for the rest of the test."""
        self._close()

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's limits for the rest of the test."""
        self._resize(min_size, max_size)

    def drain(self) -> None:
        """Do nothing: each borrower gets a new connection."""

    def check(self) -> None:
        """Do nothing: each borrower gets a new connection."""


class AsyncSandboxSource(_Lender):
    """Lends `AsyncSandboxConnection`s to an `AsyncHandle`."""

    async def getconn(self, timeout: float | None = None) -> AsyncSandboxConnection:  # noqa: ARG002
        """Borrow a connection."""
        conn: AsyncSandboxConnection = self._lend(AsyncSandboxConnection)
        if self._hook is not None:
            await self._call_hook(conn, self._hook)
        return conn

    async def _call_hook(self, conn: AsyncSandboxConnection, hook: Hook) -> None:
        try:
            await adrive(hook_steps(conn, hook))
        except BaseException:
            self._take_back(conn)
            raise

    async def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        self._take_back(conn)

    async def close(self) -> None:
        """Nothing to close: each connection is its borrower's."""


class AsyncSandboxPool(_LenderPool, AsyncSandboxSource, AsyncConnectionPool[Any]):
    """Lends `AsyncSandboxConnection`s as psycopg_pool's `AsyncConnectionPool` does."""

    _base = AsyncConnectionPool.__init__
    _sleep = staticmethod(asyncio.sleep)

    async def getconn(self, timeout: float | None = None) -> AsyncSandboxConnection:
        """Borrow a connection; raises PoolTimeout when `max_size` are out for too long."""
        if self._check is None:
            return await self._borrow(timeout)
        conn: AsyncSandboxConnection = await adrive(self._checked_steps(timeout, self._borrow))
        return conn

    async def _borrow(self, timeout: float | None) -> AsyncSandboxConnection:
        if not self._slots.take(self):
            self._refuse_to_wait()
            limit = self.timeout if timeout is None else timeout
            if not await self._slots.suspend(self, limit):
                raise self._not_given(limit)
        conn: AsyncSandboxConnection = self._give(AsyncSandboxConnection)
        if self._hook is not None:
            await self._call_hook(conn, self._hook)
        return conn

    async def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        if not self._is_out(conn):
            return
        if self._reset is None or self.closed:
            self._take_back(conn)
        else:
            await adrive(self._reset_steps(conn))

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:  # noqa: ARG002
        """Do nothing: the pool is open until it is closed."""
        self._refuse_reopening()

    async def wait(self, timeout: float = 30.0) -> None:  # noqa: ARG002
        """Do nothing: there is nothing to wait for."""
        self._refuse_closed()

    async def close(self, timeout: float = 5.0) -> None:  # noqa: ARG002
        """Close the pool for the rest of the test."""
        self._close()

    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the pool's limits for the rest of the test."""
        self._resize(min_size, max_size)

    async def drain(self) -> None:
        """Do nothing: each borrower gets a new connection."""

    async def check(self) -> None:
        """Do nothing: each borrower gets a new connection."""
