"""Real clients in a rolled-back test and in a clone see what they see on a real server."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import psycopg2.extensions
import pytest
import sqlalchemy as sa
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from helpers.waiting import PATIENCE
from psycopg import sql
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from gateway.clients import World, error_facts, twin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Boom(Exception):  # noqa: N818 - it stands for any exception of the application's
    """What a program raises when it means to."""


# psql


def psql(world: World, script: str, *options: str) -> None:
    command = ["psql", "-X", "-a", *options, "-d", world.dsn]
    done = subprocess.run(
        command,
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    world.note(command[3:-2], done.returncode)
    world.noted += done.stdout.splitlines()


STATUS = "\\echo :ERROR :SQLSTATE :ROW_COUNT :LAST_ERROR_MESSAGE\n"


@twin
def test_psql_transactions(world):
    """Tags, warnings, errors with their places, and savepoints."""
    lines = """
        INSERT INTO t VALUES (1, 'one'), (2, 'two');
        BEGIN;
        BEGIN;
        UPDATE t SET x = 'uno' WHERE n = 1;
        SAVEPOINT s;
        SELECT nothing FROM t;
        SELECT 1;
        ROLLBACK TO s;
        RELEASE s;
        RELEASE s;
        COMMIT;
        COMMIT;
        ROLLBACK;
        BEGIN READ ONLY;
        DELETE FROM t;
        END;
        ROLLBACK AND CHAIN;
        SAVEPOINT s;
        START TRANSACTION;
        COMMIT AND CHAIN;
        ABORT;
        SELECT * FROM t ORDER BY n;
    """
    psql(world, STATUS.join(line.strip() + "\n" for line in lines.split("\n")))


@twin
def test_psql_on_error_rollback(world):
    """It sets savepoints of its own."""
    psql(
        world,
        "\\set ON_ERROR_ROLLBACK on\nBEGIN;\nINSERT INTO t VALUES (1);\nINSERT INTO t VALUES (1);\n"
        "INSERT INTO t VALUES (2);\nCOMMIT;\nTABLE t;\n",
    )


@twin
def test_psql_scripts(world):
    """Several statements in one string, by -c: one transaction, and error positions are its own."""
    for script in (
        "INSERT INTO t VALUES (1); SELECT * FROM t",
        "INSERT INTO t VALUES (2); SELECT 1/0; SELECT 3",
        "INSERT INTO t VALUES (3); COMMIT; INSERT INTO t VALUES (4); SELECT  nothing",
        "BEGIN; INSERT INTO t VALUES (5); COMMIT; SELECT   oops FROM t",
        "BEGIN; INSERT INTO t VALUES (6); ROLLBACK; INSERT INTO t VALUES (7)",
        "SELECT 1; SELEC 2",
    ):
        psql(world, "", "-c", script)
    psql(world, "", "-1", "-c", "INSERT INTO t VALUES (8)", "-c", "SELECT 1/0")
    psql(world, "TABLE t")


@twin
def test_psql_autocommit_off(world):
    """It begins transactions by itself, and what it leaves open is rolled back."""
    psql(
        world,
        "\\set AUTOCOMMIT off\nINSERT INTO t VALUES (1);\nCOMMIT;\nINSERT INTO t VALUES (2);\n",
    )
    psql(world, "TABLE t;\n")


@twin
def test_psql_copy(world):
    """\\copy in and out, and a COPY that fails in the middle."""
    psql(
        world,
        "COPY t FROM STDIN;\n1\tone\n2\ttwo\n\\.\nCOPY t TO STDOUT;\n"
        "COPY t FROM STDIN;\n3\tthree\n1\tagain\n\\.\n\\copy t from stdin csv\n4,four\nx,y\n\\.\n"
        "COPY nothing FROM STDIN;\n\\copy (SELECT n FROM t ORDER BY n) to stdout csv header\n"
        "COPY t TO STDOUT (FORMAT nonsense);\nBEGIN;\nCOPY t FROM STDIN;\nbad\n\\.\nSELECT 1;\n"
        "COMMIT;\n",
    )


@twin
def test_psql_meta_commands(world):
    """What it asks the catalogs, \\gdesc, \\gexec, \\bind and a cursor's FETCH_COUNT."""
    psql(
        world,
        "\\d t\n\\dT mood\n\\conninfo_not\n\\gdesc\nSELECT 1 AS a, 'x' AS b \\gdesc\n"
        "SELECT 'SELECT ' || g FROM generate_series(1, 3) g \\gexec\n"
        "\\set FETCH_COUNT 2\nSELECT * FROM generate_series(1, 5);\nSELECT 1/0;\nBEGIN;\n"
        "SELECT * FROM generate_series(1, 3);\nCOMMIT;\n",
    )


@twin
def test_psql_notices_and_settings(world):
    """Verbose notices and errors, SET, RESET and DISCARD."""
    psql(
        world,
        "\\set VERBOSITY verbose\nSELECT noisy('x');\nDO $$ BEGIN RAISE EXCEPTION 'no' USING "
        "ERRCODE = 'P0099', HINT = 'h', DETAIL = 'd', COLUMN = 'c'; END $$;\n"
        "CREATE TABLE IF NOT EXISTS t ();\nSET datestyle = german;\nSHOW datestyle;\nBEGIN;\n"
        "SET LOCAL datestyle = sql;\nSHOW datestyle;\nROLLBACK;\nSHOW datestyle;\n"
        "RESET datestyle;\nSHOW datestyle;\nSET nonsense = 1;\nSET a.b = 1;\nSHOW a.b;\n"
        "DISCARD ALL;\nSHOW a.b;\n",
    )


@twin
def test_psql_ends_at_the_first_error(world):
    """With ON_ERROR_STOP and in a single transaction nothing stays."""
    psql(world, "INSERT INTO t VALUES (1);\nSELECT 1/0;\n", "-1", "-v", "ON_ERROR_STOP=1")
    psql(world, "TABLE t;\n")


# psycopg


@twin
def test_psycopg_transactions(world):
    """Commit, rollback, an error and the recovery from it."""
    conn = world.connect()
    world.run(conn, "INSERT INTO t VALUES (1, 'one')")
    conn.commit()
    world.run(conn, "INSERT INTO t VALUES (1, 'again')")
    world.run(conn, "SELECT 1")
    conn.commit()
    world.note(conn.info.transaction_status.name)
    world.run(conn, "INSERT INTO t VALUES (2, 'two')")
    conn.rollback()
    world.run(conn, "TABLE t")
    conn.close()
    world.run(world.connect(), "TABLE t")


@twin
def test_psycopg_autocommit(world):
    """A statement that fails leaves nothing behind and poisons nobody."""
    conn = world.connect(autocommit=True)
    world.run(conn, "INSERT INTO t VALUES (%s, %s)", [1, "one"])
    world.run(conn, "INSERT INTO t VALUES (2), (1)")
    world.run(conn, "TABLE t")
    world.run(conn, "BEGIN")
    world.run(conn, "INSERT INTO t VALUES (3)")
    world.run(conn, "SELECT %s / 0", [1])
    world.run(conn, "TABLE t")
    world.run(conn, "COMMIT")
    world.run(conn, "COMMIT")
    world.run(conn, "SAVEPOINT s")
    world.run(conn, "LOCK TABLE t")
    world.run(conn, "DECLARE c CURSOR FOR SELECT 1")
    world.run(conn, "SET LOCAL datestyle = sql")
    world.run(conn, "")
    world.run(conn, "TABLE t")


@twin
def test_psycopg_transaction_blocks(world):
    """Nested blocks, one of which fails, and one that is rolled back on purpose."""
    conn = world.connect()
    with world.noting(Boom), conn.transaction():
        world.run(conn, "INSERT INTO t VALUES (1)")
        with world.noting(Boom), conn.transaction("inner"):
            world.run(conn, "INSERT INTO t VALUES (2)")
            raise Boom
        world.run(conn, "TABLE t")
        with conn.transaction() as inner:
            world.run(conn, "INSERT INTO t VALUES (3)")
            raise psycopg.Rollback(inner)
        with world.noting(), conn.transaction():
            conn.execute("SELECT 1/0")
        world.run(conn, "TABLE t")
    world.run(conn, "TABLE t")
    conn.rollback()
    with conn.transaction(force_rollback=True):
        world.run(conn, "DELETE FROM t")
    world.run(conn, "TABLE t")


@twin
def test_psycopg_client_and_raw_cursors(world):
    """Simple queries with bound literals, several results, and parameters by number."""
    conn = world.connect(cursor_factory=psycopg.ClientCursor)
    world.run(conn, "INSERT INTO t VALUES (%s, %s)", [1, "it's"])
    with world.noting():
        cursor = conn.execute("SELECT %s; UPDATE t SET x = %s RETURNING n; SELECT 3", [1, "x"])
        world.note([(r.statusmessage, r.fetchall()) for r in cursor.results()])
    world.run(conn, "SELECT 1; SELECT nothing")
    conn.rollback()
    with psycopg.RawCursor(conn) as raw, world.noting():
        world.note(raw.execute("SELECT $1::int + $2::int", [1, 2]).fetchall())
        raw.execute("SELECT $1::int / 0", [1])


@twin
def test_psycopg_pipeline(world):
    """Results, an error that skips to the sync, and what of it stays."""
    conn = world.connect(autocommit=True)
    with conn.pipeline() as pipeline:
        cursors = [conn.execute("INSERT INTO t VALUES (%s)", [n]) for n in range(3)]
        world.note(conn.execute("SELECT count(*) FROM t").fetchall())
        world.note([c.rowcount for c in cursors])
        pipeline.sync()
    # Which of two errors psycopg raises depends on how soon the answers come.
    with world.failing(), conn.pipeline():
        conn.execute("INSERT INTO t VALUES (7)")
        conn.execute("INSERT INTO t VALUES (1)")
        conn.execute("INSERT INTO t VALUES (8)")
    world.note(conn.info.transaction_status.name)
    world.run(conn, "SELECT n FROM t ORDER BY n")
    with world.failing(), conn.pipeline(), conn.transaction():
        conn.execute("INSERT INTO t VALUES (10)")
        conn.execute("SELECT 1/0").fetchall()
    world.run(conn, "SELECT n FROM t ORDER BY n")
    with conn.pipeline(), conn.transaction():
        conn.execute("INSERT INTO t VALUES (11)")
        with world.failing(), conn.transaction():
            conn.execute("INSERT INTO t VALUES (11)").fetchone()
        conn.cursor().executemany("INSERT INTO t VALUES (%s)", [[n] for n in range(20, 40)])
    world.run(conn, "SELECT n FROM t ORDER BY n")


@twin
def test_psycopg_pipeline_with_transactions_inside(world):
    """BEGIN and COMMIT in the middle, by Parse, Bind and Execute."""
    conn = world.connect(autocommit=True)
    with world.failing(), conn.pipeline():
        conn.execute("INSERT INTO t VALUES (1)")
        conn.execute("BEGIN")
        conn.execute("INSERT INTO t VALUES (2)")
        conn.execute("COMMIT")
        conn.execute("INSERT INTO t VALUES (3)")
        conn.execute("INSERT INTO t VALUES (3)")
    world.run(conn, "SELECT n FROM t ORDER BY n")
    conn.autocommit = False
    with world.failing(), conn.pipeline():
        conn.execute("INSERT INTO t VALUES (4)")
        conn.commit()
        conn.execute("INSERT INTO t VALUES (5)")
        conn.rollback()
        conn.execute("INSERT INTO late VALUES (1, 99)")
        conn.commit()
    world.note(conn.info.transaction_status.name)
    world.run(conn, "SELECT n FROM t ORDER BY n")


@twin
def test_psycopg_executemany(world):
    """Many rows by a pipeline of its own, with what they return."""
    conn = world.connect()
    cursor = conn.cursor()
    cursor.executemany(
        "INSERT INTO t VALUES (%s, %s) RETURNING n", [[n, "x"] for n in range(5)], returning=True
    )
    world.note(cursor.rowcount, [r.fetchall() for r in cursor.results()])
    with world.noting():
        cursor.executemany("INSERT INTO t VALUES (%s)", [[8], [9], [1], [10]])
    world.note(conn.info.transaction_status.name)
    conn.rollback()
    cursor.executemany("INSERT INTO t VALUES (%s, repeat('x', 1000))", [[n] for n in range(2000)])
    conn.commit()
    world.run(conn, "SELECT count(*), sum(length(x)) FROM t")


@twin
def test_psycopg_server_side_cursors(world):
    """Iteration, scrolling, WITH HOLD over a commit, and the end of others with it."""
    conn = world.connect()
    with conn.cursor("series") as cursor:
        cursor.execute("SELECT generate_series(1, %s)", [250])
        world.note(cursor.fetchmany(3), cursor.fetchone(), len(cursor.fetchall()))
    with conn.cursor("scrolls", scrollable=True, row_factory=dict_row) as cursor:
        cursor.execute("SELECT generate_series(1, 10) AS n")
        cursor.scroll(4)
        world.note(cursor.fetchone())
        cursor.scroll(0, mode="absolute")
        world.note(cursor.fetchmany(2))
    conn.commit()
    held = conn.cursor("held", withhold=True)
    held.execute("SELECT generate_series(1, 3)")
    lost = conn.cursor("lost")
    lost.execute("SELECT 1")
    conn.commit()
    world.note(held.fetchall())
    with world.noting():
        lost.fetchall()
    conn.rollback()
    held.close()
    lost.close()
    with world.noting(), conn.cursor("wrong") as cursor:
        cursor.execute("SELECT nothing FROM t")
    conn.rollback()
    conn.autocommit = True
    with world.noting(), conn.cursor("outside") as cursor:
        cursor.execute("SELECT 1")


@twin
def test_psycopg_copy(world):
    """In and out, in text and binary, small and big."""
    conn = world.connect()
    cursor = conn.cursor()
    with cursor.copy("COPY t FROM STDIN") as copy:
        for n in range(3000):
            copy.write_row((n, "x" * 100))
    world.note(cursor.statusmessage, cursor.rowcount)
    with cursor.copy("COPY (SELECT * FROM t WHERE n < 3 ORDER BY n) TO STDOUT") as copy:
        world.note(list(copy.rows()))
    with cursor.copy("COPY t TO STDOUT (FORMAT binary)") as copy:
        world.note(sum(map(len, copy)))
    with cursor.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
        copy.set_types(["int4", "text"])
        copy.write_row((10_000, None))
    conn.commit()
    world.run(conn, "SELECT count(*) FROM t")


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("place", ["test", "clone"])
def test_psycopg_copy_that_fails(stage, place, autocommit):
    """By its data, by the client, and at its start."""

    def program(world: World) -> None:
        conn = world.connect(autocommit=autocommit)
        cursor = conn.cursor()
        for rows in (["1\tone\n", "x\ty\n"], ["2\ttwo\n" * 2], ["3\t" + "x" * 100_000 + "\n"] * 50):
            with world.noting(), cursor.copy("COPY t FROM STDIN") as copy:
                for row in rows:
                    copy.write(row)
            world.note(conn.info.transaction_status.name)
            conn.rollback()
        with world.noting(Boom), cursor.copy("COPY t FROM STDIN") as copy:
            copy.write("4\tfour\n")
            raise Boom
        world.note(conn.info.transaction_status.name)
        conn.rollback()
        with world.noting(), cursor.copy("COPY nothing FROM STDIN") as copy:
            copy.write("5\n")
        conn.rollback()
        with (
            world.noting(),
            cursor.copy("COPY (SELECT 1/(3-g) FROM generate_series(1,3) g) TO STDOUT") as copy,
        ):
            world.note([bytes(data) for data in copy])
        conn.rollback()
        world.run(conn, "TABLE t")

    stage.compare(program, place)


@twin
def test_psycopg_prepared_statements(world):
    """By name, over commits, after DEALLOCATE ALL, a rollback and DDL."""
    conn = world.connect(prepare_threshold=0)
    query = "SELECT n, x FROM t WHERE n >= %s ORDER BY n"
    names = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%%ORDER BY n'"
    world.run(conn, query, [0])
    conn.commit()
    world.run(conn, query, [0])
    world.run(conn, names, prepare=False)
    conn.rollback()
    world.run(conn, query, [0])
    world.run(conn, "ALTER TABLE t ADD y int")
    conn.rollback()
    world.run(conn, query, [0])
    world.run(conn, "SELECT 1/0")
    conn.rollback()
    world.run(conn, query, [0])
    world.run(conn, "DEALLOCATE ALL")
    world.run(conn, query, [0])
    conn.commit()
    world.run(conn, "PREPARE own (int) AS SELECT $1 + 1", prepare=False)
    world.run(conn, "EXECUTE own (1)", prepare=False)
    conn.commit()
    world.run(conn, "EXECUTE own (2)", prepare=False)
    world.run(conn, "DEALLOCATE own", prepare=False)
    world.run(conn, "EXECUTE own (3)", prepare=False)


@twin
def test_who_uses_a_held_cursor_keeps_nobody_waiting(world):
    """Nor does the cursor lose its place when another works meanwhile."""
    reader, other = world.connect(), world.connect()
    world.run(reader, "DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 9)")
    reader.commit()
    for n, use in enumerate(("FETCH 2 FROM held", "MOVE 2 FROM held", "CLOSE held")):
        world.run(reader, use)
        world.run(other, "INSERT INTO t VALUES (%s)", [n])
        other.commit()
        world.run(reader, "SELECT count(*) FROM t")
    world.run(reader, "FETCH 1 FROM held")


@twin
def test_psycopg_statement_whose_result_changes(world):
    """A cached plan that must not change its result type says so, and a new one works."""
    conn = world.connect(autocommit=True)
    query = "SELECT * FROM t"
    world.run(conn, query, prepare=True)
    other = world.connect(autocommit=True)
    other.execute("ALTER TABLE t ADD y int")
    world.run(conn, query, prepare=True)
    conn.execute("DEALLOCATE ALL")
    world.run(conn, query, prepare=True)


@twin
def test_psycopg_cancel(world):
    """Another thread cancels a statement; the connection goes on."""
    for autocommit in (True, False):
        conn = world.connect(autocommit=autocommit)
        world.run(conn, "INSERT INTO t VALUES (%s)", [int(autocommit)])
        thread = threading.Thread(target=world.run, args=(conn, "SELECT pg_sleep(60)"))
        thread.start()
        world.wait_until_sleeping()
        conn.cancel()
        thread.join(PATIENCE)
        conn.rollback()
        world.run(conn, "TABLE t")
        conn.cancel_safe()
        world.run(conn, "SELECT 1")


@twin
def test_psycopg_scripts(world):
    """One string of several statements is one transaction, unless it says otherwise."""
    conn = world.connect(autocommit=True)
    for script in (
        "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)",
        "INSERT INTO t VALUES (3); INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (4); COMMIT; INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (5); BEGIN; INSERT INTO t VALUES (6)",
        "INSERT INTO t VALUES (1)",
        "SELECT 1; ROLLBACK; SELECT 'ä', nothing",
        "BEGIN; SAVEPOINT s; INSERT INTO t VALUES (7); ROLLBACK TO s; SELECT 8; END",
        "INSERT INTO t VALUES (9); SELEC 1",
        "SELECT 1; SAVEPOINT s",
        "BEGIN; SELECT 1/0; COMMIT",
        "ROLLBACK; INSERT INTO t VALUES (10); SELECT 1/0",
        ";;",
        "/* only */ -- a comment",
        "COMMIT AND CHAIN",
    ):
        world.run(conn, script)
        world.run(conn, "SELECT n FROM t ORDER BY n")
    conn.rollback()
    world.run(conn, "SELECT n FROM t ORDER BY n")


@twin
def test_psycopg_deferred_constraints(world):
    """They fail at the commit, or at the end of a statement in autocommit."""
    conn = world.connect()
    world.run(conn, "INSERT INTO late VALUES (1, 99)")
    with world.noting():
        conn.commit()
    world.note(conn.info.transaction_status.name)
    world.run(conn, "INSERT INTO late VALUES (1, 99)")
    world.run(conn, "SET CONSTRAINTS ALL IMMEDIATE")
    conn.rollback()
    conn.autocommit = True
    world.run(conn, "INSERT INTO late VALUES (2, 99)")
    world.run(conn, "INSERT INTO late VALUES (3, 99) RETURNING id")
    world.run(conn, "INSERT INTO late VALUES (%s, %s) RETURNING id", [4, 99])
    world.run(conn, "INSERT INTO t VALUES (1); INSERT INTO late VALUES (5, 99)")
    world.run(conn, "BEGIN; INSERT INTO late VALUES (5, 99); COMMIT; SELECT 2")
    world.run(conn, "SELECT 1")
    world.run(conn, "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM late)")
    world.run(conn, "INSERT INTO t VALUES (1)")
    world.run(conn, "INSERT INTO late VALUES (7, 1)")


@twin
def test_psycopg_settings(world):
    """Startup parameters, SET, SET LOCAL, RESET, and the parameters that are reported."""

    def status(conn: Any) -> None:
        names = ("TimeZone", "DateStyle", "application_name", "client_encoding", "search_path")
        world.note([conn.info.parameter_status(name) for name in names])
        world.run(conn, "SELECT current_setting('TimeZone'), current_setting('application_name')")

    options = "-c timezone=Asia/Tokyo -c search_path=public,pg_catalog"
    conn = world.connect(options=options, application_name="mine", client_encoding="latin1")
    other = world.connect(autocommit=True)
    for command in (
        "SELECT 'ä'",
        "SET timezone = 'UTC'",
        "COMMIT",
        "SET timezone = 'Europe/Berlin'",
        "ROLLBACK",
        "SET LOCAL timezone = 'Europe/Paris'",
        "COMMIT",
        "RESET timezone",
        "COMMIT",
        "SELECT set_config('application_name', 'other', false)",
        "COMMIT",
        "RESET ALL",
        "COMMIT",
        "SET datestyle = 'german'",
        "SAVEPOINT s",
        "SET datestyle = 'sql'",
        "ROLLBACK TO s",
        "COMMIT",
        "SET timezone = 'nonsense'",
        "ROLLBACK",
        "SET client_encoding = 'utf8'",
        "COMMIT",
    ):
        world.run(conn, command)
        status(conn)
        conn.commit() if command == "COMMIT" else None
    conn.commit()
    status(other)
    conn.autocommit = True
    world.run(conn, "DISCARD ALL")
    status(conn)


@twin
def test_psycopg_transaction_modes(world):
    """What a connection asks for begins with its transactions."""
    conn = world.connect()
    conn.read_only = True
    world.run(conn, "SHOW transaction_read_only")
    world.run(conn, "INSERT INTO t VALUES (1)")
    conn.rollback()
    conn.read_only = None
    world.run(conn, "SHOW transaction_read_only")
    world.run(conn, "INSERT INTO t VALUES (1)")
    conn.rollback()
    world.run(conn, "SET TRANSACTION READ ONLY")
    world.run(conn, "INSERT INTO t VALUES (1)")


@twin
def test_psycopg_deferrable(world):
    """DEFERRABLE is shown, though it changes nothing below SERIALIZABLE."""
    conn = world.connect()
    conn.deferrable = True
    world.run(conn, "SHOW transaction_deferrable")
    conn.rollback()
    conn.deferrable = None
    world.run(conn, "SHOW transaction_deferrable")


@twin
def test_psycopg_notices_and_errors(world):
    """With all that they say."""
    conn = world.connect(autocommit=True)
    world.run(conn, "SELECT noisy('hello')")
    world.run(conn, "CREATE TABLE IF NOT EXISTS t (n int)")
    world.run(conn, "DO $$ BEGIN RAISE WARNING 'w'; PERFORM 1/0; END $$")
    world.run(conn, "SELECT 'ä' || nothing")
    world.run(conn, "INSERT INTO typed VALUES (1, NULL, 'angry')")
    world.run(conn, "SELECT   %s::int / 0, %s", [1, "x"])
    world.run(conn, "SELECT   nothing, %s", [1])


@twin
def test_psycopg_types(world):
    """Composite types, enums and arrays are found in the catalogs."""
    conn = world.connect()
    info = psycopg.types.TypeInfo.fetch(conn, "mood")
    assert info is not None
    info.register(conn)
    world.note(info.name, info.regtype)
    pair = psycopg.types.composite.CompositeInfo.fetch(conn, "pair")
    assert pair is not None
    psycopg.types.composite.register_composite(pair, conn)
    world.run(conn, "INSERT INTO typed VALUES (1, ARRAY[(1, 'glad')::pair], 'sad')")
    world.note([tuple(p) for p in conn.execute("SELECT pairs FROM typed").fetchall()[0][0]])
    world.run(conn, sql.SQL("SELECT {} FROM typed").format(sql.Identifier("m")), binary=True)


@twin
def test_psycopg_rows_by_portal(world):
    """stream() in single-row mode, and one that is left in the middle."""
    conn = world.connect()
    cursor = conn.cursor()
    world.note(list(cursor.stream("SELECT generate_series(1, %s)", [5])))
    for row in cursor.stream("SELECT generate_series(1, 200000)"):
        world.note(row)
        break
    world.run(conn, "SELECT 1")
    with world.noting():
        world.note(list(cursor.stream("SELECT 1/(3-g) FROM generate_series(1, 5) g")))
    world.note(conn.info.transaction_status.name)


@twin
def test_psycopg_big_rows_and_statements(world):
    """More than fits into any buffer, both ways."""
    conn = world.connect()
    text = "x" * 3_000_000
    world.note(conn.execute("SELECT length(%s)", [text]).fetchone())
    world.note(len(conn.execute("SELECT %s::text || %s::text", [text, text]).fetchall()[0][0]))
    world.note(
        len(conn.execute("SELECT g, repeat('y', 100) FROM generate_series(1, 20000) g").fetchall())
    )
    client = psycopg.ClientCursor(conn)
    world.note(client.execute("SELECT length(%s)", [text]).fetchone())


@twin
async def test_psycopg_async(world):
    """Transactions, pipelines, COPY, cursors and a cancel in an event loop."""
    async with await psycopg.AsyncConnection.connect(world.dsn) as conn:
        async with conn.transaction():
            await conn.execute("INSERT INTO t VALUES (1, 'one')")
            with world.noting():
                async with conn.transaction():
                    await conn.execute("INSERT INTO t VALUES (1)")
        async with conn.pipeline() as pipeline:
            cursors = [await conn.execute("INSERT INTO t VALUES (%s)", [n]) for n in (2, 3)]
            await pipeline.sync()
            world.note([c.statusmessage for c in cursors])
        async with conn.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as copy:
            await copy.write_row((4, "four"))
        async with conn.cursor("named") as cursor:
            await cursor.execute("SELECT n FROM t ORDER BY n")
            world.note([row async for row in cursor])
        await conn.commit()
        sleeping = asyncio.ensure_future(conn.execute("SELECT pg_sleep(60)"))
        await asyncio.to_thread(world.wait_until_sleeping)
        await conn.cancel_safe()
        with world.noting():
            await sleeping
        world.note(conn.info.transaction_status.name)
        await conn.rollback()
        with world.noting(asyncio.TimeoutError):
            await asyncio.wait_for(conn.execute("SELECT pg_sleep(60)"), 0.2)
        world.note(conn.info.transaction_status.name)
        await conn.rollback()
        cursor = await conn.execute("SELECT n FROM t ORDER BY n")
        world.note(await cursor.fetchall())


@twin
def test_psycopg_two_connections(world):
    """Statements of two clients one after the other, with statements and settings of one name."""
    first, second = (world.connect(autocommit=True, prepare_threshold=0) for _ in range(2))
    for n in range(3):
        world.run(first, "INSERT INTO t VALUES (%s, 'first')", [n])
        world.run(second, "INSERT INTO t VALUES (%s, 'second')", [n])
        world.run(second, "SELECT * FROM t ORDER BY %s::int, n", [n])
        world.run(first, "SELECT x FROM t ORDER BY %s::int, n", [n])
    world.run(first, "SET a.b = 'first'")
    world.run(second, "SET a.b = 'second'")
    world.run(first, "SHOW a.b")
    world.run(second, "SHOW a.b")


@twin
def test_psycopg_rolls_back_beside_another(world):
    """The DEALLOCATE ALL that it sends after a ROLLBACK makes nobody wait."""
    first, second = (world.connect() for _ in range(2))
    world.run(first, "SELECT count(*) FROM t")
    world.run(second, "ROLLBACK AND CHAIN", prepare=True)
    first.rollback()
    world.run(first, "INSERT INTO t VALUES (1, 'first')")
    first.commit()


@twin
def test_psycopg_closes_in_the_middle(world):
    """What a client leaves open is rolled back with its end."""
    conn = world.connect()
    world.run(conn, "INSERT INTO t VALUES (1)")
    conn.close()
    other = world.connect()
    world.run(other, "TABLE t")


# psycopg_pool


@twin
def test_connection_pool(world):
    """Checked, reset and lent to threads."""
    with ConnectionPool(
        world.dsn, min_size=1, max_size=3, check=ConnectionPool.check_connection, open=True
    ) as pool:
        with pool.connection() as conn:
            world.run(conn, "INSERT INTO t VALUES (1)")
        with world.noting(Boom), pool.connection() as conn:
            world.run(conn, "INSERT INTO t VALUES (2)")
            raise Boom

        def work(n: int) -> None:
            with pool.connection() as conn:
                conn.execute("INSERT INTO t VALUES (%s)", [n])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        with pool.connection() as conn:
            world.run(conn, "SELECT n FROM t ORDER BY n")
            conn.execute("SET a.b = 'x'")
        with pool.connection() as conn, world.noting():
            conn.execute("SELECT 1/0")
        pool.check()
        world.note(pool.get_stats()["requests_num"])


@twin
async def test_async_connection_pool(world):
    """Tasks at the same time, with transactions of their own."""
    async with AsyncConnectionPool(world.dsn, min_size=2, max_size=4, open=False) as pool:

        async def work(n: int) -> Any:
            async with pool.connection() as conn, conn.transaction():
                await conn.execute("INSERT INTO t VALUES (%s)", [n])
                await asyncio.sleep(0)
                if n % 3 == 0:
                    raise Boom
                return (await (await conn.execute("SELECT 1")).fetchone(),)

        found = await asyncio.gather(*(work(n) for n in range(12)), return_exceptions=True)
        world.note([error_facts(each) if isinstance(each, Exception) else each for each in found])
        async with pool.connection() as conn:
            cursor = await conn.execute("SELECT n FROM t ORDER BY n")
            world.note(await cursor.fetchall())


# psycopg2


@twin
def test_psycopg2_transactions(world):
    """Its transactions begin by a BEGIN that it sends before the first statement."""
    conn = psycopg2.connect(world.dsn)
    world.run2(conn, "INSERT INTO t VALUES (%s, %s)", [1, "one"])
    conn.commit()
    world.note(conn.get_transaction_status())
    world.run2(conn, "INSERT INTO t VALUES (1, 'again')")
    world.run2(conn, "SELECT 1")
    conn.rollback()
    with conn:
        world.run2(conn, "INSERT INTO t VALUES (2)")
    with world.noting(Boom), conn:
        world.run2(conn, "INSERT INTO t VALUES (3)")
        raise Boom
    world.run2(conn, "SAVEPOINT s; INSERT INTO t VALUES (4); ROLLBACK TO s")
    world.run2(conn, "SELECT nothing FROM t")
    conn.rollback()
    world.run2(conn, "SELECT noisy('x')")
    conn.rollback()
    conn.set_session(readonly=True)
    world.run2(conn, "INSERT INTO t VALUES (5)")
    conn.rollback()
    conn.close()


@twin
def test_psycopg2_autocommit(world):
    """Statements and scripts by themselves."""
    conn = psycopg2.connect(world.dsn)
    conn.autocommit = True
    world.run2(conn, "INSERT INTO t VALUES (1), (2)")
    world.run2(conn, "INSERT INTO t VALUES (3), (1)")
    world.run2(conn, "INSERT INTO t VALUES (4); SELECT 1/0")
    world.run2(conn, "BEGIN; INSERT INTO t VALUES (5)")
    world.run2(conn, "ROLLBACK")
    world.run2(conn, "VACUUM_ t")
    world.run2(conn, "TABLE t")
    conn.reset()
    world.run2(conn, "SHOW timezone")
    conn.close()


@twin
def test_psycopg2_named_cursor(world):
    """A cursor on the server, by itself and WITH HOLD."""
    conn = psycopg2.connect(world.dsn)
    with conn.cursor("named") as cursor:
        cursor.itersize = 10
        cursor.execute("SELECT generate_series(1, 35)")
        world.note(len(list(cursor)))
    held = conn.cursor("held", withhold=True, scrollable=True)
    held.execute("SELECT generate_series(1, 5)")
    world.note(held.fetchone())
    conn.commit()
    held.scroll(1)
    world.note(held.fetchall())
    held.close()
    conn.close()


@twin
def test_psycopg2_copy(world):
    """copy_expert both ways, and an error in the data."""
    import io

    conn = psycopg2.connect(world.dsn)
    with conn.cursor() as cursor:
        cursor.copy_expert("COPY t FROM STDIN CSV", io.StringIO("1,one\n2,two\n"))
        world.note(cursor.rowcount, cursor.statusmessage)
        found = io.StringIO()
        cursor.copy_expert("COPY t TO STDOUT CSV HEADER", found)
        world.note(found.getvalue())
        conn.commit()
        with world.noting():
            cursor.copy_expert("COPY t FROM STDIN CSV", io.StringIO("3,x\n" * 2))
        world.note(conn.get_transaction_status())
        conn.rollback()
        with world.noting():
            # No more than a socket holds: psycopg2 sends the end with the GIL held, and the gateway
            # would need it to make room.
            cursor.copy_expert("COPY t FROM STDIN CSV", io.StringIO("bad\n" + "4,x\n" * 10_000))
        conn.rollback()
        world.run2(conn, "TABLE t")
    conn.close()


@twin
def test_psycopg2_cancel(world):
    """Through PQcancel, which waits for the gateway while it holds the GIL."""
    conn = psycopg2.connect(world.dsn)
    world.run2(conn, "INSERT INTO t VALUES (1)")
    thread = threading.Thread(target=world.run2, args=(conn, "SELECT pg_sleep(60)"))
    thread.start()
    world.wait_until_sleeping()
    conn.cancel()
    thread.join(PATIENCE)
    conn.rollback()
    conn.cancel()
    world.run2(conn, "TABLE t")
    conn.close()


@twin
def test_psycopg2_large_objects(world):
    """They are called by function, past SQL."""
    conn = psycopg2.connect(world.dsn)
    large = conn.lobject(0, "wb")
    world.note(large.write(b"hello world" * 1000))
    large.close()
    conn.commit()
    again = conn.lobject(large.oid, "rb")
    again.seek(6)
    world.note(again.read(5), again.tell())
    again.close()
    conn.rollback()
    with world.noting():
        conn.lobject(4_000_000_000, "rb")
    world.note(conn.get_transaction_status())
    conn.rollback()
    conn.lobject(large.oid).unlink()
    conn.commit()
    world.run2(conn, "SELECT count(*) FROM pg_largeobject_metadata")
    conn.close()


@twin
def test_psycopg2_async_connection(world):
    """Polled by its user."""
    import select

    def wait(conn: Any) -> None:
        while (state := conn.poll()) != psycopg2.extensions.POLL_OK:
            read = [conn] if state == psycopg2.extensions.POLL_READ else []
            select.select(read, [] if read else [conn], [], PATIENCE)

    conn = psycopg2.connect(world.dsn, async_=True)
    wait(conn)
    with conn.cursor() as cursor:
        for query in ("INSERT INTO t VALUES (1)", "SELECT 1/0", "TABLE t"):
            with world.noting():
                cursor.execute(query)
                wait(conn)
                world.note(cursor.statusmessage, cursor.fetchall() if cursor.description else None)
    conn.close()


# asyncpg


@twin
async def test_asyncpg_transactions(world):
    """Nested ones, errors in them, and in autocommit."""
    conn = await asyncpg.connect(**world.asyncpg_keywords)
    await world.arun(conn, "INSERT INTO t VALUES ($1, $2)", 1, "one")
    await world.arun(conn, "INSERT INTO t VALUES ($1, $2)", 1, "again")
    async with conn.transaction():
        await world.arun(conn, "INSERT INTO t VALUES (2)")
        with world.noting(Boom):
            async with conn.transaction():
                await world.arun(conn, "INSERT INTO t VALUES (3)")
                raise Boom
        with world.noting():
            async with conn.transaction():
                await conn.execute("SELECT 1/0")
        await world.arun(conn, "SELECT n FROM t ORDER BY n")
    transaction = conn.transaction(readonly=True)
    await transaction.start()
    await world.arun(conn, "INSERT INTO t VALUES (4)")
    await world.arun(conn, "SELECT 1")
    await transaction.rollback()
    with world.noting():
        async with conn.transaction():
            await conn.execute("INSERT INTO late VALUES (1, 99)")
    await world.arun(conn, "INSERT INTO late VALUES (1, 99)")
    world.note(await conn.execute("INSERT INTO t VALUES (5); UPDATE t SET x = 'x'"))
    with world.noting():
        await conn.execute("INSERT INTO t VALUES (6); SELECT  nothing")
    await world.arun(conn, "SELECT n FROM t ORDER BY n")
    with world.noting():
        await conn.executemany("INSERT INTO t VALUES ($1)", [[7], [8], [7]])
    await conn.executemany("INSERT INTO t VALUES ($1)", [[n] for n in range(100, 2000)])
    world.note(await conn.fetchval("SELECT count(*) FROM t"))
    world.note(await conn.fetchmany("INSERT INTO t VALUES ($1) RETURNING n", [[9], [10]]))
    await conn.reset()
    await conn.close()


@twin
async def test_asyncpg_prepared_statements_and_cursors(world):
    """Statements that live on, cursors in pieces, and one outside of a transaction."""
    conn = await asyncpg.connect(**world.asyncpg_keywords)
    statement = await conn.prepare("SELECT generate_series(1, $1::int) AS n")
    world.note([tuple(row) for row in await statement.fetch(3)])
    world.note([(a.name, a.type.name) for a in statement.get_attributes()])
    world.note([p.name for p in statement.get_parameters()])
    async with conn.transaction():
        cursor = await statement.cursor(10)
        world.note([tuple(row) for row in await cursor.fetch(4)])
        await cursor.forward(2)
        world.note(tuple(await cursor.fetchrow()))
        world.note([row[0] async for row in statement.cursor(25, prefetch=10)])
        with world.noting():
            await conn.fetch("SELECT 1/0")
    world.note(await statement.fetchval(1))
    with world.noting():
        async for row in conn.cursor("SELECT 1"):
            world.note(row)
    with world.noting():
        await conn.prepare("SELECT nothing   FROM t")
    await conn.execute("DEALLOCATE ALL")
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await statement.fetch(1)
    world.note(await conn.fetchval("SELECT 2"))
    await conn.close()


@pytest.mark.parametrize("place", ["test", "clone"])
@pytest.mark.parametrize("cached", [0, 100])
def test_asyncpg_introspection(stage, place, cached):
    """Types of the application's own, as arrays of composites of enums."""

    async def program(world: World) -> None:
        conn = await asyncpg.connect(**world.asyncpg_keywords, statement_cache_size=cached)
        await conn.execute("INSERT INTO typed VALUES (1, ARRAY[(1, 'glad')::pair], 'sad')")
        world.note([tuple(p) for p in await conn.fetchval("SELECT pairs FROM typed")])
        world.note(await conn.fetchval("SELECT $1::mood[]", ["glad", "sad"]))
        world.note(await conn.fetchval("SELECT ($1::pair).b", (1, "sad")))
        await conn.set_type_codec("mood", encoder=str, decoder=str.upper, format="text")
        world.note(await conn.fetchval("SELECT m FROM typed"))
        async with conn.transaction():
            world.note(await conn.fetchval("SELECT m FROM typed"))
            with world.noting():
                await conn.fetchval("SELECT 'x'::mood")
        for n in range(3):
            world.note(await conn.fetchval("SELECT $1::int", n))
        await conn.close()

    stage.compare(program, place)


@twin
async def test_asyncpg_copy(world):
    """Records in binary, files in text, and errors."""
    import io

    conn = await asyncpg.connect(**world.asyncpg_keywords)
    records = [(n, "x" * 50) for n in range(5000)]
    world.note(await conn.copy_records_to_table("t", records=records))
    with world.noting():
        await conn.copy_records_to_table("t", records=records[:1])
    world.note(conn.is_in_transaction())
    found = io.BytesIO()
    world.note(await conn.copy_from_query("SELECT * FROM t WHERE n < $1", 3, output=found))
    world.note(found.getvalue())
    with world.noting():
        await conn.copy_to_table("t", source=io.BytesIO(b"9999\n"), format="csv")

    async def failing() -> AsyncIterator[bytes]:
        yield b"9998\tx\n"
        raise Boom

    with world.noting(Boom):
        await conn.copy_to_table("t", source=failing())
    world.note(await conn.fetchval("SELECT count(*) FROM t"))
    await conn.close()


@twin
async def test_asyncpg_timeout(world):
    """It cancels the statement, and goes on with the connection."""
    conn = await asyncpg.connect(**world.asyncpg_keywords)
    with world.noting(asyncio.TimeoutError):
        await conn.fetch("SELECT pg_sleep(60)", timeout=0.2)
    await world.arun(conn, "SELECT 1")
    async with conn.transaction():
        await world.arun(conn, "INSERT INTO t VALUES (1)")
        with world.noting(asyncio.TimeoutError):
            async with conn.transaction():
                await conn.execute("SELECT pg_sleep(60)", timeout=0.2)
        await world.arun(conn, "TABLE t")
    await world.arun(conn, "TABLE t")
    await conn.close()


@twin
async def test_asyncpg_pool_and_settings(world):
    """Connections are reset as they come back; parameters are told, notices and log too."""
    keywords = {**world.asyncpg_keywords, "server_settings": {"timezone": "Asia/Tokyo"}}
    async with asyncpg.create_pool(**keywords, min_size=2, max_size=4) as pool:

        async def work(n: int) -> Any:
            async with pool.acquire() as conn, conn.transaction():
                await conn.execute("INSERT INTO t VALUES ($1)", n)
                return await conn.fetchval("SHOW timezone")

        world.note(await asyncio.gather(*(work(n) for n in range(12))))
        world.note(await pool.fetchval("SELECT count(*) FROM t"))
        async with pool.acquire() as conn:
            await conn.execute("SET timezone = 'UTC'")
            world.note(conn.get_settings().TimeZone)
            conn.add_log_listener(lambda _, message: world.note(message.message))
            await conn.execute("SELECT noisy('x')")
            await asyncio.sleep(0)  # it calls back from the loop
            world.note(await conn.fetchval("SHOW timezone"))
            await conn.reset()
            world.note(conn.get_settings().TimeZone)
        async with pool.acquire() as conn:
            world.note(await conn.fetchval("SHOW timezone"))
            transaction = conn.transaction()
            await transaction.start()
            await conn.execute("INSERT INTO t VALUES (99)")
        world.note(await pool.fetchval("SELECT count(*) FROM t"))


# SQLAlchemy


class Base(sqlalchemy.orm.DeclarativeBase):
    pass


class T(Base):
    __tablename__ = "t"
    n: sqlalchemy.orm.Mapped[int] = sqlalchemy.orm.mapped_column(primary_key=True)
    x: sqlalchemy.orm.Mapped[str | None]


def engine_of(world: World, driver: str, **options: Any) -> Any:
    url = sa.URL.create(f"postgresql+{driver}")
    if driver != "asyncpg":
        keywords: dict[str, Any] = dict(world.conninfo)
        return sa.create_engine(url, connect_args=keywords, **options)
    return sa.ext.asyncio.create_async_engine(url, connect_args=world.asyncpg_keywords, **options)


def core_program(world: World, conn: sa.Connection) -> None:
    """Core: transactions, savepoints, recovery, and cursors."""
    table = T.__table__
    with conn.begin():
        result = conn.execute(
            table.insert().returning(table.c.n), [{"n": 1, "x": "a"}, {"n": 2, "x": None}]
        )
        world.note([tuple(row) for row in result])
        with world.noting(), conn.begin_nested():
            conn.execute(table.insert(), {"n": 1})
        with conn.begin_nested() as outer:
            conn.execute(table.insert(), {"n": 3})
            with world.noting(Boom), conn.begin_nested():
                conn.execute(table.update().values(x="all"))
                raise Boom
            outer.rollback()
        world.note(conn.execute(sa.select(table).order_by(table.c.n)).all())
    with world.noting(), conn.begin():
        conn.execute(sa.text("SELECT nothing"))
    with world.noting(), conn.begin():
        conn.execute(sa.text("INSERT INTO late VALUES (1, 99)"))
    rows = conn.execution_options(stream_results=True, max_row_buffer=10).execute(
        sa.text("SELECT generate_series(1, 35)")
    )
    world.note(sum(row[0] for row in rows))
    conn.rollback()
    world.note(conn.execute(sa.select(sa.func.count()).select_from(table)).scalar())
    conn.rollback()


def orm_program(world: World, session: sqlalchemy.orm.Session) -> None:
    """ORM: units of work, an IntegrityError and the recovery from it."""
    session.add_all([T(n=10, x="ten"), T(n=11, x="eleven")])
    session.commit()
    session.add(T(n=10, x="again"))
    with world.noting():
        session.flush()
    with world.noting():
        session.execute(sa.text("SELECT 1"))
    session.rollback()
    with world.noting(), session.begin_nested():
        session.add(T(n=11))
        session.flush()
    session.add(T(n=12))
    session.flush()
    world.note([(t.n, t.x) for t in session.scalars(sa.select(T).order_by(T.n))])
    session.rollback()
    found = session.get(T, 11)
    assert found is not None
    found.x = "changed"
    session.commit()
    session.delete(found)
    session.commit()
    for part in session.scalars(
        sa.select(T).order_by(T.n).execution_options(yield_per=1)
    ).partitions():
        world.note([(t.n, t.x) for t in part])
    session.commit()


def isolation_program(world: World, conn: sa.Connection) -> None:
    """Autocommit, and an isolation level that comes too late."""
    conn.execution_options(isolation_level="AUTOCOMMIT")
    conn.execute(sa.text("INSERT INTO t VALUES (20)"))
    with world.noting():
        conn.execute(sa.text("INSERT INTO t VALUES (20)"))
    world.note(conn.execute(sa.text("SELECT count(*) FROM t WHERE n = 20")).scalar())
    conn.rollback()
    with world.noting():
        conn.execute(sa.text("SELECT 1"))
        conn.execution_options(isolation_level="SERIALIZABLE")
    conn.rollback()


@pytest.fixture(params=["psycopg", "psycopg2", "asyncpg"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("place", ["test", "clone"])
def test_sqlalchemy(stage, place, driver):
    """Core, ORM and isolation levels, with connections that are pinged before each use."""

    def sync(world: World) -> None:
        engine = engine_of(world, driver, pool_pre_ping=True, pool_size=2)
        for program in (core_program, isolation_program):
            with engine.connect() as conn:
                program(world, conn)
        with sqlalchemy.orm.Session(engine) as session:
            orm_program(world, session)
        world.note(sorted(sa.inspect(engine).get_table_names()))
        world.note([c["name"] for c in sa.inspect(engine).get_columns("late")])
        engine.dispose()

    async def with_asyncpg(world: World) -> None:
        engine = engine_of(world, driver, pool_pre_ping=True, pool_size=2)
        for program in (core_program, isolation_program):
            async with engine.connect() as conn:
                await conn.run_sync(lambda sync_conn, run=program: run(world, sync_conn))
        async with sa.ext.asyncio.AsyncSession(engine) as session:
            await session.run_sync(lambda sync_session: orm_program(world, sync_session))
        async with engine.connect() as conn:
            stream = await conn.stream(sa.text("SELECT generate_series(1, 100)"))
            world.note(len([row async for row in stream]))
        await engine.dispose()

    stage.compare(with_asyncpg if driver == "asyncpg" else sync, place)


@pytest.mark.parametrize("place", ["test", "clone"])
def test_sqlalchemy_psycopg_async(stage, place):
    """psycopg in SQLAlchemy's event loop, with a server-side cursor and a nested transaction."""

    async def program(world: World) -> None:
        engine = sa.ext.asyncio.create_async_engine(
            sa.URL.create("postgresql+psycopg"), connect_args=dict(world.conninfo)
        )
        async with engine.begin() as conn:
            await conn.execute(sa.text("INSERT INTO t VALUES (1)"))
            with world.noting():
                async with conn.begin_nested():
                    await conn.execute(sa.text("INSERT INTO t VALUES (1)"))
            stream = await conn.stream(sa.text("SELECT generate_series(1, 100)"))
            world.note(len([row async for row in stream]))
        async with engine.connect() as conn:
            world.note((await conn.execute(sa.text("SELECT count(*) FROM t"))).scalar())
        await engine.dispose()

    stage.compare(program, place)


# Together


def test_clients_of_all_kinds_work_in_one_transaction(stage):
    """What one has committed, all see, and handles too; nothing of it stays."""
    with stage.test():
        dsn = stage.dsn
        stage.rollback.execute("INSERT INTO t VALUES (0, 'a handle')", None)
        with psycopg.connect(dsn) as conn:
            conn.execute("INSERT INTO t VALUES (1, 'psycopg')")
        conn2 = psycopg2.connect(dsn)
        with conn2, conn2.cursor() as cursor:
            cursor.execute("INSERT INTO t VALUES (2, 'psycopg2')")
        conn2.close()
        world = World(stage, stage.conninfo())

        async def asyncpg_too() -> None:
            conn = await asyncpg.connect(**world.asyncpg_keywords)
            await conn.execute("INSERT INTO t VALUES (3, 'asyncpg')")
            await conn.close()

        asyncio.run(asyncpg_too())
        psql(world, "INSERT INTO t VALUES (4, 'psql');")
        found = stage.rollback.execute("SELECT x FROM t ORDER BY n", None).fetchall()
        assert [x for (x,) in found] == ["a handle", "psycopg", "psycopg2", "asyncpg", "psql"]
