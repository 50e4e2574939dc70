"""Random programs over borrowed connections, and how one is run in a `World`."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from helpers.four_types import call
from hypothesis import strategies as st

from pytest_pgmonkey import PGConnectionManager, SandboxError

from .twins import Boom, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

SLOTS = 2
BORROWS = 6

# {b} numbers the borrow: what the one session shares (temporary tables, names) must not collide.
READS = (
    "SELECT count(*) FROM t",
    "SELECT n, x FROM t ORDER BY n",
    "SELECT max(n) FROM late",
    "SHOW work_mem",
    "SHOW transaction_read_only",
    "SELECT NULLIF(current_setting('app.mine', true), '')",  # a session never forgets the name
    "SELECT noisy('hello')",
    "SELECT n FROM t ORDER BY n FOR UPDATE",
)
WRITES = (
    "INSERT INTO t VALUES (1, 'a')",
    "INSERT INTO t VALUES (2, 'a')",
    "INSERT INTO t VALUES (3, 'a') ON CONFLICT (n) DO UPDATE SET x = t.x || '+'",
    "UPDATE t SET x = x || '!' WHERE n < 3",
    "DELETE FROM t WHERE n = 1",
    "SELECT put(4)",
    "WITH gone AS (DELETE FROM t WHERE n = 2 RETURNING n) SELECT count(*) FROM gone",
    "INSERT INTO late VALUES (1, 1)",
    "INSERT INTO late VALUES (2, 2)",
    "INSERT INTO soon VALUES (1, 1)",
    "DELETE FROM late",
    "TRUNCATE t CASCADE",
)
FAILURES = ("SELECT 1/0", "SELECT * FROM nowhere", "SELEC 1", "INSERT INTO t VALUES ('x', 'y')")
CONTROL = (
    "BEGIN",
    "begin read only",
    "START TRANSACTION",
    "COMMIT",
    "END",
    "ROLLBACK",
    "/* now */ abort;",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
)
SAVEPOINTS = (
    "SAVEPOINT a",
    "SAVEPOINT b",
    "ROLLBACK TO a",
    "ROLLBACK TO SAVEPOINT b",
    "RELEASE a",
    "RELEASE SAVEPOINT b",
)
MODES = (
    "SET CONSTRAINTS ALL DEFERRED",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SET TRANSACTION READ ONLY",
    "SET work_mem = '1MB'",
    "SET LOCAL work_mem = '2MB'",
    "RESET work_mem",
    "SELECT set_config('work_mem', '3MB', false)",
    "SELECT set_config('work_mem', '5MB', true)",
    "SET app.mine = 'x'",
    "SET default_transaction_read_only = on",
    "SET default_transaction_read_only = off",
    "RESET ALL",
)
OBJECTS = (
    "CREATE TABLE made (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    "INSERT INTO made VALUES (1), (1)",
    "DROP TABLE made",
    "CREATE TEMP TABLE tmp{b} (n int) ON COMMIT DROP",
    "CREATE TEMP TABLE tmp{b} (n int) ON COMMIT DELETE ROWS",
    "INSERT INTO tmp{b} VALUES (1)",
    "SELECT count(*) FROM tmp{b}",
    "DECLARE c{b} CURSOR FOR SELECT generate_series(1, 3)",
    "DECLARE c{b} CURSOR WITH HOLD FOR SELECT generate_series(1, 3)",
    "FETCH 1 FROM c{b}",
    "CLOSE c{b}",
    "PREPARE p{b} AS SELECT 1",
    "EXECUTE p{b}",
    "DEALLOCATE p{b}",
    "DISCARD ALL",
)

CONTROL_WORD = re.compile(r"\b(begin|start|commit|end|rollback(?! to)|abort)\b", re.I)

slots = st.integers(0, SLOTS - 1)
single = st.one_of(*map(st.sampled_from, (READS, WRITES, WRITES, FAILURES, CONTROL, SAVEPOINTS)))
odd = st.one_of(st.sampled_from(MODES), st.sampled_from(OBJECTS))
inside = st.one_of(*map(st.sampled_from, (READS, WRITES, CONTROL, FAILURES, SAVEPOINTS)))
script = st.lists(inside, min_size=2, max_size=4).map("; ".join)
statement = st.one_of(single, single, odd, script)


class Step(NamedTuple):
    """One step: a method of `Run`, the slot it works on, and its arguments."""

    name: str
    slot: int
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Step({self.name!r}, {self.slot}, {self.args!r})"


def _steps(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(name), slots, st.tuples(*arguments))


executes = _steps("execute", statement, st.sampled_from([None, None, None, True]))
steps = st.one_of(
    executes,
    executes,
    executes,
    _steps("commit"),
    _steps("rollback"),
    _steps("enter", st.sampled_from([None, None, "named"]), st.booleans()),
    _steps("leave", st.booleans()),
    _steps("leave", st.booleans()),
    _steps("borrow"),
    _steps("give_back", st.booleans()),
    _steps("set_autocommit", st.booleans()),
    _steps("set_read_only", st.sampled_from([None, True, False])),
    _steps("copy_in", st.integers(1, 6), st.booleans()),
    _steps("copy_out"),
    _steps("stream", st.booleans()),
    _steps("executemany", st.lists(st.integers(1, 5), max_size=3)),
    _steps("named_cursor", st.booleans()),
    _steps("fetch"),
    _steps("close_cursor"),
    _steps("enter_pipeline"),
    _steps("burst", st.lists(st.one_of(single, odd), min_size=1, max_size=4)),
    _steps("sync"),
    _steps("close"),
)
programs = st.lists(steps, min_size=1, max_size=14)


class RefusedError(Exception):
    """The sandbox has refused a step; what follows is not compared."""


class Slot:
    """A borrowed connection with its open blocks."""

    def __init__(self, number: int, lease: Any, conn: Any, handle: Any) -> None:
        self.number = number
        self.lease = lease
        self.conn = conn
        self.handle = handle
        self.blocks: list[Any] = []
        self.pipelines: list[Any] = []
        self.cursors: list[Any] = []
        self.streamed = False
        self.left = False


class Hands:
    """Who runs the steps of one slot: always the same thread, or the same task of the loop.

    The next step of a program is begun when the last one has ended, whoever runs it. With `loops`
    the async types have threads too, each with a loop of its own.
    """

    def __init__(self, world: World, *, loops: bool) -> None:
        self._world = world
        self._in_tasks = world.type.is_async and not loops
        self._threads: dict[int, ThreadPoolExecutor] = {}
        self._loops: dict[int, asyncio.AbstractEventLoop] = {}
        self._tasks: dict[int, tuple[asyncio.Task[None], asyncio.Queue[Any]]] = {}

    async def do(self, slot: int, step: Coroutine[Any, Any, None]) -> None:
        """Have a step done by the slot's thread or task."""
        if self._in_tasks:
            await self._in_task(slot, step)
        else:
            if slot not in self._threads:
                self._threads[slot] = ThreadPoolExecutor(1)
            self._threads[slot].submit(self._drive, slot, step).result()

    def _drive(self, slot: int, step: Coroutine[Any, Any, None]) -> None:
        if self._world.type.is_async:
            if slot not in self._loops:
                self._loops[slot] = asyncio.new_event_loop()
            self._loops[slot].run_until_complete(step)
        else:
            self._world.twins.drive(step, loop=False)

    async def _in_task(self, slot: int, step: Coroutine[Any, Any, None]) -> None:
        if slot not in self._tasks:
            queue: asyncio.Queue[Any] = asyncio.Queue()
            self._tasks[slot] = asyncio.create_task(self._work(queue)), queue
        done = asyncio.get_running_loop().create_future()
        self._tasks[slot][1].put_nowait((step, done))
        await done

    @staticmethod
    async def _work(queue: asyncio.Queue[Any]) -> None:
        while (order := await queue.get()) is not None:
            step, done = order
            try:
                done.set_result(await step)
            except Exception as error:
                done.set_exception(error)

    async def rest(self) -> None:
        """End the threads and tasks."""
        for thread in self._threads.values():
            thread.shutdown()
        for loop in self._loops.values():
            loop.close()
        for task, queue in self._tasks.values():
            queue.put_nowait(None)
            await task


class Run:
    """The run of one program in one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slots: list[Slot | None] = [None] * SLOTS
        self.borrowed = 0
        self.steps = 0
        self.refused_at: int | None = None

    async def prepare(self) -> None:
        """Have ready what all steps need."""

    async def end(self) -> None:
        """End what `prepare` has begun."""

    async def program(self, steps: list[Step], limit: int | None) -> bool:
        """Run the steps, at most `limit`; gives whether all ran."""
        try:
            for step in steps:
                if held := self.slots[step.slot]:
                    if step.name == "borrow":
                        continue
                elif step.name != "borrow":
                    await self._step(Step("borrow", step.slot), limit)
                await self._step(step, limit)
            for slot in range(SLOTS):
                while (held := self.slots[slot]) is not None:
                    name = "leave" if held.blocks else "give_back"
                    await self._step(Step(name, slot, (False,)), limit)
        except RefusedError:
            return False
        return True

    async def _step(self, step: Step, limit: int | None) -> None:
        if self.steps == limit:
            raise RefusedError
        self.world.note(step)
        held = self.slots[step.slot]
        try:
            if step.name == "borrow":
                await self._do(step.slot, self.borrow(step.slot))
            elif held is not None:
                await self._do(step.slot, getattr(self, step.name)(held, *step.args))
        except SandboxError:
            self.refused_at = self.steps
            raise RefusedError from None
        except psycopg.errors.LockNotAvailable:
            # A program that would hang: one borrower waits for another in the same thread.
            raise RefusedError from None
        except Exception as error:
            if self._is_misled(error, held):
                self.refused_at = self.steps
                raise RefusedError from None
            self.world.swallow(error)
        self._note_statuses()
        self.steps += 1

    def _is_misled(self, error: Exception, held: Slot | None) -> bool:
        """Whether psycopg takes the pipeline of another borrower for one of this connection's."""
        misled = "in pipeline mode" in str(error) and held is not None and not held.pipelines
        return misled and not self.world.real

    async def _do(self, slot: int, step: Coroutine[Any, Any, None]) -> None:
        await step

    async def abandon(self) -> None:
        """End everything, without a note."""
        self.world.noted = type(self.world.noted)()
        for slot, held in enumerate(self.slots):
            if held is not None:
                await self._do(slot, self._drop(held))

    @staticmethod
    async def _drop(held: Slot) -> None:
        for cursor in held.cursors:
            cursor._closed = True
        with suppress(Exception):
            await call(held.conn.close())
        with suppress(Exception):
            await call(exit_(held.lease)(None, None, None))

    def _note_statuses(self) -> None:
        for held in self.slots:
            if held is not None and held.pipelines:
                self.world.note(held.conn.closed)  # the status depends on what has come in
            elif held is not None:
                self.world.note(held.conn.info.transaction_status.name, held.conn.closed)

    # The steps

    async def borrow(self, slot: int) -> None:
        self.borrowed += 1
        # A manager of its own: a real pool would keep what the last borrower has set.
        self.world.manager = PGConnectionManager()
        handle = await self.world.handle(pool={"min_size": 1, "max_size": 1})
        await self._borrow_from(slot, handle)

    async def _borrow_from(self, slot: int, handle: Any) -> None:
        lease = handle.connection()
        conn = await call(enter(lease)())
        held = self.slots[slot] = Slot(self.borrowed, lease, conn, handle)

        def note(notice: psycopg.errors.Diagnostic) -> None:
            # A block that is left open ends when it is collected, on a real connection only.
            if not held.left:
                self.world.note(notice.severity, notice.sqlstate)

        conn.add_notice_handler(note)

    async def give_back(self, held: Slot, with_error: bool) -> None:
        for cursor in held.cursors:
            cursor._closed = True  # or it warns that nobody has closed it
        self.slots[self.slots.index(held)] = None
        try:
            await self._exit(held.lease, with_error)
        finally:
            held.left = True

    async def _exit(self, context: Any, with_error: bool) -> None:
        error = Boom() if with_error else None
        swallowed = await call(exit_(context)(type(error) if error else None, error, None))
        self.world.note("left", bool(swallowed))

    async def execute(self, held: Slot, query: str, prepare: bool | None) -> None:
        query = query.replace("{b}", str(held.number))
        if held.pipelines:
            await self._execute_queued(held, query)
            return
        cursor = await call(held.conn.execute(query, prepare=prepare))
        while True:
            rows = await call(cursor.fetchall()) if cursor.description else None
            self.world.note(cursor.statusmessage, cursor.rowcount, rows)
            if not cursor.nextset():
                break

    async def commit(self, held: Slot) -> None:
        try:
            await call(held.conn.commit())
        except psycopg.Error:
            if held.pipelines:
                # Until it has read the sync as well, psycopg sends no BEGIN.
                await self._sync(held)
            raise

    async def rollback(self, held: Slot) -> None:
        await call(held.conn.rollback())

    async def enter(self, held: Slot, name: str | None, force: bool) -> None:
        context = held.conn.transaction(name, force_rollback=force)
        await call(enter(context)())
        held.blocks.append(context)

    async def leave(self, held: Slot, with_error: bool) -> None:
        if not held.blocks:
            return
        errors: list[psycopg.Error] = []
        block = held.blocks.pop()
        piped = bool(held.pipelines) and held.pipelines[-1][0] is block
        if piped:
            # psycopg leaves libpq in pipeline mode where the end's own sync fails.
            errors = await self._sync(held)
        try:
            await self._exit(block, with_error)
        finally:
            if piped:
                held.pipelines.pop()
        if errors:
            raise errors[0]

    async def set_autocommit(self, held: Slot, value: bool) -> None:
        await call(held.conn.set_autocommit(value))

    async def set_read_only(self, held: Slot, value: bool | None) -> None:
        await call(held.conn.set_read_only(value))

    async def copy_in(self, held: Slot, number: int, with_error: bool) -> None:
        cursor = held.conn.cursor()
        context = cursor.copy("COPY t FROM STDIN")
        copy = await call(enter(context)())
        async with closing(context):
            await call(copy.write_row((number, "copied")))
        await self._exit(context, with_error)
        self.world.note(cursor.rowcount, cursor.statusmessage)

    async def copy_out(self, held: Slot) -> None:
        context = held.conn.cursor().copy("COPY (SELECT n FROM t ORDER BY n) TO STDOUT")
        copy = await call(enter(context)())
        async with closing(context):
            while (row := await call(copy.read_row())) is not None:
                self.world.note(row)
        await self._exit(context, False)

    async def stream(self, held: Slot, fails: bool) -> None:
        held.streamed = True
        query = (
            "SELECT 1/(2 - i) FROM generate_series(1, 3) i"
            if fails
            else "SELECT n FROM t ORDER BY n"
        )
        rows = held.conn.cursor().stream(query)
        if hasattr(rows, "__aiter__"):
            self.world.note([row async for row in rows])
        else:
            self.world.note(list(rows))

    async def executemany(self, held: Slot, numbers: list[int]) -> None:
        if held.streamed:
            return
        cursor = held.conn.cursor()
        rows = [(number, "many") for number in numbers]
        statement = "INSERT INTO t VALUES (%s, %s)"
        if held.pipelines:
            await self._queue(held, [partial(cursor.executemany, statement, rows)])
        else:
            await call(cursor.executemany(statement, rows))
        self.world.note(cursor.rowcount)

    async def named_cursor(self, held: Slot, hold: bool) -> None:
        cursor = held.conn.cursor(f"named{held.number}_{len(held.cursors)}", withhold=hold)
        held.cursors.append(cursor)
        await call(cursor.execute("SELECT generate_series(1, 4)"))

    async def fetch(self, held: Slot) -> None:
        if held.cursors and not held.pipelines:
            self.world.note(await call(held.cursors[-1].fetchone()))

    async def close_cursor(self, held: Slot) -> None:
        if held.cursors and not held.pipelines:
            cursor = held.cursors.pop()
            try:
                await call(cursor.close())
            finally:
                cursor._closed = True

    async def enter_pipeline(self, held: Slot) -> None:
        if held.streamed:
            return  # libpq is still in single-row mode, and psycopg raises an InternalError
        if held.pipelines:
            # psycopg syncs or not, depending on how soon results come in.
            await self._sync(held)
        context = held.conn.pipeline()
        held.pipelines.append((context, await call(enter(context)())))
        held.blocks.append(context)

    async def _execute_queued(self, held: Slot, query: str) -> None:
        if CONTROL_WORD.search(query):
            return  # refused in the sandbox
        if query.startswith(("ROLLBACK TO", "RELEASE")) or ";" in query:
            # After an error psycopg sends a BEGIN until it has read the sync, and that fails first.
            await self._sync(held)
        # When a pipeline's statement is prepared depends on how soon results come in.
        cursor = await call(held.conn.execute(query, prepare=False))
        with suppress(psycopg.ProgrammingError):  # there are no rows
            self.world.note(await call(cursor.fetchall()))
        self.world.note(cursor.statusmessage)

    async def burst(self, held: Slot, queries: list[str]) -> None:
        """Queue statements without looking at their results before the sync."""
        if not held.pipelines:
            return
        queries = [query.replace("{b}", str(held.number)) for query in queries]
        execute = partial(held.conn.execute, prepare=False)
        await self._queue(
            held, [partial(execute, query) for query in queries if not CONTROL_WORD.search(query)]
        )

    async def _queue(self, held: Slot, operations: list[Any]) -> None:
        errors = []
        for operation in operations:
            try:
                await call(operation())
            except SandboxError:
                raise
            except psycopg.Error as error:
                errors.append(error)
        errors += await self._sync(held)
        if errors and isinstance(errors[0], psycopg.errors.LockNotAvailable):
            raise errors[0]
        self.world.note(held.conn.info.transaction_status.name)
        # Which operation raises depends on how soon results come in; the first error does not.
        if errors:
            raise errors[0]

    async def _sync(self, held: Slot) -> list[psycopg.Error]:
        """Sync until psycopg has taken all results: it stops at each error among them."""
        errors: list[psycopg.Error] = []
        for _ in range(10):
            try:
                await call(held.pipelines[-1][1].sync())
            except SandboxError:
                raise
            except psycopg.Error as error:
                errors.append(error)
            except IndexError:
                break
            else:
                if held.conn.info.transaction_status != psycopg.pq.TransactionStatus.ACTIVE:
                    return errors
        if self.world.real:
            # A commit that fails in a sync puts psycopg out of step with the server.
            raise RefusedError
        return errors

    async def sync(self, held: Slot) -> None:
        if held.pipelines:
            await self._queue(held, [])

    async def close(self, held: Slot) -> None:
        await call(held.conn.close())


class SharedRun(Run):
    """A run in which each slot has a thread or task of its own, and all borrow of one handle."""

    loops = False

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.hands = Hands(world, loops=self.loops)
        self._handle: Any = None

    async def prepare(self) -> None:
        self._handle = await self._open()

    async def _open(self) -> Any:
        # As many as borrow, or a real pool would lend one with what its last borrower has set.
        size = {"min_size": BORROWS, "max_size": BORROWS}
        handle = await self.world.handle(pool=size)
        if self.world.real and self.world.type.is_pool:
            await call(handle.pool.wait())
        return handle

    async def end(self) -> None:
        await self.hands.rest()

    async def _do(self, slot: int, step: Coroutine[Any, Any, None]) -> None:
        await self.hands.do(slot, step)

    async def borrow(self, slot: int) -> None:
        if self.borrowed < BORROWS:
            self.borrowed += 1
            await self._borrow_from(slot, self._handle)


class LoopsRun(SharedRun):
    """A run in which each slot has a thread with a loop of its own, and a handle in it."""

    loops = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._handles: dict[int, Any] = {}

    async def prepare(self) -> None:
        """Nothing: a handle belongs to the loop in which it was opened."""

    async def borrow(self, slot: int) -> None:
        if slot not in self._handles:
            self._handles[slot] = await self._open()
            self.world.handles.clear()
        self._handle = self._handles[slot]
        await super().borrow(slot)

    async def end(self) -> None:
        for slot, handle in self._handles.items():
            await self.hands.do(slot, handle.disconnect())
        await super().end()


@asynccontextmanager
async def closing(context: Any) -> AsyncIterator[None]:
    """Leave a context with the error that ends the block: a COPY holds its connection's lock."""
    try:
        yield
    except Exception as error:
        await call(exit_(context)(type(error), error, error.__traceback__))
        raise


def enter(context: Any) -> Any:
    return getattr(context, "__aenter__", None) or context.__enter__


def exit_(context: Any) -> Any:
    return getattr(context, "__aexit__", None) or context.__exit__
