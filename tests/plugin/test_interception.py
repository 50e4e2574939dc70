"""The application's own production code, unchanged, in the test's transaction."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSAL = "*used outside of a test that has a database*"


def test_an_application_runs_unchanged(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """Import-time handles, threads and tasks all work in the test's transaction."""
    project.makepyfile(
        """
        import asyncio
        import threading
        import pytest
        import app

        def test_sync(pgmonkey):
            app.add("a")
            thread = threading.Thread(target=app.add, args=["b"])
            thread.start()
            thread.join()
            assert app.names() == ["a", "b"]
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)

        def test_nothing_stays(pgmonkey):
            assert app.names() == []

        @pytest.mark.pgmonkey
        def test_marker_alone():
            app.add("c")
            assert app.names() == ["c"]

        @pytest.mark.asyncio
        async def test_async(pgmonkey):
            await asyncio.gather(*[app.aadd(str(i)) for i in range(5)])
            await asyncio.to_thread(app.add, "t")
            assert await app.anames() == ["0", "1", "2", "3", "4", "t"]
            assert app.names() == await app.anames()
        """
    )
    run().assert_outcomes(passed=4)


def test_access_outside_a_test_is_refused(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A handle entered by a test that asks for no database raises at once, naming the ways."""
    project.makepyfile(
        """
        import pytest
        import app

        @pytest.fixture(scope="session")
        def seeded():
            app.add("x")

        def test_plain():
            app.names()

        def test_session_fixture(seeded, pgmonkey):
            pass

        def test_good(pgmonkey):
            assert app.names() == []
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines([REFUSAL])


def test_a_session_fixture_may_unblock(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """What a session fixture writes inside unblock() is there for every test."""
    project.makepyfile(
        """
        import asyncio
        import pytest
        import app

        @pytest.fixture(scope="session", autouse=True)
        def seeded(pgmonkey_database):
            with pgmonkey_database.unblock():
                app.add("seed")
                asyncio.run(app.aadd("aseed"))

        @pytest.mark.parametrize("n", [1, 2])
        def test_it(pgmonkey, n):
            app.add("z")
            assert app.names() == ["aseed", "seed", "z"]
        """
    )
    run().assert_outcomes(passed=2)


def test_fixtures_of_the_user_around_ours(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The user's own function fixtures may use the application, in whatever order they come."""
    project.makepyfile(
        """
        import pytest
        import app

        @pytest.fixture
        def before():
            app.add("before")
            yield
            assert "test" in app.names()

        @pytest.fixture(autouse=True)
        def always():
            pass

        def test_it(before, pgmonkey):
            app.add("test")
            assert app.names() == ["before", "test"]

        @pytest.mark.usefixtures("before", "pgmonkey_pool")
        class TestClass:
            def test_it(self):
                app.add("test")

        @pytest.mark.pgmonkey
        def test_marked(before):
            app.add("test")
        """
    )
    run().assert_outcomes(passed=3)


def test_a_second_database_name_is_refused_or_mapped(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Two files with one dbname lead to one database; another name needs a line of the ini."""
    (project.path / "same.yaml").write_text("connection_settings: {dbname: app, host: b.invalid}\n")
    (project.path / "other.yaml").write_text("connection_settings: {dbname: reporting}\n")
    project.makepyfile(
        """
        from pytest_pgmonkey import PGConnectionManager
        import app

        def test_same(pgmonkey):
            with PGConnectionManager().get_database_connection("same.yaml", "normal") as conn:
                conn.execute("INSERT INTO item (name) VALUES ('same')")
            assert app.names() == ["same"]

        def test_other(pgmonkey):
            with PGConnectionManager().get_database_connection("other.yaml", "normal") as conn:
                conn.execute("INSERT INTO item (name) VALUES ('other')")
            assert app.names() == ["other"]
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*names the database 'reporting'*", "*reporting = primary"])
    run("--pgmonkey-map", "reporting = primary").assert_outcomes(passed=2)


def test_handles_of_a_dsn(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A DSN leads into the test, without a file and in one, by its database's name."""
    (project.path / "dsn.yaml").write_text("connection_settings: {dsn: '${APP_URL}'}\n")
    project.makepyfile(
        """
        import pytest
        from pytest_pgmonkey import PGConnectionManager
        import app

        DSN = "postgresql://me:hunter2@b.invalid/app"
        from_dsn = PGConnectionManager().get_database_connection_from_dsn

        def add(conn):
            return conn.execute("INSERT INTO item (name) VALUES ('dsn') RETURNING name")

        @pytest.mark.asyncio
        async def test_it(pgmonkey, monkeypatch):
            for type_ in ("normal", "pool"):
                with from_dsn(DSN, type_) as conn:
                    add(conn)
            for type_ in ("async", "async_pool"):
                async with from_dsn(DSN, type_) as conn:
                    await add(conn)
            monkeypatch.setenv("APP_URL", DSN)
            with PGConnectionManager().get_database_connection(
                "dsn.yaml", "normal", resolve_env=True
            ) as conn:
                add(conn)
            assert app.names() == ["dsn"] * 5

        def test_another_name(pgmonkey):
            app.names()
            from_dsn("postgresql://me:hunter2@b.invalid/other")
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*DSN names the database 'other', and *"])


def test_a_connection_string_in_place_of_a_name(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Neither the handle nor an error shows the password in a DSN that stands as `dbname`."""
    dsn = "postgresql://me:hunter2@db.example/app"
    (project.path / "dsn.yaml").write_text(f"connection_settings: {{dbname: '{dsn}'}}\n")
    project.makepyfile(
        """
        from pytest_pgmonkey import PGConnectionManager

        def test_handle(pgmonkey):
            get = PGConnectionManager().get_database_connection
            print(get("dsn.yaml", "normal"), get("dsn.yaml", "pool"))

        def test_error(pgmonkey):
            PGConnectionManager().get_database_connection_from_dict(
                {"connection_settings": {"dbname": "other"}}, "normal"
            )
        """
    )
    result = run("-s")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*names the database*there is one test database*"])
    assert "hunter2" not in result.stdout.str()
    result = run("--pgmonkey-config=dsn.yaml")
    result.stdout.fnmatch_lines(["*connection_settings.dbname: holds a whole connection string*"])
    assert "hunter2" not in result.stdout.str()


def test_what_the_file_says_of_a_connection_holds(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Pool sizes, time-outs, session settings and autocommit are the file's."""
    (project.path / "strict.yaml").write_text(
        "connection_settings:\n"
        "  {dbname: app, autocommit: true, application_name: shop, options: -c work_mem=5MB}\n"
        "sync_settings: {search_path: [pg_temp, public], statement_timeout: 4s}\n"
        "pool_settings: {min_size: 1, max_size: 1, timeout: 0.05}\n"
    )
    project.makepyfile(
        """
        import pytest, psycopg_pool
        from pytest_pgmonkey import PGConnectionManager

        def test_it(pgmonkey):
            pool = PGConnectionManager().get_database_connection("strict.yaml", "pool")
            with pool as conn:
                assert conn.autocommit
                for name, value in {
                    "statement_timeout": "4s",
                    "search_path": "pg_temp, public",
                    "application_name": "shop",
                    "work_mem": "5MB",
                }.items():
                    assert conn.execute("SHOW " + name).fetchone() == (value,)
                with pytest.raises(psycopg_pool.PoolTimeout), pool:
                    pass
            assert pgmonkey.execute("SHOW statement_timeout").fetchone() == ("0",)
            assert pgmonkey.execute("SHOW application_name").fetchone() != ("shop",)
        """
    )
    run().assert_outcomes(passed=1)


def test_configure_hooks_are_called(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """`configure` and `aconfigure` prepare the connections of a test too."""
    project.makepyfile(
        """
        import asyncio
        from psycopg.rows import dict_row
        from pytest_pgmonkey import PGConnectionManager

        def configure(conn):
            conn.row_factory = dict_row
            conn.execute("SELECT 1")

        async def aconfigure(conn):
            conn.row_factory = dict_row
            await conn.execute("SELECT 1")

        def test_it(pgmonkey):
            manager = PGConnectionManager(configure=configure, aconfigure=aconfigure)
            with manager.get_database_connection("app.yaml", "pool") as conn:
                assert conn.execute("SELECT 1 AS a").fetchone() == {"a": 1}

            async def main():
                async with await manager.get_database_connection("app.yaml", "async") as conn:
                    return await (await conn.execute("SELECT 1 AS a")).fetchone()

            assert asyncio.run(main()) == {"a": 1}
        """
    )
    run().assert_outcomes(passed=1)


def test_a_pool_opens_one_connection_in_a_clone(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The connection that proves the configuration is the first that is lent."""
    project.makepyfile(
        """
        import asyncio
        import pytest
        from pytest_pgmonkey import PGConnectionManager

        pytestmark = pytest.mark.pgmonkey(isolation="clone")
        made = []

        async def anote(conn):
            made.append(conn)

        def test_sync():
            manager = PGConnectionManager(configure=made.append)
            with manager.get_database_connection("app.yaml", "pool") as conn:
                assert made == [conn]
                assert not conn.autocommit
                with manager.get_database_connection("app.yaml", "pool") as other:
                    assert made == [conn, other]
            made.clear()

        def test_async():
            async def main():
                manager = PGConnectionManager(aconfigure=anote)
                async with manager.get_database_connection("app.yaml", "async_pool") as conn:
                    assert made == [conn]
                    assert not conn.autocommit

            asyncio.run(main())
        """
    )
    run().assert_outcomes(passed=2)


@pytest.mark.parametrize("isolation", ["rollback", "clone"])
def test_pools_are_psycopg_pools(
    project: pytest.Pytester, run: Callable[..., Any], isolation: str
) -> None:
    """In both isolations a handle's pool is open, psycopg_pool's, and anew after it was closed."""
    project.makepyfile(
        f"ISOLATION = {isolation!r}\n"
        + dedent("""
        import pytest
        from psycopg_pool import AsyncConnectionPool, ConnectionPool
        from pytest_pgmonkey import PGConnectionManager, PGMonkeyError

        manager = PGConnectionManager()

        def check(pool):
            assert isinstance(pool, ConnectionPool) and not pool.closed
            with pool.connection() as conn:
                conn.execute("CREATE TABLE made AS SELECT 1")
            assert pool.get_stats()["pool_max"] >= 1
            pool.resize(1, 2)
            assert (pool.min_size, pool.max_size) == (1, 2)
            pool.check()
            pool.drain()
            with pytest.raises(ValueError, match="can't return connection to pool"):
                pool.putconn(conn)
            pool.close()
            assert pool.closed

        def test_own(pgmonkey):
            check(pgmonkey.pool.pool)

        def test_the_applications(pgmonkey):
            check(manager.get_database_connection("app.yaml", "pool").pool)
            pool = manager.get_database_connection("app.yaml", "pool").pool
            with pool, pool.connection() as conn:
                conn.execute("SELECT * FROM made")

        async def acheck(pool):
            assert isinstance(pool, AsyncConnectionPool) and not pool.closed
            async with pool.connection() as conn:
                await conn.execute("CREATE TABLE made AS SELECT 1")
            await pool.resize(1, 2)
            await pool.check()
            await pool.drain()
            with pytest.raises(ValueError, match="can't return connection to pool"):
                await pool.putconn(conn)
            await pool.close()
            assert pool.closed

        @pytest.mark.asyncio
        async def test_own_async(pgmonkey):
            await acheck(pgmonkey.async_pool.pool)

        @pytest.mark.asyncio
        async def test_only_asked_for(pgmonkey):
            assert not pgmonkey.async_pool.pool.closed

        def test_without_a_loop(pgmonkey):
            assert pgmonkey.normal.pool is None
            if ISOLATION == "rollback":
                pgmonkey.async_pool.pool
            else:
                with pytest.raises(PGMonkeyError, match="ask in the loop"):
                    pgmonkey.async_pool.pool

        @pytest.mark.asyncio
        async def test_the_applications_async(pgmonkey):
            await acheck((await manager.get_database_connection("app.yaml", "async_pool")).pool)
            pool = (await manager.get_database_connection("app.yaml", "async_pool")).pool
            async with pool, pool.connection() as conn:
                await conn.execute("SELECT * FROM made")
        """)
    )
    run(f"--pgmonkey-isolation={isolation}").assert_outcomes(passed=6)


def test_a_suite_that_does_not_use_the_kit_is_left_alone(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Any
) -> None:
    """Without option, fixture or marker the production code reaches the server that it names."""
    pytester.makepyfile(
        app="""
        from pytest_pgmonkey import PGConnectionManager

        pool = PGConnectionManager().get_database_connection("server.yaml", "pool")
        with pool as conn:
            conn.execute("CREATE TABLE imported (a int)")
        """,
        test_it="""
        import app

        def test_real():
            with app.pool as conn:
                assert conn.execute("SELECT count(*) FROM imported").fetchone() == (0,)
        """,
    )
    result = run()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("pgmonkey:*")


def test_import_time_access_is_refused_where_the_kit_is_used(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Any
) -> None:
    """An application that writes while it is imported does not reach its real database."""
    pytester.makepyfile(
        app="""
        from pytest_pgmonkey import PGConnectionManager

        with PGConnectionManager().get_database_connection("server.yaml", "normal") as conn:
            conn.execute("CREATE TABLE imported (a int)")
        """,
        test_it="""
        import app

        def test_it(pgmonkey):
            pass
        """,
    )
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([REFUSAL])


def test_intercept_false_leaves_the_application_alone(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Any
) -> None:
    """With intercept=false only the kit's own handles are in the test's transaction."""
    pytester.makepyfile(
        """
        from pytest_pgmonkey import PGConnectionManager

        def test_it(pgmonkey, pgmonkey_manager):
            with PGConnectionManager().get_database_connection("server.yaml", "normal") as conn:
                conn.execute("CREATE TABLE really (a int)")
            assert pgmonkey.execute("SELECT to_regclass('really')").fetchone() == (None,)
            with pgmonkey.normal as conn:
                assert conn.execute("SELECT to_regclass('really')").fetchone() == (None,)
            with pgmonkey_manager.get_database_connection("server.yaml", "pool") as conn:
                assert conn.execute("SELECT to_regclass('really')").fetchone() == (None,)
        """
    )
    run("--pgmonkey-intercept=false").assert_outcomes(passed=1)


def test_a_bad_file_is_judged_where_it_is_read(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A configuration error shows in a test as it would in production."""
    (project.path / "bad.yaml").write_text("connection_settings: {hots: x}\n")
    project.makepyfile(
        """
        import pytest
        from pytest_pgmonkey import ConfigError, PGConnectionManager

        def test_it(pgmonkey):
            with pytest.raises(ConfigError, match="host"):
                PGConnectionManager().get_database_connection("bad.yaml", "normal")
        """
    )
    run().assert_outcomes(passed=1)
