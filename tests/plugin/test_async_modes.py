"""Every way of running async tests, mixed in one run, with no settings asked of the user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SCOPES = ("function", "class", "module", "package", "session")
MIXED = """
    import asyncio
    import pytest

    async def use(handle, n):
        async with handle as conn:
            await conn.execute("CREATE TABLE t (a int)")
            await conn.execute("INSERT INTO t SELECT generate_series(1, %s)", [n])
        async with handle as conn:
            cursor = await conn.execute("SELECT count(*) FROM t")
            assert await cursor.fetchone() == (n,)
"""


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_pytest_asyncio_loop_scopes(
    pytester: pytest.Pytester, run: Callable[..., Any], mode: str
) -> None:
    """Any loop scope, function to session, in strict and auto mode, beside sync tests."""
    tests = "".join(
        f"""
    @pytest.mark.asyncio(loop_scope="{scope}")
    async def test_{scope}(pgmonkey_connection):
        await use(pgmonkey_connection, 3)

    def test_sync_after_{scope}(pgmonkey_connection):
        with pgmonkey_connection as conn:
            assert conn.execute("SELECT to_regclass('t')").fetchone() == (None,)
"""
        for scope in SCOPES
    )
    pytester.makepyfile(MIXED + tests)
    (pytester.path / "__init__.py").touch()
    run(f"--asyncio-mode={mode}").assert_outcomes(passed=4 * len(SCOPES))


@pytest.mark.parametrize("scope", ["function", "session"])
def test_the_users_own_loop_defaults(
    pytester: pytest.Pytester, run: Callable[..., Any], scope: str
) -> None:
    """asyncio_default_* may be set to anything."""
    pytester.makepyfile(
        MIXED
        + """
    async def test_a(pgmonkey_async_pool):
        await use(pgmonkey_async_pool, 1)

    async def test_b(pgmonkey_async, pgmonkey_async_pool):
        await asyncio.gather(*[one(pgmonkey_async_pool) for _ in range(9)], one(pgmonkey_async))

    async def one(handle):
        async with handle as conn:
            await conn.execute("SELECT pg_sleep(0.001)")
"""
    )
    options = [
        f"asyncio_default_fixture_loop_scope={scope}",
        f"asyncio_default_test_loop_scope={scope}",
        "asyncio_mode=auto",
    ]
    run(*[part for option in options for part in ("-o", option)]).assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_anyio_on_asyncio_and_trio(
    pytester: pytest.Pytester, run: Callable[..., Any], mode: str
) -> None:
    """anyio's plugin works on asyncio; on trio the test is skipped with the reason."""
    pytester.makepyfile(
        MIXED
        + """
    @pytest.mark.anyio
    async def test_any(pgmonkey_connection, anyio_backend):
        await use(pgmonkey_connection, 2)

    @pytest.fixture
    async def filled(pgmonkey_async):
        await use(pgmonkey_async, 4)

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_fixture(filled, pgmonkey_normal, anyio_backend):
        with pgmonkey_normal as conn:
            assert conn.execute("SELECT count(*) FROM t").fetchone() == (4,)
"""
    )
    args = ["-rs"] if mode == "strict" else ["-rs", "-p", "no:asyncio"]
    result = run(*args)
    result.assert_outcomes(passed=3, skipped=2)
    result.stdout.fnmatch_lines(["*psycopg's async connections are asyncio's, not trio's*"])


def test_async_fixtures_of_the_user_on_top(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The user's own async fixtures, of a wider loop than the test's, share the transaction."""
    pytester.makepyfile(
        MIXED
        + """
    import pytest_asyncio

    @pytest_asyncio.fixture(loop_scope="session")
    async def filled(pgmonkey_async_pool):
        await use(pgmonkey_async_pool, 2)

    @pytest.mark.asyncio
    async def test_other_loop(filled, pgmonkey_async_pool, pgmonkey_async):
        for handle in (pgmonkey_async_pool, pgmonkey_async):
            async with handle as conn:
                cursor = await conn.execute("SELECT count(*) FROM t")
                assert await cursor.fetchone() == (2,)
"""
    )
    run().assert_outcomes(passed=1)
