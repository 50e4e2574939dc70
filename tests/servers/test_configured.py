"""Tests on the server that --pgmonkey-config names: nothing stays, nothing foreign is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml

from pytest_pgmonkey.testing.addresses.urls import url_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from helpers.servers import TLSServer

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

TESTS = """
    import pytest

    def test_sync(pgmonkey_connection):
        with pgmonkey_connection as conn:
            conn.execute("INSERT INTO item VALUES (1)")
        with pgmonkey_connection as conn:
            assert conn.execute("SELECT count(*) FROM item").fetchone() == (1,)

    @pytest.mark.asyncio
    async def test_async(pgmonkey_connection):
        async with pgmonkey_connection as conn:
            await conn.execute("INSERT INTO item VALUES (1)")
"""


@pytest.fixture
def admin(pg_server: EmbeddedServer, database: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to the test's database."""
    with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as conn:
        yield conn


@pytest.fixture
def role(admin: psycopg.Connection[Any], config_file: Path) -> Iterator[str]:
    """A role with nothing but CONNECT; the YAML file logs in as it."""
    name = "only_connect"
    admin.execute(f"CREATE ROLE {name} LOGIN")
    config = yaml.safe_load(config_file.read_text("utf-8"))
    config["connection_settings"]["user"] = name
    config_file.write_text(yaml.safe_dump(config), "utf-8")
    yield name
    admin.execute(f"DROP OWNED BY {name}")
    admin.execute(f"DROP ROLE {name}")


def databases(conn: psycopg.Connection[Any]) -> set[str]:
    """All but the templates, which stay."""
    query = "SELECT datname FROM pg_database WHERE datname NOT LIKE 'pgmonkey_template_%'"
    return {name for (name,) in conn.execute(query)}


def test_a_role_with_its_own_grants_alone(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    admin: psycopg.Connection[Any],
    role: str,
) -> None:
    """CONNECT and what the tests do is enough, and nothing is committed."""
    admin.execute("CREATE TABLE item (id int)")
    admin.execute(f"GRANT SELECT, INSERT ON item TO {role}")
    pytester.makepyfile(TESTS)
    result = run(f"--pgmonkey-config={config_file}")
    result.assert_outcomes(passed=4)
    header = "pgmonkey: config *server.yaml, isolation=rollback (--pgmonkey-config)"
    result.stdout.fnmatch_lines([header])
    assert admin.execute("SELECT count(*) FROM item").fetchone() == (0,)


def test_scratch_where_a_schema_is_given(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    admin: psycopg.Connection[Any],
    pg_server: EmbeddedServer,
) -> None:
    """The schema is loaded into a database of the run, which is dropped at its end."""
    user = pg_server.conninfo("x")["user"]
    admin.execute(f"ALTER ROLE {user} CREATEDB")
    try:
        before = databases(admin)
        (pytester.path / "s.sql").write_text("CREATE TABLE item (id int)", "utf-8")
        pytester.makepyfile(
            TESTS
            + """
    def test_name(pgmonkey_database, pgmonkey):
        assert pgmonkey_database.name.startswith("pgmonkey_")
        """
        )
        run(f"--pgmonkey-config={config_file}", "--pgmonkey-schema=s.sql").assert_outcomes(passed=5)
        assert databases(admin) == before
        assert admin.execute("SELECT to_regclass('item')").fetchone() == (None,)
    finally:
        admin.execute(f"ALTER ROLE {user} NOCREATEDB")


def test_leftovers_of_dead_runs_are_swept_and_nothing_else(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    admin: psycopg.Connection[Any],
    pg_server: EmbeddedServer,
) -> None:
    """A killed run's database goes with the next run; a living run's, and others', stay."""
    user = pg_server.conninfo("x")["user"]
    admin.execute(f"ALTER ROLE {user} CREATEDB")
    foreign = "pgmonkey_0123456789ab01234567_tests"
    admin.execute(f"CREATE DATABASE {foreign} OWNER {user}")
    (pytester.path / "s.sql").write_text("CREATE TABLE item (id int)", "utf-8")
    options = [f"--pgmonkey-config={config_file}", "--pgmonkey-schema=s.sql"]
    try:
        before = databases(admin)
        pytester.makepyfile(
            "import os, signal\ndef test_it(pgmonkey): os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        run(*options)
        assert len(databases(admin) - before) == 1
        pytester.makepyfile("def test_it(pgmonkey): pass")
        run(*options).assert_outcomes(passed=1)
        assert databases(admin) == before
    finally:
        admin.execute(f"DROP DATABASE {foreign}")
        admin.execute(f"ALTER ROLE {user} NOCREATEDB")


def test_a_role_without_createdb_is_told_what_to_do(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Path
) -> None:
    """Scratch databases need CREATEDB; the error says so and names the other way."""
    (pytester.path / "s.sql").write_text("CREATE TABLE item (id int)", "utf-8")
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run(f"--pgmonkey-config={config_file}", "--pgmonkey-schema=s.sql")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*may not create databases*--pgmonkey-database=existing*"])


def test_unblock_is_refused_in_an_existing_database(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Path
) -> None:
    """Nothing is ever committed in a database that is not ours."""
    pytester.makepyfile(
        """
        import pytest
        from pytest_pgmonkey import PGMonkeyError

        def test_it(pgmonkey_database):
            with pytest.raises(PGMonkeyError, match="nothing is ever committed"):
                with pgmonkey_database.unblock():
                    pass
        """
    )
    run(f"--pgmonkey-config={config_file}").assert_outcomes(passed=1)


def test_an_escape_in_an_existing_database_stops_the_run(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Path
) -> None:
    """What was committed cannot be undone there: no further test runs on it."""
    pytester.makepyfile(
        """
        def test_escapes(pgmonkey):
            with pgmonkey.normal as conn:
                conn.execute("CREATE TABLE escaped (a int)")
                conn.pgconn.exec_(b"COMMIT")

        def test_next(pgmonkey):
            pass
        """
    )
    result = run(f"--pgmonkey-config={config_file}", "-v")
    outcomes = result.parseoutcomes()
    assert outcomes["errors"] == 1 if "errors" in outcomes else outcomes["error"] == 1
    result.stdout.no_fnmatch_line("*test_next PASSED*")
    result.stdout.fnmatch_lines(["*ended from inside*"])


def test_an_escape_in_a_scratch_database_is_healed(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The test that ended the transaction fails; the next one has a clean database."""
    pytester.makepyfile(
        """
        def test_escapes(pgmonkey):
            with pgmonkey.normal as conn:
                conn.execute("CREATE TABLE escaped (a int)")
                conn.pgconn.exec_(b"COMMIT")

        def test_next(pgmonkey):
            assert pgmonkey.execute("SELECT to_regclass('escaped')").fetchone() == (None,)
        """
    )
    result = run("-v")
    result.stdout.fnmatch_lines(
        ["*test_escapes ERROR*", "*test_next PASSED*", "*ended from inside*"]
    )


@pytest.mark.parametrize("as_dsn", [False, True])
def test_a_tls_server_and_a_password_from_the_environment(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    tls_server: TLSServer,
    monkeypatch: pytest.MonkeyPatch,
    as_dsn: bool,
) -> None:
    """The kit connects as production does: verify-full, and secrets resolved on request."""
    settings = dict(tls_server.conninfo("postgres"))
    if as_dsn:
        monkeypatch.setenv("DATABASE_URL", url_of(settings))
        settings = {"dsn": {"from_env": "DATABASE_URL"}}
    else:
        monkeypatch.setenv("TEST_DB_PASSWORD", str(settings["password"]))
        settings |= {"password": "${TEST_DB_PASSWORD}"}
    settings |= {"sslmode": "verify-full"}
    path = pytester.path / "tls.yaml"
    path.write_text(yaml.safe_dump({"connection_settings": settings}), "utf-8")
    pytester.makepyfile(
        """
        def test_it(pgmonkey):
            row = pgmonkey.execute(
                "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            ).fetchone()
            assert row == (True,)
        """
    )
    run(f"--pgmonkey-config={path}", "--pgmonkey-resolve-env").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "*no such file*"),
        ("connection_settings: [", "*bad.yaml: malformed YAML at line *"),
        ("connection_settings: {hots: x}", "*hots*host*"),
        (
            "connection_settings: {host: /nowhere, password: hush-hush}",
            "*No such file or directory*",
        ),
        ("connection_settings: {host: 127.0.0.1, port: 1}", "*connection failed*"),
    ],
)
def test_a_bad_config_is_one_error(
    pytester: pytest.Pytester, run: Callable[..., Any], text: str | None, message: str
) -> None:
    """File, key and hint, without a stack of ours and without a secret."""
    path = pytester.path / "bad.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run(f"--pgmonkey-config={path}")
    assert result.ret != 0
    output = result.stdout.str() + result.stderr.str()
    assert "hush-hush" not in output
    assert "INTERNALERROR" not in output
    assert "kit.py" not in output
    result.stdout.re_match_lines([f"(?i).*{message.strip('*').replace('*', '.*')}.*"])
