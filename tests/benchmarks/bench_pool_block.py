"""`with pool as conn: conn.execute("select 1")` against the same on psycopg_pool.

    python tests/benchmarks/bench_pool_block.py [rounds]

Both borrow from one pool, in turns of one block each, and the median of each round's turns is
compared; the figure is the median ratio. Goal: at most 1.05.
"""

from __future__ import annotations

import statistics
import sys
from time import perf_counter
from typing import TYPE_CHECKING

from pytest_pgmonkey import PGConnectionManager
from pytest_pgmonkey.testing.binaries import find_binaries
from pytest_pgmonkey.testing.embedded import EmbeddedServer

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
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        config = {**server.config("bench"), "pool_settings": {"min_size": 1, "max_size": 1}}
        with PGConnectionManager() as manager:
            handle = manager.get_database_connection_from_dict(config, "pool")
            pool = handle.pool
            assert pool is not None

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
