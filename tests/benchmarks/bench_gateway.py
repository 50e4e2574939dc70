"""Clients that join the test through the gateway, against the same clients connected directly.

    python tests/benchmarks/bench_gateway.py [--rounds 40]

The client is in the pytest process, where its work and the gateway's share one interpreter, and in
another process, while the pytest process waits. The rivals take turns round by round; the figure is
the ratio of the medians. Last comes how long a client waits while the pytest process computes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MANY = 100_000
SELECT = "SELECT 1"
ROWS = "SELECT * FROM item LIMIT 10000"
COPY_OUT = "COPY item TO STDOUT"
COPY_IN = "COPY fresh FROM STDIN"
BLOCK = "".join(f"{number}\tname {number}\n" for number in range(MANY)).encode()
SCHEMA = f"""
CREATE TABLE item (id int, name text);
INSERT INTO item SELECT n, 'name ' || n FROM generate_series(1, {MANY}) n;
CREATE TABLE visit (id int GENERATED ALWAYS AS IDENTITY, name text);
CREATE TABLE person (id int PRIMARY KEY, name text);
INSERT INTO person VALUES (1, 'p');
"""
SWITCH_INTERVALS = (0.005, 0.0005)  # the first one is Python's own
SAMPLES = 150

Seconds: TypeAlias = float
Timer: TypeAlias = "Callable[[int], Seconds]"


def main() -> None:
    """Run the suite and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        out = run_suite(Path(name), rounds)
    in_process, elsewhere = out["in_process"], out["elsewhere"]
    print(f"{'':34}{'client in pytest':^28}{'in another process':^28}")
    columns = f"{'joined':>10}{'direct':>10}{'ratio':>8}"
    print(f"{'work':28}{'goal':>6}{columns * 2}")
    for work in WORKS:
        print(f"{work.name:28}{work.goal:6.2f}", cells(in_process[work.name]), end="")
        print(cells(elsewhere[work.name]))
    in_process, elsewhere = test_times(out["costs"], ""), test_times(out["costs"], "_other")
    print(f"{'a test of 5 statements':28}{1.5:6.2f}", cells(in_process), cells(elsewhere), sep="")
    print("\nµs; a test: what it takes above one that does nothing\n")
    print("SELECT 1 of another process while pytest computes in pure Python, in µs")
    print(f"{'switch interval':20}{'median':>10}{'p90':>10}{'most':>10}")
    for interval, waits in out["waits"].items():
        p90 = quantiles(waits, n=10)[-1]
        print(
            f"{interval:20}" + "".join(f"{t * 1e6:10.0f}" for t in (median(waits), p90, max(waits)))
        )


def cells(times: tuple[list[Seconds], list[Seconds]]) -> str:
    joined, direct = (median(each) for each in times)
    return f"{joined * 1e6:9.0f}{direct * 1e6:10.0f}{joined / direct:8.2f}"


def test_times(costs: dict[str, list[Seconds]], which: str) -> tuple[list[Seconds], list[Seconds]]:
    ours, theirs, nothing = (
        median(costs[kind + which][len(costs[kind + which]) // 10 :])
        for kind in ("gateway", "hand", "empty")
    )
    return [ours - nothing], [theirs - nothing]


# What is measured: an operation repeated so many times


class Work(NamedTuple):
    """One line of the table; `timer` prepares it on a server and gives what measures it."""

    name: str
    goal: float
    repeat: int
    timer: Callable[[dict[str, Any]], Iterator[Timer]]


def each_time(operation: Callable[[], object]) -> Timer:
    def measure(repeat: int) -> Seconds:
        start = perf_counter()
        for _ in range(repeat):
            operation()
        return (perf_counter() - start) / repeat

    return measure


def connecting(server: dict[str, Any]) -> Iterator[Timer]:
    yield each_time(lambda: psycopg.connect(**server).close())


def executing(query: str, *, prepare: bool) -> Callable[[dict[str, Any]], Iterator[Timer]]:
    def timer(server: dict[str, Any]) -> Iterator[Timer]:
        with psycopg.connect(**server, autocommit=True) as conn:
            yield each_time(lambda: conn.execute(query, prepare=prepare).fetchall())

    return timer


def copying_out(server: dict[str, Any]) -> Iterator[Timer]:
    with psycopg.connect(**server) as conn, conn.cursor() as cursor:

        def copy() -> None:
            with cursor.copy(COPY_OUT) as blocks:
                for _ in blocks:
                    pass

        yield each_time(copy)


def copying_in(server: dict[str, Any]) -> Iterator[Timer]:
    with psycopg.connect(**server) as conn, conn.cursor() as cursor:

        def measure(_: int) -> Seconds:
            cursor.execute("CREATE TABLE fresh (id int, name text)")
            start = perf_counter()
            with cursor.copy(COPY_IN) as copy:
                copy.write(BLOCK)
            end = perf_counter()
            conn.rollback()
            return end - start

        yield measure


def asyncpg_arguments(server: dict[str, Any]) -> dict[str, Any]:
    return {"database" if key == "dbname" else key: value for key, value in server.items()}


def executing_by_asyncpg(query: str, *, prepare: bool) -> Any:
    def timer(server: dict[str, Any]) -> Iterator[Timer]:
        loop = asyncio.new_event_loop()
        run = loop.run_until_complete
        conn = run(asyncpg.connect(**asyncpg_arguments(server)))
        statement = run(conn.prepare(query))

        async def measure(repeat: int) -> Seconds:
            start = perf_counter()
            for _ in range(repeat):
                await (statement.fetch() if prepare else conn.execute(query))
            return (perf_counter() - start) / repeat

        yield lambda repeat: run(measure(repeat))
        run(conn.close())
        loop.close()

    return timer


WORKS = (
    Work("connect", 0.2, 5, connecting),
    Work("SELECT 1, psycopg, simple", 1.4, 50, executing(SELECT, prepare=False)),
    Work("SELECT 1, psycopg, prepared", 1.4, 50, executing(SELECT, prepare=True)),
    Work("SELECT 1, asyncpg, simple", 1.4, 50, executing_by_asyncpg(SELECT, prepare=False)),
    Work("SELECT 1, asyncpg, prepared", 1.4, 50, executing_by_asyncpg(SELECT, prepare=True)),
    Work("10,000 rows, psycopg", 1.25, 1, executing(ROWS, prepare=False)),
    Work("10,000 rows, asyncpg", 1.25, 1, executing_by_asyncpg(ROWS, prepare=True)),
    Work("100,000 rows COPY in", 1.0, 1, copying_in),
    Work("100,000 rows COPY out", 1.3, 1, copying_out),
)


def compare(joined: str, direct: str, rounds: int) -> dict[str, Any]:
    """Measure all of it on both servers in turn."""
    found: dict[str, Any] = {}
    for work in WORKS:
        timers = [work.timer(arguments(dsn)) for dsn in (joined, direct)]
        measures = [next(timer) for timer in timers]
        times: tuple[list[Seconds], list[Seconds]] = ([], [])
        for number in range(rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(measures[which](work.repeat))
        found[work.name] = tuple(each[rounds // 10 :] for each in times)
        for timer in timers:
            next(timer, None)
    return found


def arguments(dsn: str) -> dict[str, Any]:
    """Give what both drivers understand; a time-out of locks makes no difference here."""
    return {key: value for key, value in conninfo_to_dict(dsn).items() if key != "options"}


# In another process


def command(*words: str) -> list[str]:
    return [sys.executable, __file__, "client", *words]


def serve_client(what: str, *words: str) -> None:
    """Be a client in a process of its own."""
    if what == "compare":
        joined, direct, rounds = words
        json.dump(compare(joined, direct, int(rounds)), sys.stdout)
    elif what == "wait":
        (joined,) = words
        with psycopg.connect(joined, autocommit=True) as conn:
            measure = each_time(lambda: conn.execute(SELECT))
            measure(10)
            json.dump([measure(1) for _ in range(SAMPLES)], sys.stdout)
    else:
        serve_tests(*words)


def serve_tests(joined: str, direct: str) -> None:
    """Do what tests ask for by a line each: over a pool, or with a rollback by hand."""
    from psycopg_pool import ConnectionPool

    with ConnectionPool(joined, min_size=1) as pool, psycopg.connect(direct) as conn:
        for line in sys.stdin:
            if line == "gateway\n":
                with pool.connection() as pooled:
                    five(pooled)
            elif line == "hand\n":
                five(conn)
                conn.rollback()
            sys.stdout.write("done\n")
            sys.stdout.flush()


# In pytest


def five(conn: Any) -> None:
    for _ in range(2):
        conn.execute("INSERT INTO visit (name) VALUES ('x')")
        assert conn.execute("SELECT name FROM person WHERE id = 1").fetchone() == ("p",)
    conn.execute("UPDATE person SET name = 'q' WHERE id = 1")


def compute(process: subprocess.Popen[str]) -> list[Seconds]:
    """Be busy until a client has measured; to ask for its end lets other threads work."""
    number = 0
    while process.poll() is None:
        for _ in range(5_000_000):
            number = (number * 31 + 7) % 1_000_003
    assert process.stdout is not None
    waits: list[Seconds] = json.load(process.stdout)
    return waits


SUITE = """
import json, os, subprocess, sys, time
from random import Random
import psycopg, pytest
from psycopg_pool import ConnectionPool
import bench_gateway as bench

ROUNDS, OUT = {rounds}, {{"costs": {{}}, "waits": {{}}}}

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    start = time.perf_counter()
    result = yield
    cost = time.perf_counter() - start
    OUT["costs"].setdefault(item.originalname.removeprefix("test_"), []).append(cost)
    return result

def pytest_unconfigure():
    with open("out.json", "w") as file:
        json.dump(OUT, file)

def pytest_generate_tests(metafunc):
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", range(ROUNDS * 5))

def pytest_collection_modifyitems(items):
    # A test pays for what the one before it has left to do: each kind follows each other one. Those
    # that measure by themselves come first.
    def place(item):
        n = getattr(item, "callspec", None) and item.callspec.params.get("n")
        return -1 if n is None else n, Random(item.nodeid).random()
    items.sort(key=place)

# For every test, empty ones too: the rivals' own fixtures depend on nothing of ours, and what names
# `pgmonkey_dsn` would have a transaction.
@pytest.fixture(scope="session", autouse=True)
def servers(request, pgmonkey_database):
    os.environ["BENCH_DIRECT"] = pgmonkey_database.dsn
    os.environ["BENCH_JOINED"] = request.getfixturevalue("pgmonkey_dsn")

@pytest.fixture(scope="session")
def session_connection():
    with psycopg.connect(os.environ["BENCH_DIRECT"]) as conn:
        yield conn

@pytest.fixture
def by_hand(session_connection):
    yield session_connection
    session_connection.rollback()

@pytest.fixture(scope="session")
def pool(pgmonkey_dsn):
    with ConnectionPool(pgmonkey_dsn, min_size=1) as pool:
        yield pool

@pytest.fixture(scope="session")
def ask():
    command = bench.command("tests", os.environ["BENCH_JOINED"], os.environ["BENCH_DIRECT"])
    pipes = {{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        def ask(word):
            process.stdin.write(word + "\\n")
            assert process.stdout.readline() == "done\\n"
        ask("nothing")
        yield ask
        process.stdin.close()
"""
TESTS = """
import json, subprocess, sys
import pytest
import bench_gateway as bench
from conftest import OUT, ROUNDS

def test_in_process(pgmonkey, pgmonkey_database):
    OUT["in_process"] = bench.compare(pgmonkey.dsn, pgmonkey_database.dsn, ROUNDS)

def test_elsewhere(pgmonkey, pgmonkey_database):
    command = bench.command("compare", pgmonkey.dsn, pgmonkey_database.dsn, str(ROUNDS))
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    OUT["elsewhere"] = json.loads(output)

@pytest.mark.parametrize("interval", bench.SWITCH_INTERVALS)
def test_computing(pgmonkey, interval):
    before = sys.getswitchinterval()
    command = bench.command("wait", pgmonkey.dsn)
    sys.setswitchinterval(interval)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        OUT["waits"][f"{interval * 1000:g} ms"] = bench.compute(process)
    sys.setswitchinterval(before)

def test_empty(n): pass

def test_hand(n, by_hand): bench.five(by_hand)

def test_gateway(n, pool):
    with pool.connection() as conn: bench.five(conn)

def test_empty_other(n, ask): ask("nothing")

def test_hand_other(n, ask): ask("hand")

@pytest.mark.pgmonkey
def test_gateway_other(n, ask): ask("gateway")
"""


def run_suite(directory: Path, rounds: int) -> dict[str, Any]:
    (directory / "conftest.py").write_text(SUITE.format(rounds=rounds))
    (directory / "test_gateway.py").write_text(TESTS)
    (directory / "schema.sql").write_text(SCHEMA)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins would only blur it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "pytest_pgmonkey.testing.plugin", "--pgmonkey-schema=schema.sql"]
    result = subprocess.run(
        command, cwd=directory, env=environment, check=False, stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        sys.exit(result.stdout)
    found: dict[str, Any] = json.loads((directory / "out.json").read_text())
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        serve_client(*sys.argv[2:])
    else:
        main()
