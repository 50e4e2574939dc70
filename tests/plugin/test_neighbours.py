"""Beside other plugins: random order, reruns, coverage, time-outs, and all ways to distribute."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.remains import NEEDS_PROC, is_gone
from helpers.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

NEIGHBOURS = ("pytest_cov", "pytest_randomly", "pytest_rerunfailures", "pytest_timeout", "xdist")
MISSING = [name for name in NEIGHBOURS if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs {', '.join(MISSING)}: pip install 'pytest-pgmonkey[dev]'",
)

CONFTEST = """
    import os
    import pytest

    @pytest.fixture(autouse=True)
    def told(request, pgmonkey_server):
        home = pgmonkey_server.conninfo("")["host"]
        with open("told.txt", "a") as file:
            print(request.node.name, os.environ.get("PYTEST_XDIST_WORKER"), home, file=file)
"""
SUITE = """
    import pytest
    import app

    clone = pytest.mark.pgmonkey(isolation="clone")

    @pytest.mark.parametrize("n", range(3))
    def test_rollback(pgmonkey, n):
        assert app.names() == []
        app.add("x")
        assert app.names() == ["x"]

    @clone
    @pytest.mark.parametrize("n", range(3))
    def test_clone(pgmonkey, n):
        assert app.names() == []
        app.add("x")
        assert app.names() == ["x"]

    @pytest.mark.asyncio
    @pytest.mark.parametrize("n", range(3))
    async def test_async_rollback(pgmonkey, n):
        assert await app.anames() == []
        await app.aadd("x")
        assert await app.anames() == ["x"]

    @clone
    @pytest.mark.asyncio
    @pytest.mark.parametrize("n", range(3))
    async def test_async_clone(pgmonkey, n):
        assert await app.anames() == []
        await app.aadd("x")
        assert await app.anames() == ["x"]
"""
IN_THE_SUITE = 12


@pytest.fixture
def suite(project: pytest.Pytester) -> pytest.Pytester:
    """The application, with sync and async tests of both isolations that tell of themselves."""
    project.makeconftest(CONFTEST)
    project.makepyfile(SUITE)
    return project


def told(pytester: pytest.Pytester) -> list[list[str]]:
    """Name, worker and server directory of each test that began."""
    return [line.split() for line in (pytester.path / "told.txt").read_text().splitlines()]


def homes(pytester: pytest.Pytester) -> set[Path]:
    return {Path(home) for _, _, home in told(pytester)}


# pytest-randomly


@pytest.mark.parametrize("workers", [0, 2])
def test_random_order(
    suite: pytest.Pytester,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """Whatever the order, each test finds an empty table."""
    monkeypatch.delenv("PYTEST_ADDOPTS")
    run("--randomly-seed=7", f"-n{workers}").assert_outcomes(passed=IN_THE_SUITE)
    if not workers:
        names = [name for name, _, _ in told(suite)]
        written = ["test_rollback", "test_clone", "test_async_rollback", "test_async_clone"]
        assert [f"{name}[{n}]" for name in written for n in range(3)] != names


# pytest-rerunfailures


def test_a_test_that_is_run_again_begins_anew(
    suite: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """What a failed attempt wrote, or broke, is gone in the next one."""
    suite.makepyfile(
        SUITE
        + """
    attempts = set()

    def fail_once(name):
        first = name not in attempts
        attempts.add(name)
        assert not first

    def test_again(pgmonkey):
        assert app.names() == []
        app.add("x")
        fail_once("rollback")

    @clone
    def test_again_in_a_clone(pgmonkey):
        assert app.names() == []
        app.add("x")
        fail_once("clone")

    @pytest.mark.asyncio
    @pytest.mark.parametrize("isolation", [
        pytest.param("rollback", marks=pytest.mark.pgmonkey(isolation="rollback")),
        pytest.param("clone", marks=clone),
    ])
    async def test_again_async(pgmonkey, isolation):
        assert await app.anames() == []
        await app.aadd("x")
        fail_once("async " + isolation)

    def test_again_without_a_session(pgmonkey):
        if "session" not in attempts:
            with app.normal as conn:
                attempts.add("session")
                conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        assert app.names() == []
    """
    )
    result = run("--reruns=1")
    # The test that lost its session failed twice: in its call, and by what the kit says of it.
    assert result.parseoutcomes() == {"passed": IN_THE_SUITE + 5, "rerun": 6}


def test_a_database_that_is_prepared_again(suite: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A schema that fails once does not fail the test that is run again."""
    suite.makepyfile(
        steps="""
        from pathlib import Path

        def load(conn):
            conn.execute("CREATE TABLE item (name text)")
            tried = Path("tried")
            if not tried.exists():
                tried.touch()
                raise ConnectionError("not yet")
        """
    )
    suite.makeconftest("")
    suite.makeini("[pytest]\npythonpath = .\npgmonkey_schema = steps:load\n")
    result = run("--reruns=1")
    assert result.parseoutcomes() == {"passed": IN_THE_SUITE, "rerun": 1}


def test_a_worker_that_left_is_replaced_and_its_test_run_again(
    suite: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """os._exit in a test, of either isolation: its next attempt is another worker's, and clean."""
    suite.makepyfile(
        SUITE
        + """
    import os
    from pathlib import Path

    @pytest.mark.parametrize("isolation", [
        pytest.param("rollback", marks=pytest.mark.pgmonkey(isolation="rollback")),
        pytest.param("clone", marks=clone),
    ])
    def test_leaves(pgmonkey, isolation):
        assert app.names() == []
        app.add("x")
        left = Path(isolation)
        if not left.exists():
            left.touch()
            os._exit(1)
    """
    )
    result = run("-n2", "--reruns=1")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["rerun"]) == (IN_THE_SUITE + 2, 2)
    assert "failed" not in outcomes
    assert len(homes(suite)) == 1
    assert {worker for _, worker, _ in told(suite)} > {"gw0", "gw1"}


# pytest-cov


@pytest.mark.parametrize("workers", [0, 2])
def test_coverage_sees_all_of_the_application(
    suite: pytest.Pytester, run: Callable[..., Any], workers: int
) -> None:
    """Its lines count, also those that run when it is imported: nothing imports it too early."""
    suite.makepyfile(
        steps="""
        import app

        def load(conn):
            with app.normal as conn:
                conn.execute("CREATE TABLE item (name text)")
        """
    )
    suite.makeini("[pytest]\npythonpath = .\npgmonkey_schema = steps:load\n")
    suite.makeconftest(CONFTEST + "\n    import app\n")
    result = run("--cov=app", "--cov=steps", "--cov-report=term-missing", f"-n{workers}")
    result.assert_outcomes(passed=IN_THE_SUITE)
    result.stdout.re_match_lines([r"app\.py .* 100%$", r"steps\.py .* 100%$"])


# pytest-timeout

# The limits are on the functions alone: on a busy machine a server may take its time to start.
SLOW = (
    SUITE
    + """
    soon = pytest.mark.timeout(1, func_only=True)

    @soon
    def test_slow(pgmonkey):
        app.add("y")
        with app.normal as conn:
            conn.execute("SELECT pg_sleep(600)")

    @clone
    @soon
    def test_slow_clone(pgmonkey):
        app.add("y")
        with app.normal as one, app.pool as other:
            one.execute("LOCK item")
            other.execute("SELECT FROM item")

    @pytest.mark.asyncio
    @soon
    async def test_slow_async(pgmonkey_async):
        await app.aadd("y")
        async with pgmonkey_async as conn:
            await conn.execute("SELECT pg_sleep(600)")

    @clone
    @pytest.mark.asyncio
    @soon
    async def test_slow_async_clone(pgmonkey_async, pgmonkey_async_pool):
        await app.aadd("y")
        async with pgmonkey_async as one, pgmonkey_async_pool as other:
            await one.execute("LOCK item")
            await other.execute("SELECT FROM item")

    test_rollback_after, test_clone_after = test_rollback, test_clone
    test_async_rollback_after, test_async_clone_after = test_async_rollback, test_async_clone
    """
)
TIMED_OUT = "*Timeout (>1.0s) from pytest-timeout*"


def test_timeouts_by_signal(suite: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A test that waits for the server is ended and named; those after it are as clean as ever."""
    suite.makepyfile(SLOW)
    result = run("--timeout-method=signal", "--tb=short", "-v")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) == (2 * IN_THE_SUITE, 4)
    result.stdout.fnmatch_lines([TIMED_OUT] * 4)
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    (home,) = homes(suite)
    assert not home.exists()


@NEEDS_PROC
def test_timeouts_by_thread(suite: pytest.Pytester, run: Callable[..., Any]) -> None:
    """This method ends the whole process, which leaves nothing of the server."""
    suite.makepyfile(SLOW)
    result = run("--timeout-method=thread", "-k", "test_slow_clone or test_rollback")
    assert result.ret != 0
    assert "+ Timeout +" in result.stdout.str() + result.stderr.str()
    (home,) = homes(suite)
    assert wait_until(lambda: is_gone(home, set()))


def test_timeouts_by_thread_in_workers(suite: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A worker that ended itself is replaced, and the next one goes on with the same server."""
    suite.makepyfile(SLOW)
    result = run("-n1", "--timeout-method=thread", "-k", "not slow_async")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) == (2 * IN_THE_SUITE, 2)
    (home,) = homes(suite)
    assert not home.exists()


# pytest-xdist


@pytest.mark.parametrize("dist", ["load", "loadscope", "loadfile", "worksteal"])
def test_distributions(suite: pytest.Pytester, run: Callable[..., Any], dist: str) -> None:
    """Whoever gets which test, there is one server and no test sees another's data."""
    suite.makepyfile(test_one=SUITE, test_two=SUITE)
    run("-n4", "--maxprocesses=2", f"--dist={dist}").assert_outcomes(passed=3 * IN_THE_SUITE)
    assert {worker for _, worker, _ in told(suite)} == {"gw0", "gw1"}
    (home,) = homes(suite)
    assert not home.exists()


@pytest.mark.parametrize("dist", ["load", "worksteal"])
def test_workers_that_leave(suite: pytest.Pytester, run: Callable[..., Any], dist: str) -> None:
    """os._exit in tests costs these tests, no others, whatever was open."""
    leaving = """
    import os

    def test_leaves(pgmonkey):
        app.add("y")
        os._exit(3)

    @clone
    def test_leaves_a_clone(pgmonkey):
        with app.pool:
            os._exit(3)
    """
    suite.makepyfile(SUITE + leaving + "\n    test_rollback_after = test_rollback\n")
    run("-n2", f"--dist={dist}").assert_outcomes(passed=IN_THE_SUITE + 3, failed=2)
    (home,) = homes(suite)
    assert not home.exists()


# Fixtures that raise what pytest does not catch


@pytest.mark.parametrize("mark", ["", 'pytestmark = pytest.mark.pgmonkey(isolation="clone")'])
@pytest.mark.parametrize("error", ["asyncio.CancelledError", "SystemExit", "AssertionError"])
def test_a_fixture_breaks_the_teardown_off(
    project: pytest.Pytester, run: Callable[..., Any], error: str, mark: str
) -> None:
    """pytest calls no other finalizer then; yet each test ends, and so do all its fixtures."""
    project.makepyfile(f"""
    import asyncio
    import app
    import pytest

    {mark}
    ended = []

    @pytest.fixture
    def other():
        yield
        ended.append("other")
        raise {error}("second")

    @pytest.fixture
    def fixture(other, pgmonkey):
        yield
        raise {error}("first")

    @pytest.mark.parametrize("n", [1, 2])
    def test_it(pgmonkey, fixture, n):
        assert ended == ["other"] * (n - 1)
        assert app.names() == []
        app.add("x")

    def test_next(pgmonkey):
        assert app.names() == []
    """)
    result = run("-p", "no:randomly")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*first*", "*second*"])


def test_a_class_fixture_breaks_the_teardown_off(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The data of its class ends with the class, and that of the module stays."""
    project.makepyfile("""
    import app
    import pytest

    @pytest.fixture(scope="module", autouse=True)
    def of_module(pgmonkey_module):
        pgmonkey_module.execute("INSERT INTO item (name) VALUES ('module')")

    @pytest.fixture(scope="class")
    def of_class(pgmonkey_class):
        pgmonkey_class.execute("INSERT INTO item (name) VALUES ('class')")
        yield
        raise SystemExit

    @pytest.mark.usefixtures("of_class")
    class TestIt:
        def test_it(self, pgmonkey):
            assert app.names() == ["class", "module"]

    def test_next(pgmonkey):
        assert app.names() == ["module"]
    """)
    run("-p", "no:randomly").assert_outcomes(passed=2, errors=1)
