"""Per-test cost of rollback isolation against hand-written fixtures, interleaved in one run.

    python tests/benchmarks/bench_rollback.py [--rounds 400]

Cost is the median of set-up + call + teardown of a test, less that of an empty test. Every round
runs one test of each kind, in turn, so that what else the machine does falls on all alike.
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

CONFTEST = """
import json, os, time
import psycopg, pytest, pytest_asyncio

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

# For every test, empty ones too: the rivals' own fixtures depend on nothing of ours.
@pytest.fixture(scope="session", autouse=True)
def dsn(pgmonkey_database):
    os.environ["BENCH_DSN"] = pgmonkey_database.dsn

@pytest.fixture(scope="session")
def session_connection():
    with psycopg.connect(os.environ["BENCH_DSN"]) as conn:
        yield conn

@pytest.fixture
def by_hand(session_connection):
    yield session_connection
    session_connection.rollback()

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_async_connection():
    async with await psycopg.AsyncConnection.connect(os.environ["BENCH_DSN"]) as conn:
        yield conn

@pytest_asyncio.fixture(loop_scope="session")
async def by_hand_async(session_async_connection):
    yield session_async_connection
    await session_async_connection.rollback()
"""
TESTS = """
import pytest

ROUNDS = {rounds}
in_session_loop = pytest.mark.asyncio(loop_scope="session")
INSERT = "INSERT INTO item (name) VALUES ('x')"
# Not from `item`: the rows that were rolled back are still in its pages.
SELECT = "SELECT name FROM person WHERE id = 1"

def _sync(conn):
    conn.execute(INSERT)
    assert conn.execute(SELECT).fetchone() == ('p',)

async def _async(conn):
    await conn.execute(INSERT)
    cursor = await conn.execute(SELECT)
    assert await cursor.fetchone() == ('p',)

def test_empty(n): pass

def test_hand(n, by_hand): _sync(by_hand)

def test_normal(n, pgmonkey_normal):
    with pgmonkey_normal as conn: _sync(conn)

def test_pool(n, pgmonkey_pool):
    with pgmonkey_pool as conn: _sync(conn)

@in_session_loop
async def test_empty_async(n): pass

@in_session_loop
async def test_hand_async(n, by_hand_async): await _async(by_hand_async)

@in_session_loop
async def test_async(n, pgmonkey_async):
    async with pgmonkey_async as conn: await _async(conn)

@in_session_loop
async def test_async_pool(n, pgmonkey_async_pool):
    async with pgmonkey_async_pool as conn: await _async(conn)

KINDS = ["empty", "hand", "normal", "pool", "empty_async", "hand_async", "async", "async_pool"]
"""
ORDER = """
from random import Random

def pytest_generate_tests(metafunc):
    metafunc.parametrize("n", range({rounds}))

def pytest_collection_modifyitems(items):
    # A test pays for what the one before it has left to do: each kind follows each other one.
    items.sort(key=lambda item: (item.callspec.params["n"], Random(item.nodeid).random()))
"""
ROWS = (
    ("rollback, normal", "normal", "hand", "empty", "empty", 0.95),
    ("rollback, pool", "pool", "hand", "empty", "empty", 1.0),
    ("rollback, async", "async", "hand_async", "empty_async", "empty_async", 0.75),
    ("rollback, async_pool", "async_pool", "hand_async", "empty_async", "empty_async", 0.75),
)


def main() -> None:
    """Run the suite and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "conftest.py").write_text(CONFTEST + ORDER.format(rounds=rounds))
        (directory / "test_cost.py").write_text(TESTS.format(rounds=rounds))
        (directory / "schema.sql").write_text(
            "CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY, name text);"
            "CREATE TABLE person (id int PRIMARY KEY, name text);"
            "INSERT INTO person VALUES (1, 'p');"
        )
        out = directory / "costs.json"
        environment = {**os.environ, "BENCH_OUT": str(out)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins would only blur it
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "pytest_asyncio.plugin", "-p", "pytest_pgmonkey.testing.plugin"]
        command += [
            "--pgmonkey-schema=schema.sql",
            "-o",
            "asyncio_default_fixture_loop_scope=function",
        ]
        subprocess.run(
            command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        costs = json.loads(out.read_text())
    cost = {kind: median(values[rounds // 10 :]) * 1e6 for kind, values in costs.items()}
    print(f"{'work':24}{'ours':>9}{'by hand':>9}{'ratio':>8}{'goal':>7}   (µs above an empty test)")
    for label, ours, theirs, base, their_base, goal in ROWS:
        mine, rival = cost[ours] - cost[base], cost[theirs] - cost[their_base]
        print(f"{label:24}{mine:9.0f}{rival:9.0f}{mine / rival:8.2f}{goal:7.2f}")


if __name__ == "__main__":
    main()
