"""The plugin on every server that can be had: private ones, and one that a config names.

`PGMONKEY_TEST_BINDIRS` names directories of server programs, as `PATH` does; without it these are
the servers of this machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml

from pytest_pgmonkey.testing.servers.embedded.binaries import Binaries, find_all, find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMED = [
    Path(path) for path in os.environ.get("PGMONKEY_TEST_BINDIRS", "").split(os.pathsep) if path
]
SERVERS = [find_binaries(path) for path in NAMED] or [
    binaries for binaries in find_all() if binaries.archive is None
]
PROJECT = {
    "steps": """
        def load(conn):
            with open("loaded.txt", "a") as file:
                print("loaded", file=file)
            conn.execute("CREATE TABLE item (id int PRIMARY KEY DEFERRABLE, name text)")
            conn.execute("CREATE SEQUENCE numbers CACHE 5; SELECT setval('numbers', 3)")
            conn.execute(
                "CREATE FUNCTION md5_of(text) RETURNS text LANGUAGE sql "
                "BEGIN ATOMIC; SELECT md5($1); END"
            )

        load.pgmonkey_version = 1
    """,
    "test_it": """
        import os
        import psycopg
        import pytest

        SELECT = "SELECT id FROM item ORDER BY id"

        @pytest.mark.pgmonkey(types="all")
        def test_sync(pgmonkey_connection):
            with pgmonkey_connection as conn:
                conn.execute("INSERT INTO item VALUES (%s, md5_of('x'))", [1])
                with conn.transaction(force_rollback=True):
                    conn.execute("INSERT INTO item VALUES (2)")
            with pytest.raises(psycopg.errors.UniqueViolation):
                with pgmonkey_connection as conn:
                    conn.execute("SET CONSTRAINTS ALL DEFERRED")
                    conn.execute("INSERT INTO item VALUES (1)")
            with pgmonkey_connection as conn:
                assert conn.execute(SELECT).fetchall() == [(1,)]

        @pytest.mark.asyncio
        async def test_async(pgmonkey_connection):
            async with pgmonkey_connection as conn:
                async with conn.pipeline():
                    await conn.execute("INSERT INTO item VALUES (%s)", [1])
                await conn.commit()
                async with conn.cursor() as cursor, cursor.copy("COPY item FROM STDIN") as copy:
                    await copy.write_row([2, "b"])
                cursor = await conn.execute(SELECT)
                assert await cursor.fetchall() == [(1,), (2,)]

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("number", range(2))
        def test_clone(pgmonkey_connection, pgmonkey, number):
            with pgmonkey_connection as conn:
                conn.execute("INSERT INTO item VALUES (1)")
            with psycopg.connect(pgmonkey.dsn, autocommit=True) as other:
                assert other.execute(SELECT).fetchall() == [(1,)]
                other.execute("VACUUM item")

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.asyncio
        async def test_async_clone(pgmonkey_connection):
            async with pgmonkey_connection as conn:
                await conn.execute("INSERT INTO item VALUES (1)")

        @pytest.fixture(scope="class")
        def used(pgmonkey_class):
            assert pgmonkey_class.execute("SELECT nextval('numbers')").fetchone() == (4,)
            pgmonkey_class.execute("CREATE SEQUENCE more")

        @pytest.mark.pgmonkey(sequences="restart")
        @pytest.mark.parametrize("number", range(2))
        class TestSequences:
            def test_alone(self, pgmonkey, number):
                query = "SELECT nextval('numbers'), nextval('numbers')"
                assert pgmonkey.execute(query).fetchone() == (4, 5)
                pgmonkey.execute("SELECT setval('numbers', 1, false)")

            def test_wider(self, used, pgmonkey, number):
                query = "SELECT nextval('numbers'), nextval('more')"
                assert pgmonkey.execute(query).fetchone() == (9, 1)

        def test_version(pgmonkey, pgmonkey_server):
            version = pgmonkey.execute("SHOW server_version").fetchone()[0]
            assert version.split()[0] == pgmonkey_server.version == os.environ["EXPECTED"]
    """,
}


@pytest.fixture(params=SERVERS, ids=lambda binaries: f"{binaries.version}-{binaries.origin}")
def binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Binaries:
    """The programs of one server; the tests in the inner runs expect its version."""
    found: Binaries = request.param
    monkeypatch.setenv("EXPECTED", found.version)
    return found


@pytest.fixture
def versioned(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose schema counts how often it is loaded."""
    pytester.makepyfile(**PROJECT)
    pytester.makeini("[pytest]\npythonpath = .\npgmonkey_schema = steps:load\n")
    return pytester


@pytest.fixture
def server(binaries: Binaries) -> Iterator[EmbeddedServer]:
    """A running server, whose role may create databases."""
    server = EmbeddedServer.start(binaries)
    try:
        with psycopg.connect(**server.admin_conninfo(), autocommit=True) as admin:
            admin.execute(f"ALTER ROLE {server.conninfo('')['user']} CREATEDB")
        yield server
    finally:
        server.stop()


def loads(project: pytest.Pytester) -> list[str]:
    return (project.path / "loaded.txt").read_text("utf-8").splitlines()


def test_a_private_server(
    versioned: pytest.Pytester, run: Callable[..., Any], binaries: Binaries
) -> None:
    """All types in both isolations, and the second run finds the schema loaded."""
    for _ in range(2):
        run(f"--pgmonkey-bindir={binaries.bindir}").assert_outcomes(passed=17)
    assert loads(versioned) == ["loaded"]


def test_the_server_of_a_config(
    versioned: pytest.Pytester, run: Callable[..., Any], server: EmbeddedServer
) -> None:
    """The same with scratch databases, of which nothing but the template stays."""
    file = versioned.path / "server.yaml"
    file.write_text(yaml.safe_dump(server.config("postgres")), "utf-8")
    for _ in range(2):
        run(f"--pgmonkey-config={file}").assert_outcomes(passed=17)
    assert loads(versioned) == ["loaded"]
    with psycopg.connect(**server.admin_conninfo()) as admin:
        names = admin.execute("SELECT datname FROM pg_database WHERE datname ~ 'pgmonkey'")
        (kept,) = names.fetchall()
        assert kept[0].startswith("pgmonkey_template_")
