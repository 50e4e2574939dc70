"""A get of a known handle, `get_database_connection(file)`, against a block of that handle.

    python tests/benchmarks/bench_get.py [rounds]

The file is what `pgmonkey pgconfig create` writes, unchanged between two calls; the DSN leads to the
same database. A block is `with handle as conn: conn.execute("select 1")` of type `pool`. Gets and
blocks take turns, the medians of each round's turns are compared, and the figure is the median
ratio.
Goal: at most 0.2.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from psycopg.conninfo import make_conninfo

from pytest_pgmonkey import PGConnectionManager, cli
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.2
TURNS = 300


def template(conninfo: dict[str, str]) -> str:
    """Give the template's text, every comment of it included, with a server's address."""
    text = (Path(cli.__file__).parent / "template.yaml").read_text("utf-8")
    for name in ("host", "port", "dbname", "user"):
        text = re.sub(rf"(?m)^  {name}: .*$", f"  {name}: {conninfo[name]}", text, count=1)
    return text.replace("min_size: 5", "min_size: 1")


def measure(works: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    medians = []
    for _ in range(rounds):
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(TURNS):
            # Each get comes after a block, as it does in a program: the caches are cold.
            for name in ("block", "file", "block", "DSN"):
                work = works[name]
                start = perf_counter()
                work()
                times[name].append(perf_counter() - start)
        medians.append({name: statistics.median(each) for name, each in times.items()})
    return medians


def report(name: str, medians: list[dict[str, float]]) -> bool:
    ratio = statistics.median(each[name] / each["block"] for each in medians)
    get, block = (statistics.median(each[one] for each in medians) * 1e6 for one in (name, "block"))
    print(f"get from a {name}: {ratio:.3f} x a block ({get:.1f} µs against {block:.1f} µs)")
    return ratio <= GOAL


def main(rounds: int = 15) -> int:
    # Two sessions on two processors: the one that shares ours would be three times as fast.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        conninfo = {key: str(value) for key, value in server.conninfo("bench").items()}
        dsn = make_conninfo(**conninfo)
        with tempfile.TemporaryDirectory() as directory, PGConnectionManager() as manager:
            file = Path(directory) / "app.yaml"
            file.write_text(template(conninfo))
            os.utime(file, (0, 0))  # One that has just changed is read again.
            handle = manager.get_database_connection(file, "pool")

            def block() -> None:
                with handle as conn:
                    conn.execute("select 1")

            works: dict[str, Callable[[], object]] = {
                "block": block,
                "file": lambda: manager.get_database_connection(file, "pool"),
                "DSN": lambda: manager.get_database_connection_from_dsn(dsn, "pool"),
            }
            medians = measure(works, rounds)
    finally:
        server.stop()
    return 0 if min([report(name, medians) for name in ("file", "DSN")]) else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
