"""Where a handle gets its connections: psycopg, psycopg_pool, or what a test puts there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

    from .config import ConnectionSpec


class HandleLike(Protocol):
    """A handle, as an interceptor sees it."""

    spec: ConnectionSpec

    @property
    def _owner(self) -> object:
        """The manager that made the handle, `None` without one."""


class Source(Protocol):
    """Lends connections to a `Handle`; the shape of `psycopg_pool.ConnectionPool`."""

    @property
    def pool(self) -> ConnectionPool[Any] | None:
        """The psycopg_pool pool behind it, `None` where its type has none."""

    @property
    def is_gone(self) -> bool:
        """Whether its pool was closed, so that nothing can be borrowed any more."""

    def getconn(self, timeout: float | None = None) -> Connection[Any]: ...
    def putconn(self, conn: Connection[Any]) -> None: ...
    def close(self) -> None: ...


class AsyncSource(Protocol):
    """Lends connections to an `AsyncHandle`; the shape of `psycopg_pool.AsyncConnectionPool`."""

    @property
    def pool(self) -> AsyncConnectionPool[Any] | None:
        """The psycopg_pool pool behind it, `None` where its type has none."""

    @property
    def is_gone(self) -> bool:
        """Whether its pool was closed, so that nothing can be borrowed any more."""

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[Any]: ...
    async def putconn(self, conn: AsyncConnection[Any]) -> None: ...
    async def close(self) -> None: ...


class Interceptor(Protocol):
    """Stands between handles and their servers while a test session uses the kit."""

    def judge(self, spec: ConnectionSpec, owner: object) -> bool:
        """Accept or refuse what a manager is asked for; false where it shall really connect."""

    def source(self, handle: HandleLike) -> Source | None:
        """Give the source to borrow from now, `None` for the handle's own.

        Raises SandboxError where no test of the kit runs.
        """

    def async_source(self, handle: HandleLike) -> AsyncSource | None:
        """Do as `source` for an async handle."""


interceptor: Interceptor | None = None


def lent_to(handle: HandleLike) -> Source | None:
    """Give what an interceptor puts in the place of a handle's own source."""
    return interceptor.source(handle) if interceptor is not None else None


def lent_to_async(handle: HandleLike) -> AsyncSource | None:
    """Give what an interceptor puts in the place of an async handle's own source."""
    return interceptor.async_source(handle) if interceptor is not None else None
