"""What the plugin costs a run: where no test uses it, and where one uses the database.

    python tests/benchmarks/bench_start.py [runs]

Each run is a new pytest process on one file, in turns; the figures are differences of the fastest ones, as whatever else
the machine does only adds to them.
Goals: the plugin's load at most 15 ms, a warm start (an earlier run has filled the cache) at most
0.35 s. The first run of all, which fills it, is shown against a bare `initdb` and server start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from pytest_pgmonkey.testing.binaries import find_binaries
from pytest_pgmonkey.testing.embedded import EmbeddedServer

LOAD_GOAL = 0.015
START_GOAL = 0.35
PLAIN = "def test_it(): pass\n"
WITH_DATABASE = "def test_it(pgmonkey): pgmonkey.execute('SELECT 1')\n"
WITH_SCHEMA = "def test_it(pgmonkey): pgmonkey.execute('SELECT FROM item')\n"
RUNS: dict[str, tuple[str, ...]] = {
    "absent": ("test_plain.py", "-p", "no:pgmonkey"),
    "loaded": ("test_plain.py",),
    "database": ("test_database.py",),
    "schema": ("test_schema.py", "--pgmonkey-schema=schema.sql"),
}


def main(runs: int = 15) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fill(directory)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTHON")  # among them the one that forbids compiled files
        }
        environment["XDG_CACHE_HOME"] = str(directory / "cache")
        run(directory, environment, RUNS["loaded"])  # compiles what is not
        cold = run(directory, environment, RUNS["database"])
        run(directory, environment, RUNS["schema"])
        times: dict[str, list[float]] = {name: [] for name in RUNS}
        for _ in range(runs):
            for name, arguments in RUNS.items():
                times[name].append(run(directory, environment, arguments))
    fastest = {name: min(each) for name, each in times.items()}
    return report(fastest, cold)


def fill(directory: Path) -> None:
    (directory / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    (directory / "test_plain.py").write_text(PLAIN)
    (directory / "test_database.py").write_text(WITH_DATABASE)
    (directory / "test_schema.py").write_text(WITH_SCHEMA)
    tables = (f"CREATE TABLE t{n} (id int PRIMARY KEY, name text UNIQUE);\n" for n in range(30))
    (directory / "schema.sql").write_text("CREATE TABLE item ();\n" + "".join(tables))


def run(directory: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> float:
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = perf_counter() - start
    assert done.returncode == 0, done.stdout + done.stderr
    return seconds


def bare_start() -> float:
    """Time `initdb` and the start of its server, with nothing else."""
    server = EmbeddedServer(find_binaries())
    try:
        start = perf_counter()
        server.run_initdb()
        server.start_postmaster()
        return perf_counter() - start
    finally:
        server.stop()


def report(fastest: dict[str, float], cold: float) -> int:
    load = fastest["loaded"] - fastest["absent"]
    start = fastest["database"] - fastest["loaded"]
    schema = fastest["schema"] - fastest["loaded"]
    bare = min(bare_start() for _ in range(3))
    print(f"a run without the plugin: {fastest['absent']:.3f} s")
    print(f"plugin load: {1000 * load:.1f} ms (goal {1000 * LOAD_GOAL:.0f})")
    print(f"warm start: {start:.3f} s, with a schema {schema:.3f} s (goal {START_GOAL})")
    print(f"cold start: {cold - fastest['loaded']:.3f} s; bare initdb and start {bare:.3f} s")
    return 0 if load <= LOAD_GOAL and max(start, schema) <= START_GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
