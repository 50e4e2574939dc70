"""Scripts that end without closing anything: at once, with exit code 0, nothing on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.four_types import ALL, ASYNC, POOLS, SYNC

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES: dict[str, dict[str, Any]] = {
    "pool_settings": {"min_size": 5, "max_size": 20},
    "async_pool_settings": {"min_size": 5, "max_size": 20},
}

SYNC_SCRIPT = """
    import sys
    from pytest_pgmonkey import PGConnectionManager

    manager = PGConnectionManager()
    handle = manager.get_database_connection(sys.argv[1], sys.argv[2])
    with handle as conn, conn.cursor() as cur:
        cur.execute("SELECT 'hello'")
        print(cur.fetchone()[0])
"""
ASYNC_SCRIPT = """
    import asyncio, sys
    from pytest_pgmonkey import PGConnectionManager

    async def main():
        manager = PGConnectionManager()
        handle = await manager.get_database_connection(sys.argv[1], sys.argv[2])
        async with handle as conn, conn.cursor() as cur:
            await cur.execute("SELECT 'hello'")
            print((await cur.fetchone())[0])

    asyncio.run(main())
"""


@pytest.fixture
def config_path(make_config: Callable[..., Path]) -> Path:
    return make_config(**SIZES)


@pytest.mark.parametrize("type_", ALL)
def test_tutorial_script(run_script: Any, config_path: Path, type_: str) -> None:
    """The tutorial's script prints its result and ends, for every type."""
    script = ASYNC_SCRIPT if type_ in ASYNC else SYNC_SCRIPT
    finished = run_script(script, config_path, type_, options=("-W", "default"))
    finished.assert_clean()
    assert finished.out == "hello\n"
    assert finished.seconds < 5


@pytest.mark.parametrize("type_", ALL)
def test_script_that_only_asks(run_script: Any, config_path: Path, type_: str) -> None:
    """A script that ends while its pool is still connecting ends as quietly."""
    script = (
        """
        import asyncio, sys
        from pytest_pgmonkey import PGConnectionManager

        manager = PGConnectionManager()

        async def main():
            await manager.get_database_connection(sys.argv[1], sys.argv[2])

        asyncio.run(main())
        """
        if type_ in ASYNC
        else """
        import sys
        from pytest_pgmonkey import PGConnectionManager

        handle = PGConnectionManager().get_database_connection(sys.argv[1], sys.argv[2])
        """
    )
    finished = run_script(script, config_path, type_)
    finished.assert_clean()
    assert finished.seconds < 5


@pytest.mark.parametrize("type_", POOLS)
def test_script_that_fails(run_script: Any, config_path: Path, type_: str) -> None:
    """A script that fails ends with its own error and nothing else, and at once."""
    script = SYNC_SCRIPT if type_ in SYNC else ASYNC_SCRIPT
    finished = run_script(script.replace("SELECT 'hello'", "SELECT 1/0"), config_path, type_)
    assert finished.code == 1
    assert (
        finished.err.strip().splitlines()[-1] == "psycopg.errors.DivisionByZero: division by zero"
    )
    assert finished.err.count("Traceback") == 1
    assert finished.seconds < 5


@pytest.mark.parametrize("ending", ["loop.close()", "pass"])
def test_script_with_a_loop_by_hand(run_script: Any, config_path: Path, ending: str) -> None:
    """A loop that ends without `asyncio.run()`, closed or not, leaves as little behind."""
    finished = run_script(
        f"""
        import asyncio, sys
        from pytest_pgmonkey import PGConnectionManager

        manager = PGConnectionManager()

        async def main():
            handle = await manager.get_database_connection(sys.argv[1], "async_pool")
            async with handle as conn:
                await conn.execute("SELECT 1")

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        {ending}
        """,
        config_path,
    )
    finished.assert_clean()
    assert finished.seconds < 5


def test_pool_is_closed_before_the_interpreter_goes(run_script: Any, config_path: Path) -> None:
    """A pool's threads are ended while that is still possible: Python 3.14 complains later on."""
    finished = run_script(
        """
        import atexit, sys, threading

        # Registered first, called last.
        atexit.register(lambda: print(pool.closed, threading.active_count()))
        from pytest_pgmonkey import PGConnectionManager

        handle = PGConnectionManager().get_database_connection(sys.argv[1], "pool")
        with handle:
            pool = handle.pool
        """,
        config_path,
    )
    finished.assert_clean()
    assert finished.out == "True 1\n"


def test_script_that_is_busy_in_other_threads(run_script: Any, config_path: Path) -> None:
    """Daemon threads that use a pool while the process ends do not keep it, nor a lock."""
    finished = run_script(
        """
        import sys, threading
        from pytest_pgmonkey import PGConnectionManager

        pool = PGConnectionManager().get_database_connection(sys.argv[1], "pool")
        busy = threading.Barrier(5)

        def work():
            with pool as conn:
                busy.wait()
                conn.execute("SELECT pg_sleep(60)")

        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        busy.wait()
        """,
        config_path,
    )
    finished.assert_clean()
    assert finished.seconds < 5


def test_dropped_manager(run_script: Any, config_path: Path) -> None:
    """A manager that is dropped takes its handles, pools and connections with it, at once."""
    finished = run_script(
        """
        import gc, sys, threading, time, weakref
        from pytest_pgmonkey import PGConnectionManager

        def until(condition):
            deadline = time.monotonic() + 10
            while not condition():
                assert time.monotonic() < deadline, threading.enumerate()
                time.sleep(0.005)

        gc.disable()
        for type_ in ("normal", "pool"):
            manager = PGConnectionManager()
            handle = manager.get_database_connection(sys.argv[1], type_)
            with handle as conn:
                conn.execute("SELECT 1")
            del conn
            seen = [weakref.ref(manager), weakref.ref(handle)]
            seen += [weakref.ref(handle.pool)] if handle.pool else []
            del manager, handle
            assert seen[0]() is seen[1]() is None
            # A worker that is connecting holds the pool until it has done.
            until(lambda: not any(each() for each in seen))
        until(lambda: threading.active_count() == 1)
        """,
        config_path,
        options=("-W", "default"),
    )
    finished.assert_clean()


def test_dropped_async_manager(run_script: Any, config_path: Path) -> None:
    """An async manager that is dropped has its loop close what it had opened."""
    finished = run_script(
        """
        import asyncio, sys, weakref
        from pytest_pgmonkey import PGConnectionManager

        async def main():
            manager = PGConnectionManager()
            handle = await manager.get_database_connection(sys.argv[1], "async_pool")
            async with handle as conn:
                await conn.execute("SELECT 1")
            pool, seen = handle.pool, weakref.ref(handle)
            del manager, handle
            assert seen() is None
            async def end():
                while not pool.closed or len(asyncio.all_tasks()) > 2:
                    await asyncio.sleep(0.005)
            await asyncio.wait_for(end(), 10)

        asyncio.run(main())
        """,
        config_path,
        options=("-W", "default"),
    )
    finished.assert_clean()


def test_manager_used_in_one_expression(run_script: Any, config_path: Path) -> None:
    """A handle does not need its manager, nor anybody but its block."""
    finished = run_script(
        """
        import gc, sys
        from pytest_pgmonkey import PGConnectionManager

        for type_ in ("normal", "pool"):
            with PGConnectionManager().get_database_connection(sys.argv[1], type_) as conn:
                gc.collect()
                print(conn.execute("SELECT 1").fetchone()[0])
            with PGConnectionManager().get_database_connection(sys.argv[1], type_).cursor() as cur:
                gc.collect()
                print(cur.execute("SELECT 2").fetchone()[0])
        """,
        config_path,
        options=("-W", "default"),
    )
    finished.assert_clean()
    assert finished.out.split() == ["1", "2", "1", "2"]
