"""`--pgmonkey-leaks`: what a test has left open is told, with the place where it was borrowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.pytest_runs import QUICK

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = """
    import psycopg
    import pytest

    left = []

    def enter(context):
        left.append(context)
        return context.__enter__()

    def test_pool(pgmonkey):
        enter(pgmonkey.pool)

    def test_changes(pgmonkey):
        enter(pgmonkey.normal.connection()).execute("CREATE TABLE t ()")

    @pytest.mark.pgmonkey(isolation="clone")
    def test_clone(pgmonkey):
        enter(pgmonkey.pool).execute("CREATE TABLE t ()")

    @pytest.mark.asyncio
    async def test_async(pgmonkey):
        left.append(await pgmonkey.async_pool.pool.getconn())

    def test_client(pgmonkey):
        client = psycopg.connect(pgmonkey.dsn, application_name="worker")
        client.execute("CREATE TABLE t ()")
        left.append(client)

    def test_moved(pgmonkey):
        enter(pgmonkey.pool)
        with pgmonkey.normal as conn:
            conn.execute("LISTEN here")

    class TestNothing:
        def test_handles(self, pgmonkey):
            with pgmonkey.pool as conn, pgmonkey.normal.transaction() as tx:
                conn.execute("SELECT 1")
            pgmonkey.execute("CREATE TABLE t ()")

        @pytest.mark.pgmonkey(isolation="clone")
        def test_handles_in_a_clone(self, pgmonkey):
            with pgmonkey.pool as conn:
                conn.execute("CREATE TABLE t ()")

        @pytest.mark.asyncio
        async def test_coroutine(self, pgmonkey):
            async with pgmonkey.async_ as conn:
                await conn.execute("CREATE TABLE t ()")

        def test_open_client(self, pgmonkey):
            client = psycopg.connect(pgmonkey.dsn)
            client.execute("SELECT 1")
            left.append(client)

        def test_failure(self, pgmonkey):
            with pgmonkey.pool as conn:
                conn.execute("CREATE TABLE t ()")
                assert False

        def test_shared(self, pgmonkey_class, pgmonkey):
            pgmonkey_class.execute("CREATE TABLE t ()")

        @pytest.fixture
        def closed(self, pgmonkey):
            with pgmonkey.pool as conn:
                yield conn

        def test_fixture(self, closed):
            closed.execute("CREATE TABLE t ()")

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("reads", ["SELECT 1", "TABLE pg_class"])
        def test_no_lock_is_left(self, pgmonkey, reads):
            pgmonkey.execute("DROP TABLE IF EXISTS t")
            conn = pgmonkey.pool.pool.getconn()  # the pool's own affair
            conn.execute(reads)
            left.append(conn)
"""
NOT_RETURNED = "the connection borrowed at test_warnings.py:{} was not returned"
CHANGES = ", with changes that were not committed"
ENTERED = NOT_RETURNED.format(8)
LEAKS = {
    "test_pool": ENTERED,
    "test_changes": ENTERED + CHANGES,
    "test_clone": ENTERED + CHANGES,
    "test_async": NOT_RETURNED.format(22),
    "test_client": "the connection of 'worker' (process *) was left in a transaction with changes "
    "that were not committed",
    "test_moved": ENTERED,
}


@pytest.fixture(params=[(), ("-n2",)], ids=["one process", "distributed"])
def run_it(
    request: pytest.FixtureRequest, pytester: pytest.Pytester, run: Callable[..., Any]
) -> Callable[..., Any]:
    return lambda *options: run(*request.param, *options)


def test_warnings(pytester: pytest.Pytester, run_it: Callable[..., Any]) -> None:
    """Each is a line of the summary and a section of the report; nothing fails by it."""
    pytester.makepyfile(TESTS)
    result = run_it("-rP", "-p", "no:randomly")
    result.assert_outcomes(passed=14, failed=1)
    result.stdout.fnmatch_lines(["pgmonkey: 6 tests have left connections or changes behind"])
    lines = result.stdout.lines
    for test, told in LEAKS.items():
        result.stdout.fnmatch_lines([f"  test_warnings.py::{test}: {told}"])
        result.stdout.fnmatch_lines(["*- pgmonkey leaks (teardown) -*", told])
    assert sum(line.startswith("  test_warnings.py::") for line in lines) == len(LEAKS)


def test_errors(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    pytester.makepyfile(test_warnings=TESTS)
    result = run("--pgmonkey-leaks=error", "-p", "no:randomly")
    result.assert_outcomes(passed=14, failed=1, errors=len(LEAKS))
    for told in LEAKS.values():
        result.stdout.fnmatch_lines([f"pgmonkey: {told}"])
    assert "behind" not in result.stdout.str()


def test_off_and_an_unknown_word(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    pytester.makepyfile(TESTS)
    assert "was not returned" not in run("--pgmonkey-leaks=off").stdout.str()
    result = pytester.runpytest(*QUICK, "--pgmonkey-leaks=sometimes")
    result.stderr.fnmatch_lines(["*pgmonkey-leaks: 'sometimes' is not one of off, warn, error"])
