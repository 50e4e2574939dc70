"""Two pytest-xdist workers against none: tests of 10 ms of SQL in rollback isolation, start-up aside.

    python tests/benchmarks/bench_workers.py [--tests 400] [--rounds 3] [--milliseconds 10]

The SQL is work for the server, not a sleep. Each round runs a suite of two tests and one of all of
them, with both numbers of workers in turns; the figure is the ratio of the differences' medians.
Goal: at least 1.85 x, on 2 cores that do nothing else. Last comes what two workers pay for their
database before their first test: two tests that use it against two that do not.
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

GOAL = 1.85
SET_UP_GOAL = 0.3
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


PLAIN = """
def test_one(): pass
def test_other(): pass
"""


def rows_of_work(seconds: float) -> int:
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
            return round(rows * seconds / median(times))
    finally:
        server.stop()


def run(directory: Path, workers: int, tests: int, file: str = "test_it.py") -> float:
    environment = {**os.environ, "BENCH_TESTS": str(tests)}
    command = [sys.executable, "-m", "pytest", "-q", f"-n{workers}", "--pgmonkey-schema=schema.sql"]
    begin = perf_counter()
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:randomly", file],
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
    parser.add_argument("--milliseconds", type=float, default=10)
    arguments = parser.parse_args()
    rows = rows_of_work(arguments.milliseconds / 1000)
    times: dict[int, list[float]] = {0: [], 2: []}
    set_ups = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "schema.sql").write_text("CREATE TABLE item (n int);\n")
        (directory / "test_it.py").write_text(TESTS.format(work=WORK.format(rows=rows)))
        (directory / "test_plain.py").write_text(PLAIN)
        run(directory, 0, START_UP)  # fills the cache
        for _ in range(arguments.rounds):
            for workers, found in times.items():
                start_up = run(directory, workers, START_UP)
                found.append(run(directory, workers, arguments.tests + START_UP) - start_up)
            set_ups.append(start_up - run(directory, 2, 0, "test_plain.py"))
    alone, shared = (median(found) for found in times.values())
    ratio = alone / shared
    print(f"{arguments.tests} tests of {arguments.milliseconds} ms ({rows} rows), start-up aside:")
    print(f"-n0 {alone:.2f} s, -n2 {shared:.2f} s: {ratio:.2f} x faster (goal {GOAL})")
    print(f"set-up of two workers: {median(set_ups):.2f} s (goal {SET_UP_GOAL})")
    return 0 if ratio >= GOAL and median(set_ups) <= SET_UP_GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
