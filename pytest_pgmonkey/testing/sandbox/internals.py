"""All that the sandbox uses of psycopg's private side, checked against the installed version.

psycopg's connections are thin wrappers over a `PGconn`, and each of their operations is a
generator that passes `wait()`. The classes here lend one `PGconn` to many wrappers: `wait()`
takes the turn, and the few methods that speak of transactions ask the borrower instead.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import asynccontextmanager, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncTransaction, Connection, Transaction, pq

from .support import unsupported

try:
    from psycopg._connection_base import BaseConnection
    from psycopg._cursor_base import BaseCursor
    from psycopg._preparing import Prepare, PrepareManager
    from psycopg.errors import error_from_result
    from psycopg.generators import execute
    from psycopg.pq.misc import connection_summary
    from psycopg.transaction import BaseTransaction
except ImportError as error:
    # Without the path of the module, which is no help.
    raise unsupported([error.msg.partition(" (")[0]]) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from psycopg.pq.abc import PGconn, PGresult

    from .borrower import Borrower


def _owner(cls: type[Any], name: str) -> Any:
    """Give the class that defines a method: modules move between psycopg's releases."""
    return next((each for each in cls.__mro__ if name in each.__dict__), cls)


BasePipeline: Final = _owner(psycopg.Pipeline, "_sync_gen")
ServerCursorMixin: Final = _owner(psycopg.ServerCursor, "_declare_gen")

__all__ = [
    "AsyncSandboxConnection",
    "SandboxConnection",
    "check_psycopg",
    "error_from_result",
    "execute",
]

IDLE: Final = pq.TransactionStatus.IDLE

STATEMENT: Final = "statement"
DECLARE: Final = "declare"
CONTROL: Final = "control"
LOCAL: Final = "local"
CLOSE: Final = "close"
OTHER: Final = "other"

# What an operation is, by its generator function: its kind, and the variable with its SQL.
_OPERATIONS: Final = {
    (BaseCursor, "_execute_gen"): (STATEMENT, "query"),
    (BaseCursor, "_executemany_gen_pipeline"): (STATEMENT, "query"),
    (BaseCursor, "_executemany_gen_no_pipeline"): (STATEMENT, "query"),
    (BaseCursor, "_stream_send_gen"): (STATEMENT, "query"),
    (BaseCursor, "_start_copy_gen"): (STATEMENT, "statement"),
    (ServerCursorMixin, "_declare_gen"): (DECLARE, "query"),
    (ServerCursorMixin, "_close_gen"): (CLOSE, "self"),
    (BaseConnection, "_commit_gen"): (CONTROL, ""),
    (BaseConnection, "_rollback_gen"): (CONTROL, ""),
    (BaseTransaction, "_enter_gen"): (CONTROL, ""),
    (BaseTransaction, "_exit_gen"): (CONTROL, ""),
    (BasePipeline, "_enter_gen"): (CONTROL, ""),
    (BasePipeline, "_exit_gen"): (CONTROL, ""),
    (BasePipeline, "_sync_gen"): (CONTROL, ""),
    (BaseConnection, "_set_autocommit_gen"): (LOCAL, ""),
    (BaseConnection, "_set_isolation_level_gen"): (LOCAL, ""),
    (BaseConnection, "_set_read_only_gen"): (LOCAL, ""),
    (BaseConnection, "_set_deferrable_gen"): (LOCAL, ""),
}
_OVERRIDDEN: Final = (
    "_check_connection_ok",
    "_check_intrans_gen",
    "_check_tpc",
    "_deallocate",
    "_exec_command",
    "_get_tx_start_command",
    "_start_query",
)
# What else is used of these classes.
_NAMES: Final = {
    Connection: _OVERRIDDEN,
    AsyncConnection: _OVERRIDDEN,
    BaseConnection: ("_notice_handler", "_should_cancel"),
    BaseCursor: (
        "_check_results",
        "_convert_query",
        "_last_query",
        "_reset",
        "_set_results",
        "_tx",
    ),
    ServerCursorMixin: ("_withhold",),
    PrepareManager: ("_should_discard",),
}
_ATTRIBUTES: Final = (
    "_adapters",
    "_autocommit",
    "_closed",
    "_notice_handlers",
    "_notifies_backlog",
    "_notify_handlers",
    "_num_transactions",
    "_pipeline",
    "_prepared",
    "lock",
    "pgconn",
)
_PREPARED_ATTRIBUTES: Final = ("_counts", "_names", "_prepared_idx")


def _operation_codes() -> dict[int, tuple[str, str]]:
    # By identity: to hash a code object takes as long as a statement.
    codes: dict[int, tuple[str, str]] = {}
    for (cls, name), operation in _OPERATIONS.items():
        codes[id(getattr(cls, name).__code__)] = operation
    return codes


def check_psycopg() -> None:
    """Raise SandboxError naming what has moved if the installed psycopg is not supported."""
    missing = [f"{c.__name__}.{n}" for c, n in _OPERATIONS if not hasattr(c, n)]
    for cls, names in _NAMES.items():
        missing += [f"{cls.__name__}.{n}" for n in names if not hasattr(cls, n)]
    prepared = PrepareManager()
    missing += [f"PrepareManager.{n}" for n in _PREPARED_ATTRIBUTES if not hasattr(prepared, n)]
    for (owner, name), (_, variable) in _OPERATIONS.items():
        code = getattr(getattr(owner, name, None), "__code__", None)
        if variable and code is not None and variable not in code.co_varnames:
            missing.append(f"{owner.__name__}.{name}({variable})")
    _refuse_if(missing)


def _refuse_if(missing: list[str]) -> None:
    if missing:
        raise unsupported(missing)


try:
    _CODES: Final = _operation_codes()
except AttributeError:
    check_psycopg()
    raise


_OK: Final = pq.ConnStatus.OK
_EXECUTE: Final = BaseCursor._execute_gen.__code__
_IN_BLOCK: Final = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


def register_control(function: Any) -> None:
    """Let a generator function of ours pass `wait()` as transaction control does."""
    _CODES[id(function.__code__)] = (CONTROL, "")


def read_operation(gen: Any) -> tuple[str, Any, Any]:
    """Give an operation's kind, its SQL (or `None`) and its cursor or connection."""
    kind, variable = _CODES.get(id(getattr(gen, "gi_code", None)), (OTHER, ""))
    if not variable:
        return kind, None, None
    names = gen.gi_frame.f_locals
    return kind, names[variable], names["self"]


def is_execute(gen: Any) -> bool:
    """Whether an operation is a plain execute()."""
    return bool(gen.gi_code is _EXECUTE)


def is_extended(cursor: Any, gen: Any) -> bool:
    """Whether an execute() uses the extended protocol, which takes one statement only."""
    names = gen.gi_frame.f_locals
    if names.get("params") or names.get("binary") or cursor.format == pq.Format.BINARY:
        return True
    threshold, prepare = cursor.connection.prepare_threshold, names.get("prepare")
    return threshold is not None and prepare is not False and bool(prepare or threshold == 0)


def check_parameters(cursor: Any, text: str, params: Any) -> None:
    """Raise as psycopg does where placeholders and parameters do not agree."""
    cursor._tx = psycopg.adapt.Transformer(cursor)
    cursor._convert_query(text, params)


def holds(cursor: Any) -> bool:
    """Whether a server-side cursor outlives its transaction."""
    return bool(cursor._withhold)


class _TaggedResult(pq.PGresult):  # type: ignore[misc, valid-type]
    """The result of a command that was not sent as it is."""

    tag: bytes

    def __init__(self) -> None:
        """Hold no result of libpq."""

    @property
    def status(self) -> int:
        return pq.ExecStatus.COMMAND_OK

    @property
    def command_status(self) -> bytes:
        return self.tag

    @property
    def command_tuples(self) -> None:
        return None


def tagged_result(tag: bytes) -> Any:
    """Give the result of a command with this status tag."""
    result = _TaggedResult()
    result.tag = tag
    return result


def set_results(cursor: Any, results: list[PGresult]) -> None:
    """Give a cursor the results of statements that were sent one by one."""
    cursor._reset()
    cursor._last_query = None
    cursor._tx = psycopg.adapt.Transformer(cursor)
    cursor._check_results(results)
    cursor._set_results(results)


class _VirtualInfo(psycopg.ConnectionInfo):
    """A connection's info with the transaction status that its borrower sees."""

    def __init__(self, conn: _Sandboxed) -> None:
        super().__init__(conn.pgconn)
        self._conn = conn

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        return self._conn._borrower.status

    @property
    def status(self) -> pq.ConnStatus:
        return pq.ConnStatus.BAD if self._conn.closed else super().status


class _VirtualPGconn:
    """A PGconn for psycopg's transaction objects, which read statuses from it and nothing else."""

    __slots__ = ("_conn",)

    def __init__(self, conn: _Sandboxed) -> None:
        self._conn = conn

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        return self._conn._borrower.status

    @property
    def status(self) -> int:
        return pq.ConnStatus.BAD if self._conn.closed else self._conn.pgconn.status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn.pgconn, name)


class _Sandboxed(BaseConnection[Any]):
    """What the two sandbox connections share: everything but the waiting."""

    _borrower: Borrower

    def __repr__(self) -> str:
        shown = connection_summary(_VirtualPGconn(self))  # type: ignore[arg-type]
        return f"<{type(self).__module__}.{type(self).__qualname__} {shown} at 0x{id(self):x}>"

    @property
    def closed(self) -> bool:
        return self._closed or self.pgconn.status == pq.ConnStatus.BAD

    @property
    def broken(self) -> bool:
        return not self._closed and self.pgconn.status == pq.ConnStatus.BAD

    @property
    def info(self) -> psycopg.ConnectionInfo:
        return _VirtualInfo(self)

    def __del__(self, *_: Any) -> None:
        borrower: Borrower | None = self.__dict__.get("_borrower")
        if borrower is not None and not borrower.returned:
            borrower.abandon()

    def cancel(self) -> None:
        if self._borrower.owns_running_statement:
            super().cancel()

    def _should_cancel(self) -> bool:
        return self._borrower.owns_running_statement and super()._should_cancel()

    def _check_connection_ok(self) -> None:
        if self._closed:
            raise psycopg.OperationalError(self._borrower.ended or "the connection is closed")
        if self.pgconn.status != _OK:
            super()._check_connection_ok()

    def _check_tpc(self) -> None:
        raise psycopg.NotSupportedError(
            "two-phase commit would end the transaction that the test is rolled back with; "
            'use @pytest.mark.pgmonkey(isolation="clone") for this test'
        )

    def _check_intrans_gen(self, attribute: str) -> Generator[Any, Any, None]:
        if self._borrower.status != IDLE or self._num_transactions:
            yield from super()._check_intrans_gen(attribute)

    # psycopg looks at the real session, in which there is always a transaction.

    def _commit_gen(self) -> Generator[Any, Any, None]:
        if self._num_transactions or self._borrower.status != IDLE:
            yield from super()._commit_gen()

    def _rollback_gen(self) -> Generator[Any, Any, None]:
        if self._num_transactions or self._pipeline or self._borrower.status != IDLE:
            yield from super()._rollback_gen()

    def _start_query(self) -> Generator[Any, Any, None]:
        self._check_connection_ok()
        if self._autocommit or self._borrower.open:
            return
        yield from self._exec_command(self._get_tx_start_command())

    def _exec_command(
        self, command: Any, result_format: pq.Format = pq.Format.TEXT
    ) -> Generator[Any, Any, Any]:
        # Only psycopg's own code sends bytes here; users' SQL goes through cursors.
        if type(command) is bytes:
            self._check_connection_ok()
            borrower = self._borrower
            if command in (b"COMMIT", b"ROLLBACK") and borrower.status == IDLE:
                # Only a `transaction()` block sends them where SQL has already ended it.
                deliver_warning(self, "25P01", "there is no transaction in progress")
            if command == b"COMMIT":
                return (yield from borrower.commit())
            if command == b"ROLLBACK":
                return (yield from borrower.rollback())
            if command.startswith(b"BEGIN"):
                return (yield from borrower.begin(command))
            borrower.pin()
            if command.startswith(b"SAVEPOINT") and not self._pipeline:
                guarded = borrower.guarding(command)
                return (yield from borrower.backend.run(guarded))[-1]
        return (yield from super()._exec_command(command, result_format))

    def _is_idle(self) -> bool:
        """Whether there is nothing to end, so that nobody need be waited for."""
        borrower = self._borrower
        if borrower.open or self._num_transactions or self._pipeline:
            return False
        return not self.closed and borrower.is_idle

    def _ends_at_once(self) -> bool:
        """Whether psycopg has nothing to do at the end of a transaction but to send it."""
        return not (self._num_transactions or self._pipeline or self._prepared._names)

    def begin_command(self) -> bytes:
        """Give the BEGIN with the modes that are set on the connection."""
        return self._get_tx_start_command()

    def mark_closed(self) -> None:
        """Let psycopg see the connection as closed by its user."""
        self._closed = True

    def _enter_own_section(self) -> Generator[Any, Any, None]:
        if self._autocommit:
            return self._borrower.enter_section()
        return self._borrower.begin_section(self._get_tx_start_command())

    def real_command(self, command: bytes) -> Generator[Any, Any, Any]:
        """Send a command of our own: queued in pipeline mode, answered otherwise."""
        return super()._exec_command(command)

    def _deallocate(self, name: bytes | None) -> Generator[Any, Any, None]:
        # DEALLOCATE ALL would take the other borrowers' prepared statements with it. Ours have
        # names that nobody else uses, and go at the end of the test.
        if name is not None:
            yield from super()._deallocate(name)

    def _virtual_transaction(self, transaction: Any) -> Any:
        transaction.pgconn = _VirtualPGconn(self)
        return transaction


register_control(_Sandboxed._commit_gen)
register_control(_Sandboxed._rollback_gen)


class SandboxConnection(_Sandboxed, Connection[Any]):
    """A psycopg `Connection` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        borrower = self._borrower
        if (
            borrower.steady
            and getattr(gen, "gi_code", None) is _EXECUTE
            and borrower.passes(gen.gi_frame.f_locals["query"])
        ):
            # The shortest way, taken by nearly every statement of a transaction that has written.
            try:
                return super().wait(gen, *args, **kwargs)
            except psycopg.Error as error:
                borrower.explain(error)
                raise
            finally:
                borrower.busy = False
                if self.pgconn.transaction_status not in _IN_BLOCK:
                    borrower.after()
        planned = borrower.plan(gen)
        if planned is None:
            return super().wait(gen, *args, **kwargs)
        if not borrower.turn.take(borrower) or borrower.turn.displaced is not None:
            self._wait_for_turn()
        try:
            return super().wait(borrower.steps(self, planned), *args, **kwargs)
        except psycopg.Error as error:
            borrower.explain(error)
            raise
        finally:
            borrower.after()

    def commit(self) -> None:
        with self.lock:
            if self._is_idle() or (self._ends_at_once() and self._borrower.commit_at_once()):
                return
            self.wait(self._commit_gen())

    def rollback(self) -> None:
        with self.lock:
            if self._is_idle() or (self._ends_at_once() and self._borrower.rollback_at_once()):
                return
            self.wait(self._rollback_gen())

    def _wait_for_turn(self) -> None:
        borrower = self._borrower
        borrower.backend.bury()
        while True:
            if borrower.turn.holder is not borrower:
                borrower.wait_for_turn()
            if borrower.turn.displaced is None or super().wait(borrower.displace()):
                return

    def close(self) -> None:
        pool: Any = getattr(self, "_pool", None)
        if pool is not None and pool.close_returns and not self.closed:
            pool.putconn(self)
        else:
            self._borrower.close(self)

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[Transaction]:
        tx = self._virtual_transaction(Transaction(self, savepoint_name, force_rollback))
        if self._pipeline:
            with self.pipeline(), tx, self.pipeline():
                yield tx
        else:
            with tx:
                yield tx

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        outermost = self._pipeline is None
        if outermost:
            with self.lock:
                self.wait(self._borrower.enter_section())
        try:
            with super().pipeline() as pipeline:
                yield pipeline
        finally:
            if outermost:
                self._borrower.leave_section(self)

    @contextmanager
    def _pipeline_nolock(self) -> Iterator[Any]:
        self.wait(self._enter_own_section())
        try:
            with super()._pipeline_nolock() as pipeline:
                yield pipeline
        finally:
            self._borrower.leave_section(self)

    def notifies(self, **_kwargs: Any) -> Any:
        raise _no_notifies()


class AsyncSandboxConnection(_Sandboxed, AsyncConnection[Any]):
    """A psycopg `AsyncConnection` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        borrower = self._borrower
        if (
            borrower.steady
            and getattr(gen, "gi_code", None) is _EXECUTE
            and borrower.passes(gen.gi_frame.f_locals["query"])
        ):
            # The shortest way, taken by nearly every statement of a transaction that has written.
            try:
                return await super().wait(gen, *args, **kwargs)
            except psycopg.Error as error:
                borrower.explain(error)
                raise
            finally:
                borrower.busy = False
                if self.pgconn.transaction_status not in _IN_BLOCK:
                    borrower.after()
        planned = borrower.plan(gen)
        if planned is None:
            return await super().wait(gen, *args, **kwargs)
        if not borrower.turn.take(borrower) or borrower.turn.displaced is not None:
            await self._wait_for_turn()
        try:
            return await super().wait(borrower.steps(self, planned), *args, **kwargs)
        except psycopg.Error as error:
            borrower.explain(error)
            raise
        finally:
            borrower.after()

    async def commit(self) -> None:
        async with self.lock:
            if self._is_idle() or (self._ends_at_once() and self._borrower.commit_at_once()):
                return
            await self.wait(self._commit_gen())

    async def rollback(self) -> None:
        async with self.lock:
            if self._is_idle() or (self._ends_at_once() and self._borrower.rollback_at_once()):
                return
            await self.wait(self._rollback_gen())

    async def _wait_for_turn(self) -> None:
        borrower = self._borrower
        borrower.backend.bury()
        while True:
            if borrower.turn.holder is not borrower:
                await borrower.wait_for_turn_async()
            if borrower.turn.displaced is None or await super().wait(borrower.displace()):
                return

    async def close(self) -> None:
        pool: Any = getattr(self, "_pool", None)
        if pool is not None and pool.close_returns and not self.closed:
            await pool.putconn(self)
        else:
            self._borrower.close(self)

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        tx = self._virtual_transaction(AsyncTransaction(self, savepoint_name, force_rollback))
        if self._pipeline:
            async with self.pipeline(), tx, self.pipeline():
                yield tx
        else:
            async with tx:
                yield tx

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[psycopg.AsyncPipeline]:
        outermost = self._pipeline is None
        if outermost:
            async with self.lock:
                await self.wait(self._borrower.enter_section())
        try:
            async with super().pipeline() as pipeline:
                yield pipeline
        finally:
            if outermost:
                self._borrower.leave_section(self)

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncIterator[Any]:
        await self.wait(self._enter_own_section())
        try:
            async with super()._pipeline_nolock() as pipeline:
                yield pipeline
        finally:
            self._borrower.leave_section(self)

    def notifies(self, **_kwargs: Any) -> Any:
        raise _no_notifies()


def _no_notifies() -> psycopg.NotSupportedError:
    return psycopg.NotSupportedError(
        "notifications are sent at a real commit, and a rolled-back test has none; "
        'use @pytest.mark.pgmonkey(isolation="clone") for this test'
    )


class Template:
    """Makes the wrappers over one PGconn, ten times as fast as psycopg's constructor.

    The constructor runs once per class, so that the attributes are those of the installed
    version; what must not be shared is made anew for each wrapper.
    """

    def __init__(self, pgconn: PGconn) -> None:
        handlers = pgconn.notice_handler, pgconn.notify_handler
        self._attributes: dict[type, dict[str, Any]] = {}
        for cls in (SandboxConnection, AsyncSandboxConnection):
            conn = cls(pgconn)
            attributes = dict(conn.__dict__)
            _refuse_if([f"{cls.__name__}.{a}" for a in _ATTRIBUTES if a not in attributes])
            conn.__dict__.clear()
            self._attributes[cls] = attributes
        pgconn.notice_handler, pgconn.notify_handler = handlers

    def lend(
        self,
        cls: type[Any],
        borrower: Borrower,
        *,
        autocommit: bool,
        pool: object | None,
        prepared_index: int,
    ) -> Any:
        """Give a connection that nobody else uses, as `connect()` or a pool would."""
        conn: Any = object.__new__(cls)
        fields = conn.__dict__
        fields.update(self._attributes[cls])
        fields["_prepared"] = prepared = PrepareManager()
        prepared._prepared_idx = prepared_index
        fields["_notice_handlers"] = []
        fields["_notify_handlers"] = []
        fields["_notifies_backlog"] = deque()
        fields["lock"] = Lock() if cls is SandboxConnection else type(fields["lock"])()
        fields["_borrower"] = borrower
        fields["_autocommit"] = autocommit
        if pool is not None:
            fields["_pool"] = pool
        borrower.wrapper = weakref.ref(conn)
        return conn


def deliver_notice(conn: Any, result: Any) -> None:
    """Hand a server notice to the connection whose statement caused it."""
    BaseConnection._notice_handler(weakref.ref(conn), result)


class _Warning:
    """A notice that the server would give, in the shape of its result."""

    def __init__(self, sqlstate: str, message: str) -> None:
        field = pq.DiagnosticField
        self._fields = {
            field.SEVERITY: b"WARNING",
            field.SEVERITY_NONLOCALIZED: b"WARNING",
            field.SQLSTATE: sqlstate.encode(),
            field.MESSAGE_PRIMARY: message.encode(),
        }

    def error_field(self, field: int) -> bytes | None:
        return self._fields.get(pq.DiagnosticField(field))


def deliver_warning(conn: Any, sqlstate: str, message: str) -> None:
    """Warn a connection of what the server would warn it of."""
    deliver_notice(conn, _Warning(sqlstate, message))


def set_notice_handler(pgconn: PGconn, handler: Callable[[PGresult], None]) -> None:
    """Receive the notices of the shared session; notifications are never delivered."""
    pgconn.notice_handler = handler
    pgconn.notify_handler = None


def has_prepared(conn: Any) -> bool:
    """Whether psycopg has prepared statements for the connection."""
    return bool(conn._prepared._names)


def note_results(conn: Any, results: list[Any]) -> None:
    """Let psycopg find out from status tags whether its prepared statements are gone."""
    conn._prepared._should_discard(Prepare.NO, results)


def forget_prepared(conn: Any) -> None:
    """Forget prepared statements that the server no longer has."""
    conn._prepared._names.clear()
    conn._prepared._counts.clear()
