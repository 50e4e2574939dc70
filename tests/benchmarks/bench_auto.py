"""Isolation auto against marks: 1,000 tests, of which 50 need clones, and 1,000 that need none.

    python tests/benchmarks/bench_auto.py [--rounds 5]

Each figure is the fastest whole run of pytest, less one that runs no test, against that of the same tests marked or in rollback isolation; they take turns. Goals: the first run, which finds the 50 by itself, at most 1.25 x the run in which they are marked; a later one, which remembers them, at most 1.02 x; a suite without refusals 1.00 x its run with isolation rollback.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GOALS = {"first": ("marked", 1.25), "later": ("marked", 1.02), "none": ("rollback", 1.0)}
PLUGIN = "pytest_pgmonkey.testing.plugin"
SCHEMA = "CREATE TABLE item (id int PRIMARY KEY, name text);"
TESTS = """
import os
import pytest

MARKED = [pytest.mark.pgmonkey(isolation="clone")] if "BENCH_MARKED" in os.environ else []

@pytest.mark.parametrize("n", [
    pytest.param(n, marks=MARKED if n % 20 == 0 else []) for n in range(1000)
])
def test_it(pgmonkey_pool, n):
    with pgmonkey_pool as conn:
        for id_ in range(5):
            conn.execute("INSERT INTO item VALUES (%s, 'a')", [id_])
        conn.execute("SELECT count(*) FROM item")
    if n % 20 == 0 and "BENCH_NONE" not in os.environ:
        with pgmonkey_pool as conn:
            conn.autocommit = True
            conn.execute("VACUUM item")
"""


def run(directory: Path, *options: str, **variables: str) -> float:
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, *options]
    environment = {**os.environ, **variables, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begin = perf_counter()
    done = subprocess.run(
        command,
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
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    runs: dict[str, Callable[[Path], float]] = {
        "start": lambda place: run(place, "--co"),
        "marked": lambda place: run(place, BENCH_MARKED="1"),
        "first": lambda place: run(place, "--cache-clear"),
        "later": run,  # right after the first one
        "rollback": lambda place: run(place, "--pgmonkey-isolation=rollback", BENCH_NONE="1"),
        "none": lambda place: run(place, "--cache-clear", BENCH_NONE="1"),
    }
    best = dict.fromkeys(runs, float("inf"))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "test_it.py").write_text(TESTS, "utf-8")
        (directory / "schema.sql").write_text(SCHEMA, "utf-8")
        (directory / "pytest.ini").write_text("[pytest]\npgmonkey_schema = schema.sql\n", "utf-8")
        run(directory)  # the schema is saved for later runs
        for _ in range(arguments.rounds):
            for kind, measure in runs.items():
                best[kind] = min(best[kind], measure(directory))
    met = True
    for kind, (rival, goal) in GOALS.items():
        ratio = (best[kind] - best["start"]) / (best[rival] - best["start"])
        met &= ratio <= goal
        print(f"{kind:6} {ratio:.3f} of {rival}: {best[kind]:.2f} s, goal {goal}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
