"""Memory of a pytest process that uses the kit, over bare pytest with psycopg imported.

    python tests/benchmarks/bench_memory.py [runs]

Each run is a new process, in turns; its resident memory is read when its last test has ended, with all that the kit has open: all four types, and clones. The figure is the difference of the medians. Goal: below 40 MB. Needs Linux and pytest-asyncio.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

GOAL = 40.0
CONFTEST = """
import os, re
from pathlib import Path

def pytest_sessionfinish():
    status = Path("/proc/self/status").read_text()
    Path("memory").write_text(re.search(r"VmRSS:\\s*(\\d+) kB", status)[1])
"""
BARE = """
import psycopg, pytest

@pytest.mark.parametrize("n", range(100))
def test_sync(n): pass

@pytest.mark.asyncio
@pytest.mark.parametrize("n", range(100))
async def test_async(n): pass
"""
KIT = """
import pytest

@pytest.mark.parametrize("n", range(50))
def test_sync(pgmonkey_connection, n):
    with pgmonkey_connection as conn:
        conn.execute("INSERT INTO item VALUES (%s)", [n])

@pytest.mark.asyncio
@pytest.mark.parametrize("n", range(50))
async def test_async(pgmonkey_connection, n):
    async with pgmonkey_connection as conn:
        await conn.execute("INSERT INTO item VALUES (%s)", [n])

@pytest.mark.pgmonkey(isolation="clone")
@pytest.mark.parametrize("n", range(10))
def test_clone(pgmonkey_connection, n):
    with pgmonkey_connection as conn:
        conn.execute("INSERT INTO item VALUES (%s)", [n])
"""
RUNS: dict[str, tuple[str, ...]] = {
    "bare": ("test_bare.py", "-p", "no:pgmonkey"),
    "kit": ("test_kit.py", "--pgmonkey-schema=schema.sql"),
}


def run(directory: Path, arguments: tuple[str, ...]) -> float:
    """Give the megabytes that a run had in memory at its end."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return int((directory / "memory").read_text()) / 1024


def main(runs: int = 5) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ini = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        (directory / "pytest.ini").write_text(ini)
        (directory / "conftest.py").write_text(CONFTEST)
        (directory / "schema.sql").write_text("CREATE TABLE item (n int);\n")
        (directory / "test_bare.py").write_text(BARE)
        (directory / "test_kit.py").write_text(KIT)
        found = [[run(directory, arguments) for arguments in RUNS.values()] for _ in range(runs)]
    bare, kit = (median(column) for column in zip(*found, strict=True))
    print(f"bare pytest with psycopg {bare:.1f} MB, with the kit in use {kit:.1f} MB")
    print(f"the kit: {kit - bare:.1f} MB (goal below {GOAL:.0f})")
    return 0 if kit - bare < GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
