"""What a test costs in each isolation, and with the fixtures that people have, in one run.

    pip install pytest-postgresql pytest-django
    python tests/benchmarks/bench_costs.py [--rounds 100] [--tables 10 100 1000] [--out docs/pictures/costs.json]

Each test inserts a row and reads one. Cost is the median of set-up, call and teardown, less that of an empty test, in milliseconds. Every round runs one test of each kind, in turn. pytest-postgresql has a server of its own with the same binaries and settings, and a template database, as we do.
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

import psycopg

from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

CONFTEST = """
import json, os, pathlib, time
from random import Random
import psycopg, pytest
from psycopg_pool import ConnectionPool
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
    host=os.environ["PGHOST"], port=5432, user="postgres", load=[pathlib.Path("schema.sql").resolve()]
)
postgresql = factories.postgresql("postgresql_noproc")

@pytest.fixture(scope="session")
def session_connection():
    with psycopg.connect(dbname="by_hand", user="postgres") as conn:
        yield conn

@pytest.fixture
def by_hand(session_connection):
    yield session_connection
    session_connection.rollback()

@pytest.fixture(scope="session")
def foreign_pool(pgmonkey_dsn):
    with ConnectionPool(pgmonkey_dsn, min_size=1, open=True) as pool:
        yield pool

@pytest.fixture(scope="session")
def django_db_setup(django_db_setup, django_db_blocker):
    from django.db import connection
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(pathlib.Path("schema.sql").read_text())

def pytest_generate_tests(metafunc):
    metafunc.parametrize("n", range(int(os.environ["BENCH_ROUNDS"])))

def pytest_collection_modifyitems(items):
    # A test pays for what the one before it has left to do: each kind follows each other one.
    items.sort(key=lambda item: (item.callspec.params["n"], Random(item.nodeid).random()))
"""
TESTS = """
import pytest

clone = pytest.mark.pgmonkey(isolation="clone")

def work(conn):
    conn.execute("INSERT INTO item0 (name) VALUES ('x')")
    assert conn.execute("SELECT count(*) FROM item1").fetchone() == (0,)

def test_empty(n): pass

def test_by_hand(n, by_hand): work(by_hand)

def test_rollback(n, pgmonkey_normal):
    with pgmonkey_normal as conn: work(conn)

def test_rollback_pool(n, pgmonkey_pool):
    with pgmonkey_pool as conn: work(conn)

def test_gateway(n, foreign_pool):
    with foreign_pool.connection() as conn: work(conn)

@clone
def test_clone(n, pgmonkey_normal):
    with pgmonkey_normal as conn: work(conn)

def test_pytest_postgresql(n, postgresql):
    work(postgresql)
    postgresql.commit()

def test_pytest_django(n, db):
    from django.db import connection
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO item0 (name) VALUES ('x')")
        cursor.execute("SELECT count(*) FROM item1")
        assert cursor.fetchone() == (0,)
"""
SETTINGS = """
import os
SECRET_KEY = "none"
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": "django", "USER": "postgres",
    "HOST": os.environ["PGHOST"], "PORT": "5432",
}}
USE_TZ = True
"""


def run(rounds: int, tables: int, server: EmbeddedServer) -> dict[str, float]:
    """Run the suite with so many tables; gives the cost of each kind in milliseconds."""
    schema = "".join(
        f"CREATE TABLE item{n} (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);\n"
        for n in range(tables)
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "conftest.py").write_text(CONFTEST)
        (directory / "test_cost.py").write_text(TESTS)
        (directory / "bench_settings.py").write_text(SETTINGS)
        (directory / "schema.sql").write_text(schema)
        out = directory / "costs.json"
        environment = {
            **os.environ,
            "BENCH_OUT": str(out),
            "BENCH_ROUNDS": str(rounds),
            "PGHOST": server.conninfo("postgres")["host"],
            "DJANGO_SETTINGS_MODULE": "bench_settings",
            "PYTHONPATH": os.pathsep.join([name, os.environ.get("PYTHONPATH", "")]),
        }
        with psycopg.connect(**server.admin_conninfo(), autocommit=True) as conn:
            conn.execute("DROP DATABASE IF EXISTS by_hand")
            conn.execute("CREATE DATABASE by_hand")
        with psycopg.connect(**server.admin_conninfo("by_hand")) as conn:
            conn.execute(schema)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--pgmonkey-schema=schema.sql", "--create-db"]
        command += ["-o", "asyncio_default_fixture_loop_scope=function"]
        result = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            sys.exit(result.stdout[-4000:] + result.stderr[-2000:])
        costs = json.loads(out.read_text())
    middle = {kind: median(values[1:]) * 1e3 for kind, values in costs.items()}
    return {
        kind: round(value - middle["empty"], 2) for kind, value in middle.items() if kind != "empty"
    }


def main() -> None:
    """Run the suites and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tables", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    server = EmbeddedServer.start(find_binaries())
    try:
        costs = {str(n): run(arguments.rounds, n, server) for n in arguments.tables}
    finally:
        server.stop()
    print(f"{'ms a test':22}" + "".join(f"{n + ' tables':>14}" for n in costs))
    for kind in next(iter(costs.values())):
        print(f"{kind:22}" + "".join(f"{row[kind]:14.2f}" for row in costs.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(costs, indent=1) + "\n")


if __name__ == "__main__":
    main()
