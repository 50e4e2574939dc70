"""The first run on a machine, with an empty cache, against a bare `initdb` and server start.

    python tests/benchmarks/bench_cold.py [rounds]

Runs of pytest that use an embedded database, less runs that do not, and the bare programs with the same options and in the same place, in turns; the figure is the ratio of the medians. Goal: at most 1.2 x. With a schema, which is loaded and kept for later runs, is shown beside it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_start import RUNS, bare_start, environment_in, fill, run

GOAL = 1.2


def main(rounds: int = 7) -> int:
    times: dict[str, list[float]] = {"loaded": [], "database": [], "schema": []}
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fill(directory)
        environment = environment_in(directory)
        for number in range(rounds + 1):
            for kind, found in times.items():
                shutil.rmtree(directory / "cache", ignore_errors=True)
                seconds = run(directory, environment, RUNS[kind]).seconds
                if number:  # the first round reads from the disk and compiles
                    found.append(seconds)
            bare.append(bare_start())
    without, database, schema = (median(found) for found in times.values())
    rival = median(bare[1:])
    ratio = (database - without) / rival
    print(f"bare initdb and server start: {rival:.3f} s")
    print(f"cold start: {database - without:.3f} s, {ratio:.2f} x (goal {GOAL})")
    print(f"cold start with a schema: {schema - without:.3f} s, {(schema - without) / rival:.2f} x")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
