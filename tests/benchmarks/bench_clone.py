"""Per-test cost of both isolations against pytest-postgresql's fixture, interleaved in one run.

    pip install pytest-postgresql
    python tests/benchmarks/bench_clone.py [--rounds 30] [--tables 30]

Each has an embedded server with the same binaries and settings. Cost is the median of set-up + call + teardown, less an empty test's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

CONFTEST = """
import json, os, pathlib, time
from random import Random
import pytest
from pytest_postgresql import factories

COSTS = {}

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    start = time.perf_counter()
    result = yield
    COSTS.setdefault(item.originalname.removeprefix("test_"), []).append(time.perf_counter() - start)
    return result

def pytest_unconfigure():
    with open(os.environ["BENCH_OUT"], "w") as file:
        json.dump(COSTS, file)

postgresql_noproc = factories.postgresql_noproc(
    host=os.environ["BENCH_HOST"], port=5432, user="postgres", load=[pathlib.Path("schema.sql").resolve()]
)
postgresql = factories.postgresql("postgresql_noproc")

def pytest_generate_tests(metafunc):
    metafunc.parametrize("n", range(int(os.environ["BENCH_ROUNDS"])))

def pytest_collection_modifyitems(items):
    # A test pays for what the one before it has left to do: each kind follows each other one.
    items.sort(key=lambda item: (item.callspec.params["n"], Random(item.nodeid).random()))
"""
TESTS = """
import pytest

clone = pytest.mark.pgmonkey(isolation="clone")

def test_empty(n): pass

def write(conn):
    conn.execute("INSERT INTO item0 (name) VALUES ('x')")
    conn.commit()

def test_rival(n, postgresql): write(postgresql)

@clone
def test_clone(n, pgmonkey_normal):
    with pgmonkey_normal as conn: write(conn)

@clone
def test_clone_pool(n, pgmonkey_pool):
    with pgmonkey_pool as conn: write(conn)

def test_rollback(n, pgmonkey_normal):
    with pgmonkey_normal as conn: write(conn)
"""
READ = """
import pytest

def test_empty(n): pass

@pytest.mark.pgmonkey(isolation="clone")
def test_clone_read(n, pgmonkey_normal):
    with pgmonkey_normal as conn: conn.execute("SELECT count(*) FROM item0")
"""


def run(tests: str, rounds: int, tables: int, host: str) -> dict[str, float]:
    """Run a suite; gives the median cost of each kind of test in milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "conftest.py").write_text(CONFTEST)
        (directory / "test_cost.py").write_text(tests)
        (directory / "schema.sql").write_text(
            "".join(
                f"CREATE TABLE item{n} (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);"
                for n in range(tables)
            )
        )
        out = directory / "costs.json"
        environment = {
            **os.environ,
            "BENCH_OUT": str(out),
            "BENCH_ROUNDS": str(rounds),
            "BENCH_HOST": host,
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--pgmonkey-schema=schema.sql"]
        command += ["-o", "asyncio_default_fixture_loop_scope=function"]
        result = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            sys.exit(result.stdout[-4000:] + result.stderr[-2000:])
        costs = json.loads(out.read_text())
    middle = {kind: median(values[1:]) * 1e3 for kind, values in costs.items()}
    return {kind: value - middle["empty"] for kind, value in middle.items()}


def main() -> None:
    """Run the suites and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tables", type=int, default=30)
    arguments = parser.parse_args()
    server = EmbeddedServer.start(find_binaries())
    try:
        host = server.conninfo("postgres")["host"]
        cost = run(TESTS, arguments.rounds, arguments.tables, host)
        read = run(READ, arguments.rounds, arguments.tables, host)["clone_read"]
    finally:
        server.stop()
    rival = cost["rival"]
    print(f"pytest-postgresql: {rival:.1f} ms a test")
    for kind, goal in (("clone", 10), ("clone_pool", 5), ("rollback", 60)):
        print(f"{kind:12}{cost[kind]:8.2f} ms{rival / cost[kind]:8.1f} x faster (goal {goal})")
    print(f"clone, nothing written {read:.2f} ms (goal 2)")


if __name__ == "__main__":
    main()
