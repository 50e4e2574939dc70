"""Clone isolation: real connections, real commits, a database of the test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

REAL = """
    import asyncio
    import threading
    import psycopg
    import pytest
    import app
"""


def test_real_commits_in_a_database_of_its_own(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Rollback and clone tests mix freely, and none sees what another has written."""
    project.makepyfile(
        REAL
        + """
    clone = pytest.mark.pgmonkey(isolation="clone")

    @clone
    def test_commits(pgmonkey):
        app.add("x")
        with psycopg.connect(pgmonkey.dsn) as other:
            assert other.execute("SELECT name FROM item").fetchall() == [("x",)]
        assert app.names() == ["x"]
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (1,)

    def test_rollback(pgmonkey):
        assert app.names() == []
        app.add("r")

    @clone
    @pytest.mark.asyncio
    async def test_async(pgmonkey_connection):
        await asyncio.gather(*[app.aadd(str(i)) for i in range(20)])
        assert len(await app.anames()) == 20
        async with pgmonkey_connection as conn:
            cursor = await conn.execute("SELECT count(*) FROM item")
            assert await cursor.fetchone() == (20,)

    @clone
    def test_threads():
        threads = [threading.Thread(target=app.add, args=[str(i)]) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(app.names()) == 8

    @clone
    def test_what_a_rolled_back_test_cannot(pgmonkey):
        with pgmonkey.normal as conn:
            conn.autocommit = True
            conn.execute("VACUUM")
            conn.execute("CREATE INDEX CONCURRENTLY ON item (name)")
            conn.execute("LISTEN c")
            with pgmonkey.normal as other:
                other.execute("NOTIFY c, 'hello'")
            assert [n.payload for n in conn.notifies(timeout=60, stop_after=1)] == ["hello"]
        with pgmonkey.normal as conn:
            conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            row = conn.execute("SHOW transaction_isolation").fetchone()
            assert row == ("serializable",)

    @clone
    @pytest.mark.parametrize("n", range(4))
    def test_clean_each_time(pgmonkey, n):
        assert app.names() == []
        app.add("y")

    def test_end(pgmonkey):
        assert app.names() == []
    """
    )
    run().assert_outcomes(passed=11)


@pytest.mark.parametrize("mode", ["strict", "auto"])
@pytest.mark.parametrize("scope", ["function", "session"])
def test_async_pools_end_in_their_own_loop(
    project: pytest.Pytester, run: Callable[..., Any], mode: str, scope: str
) -> None:
    """Whatever the loop scope, pools are closed without a warning, and the clone can go."""
    project.makepyfile(
        REAL
        + f"""
    pytestmark = [
        pytest.mark.pgmonkey(isolation="clone"), pytest.mark.asyncio(loop_scope="{scope}")
    ]
    """
        + """
    @pytest.mark.parametrize("n", range(3))
    async def test_it(pgmonkey_async_pool, pgmonkey_async, n):
        await app.aadd("x")
        async with pgmonkey_async_pool as conn, pgmonkey_async as other:
            await conn.execute("INSERT INTO item (name) VALUES ('y')")
            await conn.commit()
            cursor = await other.execute("SELECT count(*) FROM item")
            assert await cursor.fetchone() == (2,)
    """
    )
    run(f"--asyncio-mode={mode}").assert_outcomes(passed=3)


def test_anyio_clones(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The same under anyio's runner."""
    project.makepyfile(
        REAL
        + """
    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    @pytest.mark.parametrize("n", range(2))
    async def test_it(pgmonkey_async_pool, anyio_backend, n):
        await app.aadd("x")
        assert await app.anames() == ["x"]
    """
    )
    run("--pgmonkey-isolation=clone").assert_outcomes(passed=2)


def test_a_clone_in_which_nothing_was_written_serves_again(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Tests that only read share one clone."""
    project.makepyfile(
        """
        import pytest
        import app

        pytestmark = pytest.mark.pgmonkey(isolation="clone")
        names = set()

        @pytest.mark.parametrize("n", range(4))
        def test_reads(pgmonkey, n):
            names.add(pgmonkey.execute("SELECT current_database()").fetchone())
            assert app.names() == []
            assert len(names) == 1

        def test_writes(pgmonkey):
            app.add("x")

        def test_is_another(pgmonkey):
            assert pgmonkey.execute("SELECT current_database()").fetchone() not in names
        """
    )
    run().assert_outcomes(passed=6)


def test_unblocked_data_is_in_the_clones(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """What a session fixture has prepared, every clone has too."""
    project.makepyfile(
        """
        import pytest
        import app

        @pytest.mark.pgmonkey(isolation="clone")
        def test_before(pgmonkey):
            assert app.names() == []

        @pytest.fixture(scope="session")
        def seeded(pgmonkey_database):
            with pgmonkey_database.unblock():
                app.add("seed")

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(seeded, pgmonkey):
            assert app.names() == ["seed"]

        def test_rollback(seeded, pgmonkey):
            assert app.names() == ["seed"]
        """
    )
    run().assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ("NOCREATEDB", "*cannot be copied*role with CREATEDB*"),
        ("CREATEDB", "*cannot be copied while others are connected*1 other session*close those*"),
    ],
)
def test_a_database_in_use_cannot_be_copied(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    pg_server: EmbeddedServer,
    database: str,
    right: str,
    message: str,
) -> None:
    """The error says that others are connected, or that the role may not."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.pgmonkey(isolation="clone")
        def test_it(pgmonkey):
            pass
        """
    )
    with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as other:
        role = pg_server.conninfo(database)["user"]
        other.execute(f"ALTER ROLE {role} {right}")
        try:
            result = run(f"--pgmonkey-config={config_file}", "--pgmonkey-database=existing")
        finally:
            other.execute(f"ALTER ROLE {role} NOCREATEDB")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    assert "Traceback" not in result.stdout.str()


def test_workers_share_a_server_and_no_clone(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Under pytest-xdist every worker clones its own database."""
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import pytest
        import app

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("n", range(6))
        def test_it(pgmonkey, n):
            app.add(str(n))
            assert app.names() == [str(n)]
        """
    )
    run("-n2").assert_outcomes(passed=6)
