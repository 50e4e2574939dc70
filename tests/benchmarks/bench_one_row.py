"""One row rewritten thousands of times in a rolled-back test, against real commits.

    python tests/benchmarks/bench_one_row.py [thousands]

PostgreSQL removes a row's dead versions only once the transaction that wrote them has ended: in a
rolled-back test each update walks past all the earlier ones, in a clone it finds a clean page.
Each line is the time of one update and commit, and its ratio, around that many updates.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

import psycopg

from pytest_pgmonkey.testing.sandbox import Sandbox
from pytest_pgmonkey.testing.sandbox.psycopg_door.connections import SandboxConnection
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

TABLE = "CREATE TABLE counter (id int PRIMARY KEY, n int); INSERT INTO counter VALUES (1, 0)"
SHOWN = 1, 2, 5, 10, 20, 50


def rewrite(conn: Any, times: int) -> float:
    """Give the seconds that one update and its commit take."""
    start = perf_counter()
    for _ in range(times):
        conn.execute("UPDATE counter SET n = n + 1 WHERE id = 1")
        conn.commit()
    return (perf_counter() - start) / times


def measure(conn: Any, thousands: int) -> list[float]:
    """Give the time of an update in each thousand of them."""
    conn.execute(TABLE)
    conn.commit()
    return [rewrite(conn, 1000) for _ in range(thousands)]


def main(thousands: int = 20) -> int:
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        sandbox = Sandbox(server.conninfo("bench"))
        ours = measure(sandbox.lend(SandboxConnection), thousands)
        # While the test's transaction is open, nobody's dead versions can be removed.
        sandbox.close()
        with psycopg.connect(**server.conninfo("bench")) as conn:  # type: ignore[arg-type]
            theirs = measure(conn, thousands)
    finally:
        server.stop()
    print("updates  in a test  committed  ratio")
    for number in (number for number in SHOWN if number <= thousands):
        one, other = ours[number - 1], theirs[number - 1]
        print(f"{number:>3},000 {one * 1e6:>8.0f} us {other * 1e6:>7.0f} us {one / other:>6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
