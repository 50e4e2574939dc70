"""`with pool as conn: conn.execute("select 1")` against the same on psycopg_pool, sync and async.

    python tests/benchmarks/bench_pool_block.py [rounds]

Each borrows from a pool of its own, in turns of one block each, and the median of each round's
turns is compared; the figure is the median ratio. Goal: at most 1.05.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pytest_pgmonkey import PGConnectionManager
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

GOAL = 1.05
BLOCKS = 1000
SIZE = {"min_size": 1, "max_size": 1}


def turns() -> list[tuple[int, int]]:
    # Who goes first changes: the second may find the caches warm.
    return [(turn % 2, 1 - turn % 2) for turn in range(BLOCKS)]


def ratio_of(times: tuple[list[float], list[float]]) -> float:
    return statistics.median(times[0]) / statistics.median(times[1])


def measure(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list[float]:
    ratios = []
    for _ in range(rounds):
        times: tuple[list[float], list[float]] = ([], [])
        for turn in turns():
            for index in turn:
                start = perf_counter()
                (ours, theirs)[index]()
                times[index].append(perf_counter() - start)
        ratios.append(ratio_of(times))
    return ratios


async def ameasure(
    ours: Callable[[], Coroutine[Any, Any, None]],
    theirs: Callable[[], Coroutine[Any, Any, None]],
    rounds: int,
) -> list[float]:
    ratios = []
    for _ in range(rounds):
        times: tuple[list[float], list[float]] = ([], [])
        for turn in turns():
            for index in turn:
                start = perf_counter()
                await (ours, theirs)[index]()
                times[index].append(perf_counter() - start)
        ratios.append(ratio_of(times))
    return ratios


def sync_blocks(config: dict[str, Any], dsn: str, rounds: int) -> list[float]:
    with PGConnectionManager() as manager, ConnectionPool(dsn, **SIZE) as pool:
        handle = manager.get_database_connection_from_dict(config, "pool")

        def ours() -> None:
            with handle as conn:
                conn.execute("select 1")

        def theirs() -> None:
            with pool.connection() as conn:
                conn.execute("select 1")

        return measure(ours, theirs, rounds)


async def async_blocks(config: dict[str, Any], dsn: str, rounds: int) -> list[float]:
    async with PGConnectionManager() as manager, AsyncConnectionPool(dsn, **SIZE) as pool:
        handle = await manager.get_database_connection_from_dict(config, "async_pool")

        async def ours() -> None:
            async with handle as conn:
                await conn.execute("select 1")

        async def theirs() -> None:
            async with pool.connection() as conn:
                await conn.execute("select 1")

        return await ameasure(ours, theirs, rounds)


def report(name: str, ratios: list[float]) -> bool:
    ratio = statistics.median(ratios)
    print(f"{name} block: {ratio:.3f} x psycopg_pool ({min(ratios):.3f} to {max(ratios):.3f})")
    return ratio <= GOAL


def main(rounds: int = 15) -> int:
    # Two sessions on two processors: the one that shares ours would be three times as fast.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        config = {**server.config("bench"), "pool_settings": SIZE, "async_pool_settings": SIZE}
        dsn = make_conninfo(**server.conninfo("bench"))
        good = report("pool", sync_blocks(config, dsn, rounds))
        good &= report("async_pool", asyncio.run(async_blocks(config, dsn, rounds)))
    finally:
        server.stop()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
