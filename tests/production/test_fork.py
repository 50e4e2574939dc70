"""Forked children: they open their own connections and leave their parent's alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from helpers.four_types import ASYNC, SYNC

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")

# Python 3.12 warns of forks in a process that has threads, as one with a pool has.
OPTIONS = ("-W", "ignore:This process:DeprecationWarning")


@pytest.fixture
def config_path(make_config: Callable[..., Path]) -> Path:
    return make_config(
        pool_settings={"min_size": 2, "max_size": 4},
        async_pool_settings={"min_size": 2, "max_size": 4},
    )


@pytest.mark.parametrize("type_", SYNC)
def test_child_outside_of_a_block(run_script: Any, config_path: Path, type_: str) -> None:
    """A child uses the inherited handle, and a fresh one, on connections of its own."""
    finished = run_script(
        """
        import os, sys
        from pytest_pgmonkey import PGConnectionManager

        def pid(handle):
            with handle as conn:
                return conn.execute("SELECT pg_backend_pid()").fetchone()[0]

        manager = PGConnectionManager()
        handle = manager.get_database_connection(*sys.argv[1:])
        before = {pid(handle) for _ in range(4)}
        child = os.fork()
        if child == 0:
            mine = {pid(handle) for _ in range(4)}
            assert not mine & before, (mine, before)
            assert manager.get_database_connection(*sys.argv[1:]) is handle
            handle.disconnect()
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        after = {pid(handle) for _ in range(4)}
        if sys.argv[2] == "pool":
            assert after & before, (after, before)
            assert handle.pool.get_stats().get("returns_bad", 0) == 0
        """,
        config_path,
        type_,
        options=OPTIONS,
    )
    finished.assert_clean()


@pytest.mark.parametrize("type_", SYNC)
@pytest.mark.parametrize("way", ["handle", "handle.connection()", "handle.transaction()"])
def test_child_inside_of_a_block(run_script: Any, config_path: Path, type_: str, way: str) -> None:
    """A child that leaves its parent's block neither commits nor rolls back nor closes."""
    finished = run_script(
        f"""
        import os, sys
        from pytest_pgmonkey import PGConnectionManager

        manager = PGConnectionManager()
        handle = manager.get_database_connection(*sys.argv[1:])
        with handle.cursor() as cur:
            cur.execute("CREATE TABLE kept (n int)")

        def main():
            with {way} as conn:
                conn.execute("INSERT INTO kept VALUES (1)")
                child = os.fork()
                if child == 0:
                    with handle.cursor() as cur:
                        assert cur.connection is not conn
                        assert cur.execute("SELECT count(*) FROM kept").fetchone() == (0,)
                    sys.exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                conn.execute("INSERT INTO kept VALUES (2)")

        main()
        with handle.cursor() as cur:
            assert cur.execute("SELECT count(*) FROM kept").fetchone() == (2,)
        """,
        config_path,
        type_,
        options=OPTIONS,
    )
    finished.assert_clean()


@pytest.mark.parametrize("type_", ASYNC)
def test_async_child(run_script: Any, config_path: Path, type_: str) -> None:
    """A child opens a loop and pools of its own; those of its parent go on."""
    finished = run_script(
        """
        import asyncio, os, sys
        from pytest_pgmonkey import PGConnectionManager

        manager = PGConnectionManager()

        async def pids(handle):
            found = set()
            for _ in range(4):
                async with handle as conn:
                    cur = await conn.execute("SELECT pg_backend_pid()")
                    found.add((await cur.fetchone())[0])
            return found

        async def child_main(inherited):
            fresh = await manager.get_database_connection(*sys.argv[1:])
            return await pids(inherited) | await pids(fresh)

        async def main():
            handle = await manager.get_database_connection(*sys.argv[1:])
            before = await pids(handle)
            child = os.fork()
            if child == 0:
                asyncio._set_running_loop(None)
                mine = asyncio.run(child_main(handle))
                assert not mine & before, (mine, before)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            after = await pids(handle)
            assert sys.argv[2] == "async" or after & before, (after, before)

        asyncio.run(main())
        """,
        config_path,
        type_,
        options=OPTIONS,
    )
    finished.assert_clean()


def test_multiprocessing(run_script: Any, config_path: Path) -> None:
    """Worker processes that are forked use the module's handle as it is."""
    finished = run_script(
        """
        import multiprocessing, sys
        from pytest_pgmonkey import PGConnectionManager

        handle = PGConnectionManager().get_database_connection(sys.argv[1], "pool")

        def work(_):
            with handle as conn:
                return conn.execute("SELECT pg_backend_pid()").fetchone()[0]

        before = work(0)
        with multiprocessing.get_context("fork").Pool(3) as processes:
            assert before not in processes.map(work, range(12))
        with handle as conn:
            conn.execute("SELECT 1")
        """,
        config_path,
        options=OPTIONS,
    )
    finished.assert_clean()


def test_locks_that_another_thread_holds(run_script: Any, config_path: Path) -> None:
    """A child does not wait for the locks that threads of its parent held."""
    finished = run_script(
        """
        import os, signal, sys
        from pytest_pgmonkey import PGConnectionManager

        manager = PGConnectionManager()
        handle = manager.get_database_connection(sys.argv[1], "pool")
        with manager._lock, handle._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(20)
        if child == 0:
            raise SystemExit("not reached: the child leaves inside")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """.replace(
            "signal.alarm(20)",
            "signal.alarm(20); "
            "manager.get_database_connection(sys.argv[1], 'pool').test_connection(); os._exit(0)",
        ),
        config_path,
        options=OPTIONS,
    )
    finished.assert_clean()
