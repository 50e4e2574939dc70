"""Transaction control, settings and savepoints that the application writes as SQL."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import refused
from helpers.four_types import block, call, execute, value

from pytest_pgmonkey import ConfigError, ConnectionType

from .twins import World, sandboxed, sync_handle, twin

if TYPE_CHECKING:
    from .twins import Twins

AUTOCOMMIT = {"connection": {"autocommit": True}}


@twin
async def test_begin_and_commit(w: World) -> None:
    """BEGIN, COMMIT and ROLLBACK in SQL do what they do on a server, with the same tags."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "BEGIN")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "COMMIT")
        await w.run(conn, "begin transaction")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "rollback work")
        await w.run(conn, "/* a /* nested */ comment */ -- and\n START TRANSACTION READ WRITE;")
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.run(conn, "END")
        await w.run(conn, "BEGIN")
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
        await w.run(conn, "SELECT 1/0")
        await w.run(conn, "abort;")
        await w.rows(conn)


@twin
async def test_commit_in_psycopg_transaction(w: World) -> None:
    """COMMIT and ROLLBACK in SQL end the transaction that psycopg began."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "COMMIT")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "ROLLBACK")
        await w.rows(conn)
        await w.run(conn, "COMMIT;")


@twin
async def test_chain(w: World) -> None:
    """AND CHAIN begins the next transaction at once."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "BEGIN")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "COMMIT AND CHAIN")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "ROLLBACK AND CHAIN")
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.run(conn, "COMMIT AND NO CHAIN")
        await w.run(conn, "COMMIT AND CHAIN")
        await w.run(conn, "BEGIN READ ONLY")
        await w.run(conn, "COMMIT AND CHAIN")
        await w.run(conn, "SHOW transaction_read_only")
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
        await w.run(conn, "COMMIT AND CHAIN")
        await w.run(conn, "SHOW transaction_read_only")
        await w.run(conn, "COMMIT")
        await w.rows(conn)


@twin
async def test_chain_after_an_error(w: World) -> None:
    """The next transaction has the session's modes then, not the last one's."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        for query in ("COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "SELECT 1; COMMIT AND CHAIN"):
            await w.run(conn, "BEGIN READ ONLY")
            await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
            await w.run(conn, query)
            await w.run(conn, "SHOW transaction_read_only")
            await w.run(conn, "ROLLBACK")


@twin
async def test_warnings(w: World) -> None:
    """BEGIN in a transaction and COMMIT outside one warn, and do nothing more."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        conn.add_notice_handler(lambda notice: w.note(notice.sqlstate, notice.severity))
        await w.run(conn, "COMMIT")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "BEGIN")
        await w.run(conn, "BEGIN")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "START TRANSACTION READ ONLY")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "SET CONSTRAINTS ALL DEFERRED")
        await w.run(conn, "SET TRANSACTION READ ONLY")
        await w.run(conn, "SET LOCAL work_mem = '1MB'")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")


@twin
async def test_savepoints(w: World) -> None:
    """Savepoints in SQL nest, are released and rolled back to."""
    async with w.borrow() as conn:
        await w.run(conn, "SAVEPOINT a")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "SAVEPOINT b")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "ROLLBACK TO SAVEPOINT b")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "ROLLBACK TO b")
        await w.run(conn, "RELEASE b")
        await w.run(conn, "RELEASE b")
        await w.run(conn, "ROLLBACK TRANSACTION TO SAVEPOINT a")
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.do(conn.commit)
        await w.run(conn, "ROLLBACK TO a")
        await w.do(conn.rollback)
        await w.rows(conn)


@twin
async def test_savepoint_outside(w: World) -> None:
    """A savepoint outside a transaction is refused as the server does."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "SAVEPOINT a")
        await w.run(conn, "RELEASE a")
        await w.run(conn, "ROLLBACK TO a")
        await w.run(conn, "DECLARE c CURSOR FOR SELECT 1")
        await w.run(conn, "SELECT 1")


@twin
async def test_savepoint_does_not_outlive_commit(w: World) -> None:
    """A savepoint of one transaction is unknown in the next."""
    async with w.borrow() as conn:
        for _ in range(3):
            await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
            await w.run(conn, "SAVEPOINT a")
            await w.do(conn.rollback)
            await w.run(conn, "INSERT INTO t VALUES (2, 'a') ON CONFLICT DO NOTHING")
            await w.do(conn.commit)
            await w.run(conn, "RELEASE a")
            await w.do(conn.rollback)


@twin
async def test_scripts(w: World) -> None:
    """Strings of several statements, transaction commands among them."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "BEGIN; INSERT INTO t VALUES (1, 'a'); COMMIT")
        await w.run(conn, "BEGIN; INSERT INTO t VALUES (2, 'a'); ROLLBACK;")
        await w.run(conn, "BEGIN; INSERT INTO t VALUES (3, 'a')")
        await w.run(conn, "INSERT INTO t VALUES (4, 'a'); COMMIT; INSERT INTO t VALUES (5, 'a')")
        await w.rows(conn)
        await w.run(conn, "BEGIN; INSERT INTO t VALUES (6, 'a'); INSERT INTO t VALUES (6, 'a');")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "SELECT 1; SELECT 2")
        await w.rows(conn)


@twin
async def test_prepared_script_beside_a_transaction(w: World) -> None:
    """Only one statement can be prepared: the error harms nothing but the script."""
    async with w.borrow() as open_, w.borrow(**AUTOCOMMIT) as conn:
        await w.run(open_, "SELECT 1")
        await w.run(conn, "SELECT 1; BEGIN", prepare=True)
        await w.rows(conn)
        await w.rows(open_)


@twin
async def test_script_result_sets(w: World) -> None:
    """Each statement of a script has its result set."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        cursor = await execute(
            conn, "BEGIN; INSERT INTO t VALUES (1, 'a'), (2, 'b'); SELECT n FROM t; COMMIT"
        )
        while True:
            rows = await call(cursor.fetchall()) if cursor.description else None
            w.note(cursor.statusmessage, cursor.rowcount, rows)
            if not cursor.nextset():
                break


@twin
async def test_script_implicit_block(w: World) -> None:
    """Statements that follow a COMMIT in a string fail together."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(
            conn,
            "BEGIN; INSERT INTO t VALUES (1, 'a'); COMMIT; INSERT INTO t VALUES (2, 'a'); "
            "INSERT INTO t VALUES (2, 'a')",
        )
        await w.rows(conn)
        await w.run(conn, "INSERT INTO t VALUES (3, 'a'); BEGIN; INSERT INTO t VALUES (4, 'a')")
        await w.run(conn, "ROLLBACK")
        await w.rows(conn)


@twin
async def test_functions_with_atomic_bodies(w: World) -> None:
    """The words of a function's body are no commands."""
    async with w.borrow() as conn:
        await w.run(
            conn,
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC "
            "SELECT CASE WHEN true THEN 1 END; SELECT 2; END",
        )
        await w.run(conn, "CREATE PROCEDURE p() LANGUAGE plpgsql AS $a$BEGIN COMMIT; END$a$")
        await w.run(conn, "SELECT f(), 'a; ROLLBACK', $$; COMMIT$$, E'\\'; COMMIT; --'")
        await w.do(conn.commit)
        await w.run(conn, "SELECT f()")


@twin
async def test_transaction_modes_in_sql(w: World) -> None:
    """The modes of BEGIN and SET TRANSACTION hold for the transaction and no longer."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY")
        await w.run(conn, "SHOW transaction_isolation")
        await w.run(conn, "SHOW transaction_read_only")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "SHOW transaction_read_only")
        await w.run(conn, "BEGIN")
        await w.run(conn, "SET TRANSACTION READ ONLY")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.run(conn, "BEGIN READ ONLY")
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
        await w.run(conn, "COMMIT")
        await w.rows(conn)


@twin
async def test_session_read_only(w: World) -> None:
    """`default_transaction_read_only` holds from the next transaction on."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "SET default_transaction_read_only = on")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.do(conn.commit)
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.do(conn.rollback)
        await w.run(conn, "RESET default_transaction_read_only")
        await w.do(conn.commit)
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")


@twin
async def test_set(w: World) -> None:
    """SET holds from the commit on, and a rollback takes it back."""
    async with w.borrow() as conn:
        await w.run(conn, "SET work_mem = '1MB'")
        await w.do(conn.rollback)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SET work_mem = '2MB'")
        await w.do(conn.commit)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SET work_mem TO '3MB'")
        await w.do(conn.rollback)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SELECT set_config('work_mem', '5MB', false)")
        await w.do(conn.commit)
        await w.run(conn, "SELECT set_config(%s, %s, false)", ["work_mem", "6MB"])
        await w.do(conn.rollback)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "RESET work_mem")
        await w.run(conn, "SHOW work_mem")


@twin
async def test_set_local(w: World) -> None:
    """SET LOCAL ends with its transaction, whichever way."""
    async with w.borrow() as conn:
        await w.run(conn, "SET work_mem = '2MB'")
        await w.do(conn.commit)
        await w.run(conn, "SET LOCAL work_mem = '1MB'")
        await w.run(conn, "SHOW work_mem")
        await w.do(conn.commit)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SET LOCAL work_mem = '1MB'")
        await w.do(conn.rollback)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SET LOCAL work_mem = '1MB'")
        await w.run(conn, "SET work_mem = '3MB'")
        await w.do(conn.commit)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SET work_mem = '4MB'")
        await w.run(conn, "SET LOCAL work_mem = '5MB'")
        await w.run(conn, "SHOW work_mem")
        await w.do(conn.commit)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SELECT set_config('app.user', 'me', true)")
        await w.run(conn, "SELECT current_setting('app.user', true)")
        await w.do(conn.commit)
        await w.run(conn, "SELECT current_setting('app.user', true)")
        await w.do(conn.commit)
        await w.run(conn, "SELECT set_config(%s, %s, %s)", ["app.user", "me", True])
        await w.do(conn.commit)
        await w.run(conn, "SELECT current_setting('app.user', true)")
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "SET LOCAL work_mem = '1MB'")
        await w.run(conn, "SHOW work_mem")
        async with block(conn.transaction()):
            await w.run(conn, "SET LOCAL TIME ZONE 'Europe/Rome'")
            await w.run(conn, "SHOW timezone")
        await w.run(conn, "SHOW timezone")


@twin
async def test_settings_per_borrower(w: World) -> None:
    """Each connection has its own session settings, also where they take turns."""
    async with w.borrow() as one, w.borrow() as two:
        await w.run(one, "SET work_mem = '1MB'")
        await w.do(one.commit)
        await w.run(two, "SHOW work_mem")
        await w.run(two, "SET work_mem = '2MB'")
        await w.do(two.commit)
        await w.run(one, "SHOW work_mem")
        await w.do(one.commit)
        await w.run(two, "SHOW work_mem")
        await w.do(two.rollback)
        await w.run(two, "SET search_path = nowhere")
        await w.do(two.commit)
        await w.run(one, "SELECT count(*) FROM t")
        await w.do(one.commit)
        await w.run(two, "SELECT count(*) FROM t")
        await w.do(two.rollback)
        for conn in (one, two):  # a real pool keeps what is set
            await w.run(conn, "RESET ALL")
            await w.do(conn.commit)
    if not w.type.is_pool:
        async with w.borrow() as conn:
            await w.run(conn, "SHOW work_mem")


@twin
async def test_settings_of_the_file(w: World) -> None:
    """The settings of a handle's file hold at borrow, beside handles with others."""
    async with (
        w.borrow(settings={"work_mem": "1MB", "search_path": "a, b"}) as one,
        w.borrow(settings={"work_mem": "2MB"}) as two,
        w.borrow() as three,
    ):
        for conn in (one, two, three, one):
            await w.run(conn, "SHOW work_mem")
            await w.do(conn.rollback)
        await w.run(one, "SHOW search_path")
        await w.do(one.rollback)
        await w.run(one, "RESET ALL")
        await w.run(one, "SHOW search_path")
        await w.do(one.rollback)
        await w.run(one, "SHOW search_path")


@twin
async def test_set_over_the_file(w: World) -> None:
    """What a connection has set over its file's settings is there after another's turn."""
    async with w.borrow(settings={"work_mem": "1MB"}) as one, w.borrow() as two:
        await w.run(one, "SET work_mem = '2MB'")
        await w.do(one.commit)
        await w.run(two, "SHOW work_mem")
        await w.do(two.commit)
        await w.run(one, "SHOW work_mem")
        await w.run(one, "RESET ALL")
        await w.do(one.commit)


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_sort": "off", "no_such_setting": 1},
        {"work_mem": "plenty", "enable_sort": "off"},
        {"work_mem": "12MB", "WORK_MEM": "13MB"},
    ],
)
def test_wrong_setting(
    twins: Twins, type_: str, settings: dict[str, Any], begun: bool, autocommit: bool
) -> None:
    """A file's wrong setting is production's ConfigError, and harms nobody else."""
    sections = {"settings": settings, "connection": {"autocommit": autocommit}}

    async def production() -> None:
        await World(twins, type_, real=True).handle(**sections)

    with twins.intercepting(False), pytest.raises(ConfigError) as in_production:
        twins.drive(production(), loop=ConnectionType(type_).is_async)

    async def program(w: World) -> None:
        if begun:
            async with w.borrow() as conn:
                await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        for _ in range(2):
            with pytest.raises(ConfigError) as in_sandbox:
                async with block(await w.handle(**sections)) as conn:
                    await execute(conn, "INSERT INTO t VALUES (2, 'a')")
            assert in_production.value.args == in_sandbox.value.args
        async with w.borrow() as conn:
            assert await value(conn, "SELECT count(*) FROM t") == int(begun)
            assert await value(conn, "SHOW enable_sort") == "on"
            assert await value(conn, "SHOW work_mem") == "4MB"

    twins.run(program, type_, real=False)


@twin
async def test_options_and_settings(w: World) -> None:
    """A setting of the file goes over the same one in the connection's options."""
    options = {"options": "-c work_mem=1MB -c statement_timeout=1min"}
    async with w.borrow(connection=options, settings={"work_mem": "2MB"}) as conn:
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SHOW statement_timeout")


@twin
async def test_discard_all(w: World) -> None:
    """DISCARD ALL resets the session in autocommit, and is refused in a transaction."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await w.run(conn, "SET work_mem = '1MB'")
        await w.run(conn, "CREATE TEMP TABLE mine (n int)")
        await w.run(conn, "SELECT 1", prepare=True)
        await w.run(conn, "DISCARD ALL")
        await w.run(conn, "SELECT 1", prepare=True)
        await w.run(conn, "SHOW work_mem")
        await w.run(conn, "SELECT * FROM mine")
        await w.run(conn, "BEGIN")
        await w.run(conn, "DISCARD ALL")
        await w.run(conn, "ROLLBACK")
        await w.run(conn, "SELECT 2")


@twin
async def test_prepared_in_sql(w: World) -> None:
    """PREPARE and DEALLOCATE in SQL are the session's, whatever becomes of the transaction."""
    async with w.borrow() as conn:
        await w.run(conn, "PREPARE p AS SELECT 1")
        await w.do(conn.rollback)
        await w.run(conn, "EXECUTE p")
        await w.run(conn, "DEALLOCATE p")
        await w.do(conn.rollback)
        await w.run(conn, "EXECUTE p")
        await w.do(conn.rollback)
        await w.run(conn, "PREPARE p AS SELECT 2")
        await w.run(conn, "DEALLOCATE ALL")
        await w.run(conn, "EXECUTE p")


@twin
async def test_deallocate_in_a_script(w: World) -> None:
    """What psycopg's release makes of DEALLOCATE ALL in a string of statements holds here too."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        for script in ("BEGIN; DEALLOCATE ALL; COMMIT", "BEGIN; DEALLOCATE ALL; ROLLBACK"):
            await w.run(conn, "SELECT 1", prepare=True)
            await w.run(conn, script)
            await w.run(conn, "SELECT 1", prepare=True)
            await w.run(conn, "DEALLOCATE ALL")


@twin
async def test_temporary_tables(w: World) -> None:
    """ON COMMIT DROP and DELETE ROWS are carried out at the commit."""
    async with w.borrow() as conn:
        await w.run(conn, "CREATE TEMP TABLE gone (n int) ON COMMIT DROP")
        await w.run(conn, 'CREATE TEMPORARY TABLE "Empty" (n int) ON COMMIT DELETE ROWS')
        await w.run(conn, 'INSERT INTO "Empty" VALUES (1)')
        await w.run(conn, "INSERT INTO gone VALUES (1)")
        await w.rows(conn, "gone")
        await w.do(conn.commit)
        await w.rows(conn, '"Empty"')
        await w.run(conn, 'INSERT INTO "Empty" VALUES (2)')
        await w.do(conn.commit)
        await w.rows(conn, '"Empty"')
        await w.rows(conn, "gone")
        await w.do(conn.rollback)
        await w.run(conn, "CREATE TEMP TABLE made ON COMMIT DROP AS SELECT 1 AS n")
        await w.do(conn.commit)
        await w.rows(conn, "made")
        await w.do(conn.rollback)
        await w.run(conn, 'DROP TABLE "Empty"')
        await w.do(conn.commit)
        await w.run(conn, "CREATE TEMP TABLE gone (n int) ON COMMIT DROP")
        await w.do(conn.rollback)
        await w.run(conn, "CREATE TEMP TABLE gone (n int)")
        await w.do(conn.commit)
        await w.rows(conn, "gone")
        await w.run(conn, "CREATE TEMP TABLE again (n int) ON COMMIT DROP")
        await w.run(conn, "DROP TABLE again")
        await w.run(conn, "CREATE TEMP TABLE again (n int) ON COMMIT DROP")
        await w.do(conn.commit)
        await w.rows(conn, "again")


@twin
async def test_notify_and_listen(w: World) -> None:
    """LISTEN and NOTIFY raise nothing."""
    async with w.borrow() as conn:
        await w.run(conn, "LISTEN channel")
        await w.run(conn, "UNLISTEN channel")
        await w.run(conn, "NOTIFY channel, 'x'")
        await w.run(conn, "SELECT pg_notify('channel', 'y')")


@twin
async def test_notices(w: World) -> None:
    """Notices reach the handlers of the connection that caused them."""
    async with w.borrow() as one, w.borrow() as two:
        one.add_notice_handler(lambda notice: w.note("one", notice.message_primary))
        two.add_notice_handler(lambda notice: w.note("two", notice.message_primary))
        await w.run(one, "SELECT noisy('first')")
        await w.do(one.commit)
        await w.run(two, "SELECT noisy('second')")


@twin
async def test_functions_that_write(w: World) -> None:
    """A write inside a function counts as one."""
    async with w.borrow() as conn:
        await w.run(conn, "SELECT put(1)")
        await w.do(conn.commit)
        await w.run(conn, "SELECT put(2)")
        await w.do(conn.rollback)
        await w.run(conn, "SELECT put(3)")


@twin
async def test_ddl(w: World) -> None:
    """Tables are made, altered and dropped, and what is rolled back was never there."""
    async with w.borrow() as conn:
        await w.run(conn, "CREATE TABLE made (n int)")
        await w.do(conn.rollback)
        await w.rows(conn, "made")
        await w.do(conn.rollback)
        await w.run(conn, "CREATE TABLE made (n int)")
        await w.run(conn, "ALTER TABLE made ADD COLUMN x text")
        await w.do(conn.commit)
        await w.run(conn, "INSERT INTO made VALUES (1, 'x')")
        await w.do(conn.commit)
        await w.run(conn, "DROP TABLE made")
        await w.do(conn.rollback)
        await w.rows(conn, "made")
        await w.run(conn, "TRUNCATE made")


@twin
async def test_do_block(w: World) -> None:
    """A DO block runs as one statement, and its COMMIT is refused in a transaction."""
    async with w.borrow() as conn:
        await w.run(conn, "DO $$ BEGIN INSERT INTO t VALUES (1, 'a'); END $$")
        await w.do(conn.commit)
        await w.run(conn, "DO $$ BEGIN INSERT INTO t VALUES (2, 'a'); COMMIT; END $$")


@sandboxed
async def test_two_phase_is_refused(w: World) -> None:
    """What would really end the outer transaction never reaches the server."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await execute(conn, "BEGIN")
        await execute(conn, "INSERT INTO t VALUES (1, 'a')")
        for query in ("PREPARE TRANSACTION 'x'", "SELECT 1; PREPARE TRANSACTION 'x'"):
            with pytest.raises(psycopg.NotSupportedError, match='isolation="clone"'):
                await execute(conn, query)
        for query in ("COMMIT PREPARED 'x'", "ROLLBACK PREPARED 'x'"):
            with pytest.raises(psycopg.NotSupportedError, match='isolation="clone"'):
                await execute(conn, query)
        with pytest.raises(psycopg.NotSupportedError, match='isolation="clone"'):
            await call(conn.tpc_begin(conn.xid(1, "a", "b")))
        with pytest.raises(psycopg.NotSupportedError, match='isolation="clone"'):
            conn.notifies()
        assert await value(conn, "SELECT count(*) FROM t") == 1


@sandboxed
async def test_advice(w: World) -> None:
    """Where the surrounding transaction is in the way, the server's error has a line of advice."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await execute(conn, "CREATE PROCEDURE c() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'")
        await execute(conn, "CREATE TYPE mood AS ENUM ('fine')")
        for query in (
            "VACUUM",
            "CREATE DATABASE other",
            "CREATE INDEX CONCURRENTLY ON t (x)",
            "CALL c()",
            "REINDEX TABLE CONCURRENTLY t",
        ):
            with pytest.raises(psycopg.Error, match='isolation="clone"'):
                await execute(conn, query)
        assert await value(conn, "SELECT 1") == 1
    async with w.borrow() as conn:
        await execute(conn, "SELECT 1")
        with pytest.raises(psycopg.Error, match='isolation="clone"'):
            await execute(conn, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")


@sandboxed
async def test_what_counts_as_refused(w: World) -> None:
    """What a clone would serve, and nothing that fails there as well."""
    refusals = w.twins.sandbox.refusals
    async with w.borrow(**AUTOCOMMIT) as conn:
        for queries, counts in ((refused.COUNTS, True), (refused.COUNTS_NOT, False)):
            for query in queries:
                refusals.begin(moves=False)
                with suppress(psycopg.Error):
                    await execute(conn, query)
                await call(conn.rollback())
                assert bool(refusals.first) == counts, query
    async with w.borrow() as conn:
        for operation in (conn.notifies, lambda: conn.tpc_begin("x")):
            refusals.begin(moves=False)
            with pytest.raises(psycopg.NotSupportedError, match=r"isolation=.clone."):
                await call(operation())
            assert refusals.first
            assert "isolation" not in refusals.first


@sandboxed
async def test_listen_where_a_refused_test_moves(w: World) -> None:
    """It is refused only there: elsewhere many an application listens and waits for nothing."""
    refusals = w.twins.sandbox.refusals
    async with w.borrow(**AUTOCOMMIT) as conn:
        await execute(conn, "LISTEN it")
        refusals.begin(moves=True)
        try:
            with pytest.raises(psycopg.NotSupportedError, match="notifications"):
                await execute(conn, "LISTEN it")
            await execute(conn, "UNLISTEN it")
        finally:
            refusals.begin(moves=False)


@sandboxed
async def test_out_of_locks(w: World) -> None:
    """A test that takes more locks than the server has room for is told why, and goes on."""
    async with w.borrow(**AUTOCOMMIT) as conn:
        await execute(conn, "INSERT INTO t VALUES (1, 'a')")
        with pytest.raises(psycopg.errors.OutOfMemory, match="keeps each lock"):
            await execute(
                conn, "SELECT pg_advisory_xact_lock(g) FROM generate_series(1, 9999999) g"
            )
        assert await value(conn, "SELECT count(*) FROM t") == 1
        await execute(conn, "CREATE TABLE enough (n int)")


@sandboxed
async def test_isolation_level_after_the_first(w: World) -> None:
    """A level that the running outer transaction has not is refused with advice."""
    async with w.borrow() as conn:
        await execute(conn, "INSERT INTO t VALUES (1, 'a')")
        await call(conn.commit())
        await call(conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE))
        with pytest.raises(psycopg.NotSupportedError, match='isolation="clone"'):
            await execute(conn, "SELECT 1")
        await call(conn.set_isolation_level(None))
        assert await value(conn, "SELECT n FROM t") == 1


TIMEOUT = "idle_in_transaction_session_timeout"


@twin
async def test_timeouts_that_end_sessions(w: World) -> None:
    """What an application sets it finds, by whatever way, and its transactions take it back."""
    await show(w)
    async with w.borrow(connection={"autocommit": True}) as conn:
        await w.run(conn, f"SET {TIMEOUT} = '90s'")
        for query in (f"SHOW {TIMEOUT}", f"SELECT current_setting('{TIMEOUT}')"):
            await w.run(conn, query)
        await w.run(conn, f"SELECT setting FROM pg_settings WHERE name = '{TIMEOUT}'")
        await show(w)
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, "BEGIN")
        await w.run(conn, f"SELECT set_config('{TIMEOUT}', '70s', false)")
        await w.run(conn, "SAVEPOINT a")
        await w.run(conn, f"SET LOCAL {TIMEOUT} = '80s'")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, "ROLLBACK TO a")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, f"SET LOCAL {TIMEOUT} = '60s'")
        await w.run(conn, "COMMIT")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, f"BEGIN; SET {TIMEOUT} = '50s'; SHOW {TIMEOUT}; ROLLBACK")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, f"SET {TIMEOUT} = 'never'")
        async with block(conn.pipeline()):
            await execute(conn, f"SET {TIMEOUT} = '40s'")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, "RESET ALL")
        await w.run(conn, f"SHOW {TIMEOUT}")
        await w.run(conn, f"SET {TIMEOUT} = '90s'")
        await w.run(conn, "DISCARD ALL")
        await w.run(conn, f"SHOW {TIMEOUT}")
    await show(w, settings={TIMEOUT: "20s"})
    await show(w)


async def show(w: World, **sections: Any) -> None:
    """Note what a borrower finds."""
    async with w.borrow(**sections) as conn:
        await w.run(conn, f"SHOW {TIMEOUT}")


@pytest.mark.parametrize("where", ["file", "statement", "database"])
def test_timeouts_end_no_test(own: Twins, where: str) -> None:
    """Idle for longer than the application allows, the test's transaction is still there."""
    settings = {TIMEOUT: "1s"} if where == "file" else {}
    admin, name = own.admins[False], own.sandbox_name
    if where == "database":
        admin.execute(f"ALTER DATABASE {name} SET {TIMEOUT} = '1s'")
    try:
        world = World(own, "normal", real=False)
        with sync_handle(world, settings=settings).connection() as conn:
            if where == "statement":
                conn.execute(f"SET {TIMEOUT} = '1s'")
            conn.execute("INSERT INTO t VALUES (1, 'a')")
            admin.execute("SELECT pg_sleep(1.3)")
            assert conn.execute("SELECT n FROM t").fetchall() == [(1,)]
            assert conn.execute(f"SHOW {TIMEOUT}").fetchone() == ("1s",)
        assert own.sandbox.reset() == []
        with sync_handle(world).connection() as conn:
            expected = "1s" if where == "database" else "0"
            assert conn.execute(f"SHOW {TIMEOUT}").fetchone() == (expected,)
            if where == "database":
                admin.execute("SELECT pg_sleep(1.3)")
            assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
    finally:
        admin.execute(f"ALTER DATABASE {name} RESET {TIMEOUT}")


@twin
async def test_scripts_that_revive_a_transaction(w: World) -> None:
    """A script in a failed transaction does what it says once it has rolled back to a savepoint."""
    async with w.borrow() as conn:
        await w.run(conn, "SELECT 1 / 0")
        await w.run(conn, "ROLLBACK TO a; SAVEPOINT b; SELECT 1")
        await w.do(conn.rollback)
        await w.run(conn, "SAVEPOINT a")
        await w.run(conn, "SELECT 1 / 0")
        await w.run(conn, "SELECT 1; ROLLBACK TO a; SELECT 2")
        await w.run(conn, "ROLLBACK TO a; SET LOCAL work_mem = '3MB'; SAVEPOINT b; SHOW work_mem")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.do(conn.commit)
        await w.run(conn, "SELECT current_setting('work_mem')")


@twin
async def test_an_error_in_a_pipeline_stays_until_the_sync(w: World) -> None:
    """In autocommit, too, and before a statement that needs commands of ours before it."""
    for n, statement in enumerate(
        ("SAVEPOINT a", "SET a.b = '1'", "CREATE TEMP TABLE own (n int)")
    ):
        async with w.borrow() as conn:
            await call(conn.set_autocommit(True))
            async with w.noting(), block(conn.pipeline()) as pipeline:
                for query in ("SELECT 1/0", statement, f"INSERT INTO t VALUES ({n}, 'never')"):
                    # When an error is told depends on how soon results come in.
                    with suppress(psycopg.Error):
                        await execute(conn, query)
                for _ in range(3):
                    with suppress(psycopg.Error):
                        await call(pipeline.sync())
                await execute(conn, f"INSERT INTO t VALUES ({n + 10}, 'after')")
            await w.rows(conn)
