"""What psycopg offers on a connection: cursors, COPY, pipelines, prepared statements, facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import POOLS, block, call, execute, value
from psycopg.rows import dict_row

from .twins import Boom, sandboxed, twin

if TYPE_CHECKING:
    from .twins import World

AUTOCOMMIT = {"connection": {"autocommit": True}}


async def collected(iterable: Any) -> list[Any]:
    """Give what a sync or async iterator gives."""
    if hasattr(iterable, "__aiter__"):
        return [item async for item in iterable]
    return list(iterable)


@twin
async def test_server_side_cursor(w: World) -> None:
    """A named cursor fetches, iterates and scrolls; it ends with its transaction."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5) i")
        async with block(conn.cursor("named", scrollable=True)) as cursor:
            await call(cursor.execute("SELECT n FROM t ORDER BY n"))
            w.note([c.name for c in cursor.description])
            await w.do(cursor.fetchone)
            await w.do(cursor.fetchmany, 2)
            await w.do(cursor.scroll, -1)
            await w.do(cursor.fetchall)
        cursor = conn.cursor("gone")
        await call(cursor.execute("SELECT n FROM t ORDER BY n"))
        await w.do(cursor.fetchone)
        await w.do(conn.commit)
        await w.do(cursor.fetchone)
        w.status(conn)
        await w.do(conn.rollback)
        await w.do(cursor.close)
        w.status(conn)
        async with block(conn.cursor("iterated")) as cursor:
            await call(cursor.execute("SELECT n FROM t ORDER BY n"))
            cursor.itersize = 2
            w.note(await collected(cursor))


@twin
async def test_cursor_with_hold(w: World) -> None:
    """A cursor with hold outlives the commit, not the rollback, and can be closed afterwards."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5) i")
        cursor = conn.cursor("held", withhold=True)
        await call(cursor.execute("SELECT n FROM t ORDER BY n"))
        await w.do(cursor.fetchone)
        await w.do(conn.commit)
        await w.do(cursor.fetchone)
        await w.do(conn.commit)
        await w.do(cursor.fetchall)
        await w.do(conn.rollback)
        w.status(conn)
        await w.do(cursor.close)
        w.status(conn)


@twin
async def test_cursor_in_sql(w: World) -> None:
    """DECLARE, FETCH and CLOSE in SQL."""
    async with w.borrow() as conn:
        await w.run(conn, "DECLARE c CURSOR FOR SELECT generate_series(1, 3)")
        await w.run(conn, "FETCH 2 FROM c")
        await w.do(conn.commit)
        await w.run(conn, "FETCH 1 FROM c")
        await w.do(conn.rollback)
        await w.run(conn, "DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 3)")
        await w.do(conn.commit)
        await w.run(conn, "FETCH 2 FROM c")
        await w.do(conn.rollback)
        await w.run(conn, "FETCH 2 FROM c")
        await w.run(conn, "CLOSE c")
        await w.do(conn.commit)
        await w.run(conn, "DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 3)")
        await w.do(conn.rollback)
        await w.run(conn, "FETCH 2 FROM c")


@twin
async def test_stolen_cursor(w: World) -> None:
    """A named cursor fetches from one that SQL has declared."""
    async with w.borrow() as conn:
        await w.run(conn, "DECLARE c CURSOR FOR SELECT generate_series(1, 3)")
        async with block(conn.cursor("c")) as cursor:
            await w.do(cursor.fetchone)
            await w.do(cursor.fetchall)


@twin
async def test_stream(w: World) -> None:
    """`stream()` gives row by row, in a transaction and in autocommit, also when left early."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn:
            cursor = conn.cursor()
            w.note(await collected(cursor.stream("SELECT generate_series(1, 3)")))
            w.status(conn)
            async with w.noting():
                await collected(cursor.stream("SELECT 1/(3 - i) FROM generate_series(1, 5) i"))
            w.status(conn)
            await w.do(conn.rollback)
            await w.run(conn, "INSERT INTO t VALUES (1, 'x') ON CONFLICT DO NOTHING")
            rows = cursor.stream("SELECT generate_series(1, 3000000)")
            if w.type.is_async:
                w.note(await anext(rows))
                await rows.aclose()
            else:
                w.note(next(rows))
                rows.close()
            w.status(conn)
            await w.rows(conn)


@twin
async def test_copy_in(w: World) -> None:
    """COPY FROM writes rows, in text and in binary, and an exception in it undoes it."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn:
            cursor = conn.cursor()
            async with block(cursor.copy("COPY t FROM STDIN")) as copy:
                await call(copy.write_row((1, "one")))
                await call(copy.write("2\ttwo\n"))
            w.note(cursor.rowcount, cursor.statusmessage)
            w.status(conn)
            async with block(cursor.copy("COPY t FROM STDIN (FORMAT binary)")) as copy:
                copy.set_types(["int4", "text"])
                await call(copy.write_row((3, "three")))
            await w.rows(conn)
            async with w.noting(), block(cursor.copy("COPY t FROM STDIN")) as copy:
                await call(copy.write_row((4, "four")))
                raise Boom
            w.status(conn)
            await w.do(conn.rollback)
            async with w.noting(), block(cursor.copy("COPY t FROM STDIN")) as copy:
                await call(copy.write_row((9, "nine")))
                await call(copy.write_row((9, "nine again")))
            w.status(conn)
            await w.do(conn.rollback)
            await w.run(conn, "DELETE FROM t")


@twin
async def test_copy_out(w: World) -> None:
    """COPY TO reads rows and blocks, and can be left early."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn:
            cursor = conn.cursor()
            query = "COPY (SELECT i, 'x' FROM generate_series(1, 3) i) TO STDOUT"
            async with block(cursor.copy(query)) as copy:
                w.note(await collected(copy.rows()))
            w.status(conn)
            async with block(cursor.copy(query)) as copy:
                w.note([bytes(data) for data in await collected(copy)])
            long = "COPY (SELECT i FROM generate_series(1, 100000) i) TO STDOUT"
            async with w.noting(), block(cursor.copy(long)) as copy:
                w.note(await call(copy.read_row()))
                raise Boom
            w.status(conn)
            await w.do(conn.rollback)
            async with w.noting(), block(cursor.copy(long)) as copy:
                w.note(await call(copy.read_row()))
            w.status(conn)
            await w.run(conn, "SELECT 1")


@twin
async def test_copy_errors(w: World) -> None:
    """COPY of nothing that exists, COPY by execute(), and two statements in copy()."""
    async with w.borrow() as conn:
        cursor = conn.cursor()
        for query in ("COPY nothing FROM STDIN", "SELECT 1", "SELECT 1; SELECT 2"):
            async with w.noting(), block(cursor.copy(query)):
                pass
            w.status(conn)
            await w.do(conn.rollback)
        await w.run(conn, "COPY t TO STDOUT")
        await w.do(conn.rollback)
        await w.run(conn, "SELECT 1")


@twin
async def test_executemany(w: World) -> None:
    """`executemany()` writes all or nothing, with and without returning."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn:
            cursor = conn.cursor()
            insert = "INSERT INTO t VALUES (%s, %s) RETURNING n"
            await call(cursor.executemany(insert, [(1, "a"), (2, "b")], returning=True))
            w.note(await call(cursor.fetchall()), cursor.nextset())
            w.note(await call(cursor.fetchall()), cursor.nextset())
            w.status(conn)
            await call(cursor.executemany(insert, [(3, "a"), (4, "b")]))
            w.note(cursor.rowcount)
            async with w.noting():
                await call(cursor.executemany(insert, [(5, "a"), (5, "b"), (6, "c")]))
            w.status(conn)
            await w.do(conn.rollback)
            await w.rows(conn)
            await call(cursor.executemany(insert, []))
            await w.run(conn, "DELETE FROM t")


@twin
async def test_pipeline(w: World) -> None:
    """A pipeline's statements run, fail and commit as in production."""
    async with w.borrow() as conn:
        async with block(conn.pipeline()) as pipeline:
            await execute(conn, "INSERT INTO t VALUES (1, 'a')")
            cursor = await execute(conn, "SELECT n FROM t")
            await call(pipeline.sync())
            w.status(conn)
            w.note(await call(cursor.fetchall()))
        w.status(conn)
        await w.do(conn.rollback)
        async with w.noting(), block(conn.pipeline()):
            await execute(conn, "INSERT INTO t VALUES (2, 'a')")
            await execute(conn, "INSERT INTO t VALUES (2, 'a')")
            await execute(conn, "INSERT INTO t VALUES (3, 'a')")
        w.status(conn)
        await w.do(conn.rollback)
        async with block(conn.pipeline()):
            await execute(conn, "INSERT INTO t VALUES (4, 'a')")
            await call(conn.commit())
            await execute(conn, "INSERT INTO t VALUES (5, 'a')")
            await call(conn.rollback())
            await execute(conn, "INSERT INTO t VALUES (6, 'a')")
        await w.rows(conn)


@twin
async def test_pipeline_in_open_transaction(w: World) -> None:
    """A pipeline inside an open transaction ends with it."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        async with block(conn.pipeline()):
            await execute(conn, "INSERT INTO t VALUES (2, 'a')")
        w.status(conn)
        await w.do(conn.rollback)
        await w.rows(conn)
        async with block(conn.pipeline()):
            await execute(conn, "INSERT INTO t VALUES (3, 'a')")
            await call(conn.commit())
        await w.do(conn.rollback)


@twin
async def test_pipeline_transactions(w: World) -> None:
    """`transaction()` in a pipeline, in autocommit and not."""
    for options in (AUTOCOMMIT, {}):
        async with w.borrow(**options) as conn:
            async with block(conn.pipeline()):
                async with block(conn.transaction()):
                    await execute(conn, "INSERT INTO t VALUES (1, 'a')")
                async with w.noting(), block(conn.transaction()):
                    await execute(conn, "INSERT INTO t VALUES (2, 'a')")
                    raise Boom
                async with w.noting(), block(conn.transaction()):
                    await execute(conn, "INSERT INTO t VALUES (1, 'a')")
                await execute(conn, "INSERT INTO t VALUES (4, 'a')")
            w.status(conn)
            await w.rows(conn)
            await w.run(conn, "DELETE FROM t")


@twin
async def test_pipeline_autocommit(w: World) -> None:
    """A pipeline's part up to a sync is one implicit transaction in autocommit."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        async with w.noting(), block(conn.pipeline()):
            await execute(conn, "INSERT INTO t VALUES (2, 'a')")
            await execute(conn, "INSERT INTO t VALUES (2, 'a')")
        w.status(conn)
        await w.rows(conn)
        async with block(conn.pipeline()) as pipeline:
            await execute(conn, "INSERT INTO t VALUES (3, 'a')")
            await call(pipeline.sync())
            await execute(conn, "INSERT INTO t VALUES (4, 'a')")
        await w.rows(conn)


@sandboxed
async def test_deferred_constraint_in_a_pipeline(w: World) -> None:
    """It is checked at the end of an autocommit pipeline, fetched from or not."""
    async with w.borrow(**AUTOCOMMIT) as conn:

        async def insert(*, fetches: bool) -> None:
            async with block(conn.pipeline()):
                cursor = await execute(conn, "INSERT INTO late VALUES (2, 2) RETURNING n")
                if fetches:
                    assert await call(cursor.fetchall()) == [(2,)]

        for fetches in (False, True):
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                await insert(fetches=fetches)
            assert await value(conn, "SELECT count(*) FROM late") == 0


@twin
async def test_failed_pipeline(w: World) -> None:
    """What fails outside of a transaction block fails the pipeline up to its sync."""
    async with w.borrow(**AUTOCOMMIT) as conn, block(conn.pipeline()) as pipeline:
        for query in ("RELEASE a", "RELEASE a", "SELECT 1"):
            async with w.noting():
                cursor = await execute(conn, query)
                w.note(await call(cursor.fetchall()))
        async with w.noting():
            await call(pipeline.sync())
        await w.run(conn, "SELECT 1")


@twin
async def test_error_that_stays_until_the_sync(w: World) -> None:
    """A savepoint does not undo it, and `transaction()` is skipped as well."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn, block(conn.pipeline()) as pipeline:
            await execute(conn, "SELECT 1" if options else "SAVEPOINT a")
            cursor = await execute(conn, "SELECT 1/0")
            await w.do(cursor.fetchone)
            for query in ("SET work_mem = '1MB'", "ROLLBACK TO a"):
                cursor = await execute(conn, query)
                await w.do(cursor.fetchone)
            async with w.noting(), block(conn.transaction()):
                await execute(conn, "SELECT 1")
            async with w.noting():
                await call(pipeline.sync())
            w.status(conn)
            await call(conn.rollback())
            await w.run(conn, "SHOW work_mem")


@twin
async def test_modes_set_in_a_pipeline(w: World) -> None:
    """To set one ends what runs in autocommit with a sync; what follows begins a transaction."""
    async with w.borrow(**AUTOCOMMIT) as conn, block(conn.pipeline()):
        for number, query in enumerate(("SELECT count(*) FROM t", "INSERT INTO t VALUES (1, 'a')")):
            await w.do(conn.set_autocommit, True)
            cursor = await execute(conn, query)
            w.note(cursor.rowcount if number else await call(cursor.fetchall()))
            await w.do(conn.set_isolation_level, psycopg.IsolationLevel.READ_COMMITTED)
            await w.do(conn.set_autocommit, False)
            await w.run(conn, f"INSERT INTO t VALUES ({number + 2}, 'b') RETURNING n")
            await w.do(conn.set_read_only, True)
            await call(conn.rollback())
            await w.rows(conn)
            await call(conn.commit())


@twin
async def test_prepared_statements(w: World) -> None:
    """Prepared statements work across commits, rollbacks and dropped tables."""
    async with w.borrow() as conn:
        conn.prepare_threshold = 2
        for n in range(5):
            await w.run(conn, "INSERT INTO t VALUES (%s, 'a') RETURNING n", [n])
            await w.do(conn.rollback if n % 2 else conn.commit)
        await w.run(conn, "SELECT n FROM t WHERE n > %s", [1], prepare=True)
        await w.run(conn, "SELECT n FROM t WHERE n > %s", [1], prepare=True)
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "SELECT n FROM t WHERE n > %s", [1], prepare=True)
            await w.run(conn, "SELECT x FROM t WHERE n > %s", [1], prepare=True)
            raise Boom
        await w.run(conn, "SELECT x FROM t WHERE n > %s", [1], prepare=True)
        await w.run(conn, "CREATE TABLE made (n int)")
        await w.run(conn, "SELECT * FROM made", prepare=True)
        await w.run(conn, "ALTER TABLE made ADD COLUMN x int")
        await w.run(conn, "SELECT * FROM made", prepare=True)
        conn.prepared_max = 1
        for query in ("SELECT 1", "SELECT 2", "SELECT 3", "SELECT 1"):
            await w.run(conn, query, prepare=True)


@twin
async def test_prepared_by_two(w: World) -> None:
    """Prepared statements of two connections do not get in each other's way."""
    async with w.borrow(**AUTOCOMMIT) as one, w.borrow(**AUTOCOMMIT) as two:
        for n in range(3):
            await w.run(one, "SELECT %s::int", [n], prepare=True)
            await w.run(two, "SELECT %s::int + 1", [n], prepare=True)
        await w.run(one, "DEALLOCATE ALL")
        for n in range(3):
            await w.run(one, "SELECT %s::int", [n], prepare=True)
            await w.run(two, "SELECT %s::int + 1", [n], prepare=True)


@twin
async def test_row_factories_and_adapters(w: World) -> None:
    """Row factories and adapters are each connection's own."""
    async with w.borrow() as one, w.borrow() as two:
        one.row_factory = dict_row
        one.adapters.register_loader("int4", psycopg.types.string.TextLoader)
        for conn in (one, two):
            cursor = await execute(conn, "SELECT 1 AS a")
            w.note(await call(cursor.fetchone()))
            cursor = await call(conn.execute("SELECT 1 AS a", binary=True))
            w.note(await call(cursor.fetchone()))
            await w.do(conn.rollback)


@twin
async def test_raw_and_client_cursors(w: World) -> None:
    """Client-binding and raw cursors work as they do elsewhere."""
    async with w.borrow() as conn:
        async_ = w.type.is_async
        client = psycopg.AsyncClientCursor(conn) if async_ else psycopg.ClientCursor(conn)
        raw = psycopg.AsyncRawCursor(conn) if async_ else psycopg.RawCursor(conn)
        w.note(client.mogrify("SELECT %s", ["a"]))
        await call(client.execute("INSERT INTO t VALUES (%s, %s)", [1, "a"]))
        await call(client.execute("SELECT %s; SELECT %s", [1, 2]))
        w.note(await call(client.fetchall()), client.nextset(), await call(client.fetchall()))
        await call(raw.execute("INSERT INTO t VALUES ($1, $2)", [2, "b"]))
        await w.rows(conn)
        await w.do(conn.commit)
        await w.run(conn, psycopg.sql.SQL("SELECT {}").format(psycopg.sql.Literal("x;y")))
        await w.run(conn, b"SELECT 'bytes'")


@twin
async def test_facts(w: World) -> None:
    """`info`, `closed`, `broken` and the repr speak of the connection as it appears."""
    async with w.borrow() as conn:
        w.note(conn.closed, conn.broken, conn.autocommit, conn.read_only, conn.isolation_level)
        w.note(conn.info.status.name, conn.info.pipeline_status.name, conn.info.encoding)
        w.note(conn.info.user, conn.info.server_version, conn.info.get_parameters()["user"])
        w.note("IDLE" in repr(conn))
        await w.run(conn, "SELECT 1")
        await w.do(conn.commit)
        w.note("IDLE" in repr(conn))
    w.note(conn.closed if not w.type.is_pool else None)


@twin
async def test_closed_in_the_block(w: World) -> None:
    """`close()` of a borrowed connection rolls back; what follows says that it is closed."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.do(conn.close)
        w.note(conn.closed, conn.broken)
        await w.do(conn.execute, "SELECT 1")
        await w.do(conn.commit)
        await w.do(conn.close)
        await w.do(conn.cursor)
        await w.do(conn.cancel)
        w.status(conn)
    async with w.borrow() as conn:
        await w.rows(conn)


@twin
async def test_connection_as_context(w: World) -> None:
    """`with conn:` commits or rolls back, and closes what is not a pool's."""
    for error in (False, True):
        async with w.borrow() as conn:
            async with w.noting(), block(conn):
                await w.run(conn, "INSERT INTO t VALUES (%s, 'a')", [int(error)])
                if error:
                    raise Boom
            w.note(conn.closed)


@twin
async def test_errors_of_cursors(w: World) -> None:
    """Wrong use raises what psycopg raises, and leaves the status as psycopg does."""
    async with w.borrow() as conn:
        cursor = conn.cursor()
        await call(cursor.close())
        async with w.noting():
            await call(cursor.execute("SELECT 1"))
        w.status(conn)
        await w.run(conn, "SELECT %s", [])
        await w.do(conn.rollback)
        await w.run(conn, "SELECT %(a)s", {"b": 1})
        await w.do(conn.rollback)
        await w.run(conn, "")
        await w.run(conn, "-- nothing")
        await w.run(conn, ";")
        await w.do(conn.rollback)
        await w.run(conn, "SELECT %s; SELECT 2", [1])
        await w.do(conn.rollback)
        await w.run(conn, "SELEC 1")


@twin
async def test_statement_timeout(w: World) -> None:
    """`statement_timeout` cancels a statement and leaves the transaction failed."""
    for options in ({}, AUTOCOMMIT):
        async with w.borrow(**options) as conn:
            await w.run(conn, "SET statement_timeout = 20")
            await w.do(conn.commit)
            await w.run(conn, "INSERT INTO t VALUES (1, 'a') ON CONFLICT DO NOTHING")
            await w.run(conn, "SELECT pg_sleep(5)")
            await w.run(conn, "SELECT 1")
            await w.do(conn.rollback)
            await w.rows(conn)


@pytest.mark.parametrize("type_", POOLS)
@sandboxed
async def test_pool_object(w: World) -> None:
    """The pool that a handle gives has psycopg_pool's interface as far as it has a meaning."""
    handle = await w.handle(pool={"min_size": 1, "max_size": 2, "timeout": 0.05, "name": "mine"})
    pool = handle.pool
    assert (pool.name, pool.min_size, pool.max_size, pool.closed) == ("mine", 1, 2, False)
    async with block(pool.connection()) as one:
        await execute(one, "INSERT INTO t VALUES (1, 'a')")
        assert pool.get_stats()["pool_size"] == 1
        await call(one.commit())
        two = await call(pool.getconn())
        assert await value(two, "SELECT n FROM t") == 1
        with pytest.raises(
            psycopg.OperationalError, match=r"couldn't get a connection after 0\.05"
        ):
            await call(pool.getconn())
        await call(pool.putconn(two))
        two = await call(pool.getconn(timeout=0.01))
        await call(pool.putconn(two))
    await call(pool.resize(5))
    await call(pool.check())
