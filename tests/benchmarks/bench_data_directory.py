"""Clones of a large template: in RAM, in a directory, and there with blocks that files share.

    python tests/benchmarks/bench_data_directory.py DIRECTORY [--megabytes 1000] [--rounds 7]

The directory should be on a file system that can share blocks, such as XFS or Btrfs, and every user
must be able to enter it if root runs this. The server needs PostgreSQL 18.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pytest_pgmonkey.testing.databases.commands import connect, create, drop
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

FILL = """
CREATE TABLE large AS
SELECT n, repeat('x', 900) AS filler FROM generate_series(1, %s) n
"""
ROWS_PER_MEGABYTE = 1093
METHODS = ("copy", "clone")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{'data':12}{'method':>8}{'create ms':>12}{'drop ms':>10}{'MB a clone':>12}")
    for place, data in (("RAM", None), ("directory", arguments.directory)):
        with template(data, arguments.megabytes) as (server, admin):
            for method in METHODS:
                admin.execute(f"SET file_copy_method = {method}")
                times = [clone(server, admin) for _ in range(arguments.rounds)]
                made, dropped, used = (median(column) for column in zip(*times, strict=True))
                print(f"{place:12}{method:>8}{made:12.1f}{dropped:10.1f}{used:12.0f}")


@contextmanager
def template(data: Path | None, megabytes: int) -> Iterator[tuple[EmbeddedServer, Connection[Any]]]:
    """Give a server with a database of that size, named `template`."""
    server = EmbeddedServer.start(find_binaries(), data=data)
    try:
        with connect(server.admin_conninfo()) as admin:
            create(admin, "template")
            with connect(server.admin_conninfo("template")) as conn:
                conn.execute(FILL, [megabytes * ROWS_PER_MEGABYTE])
            yield server, admin
    finally:
        server.stop()


def clone(server: EmbeddedServer, admin: Connection[Any]) -> tuple[float, float, float]:
    """Make and drop a clone; gives the milliseconds of both, and how many MB it takes."""
    before, start = shutil.disk_usage(server.home).used, perf_counter()
    create(admin, "clone", "template", unlogged=True)
    made, used = perf_counter(), shutil.disk_usage(server.home).used
    drop(admin, "clone")
    return 1000 * (made - start), 1000 * (perf_counter() - made), (used - before) / 1e6


if __name__ == "__main__":
    main()
