"""types=all: one test body over all four connection types, through thin views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def test_one_body_over_all_four_types(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A sync body runs over async types and an async body over sync types, alike."""
    pytester.makepyfile(
        """
        import psycopg
        import pytest

        pytestmark = pytest.mark.pgmonkey(types="all")
        ALL = "SELECT a FROM t ORDER BY a"

        def test_sync(pgmonkey_connection):
            handle = pgmonkey_connection
            with handle as conn:
                conn.execute("CREATE TABLE t (a int PRIMARY KEY, b text)")
                with conn.transaction():
                    conn.execute("INSERT INTO t VALUES (1, 'x')")
                with pytest.raises(ZeroDivisionError), conn.transaction():
                    conn.execute("INSERT INTO t VALUES (2, 'x')")
                    1 / 0
                conn.commit()
                conn.execute("INSERT INTO t VALUES (3, 'x')")
                conn.rollback()
                with conn.cursor() as cursor:
                    with cursor.copy("COPY t FROM STDIN") as copy:
                        copy.write_row((4, "copied"))
                        copy.write_row((5, None))
                    cursor.executemany("INSERT INTO t VALUES (%s, %s)", [(6, "m"), (7, "m")])
                    cursor.execute("SELECT a FROM t ORDER BY a")
                    assert [a for a, in cursor] == [1, 4, 5, 6, 7]
                    assert cursor.rowcount == 5
                    assert cursor.execute("SELECT a FROM t ORDER BY a").fetchone() == (1,)
                    assert cursor.fetchmany(2) == [(4,), (5,)]
                    assert cursor.fetchall() == [(6,), (7,)]
                    assert [a for a, in cursor.stream(ALL)] == [1, 4, 5, 6, 7]
                    with cursor.copy("COPY (SELECT a FROM t ORDER BY a) TO STDOUT") as copy:
                        assert "".join(a for a, in copy.rows()) == "14567"
                row = conn.execute("SELECT count(*) FROM t").fetchone()
                assert row == (5,)
                assert conn.info.transaction_status.name == "INTRANS"
            with pytest.raises(psycopg.errors.UniqueViolation), handle as conn:
                conn.execute("INSERT INTO t VALUES (1, 'again')")
            with handle.transaction() as conn:
                conn.execute("DELETE FROM t")
            with handle.cursor() as cursor:
                assert cursor.execute("SELECT count(*) FROM t").fetchone() == (0,)
            assert handle.test_connection().database

        @pytest.mark.asyncio
        async def test_async(pgmonkey_connection):
            handle = pgmonkey_connection
            async with handle as conn:
                await conn.execute("CREATE TABLE t (a int PRIMARY KEY, b text)")
                async with conn.transaction():
                    await conn.execute("INSERT INTO t VALUES (1, 'x')")
                with pytest.raises(ZeroDivisionError):
                    async with conn.transaction():
                        await conn.execute("INSERT INTO t VALUES (2, 'x')")
                        1 / 0
                await conn.commit()
                await conn.execute("INSERT INTO t VALUES (3, 'x')")
                await conn.rollback()
                async with conn.cursor() as cursor:
                    async with cursor.copy("COPY t FROM STDIN") as copy:
                        await copy.write_row((4, "copied"))
                    await cursor.executemany("INSERT INTO t VALUES (%s, %s)", [(6, "m"), (7, "m")])
                    await cursor.execute("SELECT a FROM t ORDER BY a")
                    assert [a async for a, in cursor] == [1, 4, 6, 7]
                    assert [a async for a, in cursor.stream(ALL)] == [1, 4, 6, 7]
                    async with cursor.copy("COPY (SELECT a FROM t ORDER BY a) TO STDOUT") as copy:
                        assert [a async for a, in copy.rows()] == ["1", "4", "6", "7"]
                cursor = await conn.execute("SELECT count(*) FROM t")
                assert await cursor.fetchone() == (4,)
            with pytest.raises(psycopg.errors.UniqueViolation):
                async with handle as conn:
                    await conn.execute("INSERT INTO t VALUES (1, 'again')")
            async with handle.transaction() as conn:
                await conn.execute("DELETE FROM t")
            async with handle.cursor() as cursor:
                await cursor.execute("SELECT count(*) FROM t")
                assert await cursor.fetchone() == (0,)
            assert (await handle.test_connection()).database

        def test_refusal(pgmonkey_connection):
            if type(pgmonkey_connection).__name__ == "BlockingHandle":
                with pytest.raises(AttributeError, match="'_borrow' is not passed on"):
                    pgmonkey_connection._borrow
        """
    )
    result = run("-v")
    result.assert_outcomes(passed=12)
    result.stdout.fnmatch_lines(["*test_sync?async_pool? PASSED*", "*test_async?normal? PASSED*"])
