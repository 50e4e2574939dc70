"""What `sequences=restart` costs a test, over `count`: in turns, in one process.

    python tests/benchmarks/bench_sequences.py [--rounds 1000]

A test begins, inserts a row, reads one, and ends. There are 30 sequences; before each test of either kind 0, 1 or 30 of them have moved, which is not measured. `wider` is a test inside the data of a class. The medians count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from pytest_pgmonkey import sources
from pytest_pgmonkey.testing.interception import Interception
from pytest_pgmonkey.testing.kit import Kit
from pytest_pgmonkey.testing.options import resolve

SEQUENCES = 30
MOVES = "SELECT " + ", ".join(f"nextval('s{i}')" for i in range(SEQUENCES))
MOVED = {0: "SELECT 1", 1: "SELECT nextval('s0')", 30: MOVES}


def seconds(kit: Kit, handle: Any, *, restarts: bool) -> float:
    """Run a test, and give what it takes."""
    begin = perf_counter()
    kit.begin("rollback", restarts=restarts)
    with handle as conn:
        conn.execute("INSERT INTO item VALUES (1)")
        conn.execute("SELECT name FROM person WHERE name = 'p'").fetchone()
    kit.end()
    return perf_counter() - begin


def move(kit: Kit, handle: Any, query: str) -> None:
    """Move sequences in a test of their own."""
    kit.begin("rollback")
    with handle as conn:
        conn.execute(query)
    kit.end()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        path = Path(name)
        (path / "schema.sql").write_text(
            "CREATE TABLE item (id int); CREATE TABLE person AS SELECT 'p'::text AS name;"
            + "".join(f"CREATE SEQUENCE s{i};" for i in range(SEQUENCES))
        )
        options = resolve(
            lambda option: "embedded" if option.name == "source" else None,
            lambda _: None,
            {},
            rootdir=path,
            called_from=path,
        )
        interception = sources.interceptor = Interception({}, lambda: True, everything=True)
        kit = Kit(options, interception, sys.exit, restart_wanted=lambda: True)
        stack.callback(kit.close)
        kit.prepare([path / "schema.sql"])
        handle = kit.handles.make("normal")
        print(f"{'':10}{'moved':>6}{'count':>9}{'restart':>9}{'ratio':>8}   (µs a test)")
        for label in ("", "wider"):
            if label:
                stack.enter_context(kit.share(restarts=True)).execute("INSERT INTO item VALUES (2)")
            for number, query in MOVED.items():
                taken: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(rounds):
                    for restarts, values in taken.items():
                        move(kit, handle, query)
                        values.append(seconds(kit, handle, restarts=restarts))
                count, restart = (median(values) * 1e6 for values in taken.values())
                ratio = restart / count
                print(f"{label:10}{number:6}{count:9.0f}{restart:9.0f}{ratio:8.2f}")
    sources.interceptor = None


if __name__ == "__main__":
    main()
