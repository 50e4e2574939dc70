"""psycopg connections that lead into the test's transaction: the door for code on psycopg.

psycopg's connections are thin wrappers over a `PGconn`, and each of their operations is a
generator that passes `wait()`. The classes here lend one `PGconn` to many wrappers: `wait()`
takes the turn, and the few methods that speak of transactions ask the member instead.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncTransaction, Connection, Transaction, pq

from ....connecting import setting_overwritten, setting_refused
from ... import passage
from ...sql.lexer import statements
from ..core.member import CLOSED
from ..core.refusals import no_block, no_notifies, no_two_phase
from .internals import (
    EXECUTE,
    BaseConnection,
    closed_pgconn,
    connection_summary,
    deliver_notice,
    deliver_warning,
    forget_prepared,
    has_prepared,
    pool_of,
    register_control,
)
from .operations import abandon, as_it_is, plan, steps
from .pipelines import AsyncSandboxPipeline, SandboxPipeline, step_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from psycopg.pq.abc import PGconn

    from ....config import ConnectionSpec
    from ..core.member import Member
    from ..core.settings import WrongSettingError

_IDLE: Final = pq.TransactionStatus.IDLE
_OK: Final = pq.ConnStatus.OK
_IN_BLOCK: Final = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


class _VirtualInfo(psycopg.ConnectionInfo):
    """A connection's info with the transaction status that its member sees."""

    def __init__(self, conn: _Sandboxed) -> None:
        super().__init__(conn.pgconn)
        self._conn = conn

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        return self._conn._member.status

    @property
    def backend_pid(self) -> int:
        # Who asks may be about to cancel what runs.
        self._conn._member.backend.expects_cancels = True
        return super().backend_pid


class _VirtualPGconn:
    """A PGconn for psycopg's transaction objects, which read statuses from it and nothing else.

    A view that is read at once has the connection's `pgconn` of now: the end of the test, in
    another thread, exchanges it.
    """

    __slots__ = ("_conn", "_pgconn")

    def __init__(self, conn: _Sandboxed, pgconn: PGconn | None = None) -> None:
        self._conn = conn
        self._pgconn = pgconn

    @property
    def transaction_status(self) -> pq.TransactionStatus:
        return self._conn._member.status

    @property
    def status(self) -> int:
        return pq.ConnStatus.BAD if self._conn.closed else self._conn.pgconn.status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pgconn or self._conn.pgconn, name)


class _Sandboxed(BaseConnection[Any]):
    """What the two sandbox connections share: everything but the waiting."""

    _member: Member
    _spec: ConnectionSpec | None = None
    _slots: Any = None  # what is to be freed when it comes back to its source
    _closed_into: Any = None  # the pool that `close()` has given it back to

    def __repr__(self) -> str:
        view: Any = _VirtualPGconn(self, self.pgconn)
        shown = connection_summary(view)
        return f"<{type(self).__module__}.{type(self).__qualname__} {shown} at 0x{id(self):x}>"

    @property
    def info(self) -> psycopg.ConnectionInfo:
        return _VirtualInfo(self)

    def __del__(self, *_: Any) -> None:
        member: Member | None = self.__dict__.get("_member")
        if member is not None and not member.returned:
            member.abandon()

    def cancel(self) -> None:
        if self._member.owns_running_statement:
            super().cancel()

    def _should_cancel(self) -> bool:
        # What comes late hits another statement.
        self._member.backend.expects_cancels = True
        return self._member.owns_running_statement and super()._should_cancel()

    def _cancel_gen(self, **kwargs: Any) -> Generator[Any, Any, None]:
        backend = self._member.backend
        backend.cancels_under_way += 1
        yield from super()._cancel_gen(**kwargs)
        backend.cancels_under_way -= 1

    def _check_connection_ok(self) -> None:
        if self.closed:
            raise psycopg.OperationalError(self._member.ended or CLOSED)
        if self.pgconn.status != _OK:
            super()._check_connection_ok()

    def _check_tpc(self) -> None:
        raise self._member.refuse(no_two_phase())

    def _check_intrans_gen(self, attribute: str) -> Generator[Any, Any, None]:
        if self._pipeline and self._member.status == _IDLE:
            yield from self._pipeline._sync_gen()
        if self._member.status != _IDLE:
            yield from super()._check_intrans_gen(attribute)

    @property
    def in_block(self) -> bool:
        """Whether a transaction of the application's own is open."""
        return self._member.transaction.open

    # psycopg looks at the real session, in which there is always a transaction.

    def _commit_gen(self) -> Generator[Any, Any, None]:
        if self._num_transactions or self._member.status != _IDLE:
            yield from super()._commit_gen()

    def _rollback_gen(self) -> Generator[Any, Any, None]:
        if self._pipeline and not self._num_transactions:
            yield from self._pipeline._sync_gen()
        if self._num_transactions or self._member.status != _IDLE:
            yield from super()._rollback_gen()

    def _start_query(self) -> Generator[Any, Any, None]:
        self._check_connection_ok()
        if self._autocommit or self._member.transaction.open:
            return
        yield from self._exec_command(self._get_tx_start_command())

    def _exec_command(
        self, command: Any, result_format: pq.Format = pq.Format.TEXT
    ) -> Generator[Any, Any, Any]:
        # Only psycopg's own code sends bytes here; users' SQL goes through cursors.
        if type(command) is bytes:
            self._check_connection_ok()
            member = self._member
            if self._pipeline:
                aborted = self._pipeline.status == pq.PipelineStatus.ABORTED
                if aborted and command.startswith((b"BEGIN", b"SAVEPOINT")):
                    # The server skips it, and the next sync says so.
                    return (yield from super()._exec_command(command))
                yield from self._pipeline._sync_gen()
                if aborted and command == b"COMMIT":
                    raise psycopg.errors.PipelineAborted("pipeline aborted")
            if command in (b"COMMIT", b"ROLLBACK") and member.status == _IDLE:
                # Only a `transaction()` block sends them where SQL has already ended it.
                self.warn("25P01", "there is no transaction in progress")
            if command == b"COMMIT":
                yield from member.commit()
                return passage.ended(self, "COMMIT")
            if command == b"ROLLBACK":
                member.rollback()
                return passage.ended(self, "ROLLBACK")
            if command.startswith(b"BEGIN"):
                return (yield from member.transaction.begin(command))
            if not member.transaction.open:
                # SQL of the user's has ended it; in the session it would fail in another's.
                raise no_block(statements(command.decode())[0])
            member.transaction.pin()
            if command.startswith(b"SAVEPOINT"):
                command = member.transaction.guarding(command)
            return (yield from member.backend.run(command))[-1]
        return (yield from super()._exec_command(command, result_format))

    def _is_idle(self) -> bool:
        """Whether there is nothing to end, so that nobody need be waited for."""
        member = self._member
        if member.transaction.open or self._num_transactions or self._pipeline:
            return False
        return not self.closed and member.is_idle

    def _ends_at_once(self) -> bool:
        """Whether psycopg has nothing to do at the end of a transaction but to send it."""
        return not (self._num_transactions or self._pipeline or self._prepared._names)

    def begin_command(self) -> bytes:
        """Give the BEGIN with the modes that are set on the connection."""
        return self._get_tx_start_command()

    def warn(self, sqlstate: str, message: str) -> None:
        """Hand out a warning that the server would send."""
        deliver_warning(self, sqlstate, message)

    # What its member asks

    @property
    def has_prepared(self) -> bool:
        """Whether psycopg has prepared statements for the connection."""
        return has_prepared(self)

    def begin_anew(self, command: bytes) -> None:
        """Begin with the next statement: psycopg finds that no transaction is open."""

    def forget_prepared(self) -> None:
        """Forget prepared statements that the server no longer has."""
        forget_prepared(self)

    def deliver_notice(self, result: Any) -> None:
        """Hand out a server notice that one of its statements has caused."""
        deliver_notice(self, result)

    def mark_closed(self, *, broken: bool) -> None:
        """Let psycopg see the connection as closed by its user, or as broken."""
        self._closed = not broken
        self.pgconn = closed_pgconn()

    def blame(self, wrong: WrongSettingError) -> Exception:
        """Give the error that production gives where it applies the settings of a file."""
        spec, error = self._spec, wrong.error
        session = self._member.transaction.session
        assert spec is not None
        assert session is not None
        # In front of its section's stand those that psycopg sends when it connects.
        index = wrong.index - (len(session.given) - len(spec.settings))
        if error is None:
            return setting_overwritten(spec, session.given[wrong.index][0])
        if index < 0:
            return error
        return setting_refused(spec, spec.settings[index][0], error) or error

    def pause_pipeline(self) -> Generator[Any, Any, None]:
        """Leave pipeline mode, so that our own commands can be answered."""
        return step_out(self._member, self._pipeline)

    def _deallocate(self, name: bytes | None) -> Generator[Any, Any, None]:
        # DEALLOCATE ALL would take the other members' prepared statements with it. Ours have
        # names that nobody else uses, and go at the end of the test.
        if name is not None:
            yield from super()._deallocate(name)

    def _virtual_transaction(self, transaction: Any) -> Any:
        transaction.pgconn = _VirtualPGconn(self)
        return transaction


class SandboxConnection(_Sandboxed, Connection[Any]):
    """A psycopg `Connection` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        member = self._member
        if (
            member.steady
            and getattr(gen, "gi_code", None) is EXECUTE
            and (run := as_it_is(member, gen)) is not None
        ):
            # The shortest way, taken by nearly every statement of a transaction that has written.
            try:
                return super().wait(run, *args, **kwargs)
            except psycopg.Error as error:
                member.explain(error)
                raise
            except BaseException:
                member.backend.unsettled = True
                abandon(run)
                raise
            finally:
                if self.pgconn.transaction_status in _IN_BLOCK:
                    member.busy = False
                else:
                    member.after()
        planned = plan(member, gen)
        if planned is None:
            return super().wait(gen, *args, **kwargs)
        if not member.turn.take(member) or member.turn.preempted is not None:
            member.claim_turn(super().wait)
        run = None
        try:
            run = steps(member, self, planned)
            return super().wait(run, *args, **kwargs)
        except psycopg.Error as error:
            member.explain(error)
            raise
        except BaseException:
            member.backend.unsettled = True
            abandon(run)
            raise
        finally:
            member.after()

    def commit(self) -> None:
        with self.lock:
            if self._is_idle():
                return
            if self._ends_at_once() and self._member.commit_at_once():
                passage.ended(self, "COMMIT")
                return
            self.wait(self._commit_gen())

    def rollback(self) -> None:
        with self.lock:
            if self._is_idle():
                return
            if self._ends_at_once() and self._member.rollback_at_once():
                passage.ended(self, "ROLLBACK")
                return
            self.wait(self._rollback_gen())

    def close(self) -> None:
        pool = pool_of(self)
        if pool is not None and pool.close_returns and not self.closed:
            pool.putconn(self)
            self._closed_into = pool
        else:
            self._member.close(CLOSED)

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
        with self.lock:
            self._check_connection_ok()
            self._pipeline = self._pipeline or SandboxPipeline(self)
        with super().pipeline() as pipeline:
            yield pipeline

    @contextmanager
    def _pipeline_nolock(self) -> Iterator[Any]:
        self._pipeline = SandboxPipeline(self, _no_lock=True)
        try:
            with self._pipeline as pipeline:
                yield pipeline
        finally:
            self._pipeline = None

    def notifies(self, **_kwargs: Any) -> Any:
        raise self._member.refuse(no_notifies())


class AsyncSandboxConnection(_Sandboxed, AsyncConnection[Any]):
    """A psycopg `AsyncConnection` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        member = self._member
        if (
            member.steady
            and getattr(gen, "gi_code", None) is EXECUTE
            and (run := as_it_is(member, gen)) is not None
        ):
            # The shortest way, taken by nearly every statement of a transaction that has written.
            try:
                return await super().wait(run, *args, **kwargs)
            except psycopg.Error as error:
                member.explain(error)
                raise
            except BaseException:
                member.backend.unsettled = True
                abandon(run)
                raise
            finally:
                if self.pgconn.transaction_status in _IN_BLOCK:
                    member.busy = False
                else:
                    member.after()
        planned = plan(member, gen)
        if planned is None:
            return await super().wait(gen, *args, **kwargs)
        if not member.turn.take(member) or member.turn.preempted is not None:
            await self._wait_for_turn()
        run = None
        try:
            run = steps(member, self, planned)
            return await super().wait(run, *args, **kwargs)
        except psycopg.Error as error:
            member.explain(error)
            raise
        except BaseException:
            member.backend.unsettled = True
            abandon(run)
            raise
        finally:
            member.after()

    async def commit(self) -> None:
        async with self.lock:
            if self._is_idle():
                return
            if self._ends_at_once() and self._member.commit_at_once():
                passage.ended(self, "COMMIT")
                return
            await self.wait(self._commit_gen())

    async def rollback(self) -> None:
        async with self.lock:
            if self._is_idle():
                return
            if self._ends_at_once() and self._member.rollback_at_once():
                passage.ended(self, "ROLLBACK")
                return
            await self.wait(self._rollback_gen())

    async def _wait_for_turn(self) -> None:
        member = self._member
        member.discard_abandoned()
        while True:
            if member.turn.holder is not member:
                await member.wait_for_turn_async()
            if member.turn.preempted is None:
                return
            member.start()
            try:
                has_turn = await super().wait(member.preempt())
            finally:
                member.busy = False
            if has_turn:
                return

    async def close(self) -> None:
        pool = pool_of(self)
        if pool is not None and pool.close_returns and not self.closed:
            await pool.putconn(self)
            self._closed_into = pool
        else:
            self._member.close(CLOSED)

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
        async with self.lock:
            self._check_connection_ok()
            self._pipeline = self._pipeline or AsyncSandboxPipeline(self)
        async with super().pipeline() as pipeline:
            yield pipeline

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncIterator[Any]:
        self._pipeline = AsyncSandboxPipeline(self, _no_lock=True)
        try:
            async with self._pipeline as pipeline:
                yield pipeline
        finally:
            self._pipeline = None

    def notifies(self, **_kwargs: Any) -> Any:
        raise self._member.refuse(no_notifies())


for _operation in (_Sandboxed._commit_gen, _Sandboxed._rollback_gen):
    register_control(_operation)
