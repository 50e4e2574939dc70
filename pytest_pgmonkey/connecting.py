"""Real connections: how one is opened and prepared, and the sources that lend them.

`sources.py` holds the shape of a source and nothing heavy; here are the four of production. What
is done to a connection is decided in generators of calls, which `drive` and `adrive` carry out.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import logging
import math
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed

from .errors import ConfigError
from .judge import Judge, refuse_connection_strings
from .secrets import redact_text

if TYPE_CHECKING:
    from psycopg import AsyncConnection, Connection

    from .config import ConnectionSpec

T = TypeVar("T")
P = TypeVar("P")
AnyConnection: TypeAlias = "Connection[Any] | AsyncConnection[Any]"
#: Calls to make, one after the other; each gets the result of its call, or its exception.
Steps: TypeAlias = Generator[Callable[[], Any], Any, T]
Hook: TypeAlias = Callable[[Any], Any]
Ended: TypeAlias = Callable[["AsyncPoolSource"], None]


# --- drivers ---


def drive(steps: Steps[T]) -> T:
    """Make the calls of a generator."""
    try:
        call = next(steps)
        while True:
            try:
                result = call()
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def adrive(steps: Steps[T]) -> T:
    """Make the calls of a generator and await what they give, if it can be awaited."""
    try:
        call = next(steps)
        while True:
            try:
                result = call()
                if inspect.isawaitable(result):
                    result = await result
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


# --- a new connection ---


def settings_steps(conn: AnyConnection, spec: ConnectionSpec) -> Steps[None]:
    """Apply the session settings of a file to a connection in autocommit, and verify them."""
    if not spec.settings:
        return
    # Not `conn.cursor()`: its row and cursor factories are the user's.
    is_async = isinstance(conn, psycopg.AsyncConnection)
    type_: Any = psycopg.AsyncCursor if is_async else psycopg.Cursor
    cursor = type_(conn, row_factory=tuple_row)
    one = "pg_catalog.set_config(%s, %s, false)"
    names = [name for name, _ in spec.settings]
    try:
        applied = yield from _row(cursor, one, len(names), [*chain(*spec.settings)])
    except psycopg.Error:
        yield from _name_the_culprit(cursor, one, spec)
        raise
    current = yield from _row(cursor, "pg_catalog.current_setting(%s)", len(names), names)
    for name, was, now in zip(names, applied, current, strict=True):
        if was != now:
            raise setting_overwritten(spec, name)


def _row(cursor: Any, expression: str, times: int, params: list[str]) -> Steps[tuple[str, ...]]:
    query = f"SELECT {', '.join([expression] * times)}"
    yield partial(cursor.execute, query, params, prepare=False)
    row: tuple[str, ...] = yield cursor.fetchone
    return row


def _name_the_culprit(cursor: Any, one: str, spec: ConnectionSpec) -> Steps[None]:
    for setting in spec.settings:
        try:
            yield from _row(cursor, one, 1, list(setting))
        except psycopg.Error as error:
            refused = setting_refused(spec, setting[0], error)
            if refused is None:
                return  # The error of the caller says so.
            raise refused from None


def setting_refused(spec: ConnectionSpec, name: str, error: psycopg.Error) -> ConfigError | None:
    """Give what is wrong with a setting of a file; `None` where the connection is lost."""
    message = error.diag.message_primary
    if message is None:
        return None
    # The error's own text could show a value.
    return _setting_error(spec, name, redact_text(message, spec.secrets))


def setting_overwritten(spec: ConnectionSpec, name: str) -> ConfigError:
    """Give the error of a setting that another one of its section takes back."""
    return _setting_error(spec, name, "another setting of this section overwrites it")


def _setting_error(spec: ConnectionSpec, name: str, problem: str) -> ConfigError:
    return ConfigError(problem, file=spec.origin, key=f"{spec.type.settings_section}.{name}")


def hook_steps(conn: AnyConnection, hook: Hook) -> Steps[None]:
    yield partial(hook, conn)
    status = conn.info.transaction_status
    if status == TransactionStatus.INTRANS:
        yield conn.commit
    elif status != TransactionStatus.IDLE:
        name = getattr(hook, "__qualname__", repr(hook))
        raise psycopg.ProgrammingError(
            f"the function {name!r} given to the manager left a new connection "
            f"in status {status.name}: a statement of it failed or is still running"
        )


class _Opaque:
    """Holds what no error report shall show."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Connector:
    """Opens the connections of one configuration, each prepared in the same way."""

    sync_class: ClassVar[type[Connection[Any]]] = psycopg.Connection
    async_class: ClassVar[type[AsyncConnection[Any]]] = psycopg.AsyncConnection

    def __init__(self, spec: ConnectionSpec, hook: Hook | None = None) -> None:
        self.spec = spec
        self.hook = hook
        self._class = self.async_class if spec.type.is_async else self.sync_class
        self._pool_arguments = dict(spec.pool)
        self._conninfo: Callable[[], Any] | None = self._pool_arguments.pop("conninfo", None)
        given = self._pool_arguments.pop("kwargs", {})
        self._given: Callable[[], Any] = given if callable(given) else lambda: given
        named = {} if callable(given) else given
        self.autocommit = bool(named.get("autocommit", spec.autocommit))

    def prepare(self, conn: AnyConnection) -> Steps[None]:
        yield from self.apply_settings(conn)
        yield partial(conn.set_autocommit, self.autocommit)
        if self.hook is not None:
            yield from hook_steps(conn, self.hook)

    def apply_settings(self, conn: AnyConnection) -> Steps[None]:
        yield from settings_steps(conn, self.spec)

    def connect(self, timeout: float | None = None) -> Steps[Any]:
        refuse_connection_strings(self.spec.conninfo_dict, self.spec.origin)
        # In no variable: error reports may show those of each frame.
        conn = yield partial(self._open, _Opaque((yield from self._arguments())), timeout)
        try:
            yield from self.prepare(conn)
        except BaseException:
            yield conn.close
            raise
        return conn

    def _arguments(self) -> Steps[dict[str, Any]]:
        """Give what a new connection is opened with: secret files are read, functions are called.

        What a function gives wins over the configuration.
        """
        dsn = _Opaque((yield self._conninfo) if self._conninfo is not None else None)
        judge, key = Judge({}, self.spec.origin), f"{self.spec.type.pool_section}.conninfo"
        # Settings are applied outside of a transaction: no rollback takes them back.
        return {
            **self.spec.read_conninfo(),
            **judge.dsn_parts(dsn.value, key),
            **(yield self._given),
            "autocommit": True,
        }

    def _open(self, arguments: _Opaque, timeout: float | None) -> Any:
        limit = {} if timeout is None else {"connect_timeout": max(1, math.ceil(timeout))}
        return self._class.connect(**{**arguments.value, **limit})

    def prove(self) -> Steps[None]:
        """Connect once: the error of a connection shows here, not as a pool's timeout later."""
        conn = yield from self.connect()
        yield conn.close

    def pool_arguments(
        self, driver: Callable[..., Any], configure: Hook, check: Hook
    ) -> dict[str, Any]:
        arguments = {
            **self._pool_arguments,
            "connection_class": self._class,
            "kwargs": lambda: driver(self._arguments()),
            "configure": configure,
            "open": False,
        }
        if self.spec.check_on_checkout:
            arguments["check"] = check
        return arguments


def _check_steps(pool: Any, conn: AnyConnection) -> Steps[None]:
    """Do what `check_on_checkout` wants of a connection that a pool is about to hand out."""
    if pool is None:
        return
    try:
        yield partial(pool.check_connection, conn)
    except Exception:
        # psycopg_pool tries one connection after the other, with growing delays: after a
        # restart of the server that lasts longer than a borrower waits.
        yield pool.check
        raise


# --- what borrowers change ---

# Those of the first row are changed by a method, outside of a transaction only.
_TRANSACTION_ATTRIBUTES: Final = ("autocommit", "isolation_level", "read_only", "deferrable")
_ATTRIBUTES: Final = (
    *_TRANSACTION_ATTRIBUTES,
    *("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold"),
)
_attributes_of: Final = attrgetter(*_ATTRIBUTES)


class _Originals:
    """The attributes that each connection of a pool was made with, for its next borrower."""

    def __init__(self) -> None:
        self._attributes: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()
        #: Gives those of a connection. It is called at the end of each block.
        self.of = self._attributes.get

    def connections(self) -> list[Any]:
        return list(self._attributes)

    def note(self, conn: AnyConnection) -> None:
        self._attributes[conn] = _attributes_of(conn)

    def restore_steps(self, conn: AnyConnection) -> Steps[None]:
        originals = self.of(conn)
        if originals is None or conn.closed:
            return  # Of another pool, or good for nothing: psycopg_pool says so.
        if conn.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            # psycopg_pool would do it later, and until then the attributes are locked.
            yield conn.rollback
        for name, now, original in zip(_ATTRIBUTES, _attributes_of(conn), originals, strict=True):
            if now == original:
                continue
            if name in _TRANSACTION_ATTRIBUTES:
                yield partial(getattr(conn, f"set_{name}"), original)
            else:
                setattr(conn, name, original)


# --- once ---


class _Once:
    """Does a thing once however many threads or tasks ask; those who come meanwhile share its end.

    `wait` gives the result of a future, or what to await for it.
    """

    def __init__(self, wait: Callable[[Future[Any]], Any]) -> None:
        self._wait = wait
        self.done = False
        self._lock = threading.Lock()
        self._running: Future[BaseException | None] | None = None

    def steps(self, action: Callable[[], Steps[None]]) -> Steps[None]:
        while not self.done:
            with self._lock:
                theirs = self._running
                mine: Future[BaseException | None] = Future()
                if theirs is None:
                    self._running = mine
            if theirs is None:
                yield from self._lead(action, mine)
                return
            error = yield partial(self._wait, theirs)
            # An interrupt or a cancellation is for one of them; the others try again.
            if isinstance(error, Exception):
                raise error

    def _lead(
        self, action: Callable[[], Steps[None]], outcome: Future[BaseException | None]
    ) -> Steps[None]:
        # The error is the result: nobody may be there to retrieve an exception.
        error: BaseException | None = None
        try:
            yield from action()
            self.done = True
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._running = None
            outcome.set_result(error)
            del error


def _shielded(outcome: Future[Any]) -> Any:
    """Give what a task awaits of a future that is others' as well: its cancellation ends there."""
    return asyncio.shield(asyncio.wrap_future(outcome))


# --- sources ---


class DirectSource:
    """A connection of its own for each borrower, closed when it comes back."""

    pool = None
    unopened = False
    is_gone = False

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._proof = _Once(Future.result)

    @property
    def is_open(self) -> bool:
        return self._proof.done

    def open(self) -> None:
        drive(self._proof.steps(self._connector.prove))

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        conn: Connection[Any] = drive(self._connector.connect(timeout))
        return conn

    def putconn(self, conn: Connection[Any]) -> None:
        conn.close()

    def close(self) -> None:
        """Nothing to close: each connection is its borrower's."""


class AsyncDirectSource:
    """`DirectSource` for the tasks of one loop."""

    pool = None
    unopened = False
    is_gone = False

    def __init__(self, connector: Connector, ended: Ended | None = None) -> None:  # noqa: ARG002
        self._connector = connector
        self._proof = _Once(_shielded)

    @property
    def is_open(self) -> bool:
        return self._proof.done

    async def open(self) -> None:
        await adrive(self._proof.steps(self._connector.prove))

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[Any]:
        conn: AsyncConnection[Any] = await adrive(self._connector.connect(timeout))
        return conn

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        await conn.close()

    async def close(self) -> None:
        """Nothing to close: each connection is its borrower's."""

    def close_soon(self) -> None:
        """Nothing to close either."""


class _Pool(ConnectionPool["Connection[Any]"]):
    """psycopg_pool's, which a forked child leaves alone, and which no borrower changes."""

    def __init__(self, originals: _Originals, **kwargs: Any) -> None:
        self._owner = os.getpid()
        self.originals = originals
        super().__init__(**kwargs)

    def putconn(self, conn: Connection[Any]) -> None:
        if _attributes_of(conn) != self.originals.of(conn):
            with suppress(psycopg.Error):  # Then it is broken, or busy: super() discards it.
                drive(self.originals.restore_steps(conn))
        super().putconn(conn)

    def __del__(self) -> None:
        # The parent's threads do not exist in a child, nor does who released their locks.
        if getattr(self, "_owner", None) != os.getpid():
            return
        # Collected in a worker of its own, it cannot wait for that thread.
        with suppress(RuntimeError):
            super().__del__()


class _AsyncPool(AsyncConnectionPool["AsyncConnection[Any]"]):
    """psycopg_pool's, which no borrower changes."""

    def __init__(self, originals: _Originals, **kwargs: Any) -> None:
        self.originals = originals
        super().__init__(**kwargs)

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        if _attributes_of(conn) != self.originals.of(conn):
            with suppress(psycopg.Error):  # Then it is broken, or busy: super() discards it.
                await adrive(self.originals.restore_steps(conn))
        await super().putconn(conn)


def _new_pool(type_: Callable[..., P], connector: Connector, driver: Callable[..., Any]) -> P:
    originals = _Originals()
    pool = type_(
        originals,
        **connector.pool_arguments(
            driver,
            lambda conn: driver(_configure_steps(connector, originals, conn)),
            lambda conn: driver(_check_steps(weak(), conn)),
        ),
    )
    # Weak: the pool holds its check.
    weak = ref(pool)
    return pool


def _configure_steps(
    connector: Connector, originals: _Originals, conn: AnyConnection
) -> Steps[None]:
    originals.note(conn)  # At once: the end of a loop closes those that are noted.
    yield from connector.prepare(conn)
    originals.note(conn)


class PoolSource:
    """A pool of connections."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._opening = _Once(Future.result)
        self.unopened = True
        self.closed = False
        self.pool = _new_pool(_Pool, connector, drive)
        self.getconn = self.pool.getconn

    @property
    def is_open(self) -> bool:
        return self._opening.done

    def open(self) -> None:
        drive(self._opening.steps(self._open))

    def _open(self) -> Steps[None]:
        yield from self._connector.prove()
        yield self.pool.open
        _open_pools.add(self.pool)
        self.unopened = False
        if self.closed:
            self.close()
            raise PoolClosed("the pool was closed while it was being opened")

    @property
    def is_gone(self) -> bool:
        return self.pool.closed and not self.unopened

    def putconn(self, conn: Connection[Any]) -> None:
        lost = conn.broken
        self.pool.putconn(conn)
        if lost and not self.pool.closed:
            # What killed one has killed others: the next borrower must not get those.
            self.pool.check()

    def close(self) -> None:
        self.closed = True
        self.pool.close()


class AsyncPoolSource:
    """A pool that belongs to the loop in which it is opened, and ends with it."""

    def __init__(self, connector: Connector, ended: Ended | None = None) -> None:
        self._connector = connector
        self._opening = _Once(_shielded)
        self._ended = ended
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.unopened = True
        self.closed = False
        self.pool = _new_pool(_AsyncPool, connector, adrive)
        self.getconn = self.pool.getconn

    @property
    def is_open(self) -> bool:
        return self._opening.done

    async def open(self) -> None:
        await adrive(self._opening.steps(self._open))

    def _open(self) -> Steps[None]:
        yield from self._connector.prove()
        if self.closed:
            raise PoolClosed("the pool was closed while it was being opened")
        others = asyncio.all_tasks()
        yield self.pool.open
        self._keep_open(others)
        # Cancelled before its first step, the keeper would not close anything.
        yield partial(asyncio.sleep, 0)

    def open_at_once(self) -> None:
        """Open the pool for one who cannot await: in the running loop, and without a proof."""
        others = asyncio.all_tasks()
        with suppress(StopIteration):
            self.pool.open().send(None)  # It waits for nothing.
        self._keep_open(others)

    def _keep_open(self, others: set[asyncio.Task[Any]]) -> None:
        loop = asyncio.get_running_loop()
        self._keeper = loop.create_task(self._keep(), name=f"{self.pool.name}-keeper")
        self._tasks = asyncio.all_tasks() - others
        _kept.add(self)
        self.unopened = False

    async def _keep(self) -> None:
        """Live as long as the loop, then close the pool.

        A worker of psycopg_pool swallows its cancellation while it is connecting, and
        `asyncio.run()` would wait for it forever.
        """
        with suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        self.closed = True
        # The cancellation of the pool's own tasks ends its `close()` before the connections.
        await self.pool.drain()
        with suppress(asyncio.CancelledError):
            await self.pool.close()
        _kept.discard(self)
        if self._ended is not None:
            self._ended(self)

    @property
    def is_gone(self) -> bool:
        return self.pool.closed and not self.unopened

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        lost = conn.broken
        await self.pool.putconn(conn)
        if lost and not self.pool.closed:
            # What killed one has killed others: the next borrower must not get those.
            await self.pool.check()

    async def close(self) -> None:
        keeper = self._keeper
        if keeper is None or keeper.get_loop() is not asyncio.get_running_loop():
            self.close_soon()
            return
        self.closed = True
        keeper.cancel()
        await asyncio.wait([keeper])

    def close_soon(self) -> None:
        """Have the pool closed by its own loop; callable from any thread."""
        self.closed = True
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        loop = keeper.get_loop()
        if loop.is_closed():
            self._discard(loop)
            return
        with suppress(RuntimeError):  # It may be closed by now.
            loop.call_soon_threadsafe(keeper.cancel)

    def close_at_exit(self) -> None:
        """End what nobody will end any more: a loop that stands still now never runs again."""
        if self._keeper is not None and not self._keeper.get_loop().is_running():
            self._discard(self._keeper.get_loop())

    def _discard(self, loop: asyncio.AbstractEventLoop) -> None:
        """End what a loop left behind that was closed without ending its tasks."""
        _kept.discard(self)
        for conn in self.pool.originals.connections():
            conn.pgconn.finish()
        for task in asyncio.all_tasks(loop):
            coro: Any = task.get_coro()
            # Before Python 3.12 the pool's scheduler waits in a task of its own.
            if task in self._tasks or getattr(coro, "__qualname__", "") == "Event.wait":
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with suppress(RuntimeError):  # Their clean-up wants the loop.
                    coro.close()


def _is_worth_a_word(record: logging.LogRecord) -> bool:
    """Hold back psycopg_pool's warnings of connects that the end of the loop cancelled."""
    args = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(arg, asyncio.CancelledError) for arg in args)


_pool_logger = logging.getLogger("psycopg.pool")
_pool_logger.addFilter(_is_worth_a_word)


# --- the end of the process, and its children ---

_open_pools: WeakSet[_Pool] = WeakSet()
#: Async pools whose loop has not ended yet. Held: collected with their loop, tasks complain.
_kept: set[AsyncPoolSource] = set()
#: What a forked child inherited and must neither use nor close.
_inherited: list[object] = []
#: What must forget its parent's connections in a forked child.
_forgetful: WeakSet[Any] = WeakSet()


def leave_to_parent(thing: object) -> None:
    """Keep an inherited object for good: its finalizer would speak on the parent's connection."""
    _inherited.append(thing)


class OwnContext:
    """A context manager of a connection, which a forked child does not end in its parent's stead.

    Its end sends statements: on the parent's connection they would be the parent's.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._owner = os.getpid()

    def _is_inherited(self) -> bool:
        if self._owner == os.getpid():
            return False
        leave_to_parent(self._context)
        return True

    def __enter__(self) -> Any:
        return self._context.__enter__()

    def __exit__(self, *raised: Any) -> Any:
        return None if self._is_inherited() else self._context.__exit__(*raised)

    async def __aenter__(self) -> Any:
        return await self._context.__aenter__()

    async def __aexit__(self, *raised: Any) -> Any:
        return None if self._is_inherited() else await self._context.__aexit__(*raised)


def forget_in_child(owner: Any) -> None:
    """Have `owner.forget_parent()` called in each forked child."""
    _forgetful.add(owner)


def _after_fork_in_child() -> None:
    global _open_pools
    _open_pools = WeakSet()
    _inherited.extend(_kept)
    _kept.clear()
    for owner in list(_forgetful):
        owner.forget_parent()


def _close_pools() -> None:
    # Joining threads at a later stage of the shutdown fails, and psycopg_pool would say so.
    _pool_logger.disabled = True
    for pool in list(_open_pools):
        pool.close(timeout=0.2)
    for source in list(_kept):
        source.close_at_exit()


atexit.register(_close_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
