"""What a handle borrows from while a test runs: connections lent as its type lends them."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from psycopg.pq import TransactionStatus
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

from ....connecting import adrive, drive, hook_steps
from ...file_settings import session_settings
from ..core.member import CLOSED
from ..core.waiting import Queue
from .connections import AsyncSandboxConnection, SandboxConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from ....config import ConnectionSpec
    from ....connecting import Steps
    from ....handles import AsyncHandle, Handle
    from ..core.waiting import Waiter

logger = logging.getLogger("pytest_pgmonkey")

_REMEMBERED: Final = 256
_DEFAULT_MIN_SIZE: Final = 4  # psycopg_pool's own defaults
_DEFAULT_TIMEOUT: Final = 30.0

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

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size
        self.taken = 0

    def _take(self, token: object) -> bool:  # noqa: ARG002 - everyone is alike
        if self.size is not None and self.taken >= self.size:
            return False
        self.taken += 1
        return True

    def free(self) -> None:
        with self._mutex:
            self.taken -= 1
            self._grant()

    def _abandon(self, waiter: Waiter) -> None:  # noqa: ARG002
        self.free()


class _Unlimited:
    """Lets a type without a pool have as many connections as it likes."""

    def take(self, _token: object) -> bool:
        return True

    def free(self) -> None:
        """Nothing was taken."""

    def expel(self) -> None:
        """Nobody waits."""


_UNLIMITED: Final = _Unlimited()


class _Lender:
    """What both kinds of source share: a pool's limits and numbers, and the end of a loan.

    Where the type has no pool, nothing is limited. Of psycopg_pool's interface it has what
    applications use; `resize` and `check` have nothing to do here.
    """

    def __init__(self, lend: Callable[..., Any], handle: Handle | AsyncHandle) -> None:
        spec = handle.spec
        connector = handle._connector
        self.spec: Final = spec
        self._lend_connection = lend
        self._settings = _cached_settings(spec)
        self._hook = connector.hook
        self._autocommit = connector.autocommit
        self._pooled = spec.type.is_pool
        self.closed = self.is_used = False
        self._reset: Any = None
        self._slots: Any = _UNLIMITED
        self._requests = 0
        if self._pooled:
            self._read_options(dict(spec.pool))

    def _read_options(self, options: dict[str, Any]) -> None:
        self.name = options.get("name") or f"sandbox-{self.spec.type}"
        self.min_size = int(options.get("min_size", _DEFAULT_MIN_SIZE))
        maximum = options.get("max_size")
        self.max_size = int(self.min_size if maximum is None else maximum)
        self.timeout = float(options.get("timeout", _DEFAULT_TIMEOUT))
        self.max_waiting = int(options.get("max_waiting", 0))
        self.close_returns = bool(options.get("close_returns", False))
        self._reset = options.get("reset")
        self._slots = _Slots(self.max_size)

    def _lend(self, cls: type[Any]) -> Any:
        self._requests += 1
        conn = self._lend_connection(
            cls,
            self._settings,
            autocommit=self._autocommit,
            pool=self if self._pooled else None,
        )
        conn._slots = self._slots
        if self._settings:
            conn._spec = self.spec
        return conn

    def _check_open(self) -> None:
        if self.closed:
            raise PoolClosed(f"the pool {self.name!r} is already closed")
        if self.max_waiting and self._slots.waiting >= self.max_waiting:
            raise TooManyRequests(
                f"the pool {self.name!r} has already {self._slots.waiting} requests waiting"
            )

    def _timed_out(self, timeout: float) -> PoolTimeout:
        return PoolTimeout(f"couldn't get a connection after {timeout:.2f} sec")

    def _take_back(self, conn: Any) -> None:
        member = conn._member
        if not member.ended:
            if self._pooled and member.status != TransactionStatus.IDLE:
                logger.warning("rolling back returned connection: %s", conn)
            member.close(CLOSED)
        slots, conn._slots = conn._slots, None
        if slots is not None:
            slots.free()

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

    def renew(self) -> None:
        """End with the test, and be as new: who still waits for a connection gets none."""
        self.is_used = self.closed = False
        self._requests = 0
        if self._pooled:
            slots, self._slots = self._slots, _Slots(self.max_size)
            slots.expel()

    def _nothing_to_do(self, method: str) -> None:
        logger.info("%s() does nothing in a rolled-back test: its pool has no connections", method)


class SandboxSource(_Lender):
    """Lends `SandboxConnection`s to a `Handle`."""

    def getconn(self, timeout: float | None = None) -> SandboxConnection:
        """Borrow a connection; raises PoolTimeout when `max_size` are out for too long."""
        if not self._slots.take(self):
            self._check_open()
            limit = self.timeout if timeout is None else timeout
            if not self._slots.block(self, limit):
                raise self._timed_out(limit)
        try:
            if self.closed:
                self._check_open()
            conn: SandboxConnection = self._lend(SandboxConnection)
        except BaseException:
            self._slots.free()
            raise
        if self._hook is not None:
            self._configure(conn)
        return conn

    def _configure(self, conn: SandboxConnection) -> None:
        assert self._hook is not None
        try:
            drive(hook_steps(conn, self._hook))
        except BaseException:
            self._take_back(conn)
            raise

    def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        if self._reset is None:
            self._take_back(conn)
        else:
            drive(self._reset_steps(conn))

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[SandboxConnection]:
        """Borrow a connection for a block, as psycopg_pool does."""
        conn = self.getconn(timeout)
        try:
            with conn:
                yield conn
        finally:
            self.putconn(conn)

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Do nothing: the pool is open as long as the test runs."""

    def wait(self, timeout: float = 30.0) -> None:
        """Do nothing: there is nothing to wait for."""

    def close(self, timeout: float = 5.0) -> None:  # noqa: ARG002 - psycopg_pool's signature
        """Close the pool for the rest of the test."""
        self.closed = self._pooled

    def resize(self, min_size: int, max_size: int | None = None) -> None:  # noqa: ARG002
        """Do nothing, and say so in the log."""
        self._nothing_to_do("resize")

    def check(self) -> None:
        """Do nothing, and say so in the log."""
        self._nothing_to_do("check")


class AsyncSandboxSource(_Lender):
    """Lends `AsyncSandboxConnection`s to an `AsyncHandle`."""

    async def getconn(self, timeout: float | None = None) -> AsyncSandboxConnection:
        """Borrow a connection; raises PoolTimeout when `max_size` are out for too long."""
        if not self._slots.take(self):
            self._check_open()
            limit = self.timeout if timeout is None else timeout
            if not await self._slots.suspend(self, limit):
                raise self._timed_out(limit)
        try:
            if self.closed:
                self._check_open()
            conn: AsyncSandboxConnection = self._lend(AsyncSandboxConnection)
        except BaseException:
            self._slots.free()
            raise
        if self._hook is not None:
            await self._configure(conn)
        return conn

    async def _configure(self, conn: AsyncSandboxConnection) -> None:
        assert self._hook is not None
        try:
            await adrive(hook_steps(conn, self._hook))
        except BaseException:
            self._take_back(conn)
            raise

    async def putconn(self, conn: Any) -> None:
        """Give a borrowed connection back; what is still open on it is rolled back."""
        if self._reset is None:
            self._take_back(conn)
        else:
            await adrive(self._reset_steps(conn))

    @asynccontextmanager
    async def connection(
        self, timeout: float | None = None
    ) -> AsyncIterator[AsyncSandboxConnection]:
        """Borrow a connection for a block, as psycopg_pool does."""
        conn = await self.getconn(timeout)
        try:
            async with conn:
                yield conn
        finally:
            await self.putconn(conn)

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Do nothing: the pool is open as long as the test runs."""

    async def wait(self, timeout: float = 30.0) -> None:
        """Do nothing: there is nothing to wait for."""

    async def close(self, timeout: float = 5.0) -> None:  # noqa: ARG002 - psycopg_pool's signature
        """Close the pool for the rest of the test."""
        self.closed = self._pooled

    async def resize(self, min_size: int, max_size: int | None = None) -> None:  # noqa: ARG002
        """Do nothing, and say so in the log."""
        self._nothing_to_do("resize")

    async def check(self) -> None:
        """Do nothing, and say so in the log."""
        self._nothing_to_do("check")
