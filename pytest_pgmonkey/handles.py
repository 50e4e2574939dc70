"""Handles of the four connection types: a block borrows a connection and returns it at its end.

`Handle` and `AsyncHandle` are twins that do the I/O. The pure code that both use decides which
block an exit belongs to, how a block ends, and what facts a server gives.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from asyncio import events
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import PoolClosed

from . import sources
from .blocks import INHERITED, Block, Blocks, settle, undo
from .connecting import (
    AsyncDirectSource,
    AsyncPoolSource,
    Connector,
    DirectSource,
    OwnContext,
    PoolSource,
    Steps,
    adrive,
    drive,
    forget_in_child,
    leave_to_parent,
)
from .errors import HandleClosedError, PGMonkeyError, SandboxError
from .secrets import redact_config

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from types import FrameType

    from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

    from .config import ConnectionSpec
    from .connecting import Hook
    from .connection_type import ConnectionType
    from .sources import AsyncSource, Source

IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS
AsyncH_co = TypeVar("AsyncH_co", bound="AsyncHandle", covariant=True)


# --- facts ---


@dataclass(frozen=True)
class ServerFacts:
    """Facts about a server, from a working connection."""

    #: Such as `"17.2"`.
    server_version: str
    database: str
    user: str
    #: The version of TLS, `None` without it.
    tls: str | None
    #: A name or an address, or the directory of a Unix socket.
    host: str
    port: int
    #: The process that serves the connection.
    backend_pid: int
    #: How many seconds it took to get a connection and the answer.
    elapsed: float


_FACTS = """
    SELECT pg_catalog.split_part(pg_catalog.current_setting('server_version'), ' ', 1),
        pg_catalog.current_database(), current_user, pg_catalog.pg_backend_pid(),
        (SELECT version FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid())
"""


def _facts(conn: Any, start: float) -> Steps[ServerFacts]:
    cursor = conn.cursor(row_factory=tuple_row)
    yield partial(cursor.execute, _FACTS)
    version, database, user, pid, tls = yield cursor.fetchone
    host, port = conn.info.host, conn.info.port
    return ServerFacts(version, database, user, tls, host, port, pid, perf_counter() - start)


# --- what both kinds of handle are ---


class RedactedConfig(Mapping[str, Any]):
    """A read-only configuration whose repr hides secrets."""

    def __init__(self, values: Mapping[str, Any], shown: Any = None) -> None:
        self._values = values
        self._shown = redact_config(values) if shown is None else shown

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, Mapping):
            return value
        shown = self._shown.get(key) if isinstance(self._shown, Mapping) else self._shown
        return RedactedConfig(value, shown)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._shown)


class _Keeper(Protocol):
    """The part of the manager that a handle needs."""

    def _evict(self, handle: Any) -> None: ...


class _BaseHandle:
    """What sync and async handles share."""

    def __init__(
        self,
        spec: ConnectionSpec,
        hook: Hook | None = None,
        manager: _Keeper | None = None,
        connector: type[Connector] = Connector,
    ) -> None:
        self.spec = spec
        self._connector = connector(spec, hook)
        self._blocks = Blocks()
        self._lock = threading.Lock()
        self._manager = ref(manager) if manager is not None else None
        self._closed = False
        self._successor: Any = None
        self._reset_sources()
        forget_in_child(self)

    @property
    def connection_type(self) -> ConnectionType:
        """The handle's type."""
        return self.spec.type

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that the handle was made from. Its `repr()` shows no secrets."""
        return RedactedConfig(self.spec.config)

    def __repr__(self) -> str:
        state = " (closed)" if self._closed else ""
        return f"<{self.spec.describe(type(self).__name__)}{state}>"

    _is_finalizing = staticmethod(sys.is_finalizing)  # a module's names may be gone by then

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if self._is_finalizing():
            return  # what the text needs cannot be imported any more
        blocks = getattr(self, "_blocks", None)
        for place in blocks.places() if blocks is not None else ():
            _warn(
                f"{self!r} was deleted while the block entered at {place} was open",
                ResourceWarning,
                source=self,
            )

    def _forward(self) -> Any:
        """Return the handle that replaced this one; raises HandleClosedError if there is none."""
        if self._successor is not None:
            return self._successor
        raise HandleClosedError(f"{self!r} was disconnected: get a new one from the manager")

    @property
    def _owner(self) -> _Keeper | None:
        return self._manager() if self._manager is not None else None

    def connection(self, timeout: float | None = None) -> Any:
        raise NotImplementedError

    def _here(self) -> Any:
        """Return a block on the surrounding block's connection, or on a new one."""
        block = self._blocks.visible()
        return nullcontext(block.conn) if block is not None else self.connection()

    # --- the end ---

    def _reset_sources(self) -> None:
        raise NotImplementedError

    def _take_sources(self) -> list[Any]:
        raise NotImplementedError

    def _retire(self, successor: _BaseHandle | None = None) -> list[Any]:
        """Close for good, or pass later blocks to `successor`; returns the sources to close."""
        with self._lock:
            self._successor = successor or self._successor
            self._closed = self._successor is None
            return self._take_sources()

    def _supersede(self, successor: _BaseHandle) -> Steps[None]:
        """Pass later blocks to another handle; open blocks finish normally."""
        for source in self._retire(successor):
            yield source.close

    def _lent(self, lent_to: Callable[[Any], Any]) -> Any:
        """Return the source that a test lends to this handle, if any."""
        try:
            return lent_to(self)
        except SandboxError:
            return None  # Outside of a test nothing is lent.

    def _disconnect(self, lent_to: Callable[[Any], Any]) -> Steps[None]:
        try:
            lent = lent_to(self)
        except SandboxError:
            return  # Outside of a test nothing is lent.
        if lent is not None:
            yield lent.close
            return
        successor = self._successor
        for source in self._retire():
            yield source.close
        if successor is not None:
            yield successor.disconnect
        if (manager := self._owner) is not None:
            manager._evict(self)

    def forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._blocks.forget_parent()
        leave_to_parent(self._take_sources())
        if not self._closed and self._successor is None:
            self._reset_sources()


class _BaseLease:
    """What `Lease` and `AsyncLease` share."""

    _block: Block | None = None

    def __init__(self, handle: Any, timeout: float | None) -> None:
        self._handle = handle
        self._timeout = timeout

    def _refuse_second(self) -> None:
        if self._block is not None:
            raise PGMonkeyError(
                f"this connection() is open since {self._block.where}: "
                "call handle.connection() for each block"
            )

    def _note(self, borrowed: tuple[Any, Any], frame: FrameType) -> Any:
        self._block = self._handle._blocks.enter(*borrowed, frame, paired=False)
        return borrowed[1]

    def _take(self) -> Block:
        block, self._block = self._block, None
        if block is None:
            raise PGMonkeyError("this connection() was not entered, or was left already")
        self._handle._blocks.remove(block)
        return block

    def __del__(self, _warn: Any = warnings.warn) -> None:
        block = self._block
        if block is None or block.is_inherited:
            return
        self._handle._blocks.remove(block)
        _warn(
            f"a connection of {self._handle!r}, taken at {block.where}, was never given back",
            ResourceWarning,
            source=self,
        )


# --- sync ---


class Handle(_BaseHandle):
    """A handle for sync code: `with handle as conn:` gives a psycopg connection.

    A clean exit from the block commits; an exception rolls back and is raised again. Any number of
    threads can open blocks at the same time; each block has its own connection.
    """

    _source: DirectSource | PoolSource | None

    def _reset_sources(self) -> None:
        source = PoolSource if self.spec.type.is_pool else DirectSource
        self._source = source(self._connector)

    def __enter__(self) -> Connection[Any]:
        source, conn = self._borrow(None)
        self._blocks.enter(source, conn, sys._getframe(1), paired=True)
        return conn

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._end(self._blocks.leave(sys._getframe(1)), exc)

    def connection(self, timeout: float | None = None) -> Lease:
        """Borrow a connection for a block: `with handle.connection() as conn:`.

        Use it where a block ends in another function, thread or task than it began in. `timeout`
        is in seconds. A pool that has no connection for so long raises `psycopg_pool.PoolTimeout`;
        type `normal` uses it as `connect_timeout`.
        """
        return Lease(self, timeout)

    @contextmanager
    def cursor(self, *args: Any, **kwargs: Any) -> Iterator[Cursor[Any]]:
        """Open a cursor on the connection of the surrounding block, or on one of its own.

        Takes the arguments of psycopg's `Connection.cursor()`.
        """
        with self._here() as conn, OwnContext(conn.cursor(*args, **kwargs)) as cursor:
            yield cursor

    @contextmanager
    def transaction(self, force_rollback: bool = False) -> Iterator[Connection[Any]]:
        """Open a transaction, or a savepoint in the surrounding one; gives the connection.

        With `force_rollback` it is rolled back at its end, also without an exception.
        """
        with self._here() as conn, OwnContext(conn.transaction(force_rollback=force_rollback)):
            yield conn

    @property
    def pool(self) -> ConnectionPool[Any] | None:
        """The psycopg_pool pool; `None` for type `normal`."""
        if not self.spec.type.is_pool:
            return None
        source: Any = sources.lent_to(self) or self._source or self._forward()
        return source.pool  # type: ignore[no-any-return]

    def test_connection(self) -> ServerFacts:
        """Connect, and ask the server for facts about it.

        Raises psycopg's own error where it cannot be reached.
        """
        start = perf_counter()
        with self.connection() as conn:
            return drive(_facts(conn, start))

    def disconnect(self) -> None:
        """Close for good. Connections in use are closed at the end of their blocks.

        A block that begins later raises `HandleClosedError`: ask the manager for a new handle.
        """
        drive(self._disconnect(sources.lent_to))

    # --- for the manager ---

    @property
    def _gone(self) -> bool:
        source = self._lent(sources.lent_to) or self._source
        return source is None or source.is_gone

    def _open(self) -> Steps[None]:
        """Open the pool, or check that the server answers."""
        source = self._source
        if source is not None and not source.is_open:
            yield source.open

    def _take_sources(self) -> list[DirectSource | PoolSource]:
        source, self._source = self._source, None
        return [source] if source is not None else []

    def _end_all(self) -> None:
        """Close from outside, if the handle belongs to no manager."""
        for source in self._retire():
            source.close()

    # --- lending ---

    def _borrow(self, timeout: float | None) -> tuple[Source, Connection[Any]]:
        if sources.interceptor is not None:
            lent = sources.interceptor.source(self)
            if lent is not None:
                return lent, lent.getconn(timeout)
        source = self._source
        if source is None:
            return self._forward()._borrow(timeout)  # type: ignore[no-any-return]
        try:
            if source.unopened:
                source.open()
            return source, source.getconn(timeout)
        except PoolClosed:
            if self._source is source:
                raise
        # A reload or a disconnect came between.
        return self._borrow(timeout)

    def _end(self, block: Block, error: BaseException | None) -> None:
        source, conn = block.end()
        if source is INHERITED:
            leave_to_parent(conn)
            return
        # A lent connection's own status is not what its session is in; to ask costs more.
        status = (conn.pgconn if source is self._source else conn.info).transaction_status
        try:
            if error is None and status == INTRANS:
                # The usual end, without the detour.
                try:
                    conn.commit()
                except BaseException:
                    drive(undo(conn))
                    raise
            elif status != IDLE:
                drive(settle(conn, error))
        finally:
            source.putconn(conn)


if TYPE_CHECKING:

    class PoolHandle(Handle):
        """A `Handle` of type `pool`."""

        @property
        def pool(self) -> ConnectionPool[Any]: ...

else:
    PoolHandle = Handle


class Lease(_BaseLease):
    """A block that remembers its own connection; made by `Handle.connection()`."""

    def __enter__(self) -> Connection[Any]:
        self._refuse_second()
        borrowed = self._handle._borrow(self._timeout)
        conn: Connection[Any] = self._note(borrowed, sys._getframe(1))
        return conn

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._handle._end(self._take(), exc)


# --- async ---


class AsyncHandle(_BaseHandle):
    """A handle for coroutines: `async with handle as conn:` gives a psycopg connection.

    A clean exit from the block commits; an exception rolls back and is raised again. Any number of
    tasks can open blocks at the same time; each block has its own connection. Each event loop has
    its own connections and pool.
    """

    _sources: WeakKeyDictionary[AbstractEventLoop, AsyncDirectSource | AsyncPoolSource]

    def _reset_sources(self) -> None:
        self._sources = WeakKeyDictionary()

    # `async with` calls these two in its own frame, which must be seen: hence no `async def`.

    def __aenter__(self) -> Coroutine[Any, Any, AsyncConnection[Any]]:
        return self._enter(sys._getframe(1))

    def __aexit__(
        self, kind: object, exc: BaseException | None, traceback: object
    ) -> Coroutine[Any, Any, None]:
        return self._exit(sys._getframe(1), exc)

    async def _enter(self, frame: FrameType) -> AsyncConnection[Any]:
        source, conn = await self._borrow(None)
        self._blocks.enter(source, conn, frame, paired=True)
        return conn

    async def _exit(self, frame: FrameType, error: BaseException | None) -> None:
        await self._end(self._blocks.leave(frame), error)

    def connection(self, timeout: float | None = None) -> AsyncLease:
        """Borrow a connection for a block: `async with handle.connection() as conn:`.

        Use it where a block ends in another function or task than it began in. `timeout` is in
        seconds. A pool that has no connection for so long raises `psycopg_pool.PoolTimeout`; type
        `async` uses it as `connect_timeout`.
        """
        return AsyncLease(self, timeout)

    @asynccontextmanager
    async def cursor(self, *args: Any, **kwargs: Any) -> AsyncIterator[AsyncCursor[Any]]:
        """Open a cursor on the connection of the surrounding block, or on one of its own.

        Takes the arguments of psycopg's `Connection.cursor()`.
        """
        async with self._here() as conn, OwnContext(conn.cursor(*args, **kwargs)) as cursor:
            yield cursor

    @asynccontextmanager
    async def transaction(
        self, force_rollback: bool = False
    ) -> AsyncIterator[AsyncConnection[Any]]:
        """Open a transaction, or a savepoint in the surrounding one; gives the connection.

        With `force_rollback` it is rolled back at its end, also without an exception.
        """
        async with (
            self._here() as conn,
            OwnContext(conn.transaction(force_rollback=force_rollback)),
        ):
            yield conn

    @property
    def pool(self) -> AsyncConnectionPool[Any] | None:
        """The psycopg_pool pool of the running loop; `None` for type `async`.

        `None` for type `async`. Raises `PGMonkeyError` outside of a loop where there is no pool, or
        more than one.
        """
        if not self.spec.type.is_pool:
            return None
        lent = sources.lent_to_async(self)
        if lent is not None:
            return lent.pool
        if self._is_retired:
            return self._forward().pool  # type: ignore[no-any-return]
        loop = events._get_running_loop()
        if loop is not None:
            return self._source_in(loop).pool
        pools = [source.pool for source in self._sources.values() if source.pool is not None]
        if len(pools) != 1:
            raise PGMonkeyError(
                f"{self!r} has {len(pools)} pools, one for each event loop: ask in the loop"
            )
        return pools[0]

    async def test_connection(self) -> ServerFacts:
        """Connect, and ask the server for facts about it.

        Raises psycopg's own error where it cannot be reached.
        """
        start = perf_counter()
        async with self.connection() as conn:
            return await adrive(_facts(conn, start))

    async def disconnect(self) -> None:
        """Close for good. Connections in use are closed at the end of their blocks.

        A block that begins later raises `HandleClosedError`: ask the manager for a new handle.
        """
        await adrive(self._disconnect(sources.lent_to_async))

    # --- for the manager ---

    @property
    def _gone(self) -> bool:
        own = self._sources.get(asyncio.get_running_loop())
        source = self._lent(sources.lent_to_async) or own
        return self._is_retired or (source is not None and source.is_gone)

    @property
    def _is_retired(self) -> bool:
        return self._closed or self._successor is not None

    def _open(self) -> Steps[None]:
        """Open the pool of this loop, or check that the server answers."""
        if self._is_retired:
            return
        source = self._source_in(asyncio.get_running_loop())
        if not source.is_open:
            yield source.open

    def _take_sources(self) -> list[AsyncDirectSource | AsyncPoolSource]:
        taken = list(self._sources.values())
        self._sources.clear()
        return taken

    def _close_soon(self) -> None:
        """Close from sync code: each loop closes its own pool when it next runs."""
        if sources.interceptor is not None:
            return
        for source in self._retire():
            source.close_soon()

    def _end_all(self) -> None:
        """Close from sync code, and wait for loops that are not running."""
        loops = list(self._sources.items())
        self._retire()
        for loop, source in loops:
            if loop.is_closed() or loop.is_running():
                source.close_soon()
            else:
                loop.run_until_complete(source.close())

    def __del__(self, _warn: Any = warnings.warn) -> None:
        super().__del__(_warn)
        for source in list(getattr(self, "_sources", {}).values()):
            source.close_soon()

    # --- lending ---

    def _source_in(self, loop: AbstractEventLoop) -> AsyncDirectSource | AsyncPoolSource:
        source = self._sources.get(loop)
        if source is not None:
            return source
        with self._lock:
            source = self._sources.get(loop)
            if source is None:
                # A pool holds its loop, which therefore never leaves the dictionary by itself.
                for ended in [ended for ended in self._sources if ended.is_closed()]:
                    self._sources.pop(ended).close_soon()
                forget = partial(_loop_ended, ref(self), ref(loop))
                kind = AsyncPoolSource if self.spec.type.is_pool else AsyncDirectSource
                source = self._sources[loop] = kind(self._connector, forget)
        return source

    async def _borrow(self, timeout: float | None) -> tuple[AsyncSource, AsyncConnection[Any]]:
        lent = sources.lent_to_async(self)
        if lent is not None:
            return lent, await lent.getconn(timeout)
        if self._is_retired:
            return await self._forward()._borrow(timeout)  # type: ignore[no-any-return]
        loop = asyncio.get_running_loop()
        source = self._source_in(loop)
        try:
            if source.unopened:
                await source.open()
            return source, await source.getconn(timeout)
        except PoolClosed:
            if self._sources.get(loop) is source:
                raise
        # A reload or a disconnect came between.
        return await self._borrow(timeout)

    async def _end(self, block: Block, error: BaseException | None) -> None:
        source, conn = block.end()
        if source is INHERITED:
            leave_to_parent(conn)
            return
        status = conn.info.transaction_status
        try:
            if error is None and status == INTRANS:
                # The usual end, without the detour.
                try:
                    await conn.commit()
                except BaseException:
                    await adrive(undo(conn))
                    raise
            elif status != IDLE:
                await adrive(settle(conn, error))
        finally:
            await source.putconn(conn)


if TYPE_CHECKING:

    class AsyncPoolHandle(AsyncHandle):
        """An `AsyncHandle` of type `async_pool`."""

        @property
        def pool(self) -> AsyncConnectionPool[Any]: ...

else:
    AsyncPoolHandle = AsyncHandle


class AsyncLease(_BaseLease):
    """A block that remembers its own connection; made by `AsyncHandle.connection()`."""

    def __aenter__(self) -> Coroutine[Any, Any, AsyncConnection[Any]]:
        return self._enter(sys._getframe(1))

    async def _enter(self, frame: FrameType) -> AsyncConnection[Any]:
        self._refuse_second()
        borrowed = await self._handle._borrow(self._timeout)
        conn: AsyncConnection[Any] = self._note(borrowed, frame)
        return conn

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        await self._handle._end(self._take(), exc)


class PendingHandle(Coroutine[Any, Any, AsyncH_co]):
    """The manager's answer for async types: `await` gets the handle, `async with` a connection.

    Any number of tasks can await and enter it, any number of times. You can also leave it unused.
    asyncio accepts it as a coroutine.
    """

    def __init__(self, ask: Callable[[bool], Coroutine[Any, Any, AsyncH_co]], reload: bool) -> None:
        self._ask = ask
        self._reload = reload
        self._running: Coroutine[Any, Any, AsyncH_co] | None = None
        self._blocks = Blocks()

    async def _get(self) -> AsyncH_co:
        handle = await self._ask(self._reload)
        self._reload = False
        return handle

    def __await__(self) -> Generator[Any, Any, AsyncH_co]:
        return self._get().__await__()

    # As with a handle, the frame of an `async with` must be seen.

    def __aenter__(self) -> Coroutine[Any, Any, AsyncConnection[Any]]:
        return self._enter(sys._getframe(1))

    def __aexit__(
        self, kind: object, exc: BaseException | None, traceback: object
    ) -> Coroutine[Any, Any, None]:
        lease, _ = self._blocks.leave(sys._getframe(1)).end()
        return lease.__aexit__(kind, exc, traceback)  # type: ignore[no-any-return]

    async def _enter(self, frame: FrameType) -> AsyncConnection[Any]:
        # A lease, as a reload may give the next block another handle.
        lease = (await self._get()).connection()
        conn = await lease._enter(frame)
        self._blocks.enter(lease, conn, frame, paired=True)
        return conn

    # What asyncio asks of a coroutine, for `asyncio.run()` and `create_task()`.

    def send(self, value: Any) -> Any:
        if self._running is None:
            self._running = self._get()
        return self._running.send(value)

    def throw(self, *error: Any) -> Any:
        if self._running is None:
            self._running = self._get()
        return self._running.throw(*error)

    def close(self) -> None:
        if self._running is not None:
            self._running.close()


def _loop_ended(
    handle_ref: ref[AsyncHandle], loop_ref: ref[AbstractEventLoop], source: AsyncPoolSource
) -> None:
    """Forget the pool of a loop that is about to end."""
    handle, loop = handle_ref(), loop_ref()
    if handle is not None and loop is not None and handle._sources.get(loop) is source:
        del handle._sources[loop]


def make_handle(
    spec: ConnectionSpec,
    hook: Hook | None = None,
    manager: _Keeper | None = None,
    connector: type[Connector] = Connector,
) -> Handle | AsyncHandle:
    """Make a handle of the configuration's type; it does not connect yet."""
    kind = AsyncHandle if spec.type.is_async else Handle
    return kind(spec, hook, manager, connector)
