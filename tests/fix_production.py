"""What the tests of the production side share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import pytest_asyncio
from helpers.four_types import ALL, Kind

from pytest_pgmonkey import PGConnectionManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer


@pytest.fixture
def config(pg_server: EmbeddedServer, database: str) -> dict[str, Any]:
    """The sections that lead to this test's database."""
    return pg_server.config(database)


@pytest.fixture
def admin(pg_server: EmbeddedServer, database: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection beside those that are tested; the table `t` is there."""
    with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as conn:
        conn.execute("CREATE TABLE t (n int PRIMARY KEY)")
        conn.execute("GRANT ALL ON t TO public")
        yield conn


@pytest.fixture
def rows(admin: psycopg.Connection[Any]) -> Callable[[], list[int]]:
    """What of table `t` others see."""
    return lambda: [n for (n,) in admin.execute("SELECT n FROM t ORDER BY n")]


@pytest.fixture
def sessions(admin: psycopg.Connection[Any]) -> Callable[[], list[int]]:
    """The backends that serve this test's database, the admin's own aside."""
    query = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY pid"
    )
    return lambda: [number for (number,) in admin.execute(query)]


@pytest_asyncio.fixture
async def manager() -> AsyncIterator[PGConnectionManager]:
    async with PGConnectionManager() as manager:
        yield manager


@pytest.fixture(params=ALL)
def kind(
    request: pytest.FixtureRequest, config: dict[str, Any], manager: PGConnectionManager
) -> Kind:
    return Kind(request.param, config, manager)


class Finished:
    """A script that has run."""

    def __init__(self, process: subprocess.CompletedProcess[str], seconds: float) -> None:
        self.code = process.returncode
        self.out = process.stdout
        self.err = process.stderr
        self.seconds = seconds

    def assert_clean(self) -> None:
        assert (self.err, self.code) == ("", 0)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., Finished]:
    """Run a script in a process of its own, with the given arguments."""

    def run(source: str, *args: object, options: tuple[str, ...] = ()) -> Finished:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source), "utf-8")
        command = [sys.executable, *options, str(path), *map(str, args)]
        start = time.monotonic()
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=Path(__file__).parents[1],
            env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        )
        return Finished(process, time.monotonic() - start)

    return run
