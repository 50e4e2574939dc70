"""Programs that run twice: in the sandbox and on a real database, with equal outcomes.

A program is an `async def` over a `World`; what it does is noted, value by value and SQLSTATE by
SQLSTATE. Over the sync types nothing in it ever suspends, so that it runs without an event loop.
"""

from __future__ import annotations

import asyncio
import functools
import gc
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import psycopg
from helpers.four_types import block, call

from pytest_pgmonkey import ConnectionType, PGConnectionManager, PGMonkeyError, sources
from pytest_pgmonkey.testing.addresses.purpose import Purpose
from pytest_pgmonkey.testing.gateway.entrance.entrance import Entrance
from pytest_pgmonkey.testing.gateway.gateway import Gateway
from pytest_pgmonkey.testing.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

SCHEMA = """
CREATE TABLE t (n int PRIMARY KEY, x text);
CREATE TABLE late (id int PRIMARY KEY, n int REFERENCES t DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE soon (id int PRIMARY KEY, n int REFERENCES t DEFERRABLE INITIALLY IMMEDIATE);
CREATE FUNCTION noisy(what text) RETURNS int LANGUAGE plpgsql AS
    $$ BEGIN RAISE NOTICE '%', what; RETURN 1; END $$;
CREATE FUNCTION put(number int) RETURNS int LANGUAGE sql AS
    $$ INSERT INTO t VALUES (number, 'put') RETURNING n $$;
"""
TABLES = ("t", "late", "soon")
#: The types of which programs run over the gateway as well: there they are psycopg's own.
JOINING = ("normal", "async")


class Boom(Exception):  # noqa: N818 - it stands for any exception of the application's
    """What a program raises when it means to."""


class Outcome(list[Any]):
    """What the steps of one run gave."""


def shown(error: BaseException) -> Any:
    """Give what must be equal of an error: its SQLSTATE, or its psycopg class."""
    if isinstance(error, psycopg.errors.PipelineAborted):
        return "25P02"  # what follows says either, depending on how soon results come in
    if isinstance(error, psycopg.Error):
        if error.sqlstate:
            return error.sqlstate
        known = [c.__name__ for c in type(error).__mro__ if c.__module__.startswith("psycopg")]
        return known[0]
    return type(error).__name__


def difference(on_server: Outcome, in_sandbox: Outcome) -> str:
    """Say where two runs of a program parted."""
    lines = []
    for real, ours in zip_longest(on_server, in_sandbox, fillvalue="nothing"):
        lines.append(f"both:    {real}" if real == ours else f"server:  {real}\nsandbox: {ours}")
        if real != ours:
            break
    return "\n".join(lines)


class World:
    """One of the places in which a program runs, for one connection type."""

    def __init__(self, twins: Twins, type_: str, *, real: bool, joins: bool = False) -> None:
        self.twins = twins
        self.type = ConnectionType(type_)
        self.real = real
        self.joins = joins  # through the gateway, by real connections
        self.manager = PGConnectionManager()
        self.noted = Outcome()
        self.handles: list[Any] = []

    async def handle(self, type_: str | None = None, **sections: Any) -> Any:
        """Give a handle on this world's database; `settings` and `pool` for the type's sections."""
        type_ = ConnectionType(type_ or self.type)
        config: dict[str, Any] = dict(self.twins.server.config(self.twins.real_name))
        config["connection_settings"] = {
            **config["connection_settings"],
            **(self.twins.gateway.conninfo(Purpose.SESSION) if self.joins else {}),
            **sections.get("connection", {}),
        }
        if "settings" in sections:
            config[type_.settings_section] = sections["settings"]
        if type_.pool_section:
            config[type_.pool_section] = {"min_size": 1, "max_size": 4, **sections.get("pool", {})}
        handle = await call(self.manager.get_database_connection_from_dict(config, type_))
        self.handles.append(handle)
        return handle

    # Steps: each notes what it gave.

    def note(self, *values: Any) -> None:
        self.noted.append(values[0] if len(values) == 1 else values)

    def swallow(self, error: BaseException) -> None:
        if not isinstance(error, (psycopg.Error, Boom, PGMonkeyError, asyncio.TimeoutError)):
            raise error
        self.twins.last_error = error
        self.note("error", shown(error))

    @asynccontextmanager
    async def borrow(self, type_: str | None = None, **sections: Any) -> AsyncIterator[Any]:
        """Enter a handle's block; an error that leaves it is noted and goes no further."""
        try:
            async with block(await self.handle(type_, **sections)) as conn:
                yield conn
        except Exception as error:
            self.swallow(error)

    @asynccontextmanager
    async def noting(self) -> AsyncIterator[None]:
        """Note the error that leaves the block."""
        try:
            yield
        except Exception as error:
            self.swallow(error)

    async def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call something, await what it gives, note the result and give it."""
        try:
            result = await call(function(*args, **kwargs))
        except Exception as error:
            self.swallow(error)
            return None
        self.note(getattr(function, "__name__", ""), result)
        return result

    async def run(self, conn: Any, query: Any, params: Any = None, **kwargs: Any) -> Any:
        """Execute, and note status tag, row count, rows and the transaction's status."""
        try:
            cursor = await call(conn.execute(query, params, **kwargs))
            rows = await call(cursor.fetchall()) if cursor.description else None
            self.note(query, cursor.statusmessage, cursor.rowcount, rows)
        except Exception as error:
            self.note(query)
            self.swallow(error)
            rows = None
        self.status(conn)
        return rows

    def status(self, conn: Any) -> None:
        self.note(conn.info.transaction_status.name)

    async def rows(self, conn: Any, table: str = "t") -> list[Any]:
        result: list[Any] = await self.run(conn, f"SELECT * FROM {table} ORDER BY 1")
        return result

    async def finish(self) -> None:
        """Note what a later borrower finds, and give up the handles."""
        async with self.borrow() as conn:
            for table in TABLES:
                await self.rows(conn, table)
        if self.real or self.joins:
            for handle in self.handles:
                await call(handle.disconnect())


class Twins:
    """A sandbox on one database and the real thing on another, with the same schema."""

    def __init__(self, server: EmbeddedServer, sandbox_name: str, real_name: str) -> None:
        self.server = server
        self.real_name = real_name
        self.sandbox_name = sandbox_name
        self.last_error: BaseException | None = None
        self.sandbox = Sandbox(server.conninfo(sandbox_name), wait_timeout=0.5)
        self.admins: Mapping[bool, psycopg.Connection[Any]] = {
            real: psycopg.connect(
                **server.conninfo(real_name if real else sandbox_name), autocommit=True
            )
            for real in (False, True)
        }
        for admin in self.admins.values():
            admin.execute(SCHEMA)
        self.admins[True].execute(f"ALTER DATABASE {real_name} SET lock_timeout = '200ms'")
        self.loop = asyncio.new_event_loop()

    @cached_property
    def gateway(self) -> Gateway:
        """The other door to the sandbox."""
        conninfo = self.server.conninfo(self.sandbox_name)
        entrance = Entrance(conninfo["user"], conninfo["dbname"], lambda: self.gateway)
        return Gateway(lambda: self, lambda: conninfo, lambda: conninfo, entrance)

    @property
    def leads_to(self) -> Sandbox:
        return self.sandbox

    def close(self) -> None:
        if "gateway" in self.__dict__:
            self.gateway.close()
        self.sandbox.close()
        for admin in self.admins.values():
            admin.close()
        self.settle()
        self.loop.close()

    def settle(self) -> None:
        """End what interrupted programs have left, and have nothing of them in a later loop."""

        async def end() -> bool:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            # A generator that was collected has its end in a task, from the loop's next turn on.
            await asyncio.sleep(0)
            left |= asyncio.all_tasks() - {asyncio.current_task()}
            if left:
                await asyncio.wait(left, timeout=10)
            return bool(left)

        # What one held is garbage only once it has ended.
        gc.collect()
        for _ in range(10):
            if not self.loop.run_until_complete(end()):
                break
            gc.collect()
        # A timer that is not due yet holds its task's context, with the blocks open in it.
        self.loop.close()
        self.loop = asyncio.new_event_loop()
        gc.collect()

    # The interceptor's interface

    def judge(self, *_spec: Any) -> bool:
        """Accept every configuration."""
        return True

    def source(self, handle: Any) -> Any:
        return self.sandbox.source(handle)

    def async_source(self, handle: Any) -> Any:
        return self.sandbox.async_source(handle)

    @contextmanager
    def intercepting(self, on: bool = True) -> Iterator[None]:
        """Lead every handle into the sandbox, for a block."""
        before, sources.interceptor = sources.interceptor, self if on else None
        try:
            yield
        finally:
            sources.interceptor = before

    # Running

    def drive(self, coroutine: Coroutine[Any, Any, Any], *, loop: bool) -> Any:
        """Run a coroutine: in the loop, or to its end in one step where nothing can suspend."""
        if loop:
            return self.loop.run_until_complete(coroutine)
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("a sync program has suspended")

    def run(self, program: Any, type_: str, *, real: bool, joins: bool = False) -> Outcome:
        world = World(self, type_, real=real, joins=joins)

        async def whole() -> None:
            await program(world)
            await world.finish()

        try:
            with self.intercepting(not (real or joins)):
                self.drive(whole(), loop=world.type.is_async)
        finally:
            problems = [] if real else self.sandbox.reset()
            if real:
                self.renew()
        assert problems == []
        return world.noted

    def renew(self) -> None:
        self.admins[True].execute(
            "DROP OWNED BY CURRENT_USER; " + SCHEMA  # type: ignore[arg-type]
        )

    def persisted(self) -> list[Any]:
        """Give what another session sees of the sandbox's database."""
        admin = self.admins[False]
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        found: list[Any] = admin.execute(f"{query} ORDER BY 1").fetchall()
        return found + [admin.execute(f"SELECT * FROM {t}").fetchall() for t in TABLES]

    def compare(self, program: Any, type_: str) -> None:
        before = self.persisted()
        in_sandbox = self.run(program, type_, real=False)
        after = self.persisted()
        on_server = self.run(program, type_, real=True)
        assert before == after
        if on_server != in_sandbox:
            raise AssertionError(difference(on_server, in_sandbox))
        if type_ in JOINING:
            joined = self.run(program, type_, real=False, joins=True)
            assert before == self.persisted()
            if on_server != joined:
                raise AssertionError(difference(on_server, joined))


def twin(program: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a program: it runs over one type, in the sandbox and on a real database."""

    @functools.wraps(program)
    def test(twins: Twins, type_: str) -> None:
        twins.compare(program, type_)

    del test.__wrapped__  # type: ignore[attr-defined] # pytest would read the program's arguments
    return test


def sandboxed(program: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a program that asserts for itself, and runs in the sandbox only."""

    @functools.wraps(program)
    def test(twins: Twins, type_: str) -> None:
        before = twins.persisted()
        twins.run(program, type_, real=False)
        assert before == twins.persisted()

    del test.__wrapped__  # type: ignore[attr-defined]
    return test


def sync_handle(world: World, type_: str = "normal", **sections: Any) -> Any:
    """Give a handle to a program that runs without an event loop."""
    return world.twins.drive(world.handle(type_, **sections), loop=False)


def rows(twins: Twins) -> list[Any]:
    """Give what others see of table `t` on the sandbox's database."""
    return twins.admins[False].execute("SELECT n FROM t ORDER BY 1").fetchall()
