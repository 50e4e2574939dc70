"""`with pool as conn: conn.execute("select 1")` against the same on psycopg_pool.

    python tests/benchmarks/bench_pool_block.py [rounds]

Each borrows from a pool of its own, in turns of one block each, and the median of each round's
turns is compared; the figure is the median ratio. Goal: at most 1.05.
"""

from __future__ import annotations

import os
import statistics
import sys
from time import perf_counter
from typing import TYPE_CHECKING

from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from pytest_pgmonkey import PGConnectionManager
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 1.05
BLOCKS = 1000


def measure(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list[float]:
    ratios = []
    for _ in range(rounds):
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(BLOCKS):
            # Who goes first changes: the second may find the caches warm.
            for index in (turn % 2, 1 - turn % 2):
                start = perf_counter()
                (ours, theirs)[index]()
                times[index].append(perf_counter() - start)
        ratios.append(statistics.median(times[0]) / statistics.median(times[1]))
    return ratios


def main(rounds: int = 15) -> int:
    # Two sessions on two processors: the one that shares ours would be three times as fast.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        config = {**server.config("bench"), "pool_settings": {"min_size": 1, "max_size": 1}}
        dsn = make_conninfo(**server.conninfo("bench"))
        with (
            PGConnectionManager() as manager,
            ConnectionPool(dsn, min_size=1, max_size=1) as pool,
        ):
            handle = manager.get_database_connection_from_dict(config, "pool")

            def ours() -> None:
                with handle as conn:
                    conn.execute("select 1")

            def theirs() -> None:
                with pool.connection() as conn:
                    conn.execute("select 1")

            ratios = measure(ours, theirs, rounds)
    finally:
        server.stop()
    ratio = statistics.median(ratios)
    print(f"pool block: {ratio:.3f} x psycopg_pool ({min(ratios):.3f} to {max(ratios):.3f})")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
