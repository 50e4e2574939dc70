"""What the record of a statement costs: the same statement with it and without, in turns.

    python tests/benchmarks/bench_record.py [--rounds 20]

`SELECT 1` in an open transaction of rollback isolation, by a cursor of a sync handle; the fastest round of each counts. Goal: at most 1.5 µs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from pytest_pgmonkey import sources
from pytest_pgmonkey.testing import passage
from pytest_pgmonkey.testing.interception import Interception
from pytest_pgmonkey.testing.kit import Kit
from pytest_pgmonkey.testing.options import resolve

GOAL = 1.5
STATEMENTS = 5000


def seconds(cursor: Any) -> float:
    begin = perf_counter()
    for _ in range(STATEMENTS):
        cursor.execute("SELECT 1")
    return perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        options = resolve(
            lambda option: "embedded" if option.name == "source" else None,
            lambda _: None,
            {},
            rootdir=path,
            called_from=path,
        )
        interception = sources.interceptor = Interception({}, lambda: True, everything=True)
        kit = Kit(options, interception, sys.exit)
        try:
            kit.prepare([])
            kit.begin("rollback")
            best = {None: float("inf"), passage.recorder: float("inf")}
            with kit.handles.make("normal") as conn, conn.cursor() as cursor:
                cursor.execute("CREATE TABLE item ()")
                for _ in range(arguments.rounds):
                    for recorder in best:
                        passage.recorder = recorder
                        best[recorder] = min(best[recorder], seconds(cursor))
            kit.end()
        finally:
            kit.close()
            sources.interceptor = None
    without, with_record = (value / STATEMENTS * 1e6 for value in best.values())
    cost = with_record - without
    print(f"{cost:.2f} µs ({without:.2f} without, {with_record:.2f} with), goal {GOAL}")
    return 0 if cost <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
