"""The fixtures, in a project with no configuration at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def test_no_configuration_at_all(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """One file with a sync and an async test on pgmonkey_connection passes, two runs each."""
    pytester.makepyfile(
        """
        import pytest

        def test_sync(pgmonkey_connection):
            with pgmonkey_connection as conn:
                conn.execute("CREATE TABLE t (a int)")
                conn.execute("INSERT INTO t VALUES (1)")
            with pgmonkey_connection as conn:
                assert conn.execute("SELECT count(*) FROM t").fetchone() == (1,)

        @pytest.mark.asyncio
        async def test_async(pgmonkey_connection):
            async with pgmonkey_connection as conn:
                await conn.execute("CREATE TABLE t (a int)")
                await conn.execute("INSERT INTO t VALUES (1)")
            async with pgmonkey_connection as conn:
                cursor = await conn.execute("SELECT count(*) FROM t")
                assert await cursor.fetchone() == (1,)
        """
    )
    result = run("-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        [
            "pgmonkey: PostgreSQL *, embedded (*), isolation=auto*",
            "*test_sync?normal?*",
            "*test_sync?pool?*",
            "*test_async?async?*",
            "*test_async?async_pool?*",
        ]
    )


def test_all_four_types_share_one_transaction(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """What one type has committed all others see, and the next test sees none of it."""
    pytester.makepyfile(
        """
        import asyncio
        import pytest

        def test_writes(pgmonkey):
            pgmonkey.execute("CREATE TABLE t (a text)")
            with pgmonkey.normal as conn:
                conn.execute("INSERT INTO t VALUES ('normal')")
            with pgmonkey.pool as conn:
                conn.execute("INSERT INTO t VALUES ('pool')")

            async def main():
                async with pgmonkey.async_ as conn:
                    await conn.execute("INSERT INTO t VALUES ('async')")
                async with pgmonkey.async_pool as conn:
                    cursor = await conn.execute("SELECT count(*) FROM t")
                    return await cursor.fetchone()

            assert asyncio.run(main()) == (3,)
            cursor = pgmonkey.execute("SELECT count(*) FROM t WHERE a <> %s", ["x"])
            assert cursor.fetchone() == (3,)

        def test_is_clean(pgmonkey):
            assert pgmonkey.execute("SELECT to_regclass('t')").fetchone() == (None,)

        def test_manager(pgmonkey_manager, pgmonkey):
            pool = pgmonkey_manager.get_database_connection_from_dict(
                {"connection_settings": {"host": "nowhere.invalid", "dbname": "other"}}, "pool"
            )
            with pool as conn:
                conn.execute("CREATE TABLE u (a int)")
            assert pgmonkey.execute("SELECT count(*) FROM u").fetchone() == (0,)
            assert pgmonkey.config["connection_settings"]["dbname"] in pgmonkey.dsn

        def test_single(pgmonkey_normal, pgmonkey_pool):
            from pytest_pgmonkey import Handle
            assert type(pgmonkey_normal) is type(pgmonkey_pool) is Handle

        @pytest.mark.asyncio
        async def test_async_single(pgmonkey_async, pgmonkey_async_pool):
            from pytest_pgmonkey import AsyncHandle
            assert type(pgmonkey_async) is type(pgmonkey_async_pool) is AsyncHandle
            async with pgmonkey_async as conn, pgmonkey_async_pool as other:
                await conn.execute("SELECT 1")
                await other.execute("SELECT 1")
        """
    )
    run().assert_outcomes(passed=5)


def test_the_server_and_the_database(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The session fixtures tell how to reach the database by other means."""
    pytester.makepyfile(
        """
        import psycopg, stat
        from pytest_pgmonkey import PGConnectionManager, load_config

        def test_server(pgmonkey_server, pgmonkey_database):
            assert pgmonkey_server.source == "embedded"
            with psycopg.connect(**pgmonkey_server.conninfo(pgmonkey_database.name)) as conn:
                row = conn.execute(
                    "SELECT current_setting('server_version') LIKE %s || '%%', rolsuper, "
                    "pg_get_userbyid(datdba) = current_user FROM pg_roles, pg_database "
                    "WHERE rolname = current_user AND datname = current_database()",
                    [pgmonkey_server.version],
                ).fetchone()
            assert row == (True, False, True)

        def test_database(pgmonkey_database):
            for where in (pgmonkey_database.dsn, pgmonkey_database.url):
                with psycopg.connect(where) as conn:
                    assert conn.info.dbname == pgmonkey_database.name
            path = pgmonkey_database.config_path
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert load_config(path)["connection_settings"]["dbname"] == pgmonkey_database.name

        def test_unblock(pgmonkey_database):
            with pgmonkey_database.unblock():
                with PGConnectionManager().get_database_connection_from_dict(
                    {"connection_settings": {"host": "nowhere.invalid"}}, "normal"
                ) as conn:
                    conn.execute("CREATE TABLE seeded (a int)")

        def test_sees_it(pgmonkey):
            assert pgmonkey.execute("SELECT count(*) FROM seeded").fetchone() == (0,)
        """
    )
    run().assert_outcomes(passed=4)


def test_a_dsn_waits_no_longer_than_the_test(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A connection past the test's transaction has its wait-timeout as its lock_timeout."""
    pytester.makepyfile(
        """
        import psycopg, pytest

        @pytest.fixture(scope="session", autouse=True)
        def seeded(pgmonkey_database):
            with pgmonkey_database.unblock():
                with psycopg.connect(pgmonkey_database.dsn) as conn:
                    conn.execute("CREATE TABLE seeded (a int); INSERT INTO seeded VALUES (1)")

        def test_rollback(pgmonkey, pgmonkey_database):
            pgmonkey.execute("UPDATE seeded SET a = 2")
            with psycopg.connect(pgmonkey_database.dsn) as conn:
                assert conn.execute("SHOW lock_timeout").fetchone() == ("250ms",)
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    conn.execute("UPDATE seeded SET a = 3")

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(pgmonkey):
            with psycopg.connect(pgmonkey.dsn) as conn:
                assert conn.execute("SHOW lock_timeout").fetchone() == ("0",)
        """
    )
    run("--pgmonkey-wait-timeout=0.25").assert_outcomes(passed=2)


def test_types_by_option_and_marker(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The option and the marker choose the types; the marker wins."""
    pytester.makepyfile(
        """
        import pytest

        def test_option(pgmonkey_connection):
            pass

        @pytest.mark.pgmonkey(types="normal")
        def test_marker(pgmonkey_connection):
            pass

        @pytest.mark.parametrize("pgmonkey_connection", ["pool"], indirect=True)
        def test_own(pgmonkey_connection):
            assert pgmonkey_connection.connection_type == "pool"
        """
    )
    result = run("-v", "--pgmonkey-types=pool")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["*test_option?pool?*", "*test_marker?normal?*", "*test_own?pool?*"]
    )


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("isolation='none'", "*isolation 'none' is not one of auto, rollback, clone*"),
        ("isolated=True", "*takes isolation=, types=, max_queries= and sequences=, not isolated*"),
        (
            "'rollback'",
            "*takes isolation=, types=, max_queries= and sequences=, not a positional argument*",
        ),
    ],
)
def test_a_wrong_marker_fails_its_test(
    pytester: pytest.Pytester, run: Callable[..., Any], marker: str, message: str
) -> None:
    """The marker's mistakes are the test's error, in one line."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.pgmonkey({marker})
        def test_it():
            pass
        """
    )
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*plugin.py*")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ("'threads'", "*test_it: @*: 'threads' is not one of normal, *"),
        ("'pool, threads'", "*'threads' is not one of *"),
        ("[]", "*names no type; there are normal, *"),
        ("5", "*5 is no name of a type, nor a list of them*"),
    ],
)
def test_wrong_types_in_the_marker_stop_the_run(
    pytester: pytest.Pytester, run: Callable[..., Any], types: str, message: str
) -> None:
    """One line that names the test, and no stack of ours."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.pgmonkey(types={types})
        def test_it(pgmonkey_connection):
            pass
        """
    )
    result = run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_markers_add_up(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """Each keyword is that of the nearest marker that has it."""
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.pgmonkey(types="normal")

        @pytest.mark.pgmonkey(isolation="clone")
        class TestIt:
            @pytest.mark.pgmonkey(types=["pool", "pool"])
            def test_types(self, pgmonkey, pgmonkey_connection):
                name, = pgmonkey.execute("SELECT current_database()").fetchone()
                assert "clone" in name
                assert pgmonkey_connection.connection_type == "pool"

            @pytest.mark.pgmonkey
            def test_bare(self, pgmonkey, pgmonkey_connection):
                name, = pgmonkey.execute("SELECT current_database()").fetchone()
                assert "clone" in name
                assert pgmonkey_connection.connection_type == "normal"

            @pytest.mark.pgmonkey(isolation="rollback")
            def test_isolation(self, pgmonkey):
                name, = pgmonkey.execute("SELECT current_database()").fetchone()
                assert "clone" not in name
        """
    )
    run().assert_outcomes(passed=3)


def test_fixtures_are_listed_with_a_useful_line(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """`pytest --fixtures` says in a line what each fixture gives."""
    pytester.makepyfile("def test_nothing(): pass")
    result = run("--fixtures")
    for name in (
        "pgmonkey",
        "pgmonkey_connection",
        "pgmonkey_normal",
        "pgmonkey_pool",
        "pgmonkey_async",
        "pgmonkey_async_pool",
        "pgmonkey_manager",
        "pgmonkey_module",
        "pgmonkey_class",
        "pgmonkey_server",
        "pgmonkey_database",
        "pgmonkey_schema",
    ):
        result.stdout.re_match_lines([rf"{name}( \[\w+ scope\])? -- .*fixtures\.py:\d+"])
    result.stdout.no_fnmatch_line("*no docstring available*pgmonkey*")
