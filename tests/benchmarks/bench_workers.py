"""Two pytest-xdist workers against none: tests of 10 ms of SQL in rollback isolation, start-up aside.

    python tests/benchmarks/bench_workers.py [--tests 400] [--rounds 3]

The SQL is work for the server, not a sleep. Each round runs a suite of two tests and one of all of them, with both numbers of workers in turns; the figure is the ratio of the differences' medians. Goal: at least 1.7 x, on 2 cores that do nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import psycopg

from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

GOAL = 1.7
SECONDS = 0.010
START_UP = 2
WORK = "SELECT sum(sqrt(n)) FROM generate_series(1, {rows}) n"
TESTS = """
import os
import pytest

@pytest.mark.parametrize("n", range(int(os.environ["BENCH_TESTS"])))
def test_it(pgmonkey_pool, n):
    with pgmonkey_pool as conn:
        conn.execute("INSERT INTO item VALUES (%s)", [n])
        conn.execute({work!r})
"""


def rows_of_work() -> int:
    """Find how many rows keep the server busy for that time, alone."""
    server = EmbeddedServer.start(find_binaries())
    try:
        with psycopg.connect(**server.conninfo("postgres")) as conn:
            rows = 100_000
            times = []
            for _ in range(20):
                begin = perf_counter()
                conn.execute(WORK.format(rows=rows))
                times.append(perf_counter() - begin)
            return round(rows * SECONDS / median(times))
    finally:
        server.stop()


def run(directory: Path, workers: int, tests: int) -> float:
    environment = {**os.environ, "BENCH_TESTS": str(tests)}
    command = [sys.executable, "-m", "pytest", "-q", f"-n{workers}", "--pgmonkey-schema=schema.sql"]
    begin = perf_counter()
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:randomly"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = perf_counter() - begin
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = rows_of_work()
    times: dict[int, list[float]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "schema.sql").write_text("CREATE TABLE item (n int);\n")
        (directory / "test_it.py").write_text(TESTS.format(work=WORK.format(rows=rows)))
        run(directory, 0, START_UP)  # fills the cache
        for _ in range(arguments.rounds):
            for workers, found in times.items():
                start_up = run(directory, workers, START_UP)
                found.append(run(directory, workers, arguments.tests + START_UP) - start_up)
    alone, shared = (median(found) for found in times.values())
    ratio = alone / shared
    print(f"{arguments.tests} tests of {1000 * SECONDS:.0f} ms ({rows} rows), start-up aside:")
    print(f"-n0 {alone:.2f} s, -n2 {shared:.2f} s: {ratio:.2f} x faster (goal {GOAL})")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
