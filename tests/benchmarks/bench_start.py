"""What the plugin costs a run: where no test uses it, and where one uses the database.

    python tests/benchmarks/bench_start.py [runs]

Each run is a new pytest process on one file, in turns; the figures are differences of the fastest
ones, as whatever else the machine does only adds to them. The load is counted in processor time.
Goals: the plugin's load at most 8 ms, a warm start (an earlier run has filled the cache) at most
0.2 s. The first run of all, which fills it, is shown against a bare `initdb` and server start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

LOAD_GOAL = 0.008
START_GOAL = 0.2
PLAIN = "def test_it(): pass\n"
WITH_DATABASE = "def test_it(pgmonkey): pgmonkey.execute('SELECT 1')\n"
WITH_SCHEMA = "def test_it(pgmonkey): pgmonkey.execute('SELECT FROM item')\n"
# By its module. For each `-p` pytest searches the entry points of all that is installed, as it does
# once in any run, and so it does here in the runs without the plugin too.
PLUGIN = ("-p", "pytest_pgmonkey.testing.plugin")
NOTHING = ("-p", "nothing")
RUNS: dict[str, tuple[str, ...]] = {
    "absent": ("test_plain.py", *NOTHING),
    "loaded": ("test_plain.py", *PLUGIN),
    "database": ("test_database.py", *PLUGIN),
    "schema": ("test_schema.py", *PLUGIN, "--pgmonkey-schema=schema.sql"),
}


def main(runs: int = 15) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fill(directory)
        environment = environment_in(directory)
        for name in ("absent", "loaded", "schema"):  # compiles what is not
            run(directory, environment, RUNS[name])
        shutil.rmtree(directory / "cache")
        cold = run(directory, environment, RUNS["database"])
        run(directory, environment, RUNS["schema"])
        times: dict[str, list[Times]] = {name: [] for name in RUNS}
        for _ in range(runs):
            for name, arguments in RUNS.items():
                times[name].append(run(directory, environment, arguments))
    fastest = {name: Times(*map(min, zip(*each, strict=True))) for name, each in times.items()}
    return report(fastest, cold)


def environment_in(directory: Path) -> dict[str, str]:
    """Give the environment of runs that keep their cache in a directory."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON")  # among them the one that forbids compiled files
    }
    environment["XDG_CACHE_HOME"] = str(directory / "cache")
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins would only blur it
    return environment


def fill(directory: Path) -> None:
    (directory / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    (directory / "nothing.py").touch()
    (directory / "test_plain.py").write_text(PLAIN)
    (directory / "test_database.py").write_text(WITH_DATABASE)
    (directory / "test_schema.py").write_text(WITH_SCHEMA)
    tables = (f"CREATE TABLE t{n} (id int PRIMARY KEY, name text UNIQUE);\n" for n in range(30))
    (directory / "schema.sql").write_text("CREATE TABLE item ();\n" + "".join(tables))


class Times(NamedTuple):
    """What one run took."""

    seconds: float
    processor: float


def run(directory: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> Times:
    command = [sys.executable, "-m", "pytest", *arguments]
    log = directory / "log"
    with log.open("w") as file:
        start = perf_counter()
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - start
    process.returncode = status
    assert status == 0, log.read_text()
    return Times(seconds, usage.ru_utime + usage.ru_stime)


def bare_start() -> float:
    """Time `initdb` and the start of its server, with nothing else."""
    server = EmbeddedServer(find_binaries())
    try:
        start = perf_counter()
        server.make_cluster()
        server.start_postmaster()
        return perf_counter() - start
    finally:
        server.stop()


def report(fastest: dict[str, Times], cold: Times) -> int:
    loaded = fastest["loaded"].seconds
    load = fastest["loaded"].processor - fastest["absent"].processor
    start = fastest["database"].seconds - loaded
    schema = fastest["schema"].seconds - loaded
    bare = min(bare_start() for _ in range(3))
    print(f"a run without the plugin: {fastest['absent'].seconds:.3f} s")
    print(f"plugin load: {1000 * load:.1f} ms (goal {1000 * LOAD_GOAL:.0f})")
    print(f"warm start: {start:.3f} s, with a schema {schema:.3f} s (goal {START_GOAL})")
    print(f"cold start: {cold.seconds - loaded:.3f} s; bare initdb and start {bare:.3f} s")
    return 0 if load <= LOAD_GOAL and max(start, schema) <= START_GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
