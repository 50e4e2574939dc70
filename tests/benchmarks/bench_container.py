"""Start of a server in a container against testcontainers' own, interleaved in one run.

    PGMONKEY_TEST_IMAGE=postgres:18 python tests/benchmarks/bench_container.py [--rounds 5]

The time is from asking for the server to its first answered query. `tests/container_image/build`
makes an image without a registry.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from statistics import median
from typing import TYPE_CHECKING

# Their reaper is one more image and one more second, and would not be a fair rival.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"

import psycopg
from testcontainers.community.postgres import PostgresContainer

from pytest_pgmonkey.testing.servers.container.server import ContainerServer

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.3


def ours(image: str) -> Callable[[], object]:
    server = ContainerServer.start(image)
    with psycopg.connect(**server.conninfo("postgres")) as conn:
        conn.execute("SELECT 1")
    return server.stop


def theirs(image: str) -> Callable[[], object]:
    server = PostgresContainer(image, driver=None).start()
    with psycopg.connect(server.get_connection_url()) as conn:
        conn.execute("SELECT 1")
    return server.stop


def measure(start: Callable[[str], Callable[[], object]], image: str) -> float:
    begin = time.perf_counter()
    stop = start(image)
    seconds = time.perf_counter() - begin
    stop()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    image = os.environ.get("PGMONKEY_TEST_IMAGE", "pgmonkey-test-postgres")
    rounds = [(measure(ours, image), measure(theirs, image)) for _ in range(arguments.rounds)]
    own, rival = (median(column) for column in zip(*rounds, strict=True))
    sys.stdout.write(
        f"container start: {own:.2f} s, testcontainers' own {rival:.2f} s\n"
        f"difference: {own - rival:+.2f} s (goal: at most {GOAL:+.2f} s)\n"
    )


if __name__ == "__main__":
    main()
