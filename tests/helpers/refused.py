"""A suite of which some tests need a clone, with no marker; written into a project by tests."""

from __future__ import annotations

from typing import Final

REFUSED: Final = (
    "listen",
    "vacuum",
    "concurrently",
    "two_writers",
    "two_writers_in_threads",
    "second_level",
    "two_phase",
    "new_enum_value",
    "commit_in_procedure",
    "async_listen",
    "async_vacuum",
    "in_a_fixture",
    "in_a_fixture_s_end",
    "in_another_process",
    "swallowed",
)
#: Each refused test ends with a comparison, which `wrong()` below makes fail.
MIXED: Final = """
    import os
    import subprocess
    import sys
    import threading

    import psycopg
    import pytest

    RIGHT = 1
    PLAIN = 200

    @pytest.fixture(autouse=True)
    def table(pgmonkey):
        pgmonkey.execute("CREATE TABLE IF NOT EXISTS mixed (n int)")

    @pytest.mark.parametrize("n", range(PLAIN))
    def test_plain(pgmonkey, n):
        assert pgmonkey.execute("SELECT count(*) FROM mixed").fetchone() == (0,)
        pgmonkey.execute("INSERT INTO mixed VALUES (1)")

    def test_listen(pgmonkey):
        with pgmonkey.normal as conn:
            conn.autocommit = True
            conn.execute("LISTEN told")
            pgmonkey.execute("NOTIFY told, 'it'")
            found = [each.payload for each in conn.notifies(timeout=60, stop_after=1)]
        assert (found, RIGHT) == (["it"], 1)

    def test_vacuum(pgmonkey):
        pgmonkey.execute("VACUUM mixed")
        assert RIGHT == 1

    def test_concurrently(pgmonkey):
        pgmonkey.execute("CREATE INDEX CONCURRENTLY ON mixed (n)")
        assert RIGHT == 1

    def test_two_writers(pgmonkey):
        with pgmonkey.normal as one, pgmonkey.pool as other:
            one.execute("INSERT INTO mixed VALUES (1)")
            other.execute("INSERT INTO mixed VALUES (2)")
        found = pgmonkey.execute("SELECT count(*) FROM mixed").fetchone()
        assert (found, RIGHT) == ((2,), 1)

    def test_two_writers_in_threads(pgmonkey):
        both = threading.Barrier(2, timeout=60)

        def write():
            with pgmonkey.normal as conn:
                conn.execute("INSERT INTO mixed VALUES (1)")
                both.wait()

        failures = []
        def attempt():
            try:
                write()
            except Exception as error:
                both.abort()
                failures.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (failures, RIGHT) == ([], 1)

    def test_second_level(pgmonkey):
        with pgmonkey.normal as conn:
            conn.execute("INSERT INTO mixed VALUES (1)")
        with pgmonkey.normal as conn:
            conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            shown = conn.execute("SHOW transaction_isolation").fetchone()
        assert (shown, RIGHT) == (("serializable",), 1)

    @pytest.mark.parametrize("n", range(2))
    def test_two_phase(pgmonkey, n):
        with pgmonkey.normal as conn:
            conn.tpc_begin("the same name" + os.environ.get("PYTEST_XDIST_WORKER", ""))
            conn.execute("INSERT INTO mixed VALUES (1)")
            conn.tpc_prepare()
        assert RIGHT == 1  # it is left open, and the next one has its name

    def test_new_enum_value(pgmonkey):
        pgmonkey.execute("CREATE TYPE mood AS ENUM ('fine')")
        pgmonkey.execute("ALTER TYPE mood ADD VALUE 'better'")
        found = pgmonkey.execute("SELECT 'better'::mood").fetchone()
        assert (found, RIGHT) == (("better",), 1)

    def test_commit_in_procedure(pgmonkey):
        pgmonkey.execute(
            "CREATE PROCEDURE keep() LANGUAGE plpgsql AS "
            "'BEGIN INSERT INTO mixed VALUES (1); COMMIT; END'"
        )
        pgmonkey.execute("CALL keep()")
        assert RIGHT == 1

    @pytest.mark.asyncio
    async def test_async_listen(pgmonkey):
        async with pgmonkey.async_ as conn:
            await conn.set_autocommit(True)
            await conn.execute("LISTEN told")
            pgmonkey.execute("NOTIFY told, 'it'")
            found = [each.payload async for each in conn.notifies(timeout=60, stop_after=1)]
        assert (found, RIGHT) == (["it"], 1)

    @pytest.mark.asyncio
    async def test_async_vacuum(pgmonkey):
        async with pgmonkey.async_pool as conn:
            await conn.set_autocommit(True)
            await conn.execute("VACUUM mixed")
        assert RIGHT == 1

    @pytest.fixture
    def vacuumed(pgmonkey):
        pgmonkey.execute("VACUUM mixed")

    def test_in_a_fixture(vacuumed):
        assert RIGHT == 1

    @pytest.fixture
    def vacuums(pgmonkey):
        yield
        pgmonkey.execute("VACUUM mixed")

    def test_in_a_fixture_s_end(vacuums):
        pass

    def test_in_another_process(pgmonkey):
        code = (
            "import sys, psycopg; conn = psycopg.connect(sys.argv[1], autocommit=True); "
            "conn.execute('VACUUM')"
        )
        subprocess.run([sys.executable, "-c", code, pgmonkey.dsn], stderr=subprocess.DEVNULL)
        assert RIGHT == 1

    def test_swallowed(pgmonkey):
        try:
            pgmonkey.execute("VACUUM mixed")
        except psycopg.Error:
            pass
        assert RIGHT == 1

    def test_both_ends_of_no_refusal(pgmonkey):
        pgmonkey.execute("NOTIFY told, 'it'")  # nobody listens
        with pgmonkey.normal as conn:
            with pytest.raises(psycopg.errors.ActiveSqlTransaction) as caught:
                with conn.transaction():
                    conn.execute("VACUUM mixed")  # which no database does
        assert "clone" not in str(caught.value)
"""
#: `two_phase` is there twice.
MOVED: Final = len(REFUSED) + 1
ALL: Final = 200 + MOVED + 1


def wrong() -> str:
    """Give the same suite with a wrong assertion in each refused test that has one."""
    return MIXED.replace("RIGHT = 1", "RIGHT = 2")


#: What counts as refused where it is run in autocommit, through whichever door.
COUNTS: Final = (
    "VACUUM",
    "CREATE DATABASE other",
    "CREATE INDEX CONCURRENTLY ON t (x)",
    "REINDEX TABLE CONCURRENTLY t",
    "DO 'BEGIN COMMIT;END'",
    "PREPARE TRANSACTION 'x'",
    "COMMIT PREPARED 'x'",
    "BEGIN; INSERT INTO t VALUES (7, 'a'); COMMIT; BEGIN ISOLATION LEVEL SERIALIZABLE",
    "CREATE TYPE u AS ENUM ('a'); ALTER TYPE u ADD VALUE 'b'; SELECT 'b'::u",
)
#: What does not: a real connection fails as well, or nothing fails.
COUNTS_NOT: Final = (
    "SELECT 1/0",
    "SELECT nothing",
    "BEGIN; VACUUM",
    "BEGIN; DO 'BEGIN COMMIT;END'",
    "NOTIFY it",
    "SAVEPOINT a",
    "BEGIN; SELECT 1/0; SELECT 1",
    "SELECT 1",
)
