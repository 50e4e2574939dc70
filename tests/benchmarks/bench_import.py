"""`from pytest_pgmonkey import PGConnectionManager` against `import psycopg, psycopg_pool, yaml`.

    python tests/benchmarks/bench_import.py [runs]

Each in a new interpreter, in turns; the figure is the ratio of the medians, after what a bare
interpreter takes is taken off both. Goal: at most 1.1.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from time import perf_counter

GOAL = 1.1
STATEMENTS = {
    "bare": "pass",
    "ours": "from pytest_pgmonkey import PGConnectionManager",
    "theirs": "import psycopg, psycopg_pool, yaml",
}


def main(runs: int = 25) -> int:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(runs + 1):
        for name, statement in STATEMENTS.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            times[name].append(perf_counter() - start)
    # The first turn reads the files from the disk and compiles them.
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    ratio = (medians["ours"] - medians["bare"]) / (medians["theirs"] - medians["bare"])
    print(
        f"import: {ratio:.3f} x ({1000 * (medians['ours'] - medians['bare']):.0f} ms "
        f"against {1000 * (medians['theirs'] - medians['bare']):.0f} ms)"
    )
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
