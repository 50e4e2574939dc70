"""A config that leads through PgBouncer: what works there, and what is refused in time."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from helpers.waiting import wait_until

from pytest_pgmonkey.testing.servers.embedded.binaries import run_as
from pytest_pgmonkey.testing.servers.embedded.unprivileged import unprivileged_uid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

PORT = 6432
INI = """\
[databases]
* = host={host} port={port}

[pgbouncer]
pool_mode = {mode}
listen_addr =
listen_port = {listen}
unix_socket_dir = {directory}
auth_type = trust
auth_file = {directory}/users.txt
default_pool_size = 5
server_round_robin = 1
ignore_startup_parameters = extra_float_digits
"""
TYPES = """
    import psycopg
    import pytest

    @pytest.mark.pgmonkey(types="all")
    @pytest.mark.parametrize("number", range(3))
    def test_sync(pgmonkey_connection, number):
        with pgmonkey_connection as conn:
            for end in (conn.rollback, conn.commit):
                for count in range(7):  # more often than psycopg waits before it prepares
                    conn.execute("INSERT INTO item VALUES (%s)", [count])
                end()
        with pgmonkey_connection as conn:
            with pytest.raises(psycopg.errors.UndefinedTable):
                conn.execute("SELECT FROM nothing")
            conn.rollback()
            conn.execute("SET LOCAL work_mem TO '1234kB'")
            assert conn.execute("SHOW work_mem").fetchone() == ("1234kB",)
        with pgmonkey_connection as conn:
            assert conn.execute("SELECT count(*) FROM item").fetchone() == (7,)

    def test_dsn(pgmonkey):
        with psycopg.connect(pgmonkey.dsn) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("number", range(3))
    async def test_async(pgmonkey_connection, number):
        async with pgmonkey_connection as conn:
            for count in range(7):
                await conn.execute("INSERT INTO item VALUES (%s)", [count])
        async with pgmonkey_connection as conn:
            cursor = await conn.execute("SELECT count(*) FROM item")
            assert await cursor.fetchone() == (7,)
"""


@pytest.fixture(params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, pg_server: EmbeddedServer) -> Iterator[Path]:
    """PgBouncer in front of the suite's server; gives the directory of its socket."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("needs PgBouncer (Debian: pgbouncer): install it to run this test")
    server = pg_server.conninfo("")
    directory = pg_server.socket_directory / f"pooler-{request.param}"
    directory.mkdir(mode=0o755)
    uid = unprivileged_uid()  # it refuses to run as root
    if uid is not None:
        os.chown(directory, uid, uid)
    (directory / "users.txt").write_text(f'"{server["user"]}" ""\n', "utf-8")
    ini = INI.format(**server, mode=request.param, listen=PORT, directory=directory)
    (directory / "pgbouncer.ini").write_text(ini, "utf-8")
    log = (directory / "log").open("w")
    with (
        log,
        subprocess.Popen(
            [program, str(directory / "pgbouncer.ini")], stdout=log, stderr=log, **run_as(uid)
        ) as process,
    ):
        try:
            assert wait_until((directory / f".s.PGSQL.{PORT}").exists)
            yield directory
        finally:
            process.terminate()
    shutil.rmtree(directory)


@pytest.fixture
def pooled(pooler: Path, config_file: Path) -> Path:
    """The YAML file of a database, changed so that it leads through the pooler."""
    config = yaml.safe_load(config_file.read_text("utf-8"))
    config["connection_settings"] |= {"host": str(pooler), "port": PORT}
    config_file.write_text(yaml.safe_dump(config), "utf-8")
    return config_file


def test_rollback_in_the_existing_database(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    pooled: Path,
    pg_server: EmbeddedServer,
    database: str,
) -> None:
    """All four types work, and nothing is committed."""
    with psycopg.connect(**pg_server.conninfo(database)) as conn:
        conn.execute("CREATE TABLE item (id int)")
    in_each_session(pooled, "SELECT 1")
    pytester.makepyfile(TYPES)
    for _ in range(2):  # what a run leaves in the server's sessions must not meet the next
        run(f"--pgmonkey-config={pooled}").assert_outcomes(passed=19)
        query = "SELECT statement FROM pg_prepared_statements"
        assert in_each_session(pooled, query) == []
    with psycopg.connect(**pg_server.conninfo(database)) as conn:
        assert conn.execute("SELECT count(*) FROM item").fetchone() == (0,)


def test_sequences_restart(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    pooled: Path,
    pg_server: EmbeddedServer,
    database: str,
) -> None:
    """What one of the server's sessions has fetched ahead is not the next test's, in another."""
    with psycopg.connect(**pg_server.conninfo(database)) as conn:
        conn.execute("CREATE SEQUENCE numbers CACHE 10")
    in_each_session(pooled, "SELECT 1")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(pgmonkey, number):
            for expected in (1, 2):
                assert pgmonkey.execute("SELECT nextval('numbers')").fetchone() == (expected,)
        """
    )
    run(f"--pgmonkey-config={pooled}", "--pgmonkey-sequences=restart").assert_outcomes(passed=6)
    with psycopg.connect(**pg_server.conninfo(database)) as conn:
        assert conn.execute("SELECT nextval('numbers')").fetchone() == (1,)


def in_each_session(pooled: Path, query: str) -> list[Any]:
    """Ask in several of the server's sessions, among which the pooler then goes around."""
    conninfo = yaml.safe_load(pooled.read_text("utf-8"))["connection_settings"]
    with ExitStack() as stack:
        connections = [stack.enter_context(psycopg.connect(**conninfo)) for _ in range(3)]
        return [row for conn in connections for row in conn.execute(query).fetchall()]


@pytest.mark.parametrize(
    "options", [["--pgmonkey-schema=s.sql"], ["--pgmonkey-isolation=clone"]], ids="".join
)
def test_databases_of_our_own_are_refused(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    pooled: Path,
    pg_server: EmbeddedServer,
    options: list[str],
) -> None:
    """Another run would take them for a dead one's; the error says where to go instead."""
    (pytester.path / "s.sql").write_text("CREATE TABLE item (id int)", "utf-8")
    pytester.makepyfile("def test_it(pgmonkey): pass")
    with psycopg.connect(**pg_server.admin_conninfo(), autocommit=True) as admin:
        admin.execute(f"ALTER ROLE {pg_server.conninfo('')['user']} CREATEDB")
        try:
            result = run(f"--pgmonkey-config={pooled}", *options)
            query = "SELECT count(*) FROM pg_database WHERE datname ~ '^pgmonkey_[0-9a-f]{20}'"
            assert admin.execute(query).fetchone() == (0,)
        finally:
            admin.execute(f"ALTER ROLE {pg_server.conninfo('')['user']} NOCREATEDB")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*through a connection pooler*server's own host and port*"])
