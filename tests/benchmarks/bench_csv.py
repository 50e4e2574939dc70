r"""`pgmonkey pgimport` and `pgexport` against psql's `\copy`.

    python tests/benchmarks/bench_csv.py [rows [rounds]]

Whole commands, start of the interpreter included, and `export_csv` and `import_csv` alone, called in
this process; in turns on one private server. The figure is the ratio of the medians. Goals for 1,000,000 rows of 5 columns: an import takes at most 1.15 of
psql's time, an export at most 1.3, and an import with inferred types twice as long as one without;
less than 60 MB, and no more of it for 2,000,000 rows than for 100,000.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import yaml

from pytest_pgmonkey import PGConnectionManager, export_csv, import_csv
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_pgmonkey import CSVResult

IMPORT_GOAL = 1.15
EXPORT_GOAL = 1.3
INFERENCE_GOAL = 2.0
MEMORY_GOAL = 60
FLAT = 1.1
DATABASE = "bench"
TABLE = """
    CREATE TABLE {} (
        id bigint PRIMARY KEY, name text, amount numeric(12, 2), created timestamptz, note text
    )
"""
ROWS = """
    INSERT INTO bench
    SELECT i, 'Customer ' || i, i * 1.25, timestamptz '2024-01-01' + i * interval '1 minute',
           CASE i % 3 WHEN 0 THEN NULL WHEN 1 THEN 'a "quoted", word' ELSE 'a plain one' END
    FROM generate_series(1, {}) AS i
"""
# In the process itself: what the operating system reports of a child counts its parent's pages.
PEAK = """
import re, sys
from pathlib import Path
from pytest_pgmonkey.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
sys.stderr.write(str(int(peak[1]) // 1024))
sys.exit(status)
"""


class Bench:
    def __init__(self, server: EmbeddedServer, directory: Path) -> None:
        self.directory = directory
        conninfo = server.conninfo(DATABASE)
        self.config = directory / "bench.config.yaml"
        self.config.write_text(yaml.safe_dump(server.config(DATABASE)))
        self.psql = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1"]
        self.psql += ["-h", conninfo["host"], "-p", str(conninfo.get("port", 5432))]
        self.psql += ["-U", conninfo["user"], DATABASE]
        self.theirs, self.ours = directory / "theirs.csv", directory / "ours.csv"

    def sql(self, *statements: str) -> None:
        for statement in statements:
            subprocess.run([*self.psql, "-c", statement], check=True)

    def fill(self, rows: int) -> None:
        self.sql("DROP TABLE IF EXISTS bench, copied", TABLE.format("bench"))
        self.sql(TABLE.format("copied"), ROWS.format(rows), "VACUUM ANALYZE bench")

    def copy(self, command: str, path: Path) -> float:
        options = "WITH (FORMAT csv, HEADER)"
        return timed([*self.psql, "-c", rf"\copy {command} '{path}' {options}"])

    def arguments(self, command: str, table: str, option: str) -> list[str]:
        file = ["--connconfig", str(self.config), option, str(self.ours)]
        return [command, "--table", table, *file]

    def export(self) -> tuple[float, float]:
        theirs = self.copy("bench TO", self.theirs)
        return theirs, timed(ours(*self.arguments("pgexport", "bench", "--export_file")))

    def export_call(self) -> tuple[float, float]:
        theirs = self.copy("bench TO", self.theirs)
        return theirs, self.called(export_csv, "bench")

    def import_call(self) -> tuple[float, float]:
        self.sql("TRUNCATE copied")
        theirs = self.copy("copied FROM", self.theirs)
        self.sql("TRUNCATE copied")
        return theirs, self.called(import_csv, "copied")

    def called(self, copy: Callable[..., CSVResult], table: str) -> float:
        with PGConnectionManager() as manager:
            handle = manager.get_database_connection(self.config, "normal")
            start = perf_counter()
            copy(handle, self.ours, table=table)
            return perf_counter() - start

    def import_(self) -> tuple[float, float]:
        self.sql("TRUNCATE copied")
        theirs = self.copy("copied FROM", self.theirs)
        self.sql("TRUNCATE copied")
        return theirs, timed(ours(*self.arguments("pgimport", "copied", "--import_file")))

    def inferred(self) -> tuple[float, float]:
        command = ours(*self.arguments("pgimport", "created", "--import_file"), "--create-table")
        self.sql("DROP TABLE IF EXISTS created")
        plain = timed(command)
        self.sql("DROP TABLE created")
        return plain, timed([*command, "--infer-types"])

    def peaks(self) -> dict[str, int]:
        self.sql("TRUNCATE copied")
        return {
            "export": peak(self.arguments("pgexport", "bench", "--export_file")),
            "import": peak(self.arguments("pgimport", "copied", "--import_file")),
        }


def ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest_pgmonkey", *arguments]


def timed(command: list[str]) -> float:
    start = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


def peak(arguments: list[str]) -> int:
    command = [sys.executable, "-c", PEAK, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stderr)


def compared(
    name: str, rival: str, goal: float, turn: Callable[[], tuple[float, float]], rounds: int
) -> bool:
    # The first turn fills caches.
    times = [turn() for _ in range(rounds + 1)][1:]
    theirs, mine = (statistics.median(each) for each in zip(*times, strict=True))
    ratio = mine / theirs
    print(f"{name}: {ratio:.2f} x {rival} ({mine:.2f} s against {theirs:.2f} s)")
    return ratio <= goal


def memory(bench: Bench) -> bool:
    good = True
    measured = {}
    for rows in (100_000, 2_000_000):
        bench.fill(rows)
        measured[rows] = bench.peaks()
    for name in ("export", "import"):
        few, many = (peaks[name] for peaks in measured.values())
        print(f"{name}: {few} MB for 100,000 rows, {many} MB for 2,000,000")
        good &= many < MEMORY_GOAL and many <= few * FLAT
    return good


def main(rows: int = 1_000_000, rounds: int = 5) -> int:
    if shutil.which("psql") is None:
        sys.exit("needs psql (Debian: postgresql-client)")
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database(DATABASE)
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(server, Path(directory))
            bench.fill(rows)
            good = compared("export", "psql", EXPORT_GOAL, bench.export, rounds)
            assert bench.ours.read_bytes() == bench.theirs.read_bytes()
            good &= compared("import", "psql", IMPORT_GOAL, bench.import_, rounds)
            good &= compared("export_csv", "psql", EXPORT_GOAL, bench.export_call, rounds)
            good &= compared("import_csv", "psql", IMPORT_GOAL, bench.import_call, rounds)
            goal = INFERENCE_GOAL
            good &= compared("inferred types", "a plain import", goal, bench.inferred, rounds)
            if os.path.exists("/proc/self/status"):  # noqa: PTH110
                good &= memory(bench)
    finally:
        server.stop()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
