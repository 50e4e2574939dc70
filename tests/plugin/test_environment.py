"""The option `env`: an application that knows nothing of the kit finds the tests' database."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import psycopg
import pytest
import yaml
from helpers.remains import NEEDS_PROC, processes_of
from helpers.waiting import wait_until
from psycopg.conninfo import conninfo_to_dict

from pytest_pgmonkey.testing.addresses.variables import Variable, read_variable, values
from pytest_pgmonkey.testing.options import OptionError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

    Several = Callable[..., tuple[list["Told"], list[str]]]

BY_TCP = {"host": "127.0.0.1", "port": "5", "user": "u", "password": "p", "dbname": "d"}
LIMIT = 30  # seconds for a run that might never end
# Plugins that no project here needs, and that take longer than its tests.
QUICK = tuple(f"-pno:{name}" for name in ("hypothesispytest", "anyio", "django", "pytest_cov"))
LINES = """\
    DATABASE_URL
    URL_AGAIN = url
    ENGINE_URL=url:postgresql+psycopg
    THE_DSN = dsn
    DB_HOST = host
    DB_PORT = port
    DB_USER = user
    DB_PASSWORD   =   password
    DB_NAME = dbname
"""
NAMES = ("DATABASE_URL", "URL_AGAIN", "ENGINE_URL", "THE_DSN", "DB_HOST", "DB_PORT", "DB_USER",
         "DB_PASSWORD", "DB_NAME")  # fmt: skip
# It connects when it is imported, as many do.
CONNECTED = """
    import os
    import psycopg

    conn = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)

    def add(name):
        conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

    def names():
        return [name for (name,) in conn.execute("SELECT name FROM item ORDER BY id")]

    def load(_):
        conn.execute("CREATE TABLE item (id serial, name text)")
"""


@pytest.fixture
def run(run: Callable[..., Any]) -> Callable[..., Any]:
    """Run pytest without the plugins that take longer than the tests of a project."""
    return lambda *args: run(*QUICK, *args)


@pytest.fixture
def connected(project: pytest.Pytester) -> pytest.Pytester:
    """A project with an application that connects when it is imported."""
    project.makepyfile(connected=CONNECTED)
    return project


def ini(project: pytest.Pytester, *lines: str) -> None:
    head = ("[pytest]", "pythonpath = .", "asyncio_default_fixture_loop_scope = function")
    (project.path / "tox.ini").write_text("\n".join([*head, *lines]) + "\n", "utf-8")


def is_refused(address: str) -> bool:
    """Whether nobody listens at the host and port of a URL."""
    parts = urlsplit(address)
    with socket.socket() as sock:
        return sock.connect_ex((parts.hostname or "", parts.port or 0)) != 0


# Lines


@pytest.mark.parametrize(
    ("line", "variable"),
    [
        ("DATABASE_URL", Variable("DATABASE_URL", "url", "postgresql")),
        ("  A=url ", Variable("A", "url", "postgresql")),
        ("_a1 = url:postgresql+asyncpg", Variable("_a1", "url", "postgresql+asyncpg")),
        ("A = url:postgis", Variable("A", "url", "postgis")),
        ("A = url:jdbc.x-1", Variable("A", "url", "jdbc.x-1")),
        ("A\t=\tdsn", Variable("A", "dsn", "postgresql")),
        *((f"A = {part}", Variable("A", part, "postgresql")) for part in BY_TCP),
    ],
)
def test_a_line_is_read(line: str, variable: Variable) -> None:
    """A name alone stands for a URL; blanks do not matter."""
    assert read_variable(line) == variable


BAD_LINES = [
    "",
    "9A",
    "A-B",
    "A B",
    "A =",
    "= url",
    "A = nothing",
    "A = URL",
    "A = url:",
    "A = url:1x",
    "A = url:a:b",
    "A = host:x",
    "A = url = dsn",
    "A = postgresql://u@h/d",
    "A = url\nB = dsn",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_none(line: str) -> None:
    """Nothing is guessed: a variable that is not set leaves the developer's own value."""
    assert read_variable(line) is None


@pytest.mark.parametrize("line", BAD_LINES[1:])
@pytest.mark.parametrize("place", ["--pgmonkey-env", "PGMONKEY_ENV", "pgmonkey_env"])
def test_a_bad_line_is_named_with_its_option(line: str, place: str) -> None:
    """Wherever it was given; the error says what a line may be."""

    def decide(text: str) -> Any:
        given = {place: ["GOOD = dsn", text]}
        return resolve(
            lambda option: given.get(option.flag),
            lambda option: given.get(option.ini),
            {place: text} if place.isupper() else {},
            rootdir=Path("/"),
            called_from=Path("/"),
        )

    with pytest.raises(OptionError) as caught:
        decide(line)
    message = str(caught.value)
    assert message.startswith(f"{place}: {line!r} must read NAME, NAME = url:SCHEME, or NAME = ")
    assert message.endswith("url, dsn, host, port, user, password, dbname")
    assert decide("A = host").env[-1] == Variable("A", "host", "postgresql")


def test_the_values_of_variables() -> None:
    """Each has its part of the address."""
    variables = [Variable(name, name, "a+b") for name in (*BY_TCP, "url", "dsn")]
    found = values(variables, lambda: "the dsn", lambda: BY_TCP)
    assert found == {**BY_TCP, "url": "a+b://u:p@127.0.0.1:5/d", "dsn": "the dsn"}


def test_no_address_is_asked_for_that_no_variable_holds() -> None:
    """To listen by TCP is for those who want it."""
    asked: list[str] = []

    def by_tcp() -> dict[str, str]:
        asked.append("tcp")
        return BY_TCP

    def dsn() -> str:
        asked.append("dsn")
        return ""

    for part in ("dsn", "host"):
        values([Variable("A", part)], dsn, by_tcp)
    assert asked == ["dsn", "tcp"]
    assert values([], dsn, by_tcp) == {}


# Applications


def test_an_application_joins_every_test(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """Connections, a pool and engines of a module are there before the first test.

    No test names a fixture or has a marker. What is asked for at the import is answered, and
    nothing can be written then.
    """
    ini(
        project,
        "pgmonkey_schema = schema.sql",
        "pgmonkey_env =",
        "    DATABASE_URL",
        "    ENGINE_URL = url:postgresql+psycopg",
        "    ASYNC_URL = url:postgresql+asyncpg",
        "asyncio_default_test_loop_scope = session",
        "addopts = --doctest-modules",
    )
    project.makepyfile(
        shop="""
        '''
        >>> add("doctest")
        >>> names()
        ['doctest']
        '''
        import os
        import psycopg
        import sqlalchemy as sa
        from psycopg_pool import ConnectionPool
        from sqlalchemy.ext.asyncio import create_async_engine

        INSERT = "INSERT INTO item (name) VALUES ('{}')"
        NAMES = "SELECT name FROM item ORDER BY id"

        conn = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
        (answer,) = conn.execute("SELECT 40 + 2").fetchone()
        try:
            conn.execute("CREATE TABLE written ()")
        except psycopg.Error as error:
            refused = error
        pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=2, max_size=2, open=False)
        pool.open(wait=True)
        background = ConnectionPool(os.environ["DATABASE_URL"], min_size=1, open=True)
        engine = sa.create_engine(os.environ["ENGINE_URL"])
        with engine.connect() as checked:
            checked.execute(sa.text("SELECT 1"))
        async_engine = create_async_engine(os.environ["ASYNC_URL"])

        def add(name):
            with pool.connection() as conn:
                conn.execute(INSERT.format(name))

        def names():
            with background.connection() as conn:
                return [name for (name,) in conn.execute(NAMES)]
        """,
        conftest="""
        import os
        AT_FIRST = os.environ["DATABASE_URL"]

        import shop

        def pytest_unconfigure():
            shop.conn.close()
            shop.pool.close()
            shop.background.close()
            shop.engine.dispose()
        """,
        test_shop="""
        import os
        import unittest
        import psycopg, pytest, shop
        import sqlalchemy as sa
        from conftest import AT_FIRST
        from shop import INSERT, NAMES, add, names

        def test_at_the_import():
            assert AT_FIRST == os.environ["DATABASE_URL"]
            assert shop.answer == 42
            assert shop.refused.sqlstate == "57P03"
            assert "outside of a test" in str(shop.refused)
            assert "unblock()" in str(shop.refused)

        @pytest.mark.parametrize("n", range(3))
        def test_all_work_in_one_transaction(n):
            assert names() == []
            add("pool")
            shop.conn.execute(INSERT.format("conn"))
            with shop.engine.begin() as conn:
                conn.execute(sa.text(INSERT.format("engine")))
            with pytest.raises(ZeroDivisionError), shop.engine.begin() as conn:
                conn.execute(sa.text(INSERT.format("undone")))
                1 / 0
            with shop.engine.connect() as conn:
                found = list(conn.scalars(sa.text(NAMES)))
            assert found == names() == ["pool", "conn", "engine"]

        @pytest.mark.asyncio
        @pytest.mark.parametrize("n", range(3))
        async def test_async(n):
            assert names() == []
            async with shop.async_engine.begin() as conn:
                await conn.execute(sa.text(INSERT.format("async")))
            async with shop.async_engine.connect() as conn:
                assert list(await conn.scalars(sa.text(NAMES))) == names() == ["async"]

        @pytest.mark.asyncio
        async def test_the_last_async_one():
            await shop.async_engine.dispose()

        class TestClass(unittest.TestCase):
            def setUp(self):
                add("setUp")

            def test_one(self):
                add("one")
                assert names() == ["setUp", "one"]

            test_two = test_one

        @pytest.fixture
        def filled():
            add("fixture")
            yield
            assert names() == ["fixture", "test"]

        def test_with_a_fixture(filled):
            add("test")

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("n", range(2))
        def test_clone(n):
            add("clone")
            shop.conn.execute("VACUUM item")
            assert names() == ["clone"]

        def test_a_fixture_of_ours(pgmonkey, pgmonkey_url):
            pgmonkey.execute(INSERT.format("pgmonkey"))
            assert names() == ["pgmonkey"]
            assert pgmonkey_url == AT_FIRST
            assert pgmonkey.url != AT_FIRST

        @pytest.fixture(scope="session")
        def early():
            with pytest.raises(psycopg.errors.CannotConnectNow):
                add("early")
            assert names() == []

        def test_a_wider_fixture(early):
            pass

        def test_nothing_has_stayed():
            assert names() == []
        """,
    )
    result = run("-v")
    result.assert_outcomes(passed=17)
    assert result.errlines == []


def test_a_schema_step_in_the_module_that_connects(connected: pytest.Pytester) -> None:
    """The client that waits in the middle of its import does not wait for itself."""
    ini(connected, "pgmonkey_env = DATABASE_URL", "pgmonkey_schema = connected:load")
    connected.makeconftest("import connected")
    connected.makepyfile(
        """
        from connected import add, names

        def test_it():
            add("x")
            assert names() == ["x"]
        """
    )
    run_in_time(connected).assert_outcomes(passed=1)


def run_in_time(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run pytest where a defect has made it hang."""
    return project.runpytest_subprocess("-p", "no:cacheprovider", *QUICK, *args, timeout=LIMIT)


# The variables themselves

# Runs pytest several times in one process, and tells what that has changed.
SEVERAL = """
    import json, os, sys
    import pytest

    os.environ.pop("PYTEST_CURRENT_TEST")
    told = []
    for args, variable in json.loads(sys.argv[1]):
        if variable:
            os.environ["PGMONKEY_ENV"] = variable
        before = dict(os.environ)
        code = pytest.main(["-p", "no:cacheprovider", *sys.argv[2:], *args])
        after = dict(os.environ)
        os.environ.pop("PGMONKEY_ENV", None)
        seen = []
        if os.path.exists("seen.txt"):
            with open("seen.txt") as file:
                seen = [json.loads(line) for line in file]
            os.unlink("seen.txt")
        changed = [key for key in before | after if before.get(key) != after.get(key)]
        told.append([int(code), seen, changed])
    with open("told.json", "w") as file:
        json.dump(told, file)
"""
SEEING = f"""
    import json, os, socket
    from urllib.parse import urlsplit

    def see():
        seen = {{name: os.environ.get(name) for name in {NAMES}}}
        parts = urlsplit(seen["DATABASE_URL"])
        with socket.socket() as sock:
            seen["listens"] = sock.connect_ex((parts.hostname, parts.port or 5432)) == 0
        with open("seen.txt", "a") as file:
            print(json.dumps(seen), file=file)
"""


class Told(NamedTuple):
    """What a run of several has told."""

    code: int
    seen: list[dict[str, Any]]
    changed: list[str]


@pytest.fixture
def several(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Several:
    """Run pytest several times in one process; gives what each has told, and all errors.

    Conftest and test note what they see of the variables, two of which have values before. The
    process is one that a worker of pytest-xdist has started.
    """
    project.makepyfile(several=SEVERAL, seeing=SEEING)
    project.makeconftest("from seeing import see\nsee()\n")
    project.makepyfile("from seeing import see\ndef test_it():\n    see()\n")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.2:1/the_developer_s")
    monkeypatch.setenv("DB_HOST", "db.example")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")

    def several(*runs: tuple[list[str], str]) -> tuple[list[Told], list[str]]:
        done = project.run(sys.executable, "several.py", json.dumps(runs), *QUICK, timeout=120)
        assert done.ret == 0
        told = json.loads((project.path / "told.json").read_text())
        return [Told(*each) for each in told], done.errlines

    return several


def test_all_that_a_variable_may_hold(project: pytest.Pytester, several: Several) -> None:
    """The parts are those of the URL; values that were there are overwritten, and put back."""
    ini(project, "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    told, _ = several(([], ""), (["--collect-only"], ""))
    for code, seen, changed in told:
        assert (code, changed) == (0, [])
        at_first = seen[0]
        assert at_first == seen[-1]
        assert at_first["listens"]
        url = at_first["DATABASE_URL"]
        parts = urlsplit(url)
        assert at_first["URL_AGAIN"] == url
        assert at_first["ENGINE_URL"] == url.replace("postgresql:", "postgresql+psycopg:")
        assert at_first["DB_HOST"] == parts.hostname == "127.0.0.1"
        assert at_first["DB_PORT"] == str(parts.port)
        assert at_first["DB_USER"] == parts.username == "pgmonkey"
        assert at_first["DB_PASSWORD"] == parts.password
        assert at_first["DB_NAME"] == parts.path[1:] == "tests"
        by_socket = conninfo_to_dict(at_first["THE_DSN"])
        assert (by_socket["user"], by_socket["dbname"]) == ("pgmonkey", "tests")
        assert "password" not in by_socket
        assert is_refused(url)
        assert not Path(str(by_socket["host"])).exists()
    assert [len(each.seen) for each in told] == [2, 1]
    passwords = {each.seen[0]["DB_PASSWORD"] for each in told}
    assert len(passwords) == 2  # each run has its own
    assert min(map(len, passwords)) > 20


def test_the_option_in_other_places(project: pytest.Pytester, several: Several) -> None:
    """The command line beats the environment, which beats the ini file."""
    ini(project, "pgmonkey_env = DB_NAME = dbname")
    on_command_line = ["--pgmonkey-env=DB_USER = user", "--pgmonkey-env", "DB_PORT=port"]
    told, _ = several(
        (["--collect-only"], ""),
        (["--collect-only"], "DB_PASSWORD = password"),
        (["--collect-only", *on_command_line], "THE_DSN = dsn"),
    )
    for each, names in zip(
        told, [{"DB_NAME"}, {"DB_PASSWORD"}, {"DB_USER", "DB_PORT"}], strict=True
    ):
        assert (each.code, each.changed) == (0, [])
        (seen,) = each.seen
        assert {name for name, value in seen.items() if value} == names | {
            "DATABASE_URL",
            "DB_HOST",
        }
        assert seen["DB_HOST"] == "db.example"


def test_what_runs_no_test_leaves_nothing(project: pytest.Pytester, several: Several) -> None:
    """The conftest finds the variables in any case, and they are put back, also after an error.

    What is wrong with an option is told in a line, before a conftest is loaded.
    """
    ini(project, "norecursedirs = broken", "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    (project.path / "broken").mkdir()
    (project.path / "broken" / "conftest.py").write_text("1 / 0\n")
    told, errors = several(
        (["--collect-only"], ""),
        (["--help"], ""),
        (["--fixtures"], ""),
        (["-k", "other"], ""),
        (["broken"], ""),
        (["--pgmonkey-env", "9A"], ""),
        (["--pgmonkey-config", "missing.yaml"], ""),
    )
    assert [each.code for each in told] == [0, 0, 0, 5, 4, 4, 4]
    assert [each.changed for each in told] == [[]] * len(told)
    directories = set()
    for each in told[:5]:
        assert each.seen
        for seen in each.seen:
            assert seen["listens"]
            assert is_refused(seen["DATABASE_URL"])
            directories.add(str(conninfo_to_dict(seen["THE_DSN"])["host"]))
    assert len(directories) == 5
    assert not any(Path(directory).exists() for directory in directories)
    assert [each.seen for each in told[5:]] == [[], []]
    first, second = [line for line in errors if line][-2:]
    assert first.startswith("ERROR: --pgmonkey-env: '9A' must read NAME, ")
    assert "missing.yaml: cannot be read: No such file" in second
    assert not any("Traceback" in line for line in errors)


def test_options_of_xdist_that_distribute_nothing(
    project: pytest.Pytester, several: Several
) -> None:
    """This process runs the tests, or collects them, and so it has the variables."""
    pytest.importorskip("xdist")
    ini(project, "pgmonkey_env =", LINES)
    told, _ = several(
        (["-n0", "--dist=loadfile"], ""),
        (["-n2", "--collect-only"], ""),
        (["-nauto", "--pdb", "-k", "other"], ""),
        (["--dist=load", "-k", "other"], ""),
        (["--tx=2*popen", "-k", "other"], ""),
    )
    assert [each.code for each in told] == [0, 0, 5, 5, 5]
    assert [len(each.seen) for each in told] == [2, 1, 1, 1, 1]
    assert all(seen["listens"] for each in told for seen in each.seen)


def test_libpq_s_own_variables_and_other_names(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A program that names no address at all joins, and one that asks for a mapped database."""
    ini(
        project,
        "pgmonkey_schema = schema.sql",
        "pgmonkey_map = other = primary",
        "pgmonkey_env =",
        "    DATABASE_URL",
        "    THE_DSN = dsn",
        "    PGHOST = host",
        "    PGPORT = port",
        "    PGUSER = user",
        "    PGPASSWORD = password",
        "    PGDATABASE = dbname",
    )
    project.makepyfile(
        """
        import os, subprocess
        import psycopg, pytest

        INSERT = "INSERT INTO item (name) VALUES ('x')"
        conn = psycopg.connect("", autocommit=True)

        def renamed(name):
            return os.environ["DATABASE_URL"].rpartition("/")[0] + f"/{name}"

        def test_it():
            conn.execute(INSERT)
            subprocess.run(["psql", "-X", "-q", "-w", "-c", INSERT], check=True, timeout=60)
            with psycopg.connect(os.environ["THE_DSN"]) as by_socket:
                by_socket.execute(INSERT)
            assert conn.execute("SELECT count(*) FROM item").fetchone() == (3,)

        @pytest.mark.parametrize("n", range(2))
        def test_a_mapped_name(n):
            with psycopg.connect(renamed("other")) as other:
                assert other.execute("SELECT current_database()::text").fetchone() == ("tests",)
                other.execute(INSERT)
            assert conn.execute("SELECT count(*) FROM item").fetchone() == (1,)

        def test_another_name():
            with pytest.raises(psycopg.OperationalError) as caught:
                psycopg.connect(renamed("third"))
            told = str(caught.value)
            assert 'connect to "tests", not to "third"' in told
            assert "pgmonkey_map = third = primary" in told

        def test_the_last():
            conn.close()
        """
    )
    run("-v").assert_outcomes(passed=5)


# Where the database is prepared


def test_a_schema_that_the_application_loads(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """It writes for good by its own connections, which is kept for the next run.

    So does a session fixture within unblock().
    """
    ini(project, "pgmonkey_env = DATABASE_URL")
    project.makepyfile(
        lazy="""
        import os
        from psycopg_pool import ConnectionPool

        pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=1, open=False)

        def execute(query):
            pool.open()
            with pool.connection() as conn:
                cursor = conn.execute(query)
                return [x for (x,) in cursor.fetchall()] if cursor.description else []

        def add(name):
            execute(f"INSERT INTO item (name) VALUES ('{name}')")

        def names():
            return execute("SELECT name FROM item ORDER BY id")
        """,
        conftest="""
        import pytest
        from lazy import add, execute, names, pool

        def load(conn):
            name, = conn.execute("SELECT current_database()::text").fetchone()
            assert execute("SELECT current_database()::text") == [name]
            execute("CREATE TABLE item (id serial, name text)")
            add("of the schema")
            with open("loaded.txt", "a") as file:
                print("loaded", file=file)

        load.pgmonkey_version = 1

        @pytest.fixture(scope="session")
        def pgmonkey_schema():
            return [load]

        @pytest.fixture(scope="session", autouse=True)
        def seed(pgmonkey_database):
            assert names() == ["of the schema"]
            with pytest.raises(Exception, match="outside of a test"):
                add("too early")
            with pgmonkey_database.unblock():
                add("of the fixture")
            assert names() == ["of the schema", "of the fixture"]
            yield
            pool.close()
        """,
        test_it="""
        import pytest
        from lazy import add, names

        @pytest.mark.parametrize("isolation", [
            pytest.param(name, marks=pytest.mark.pgmonkey(isolation=name))
            for name in ("rollback", "clone", "rollback")
        ])
        def test_it(isolation):
            add("of the test")
            assert names() == ["of the schema", "of the fixture", "of the test"]

        def test_nothing_has_stayed():
            assert names() == ["of the schema", "of the fixture"]
        """,
    )
    for _ in range(2):
        run("-v").assert_outcomes(passed=4)
    assert (project.path / "loaded.txt").read_text() == "loaded\n"


def test_a_server_that_cannot_be_had(connected: pytest.Pytester, several: Several) -> None:
    """The application is told why when it connects: no run waits for a server that never comes."""
    ini(connected, "pgmonkey_env = DATABASE_URL")
    connected.makeconftest("import connected")
    told, errors = several(
        (["--pgmonkey-bindir=/nonexistent"], ""), (["--pgmonkey-schema=missing.sql"], "")
    )
    assert [each.code for each in told] == [pytest.ExitCode.USAGE_ERROR] * 2
    first, second = [line for line in errors if line.startswith("E   ")]
    assert "OperationalError" in first
    assert "The directory /nonexistent does not hold the programs" in first
    assert "missing.sql does not exist" in second


# A server that a file names


@pytest.fixture
def owner(pg_server: EmbeddedServer, config_file: Path) -> Iterator[str]:
    """A role that may create databases; the file logs in as it."""
    config = yaml.safe_load(config_file.read_text("utf-8"))
    config["connection_settings"]["user"] = "environment_owner"
    config_file.write_text(yaml.safe_dump(config), "utf-8")
    with psycopg.connect(pg_server.admin_dsn, autocommit=True) as conn:
        conn.execute("CREATE ROLE environment_owner LOGIN CREATEDB")
        yield "environment_owner"
        query = "SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = %s"
        for (name,) in conn.execute(query, ["environment_owner"]).fetchall():
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)")  # a template that is kept
        conn.execute("DROP ROLE environment_owner")


ON_A_SERVER = """
    import os
    import psycopg, pytest
    from connected import add, conn, names
    from pytest_pgmonkey import PGMonkeyError

    WHO = "SELECT current_user::text, current_database()::text"

    @pytest.mark.parametrize("n", range(2))
    def test_it(n, pgmonkey, pgmonkey_database):
        add("x")
        assert names() == ["x"]
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (1,)
        who = os.environ["DB_USER"], pgmonkey_database.name
        assert conn.execute(WHO).fetchone() == pgmonkey.execute(WHO).fetchone() == who
        for address in (pgmonkey.url, pgmonkey.dsn, os.environ["DATABASE_URL"]):
            with psycopg.connect(address) as other:
                assert other.execute("SELECT count(*) FROM item").fetchone() == (1,)

    def test_the_administrator(pgmonkey_server):
        with pytest.raises(PGMonkeyError, match="no administrator"):
            pgmonkey_server.admin_dsn

    def test_what_the_variables_say(pgmonkey_database):
        user, name = os.environ["EXPECTED"].split()
        assert os.environ["DB_USER"] == user
        assert os.environ["DB_NAME"] == name
        assert (pgmonkey_database.name == name) == ("EXISTING" in os.environ)

    def test_the_last():
        conn.close()
"""


def test_an_existing_database(
    connected: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    pg_server: EmbeddedServer,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """User and name are those of the file, and nothing is committed."""
    ini(connected, "pgmonkey_env =", LINES)
    connected.makepyfile(ON_A_SERVER)
    conninfo = pg_server.conninfo(database)
    monkeypatch.setenv("EXPECTED", f"{conninfo['user']} {database}")
    monkeypatch.setenv("EXISTING", "1")
    with psycopg.connect(**conninfo, autocommit=True) as conn:
        conn.execute("CREATE TABLE item (id serial, name text)")
        run("-v", f"--pgmonkey-config={config_file}").assert_outcomes(passed=5)
        assert conn.execute("SELECT count(*) FROM item").fetchone() == (0,)


def test_scratch_databases(
    connected: pytest.Pytester,
    run: Callable[..., Any],
    config_file: Path,
    owner: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They go by the name that the file has, whatever they are called."""
    ini(connected, "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    connected.makepyfile(ON_A_SERVER)
    monkeypatch.setenv("EXPECTED", f"{owner} {database}")
    run("-v", f"--pgmonkey-config={config_file}").assert_outcomes(passed=5)


def test_a_file_that_relies_on_libpq_s_variables(
    pytester: pytest.Pytester,
    pg_server: EmbeddedServer,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It still means what they were before the option has overwritten them."""
    for name, value in pg_server.conninfo(database).items():
        monkeypatch.setenv(f"PG{name.upper()}", value)
    monkeypatch.delenv("PGDBNAME")
    file = pytester.path / "server.yaml"
    file.write_text(f"connection_settings: {{dbname: {database}}}\n", "utf-8")
    ini(
        pytester,
        "pgmonkey_config = server.yaml",
        "pgmonkey_env =",
        "    PGHOST = host",
        "    PGPORT = port",
        "    PGUSER = user",
        "    PGPASSWORD = password",
        "    PGDATABASE = dbname",
    )
    pytester.makepyfile(
        """
        import psycopg, pytest

        conn = psycopg.connect("", autocommit=True)

        @pytest.mark.parametrize("n", range(2))
        def test_it(n):
            conn.execute("CREATE TABLE item ()")

        def test_of_a_test(pgmonkey):
            pgmonkey.execute("CREATE TABLE item ()")
            with psycopg.connect(pgmonkey.url) as other:
                assert other.execute("TABLE item").fetchall() == []
            conn.close()
        """
    )
    run_in_time(pytester, "-v").assert_outcomes(passed=3)
    with psycopg.connect(**pg_server.conninfo(database)) as conn:
        assert conn.execute("SELECT to_regclass('item')").fetchone() == (None,)


def test_a_file_that_names_no_user(
    pytester: pytest.Pytester,
    run: Callable[..., Any],
    pg_server: EmbeddedServer,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is libpq's: PGUSER, or the operating system's."""
    config = pg_server.config(database)
    monkeypatch.setenv("PGUSER", config["connection_settings"].pop("user"))
    (pytester.path / "server.yaml").write_text(yaml.safe_dump(config), "utf-8")
    pytester.makepyfile(
        """
        import os
        import psycopg

        def test_it(pgmonkey):
            pgmonkey.execute("CREATE TABLE item ()")
            for address in (pgmonkey.dsn, pgmonkey.url):
                with psycopg.connect(address) as conn:
                    assert conn.execute("TABLE item").fetchall() == []
            assert pgmonkey.env["PGUSER"] == os.environ["PGUSER"]
        """
    )
    run("--pgmonkey-config=server.yaml").assert_outcomes(passed=1)


# pytest-xdist


def test_each_worker_has_an_address_of_its_own(
    connected: pytest.Pytester, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller has nobody's, and no process of the gateway; all share one server."""
    pytest.importorskip("xdist")
    monkeypatch.setenv("DATABASE_URL", "postgresql://db.example/the_developer_s")
    ini(connected, "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    connected.makepyfile(
        conftest="""
        import json, os
        from pathlib import Path

        def children():
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    if int(parent) == os.getpid():
                        yield (process / "cmdline").read_text()
                except OSError:  # it has ended meanwhile
                    pass

        def pytest_sessionfinish(session):
            if not hasattr(session.config, "workerinput"):
                seen = [os.environ["DATABASE_URL"], list(children())]
                Path("controller.json").write_text(json.dumps(seen))
        """,
        test_it="""
        import json, os
        import pytest
        from connected import add, conn, names

        WHERE = "SELECT current_database()::text, pg_postmaster_start_time()::text"

        @pytest.mark.parametrize("n", range(4))
        def test_it(n, worker_id):
            assert names() == []
            add("x")
            assert names() == ["x"]
            (name, start) = conn.execute(WHERE).fetchone()
            assert name == os.environ["DB_NAME"] == f"tests_{worker_id}"
            with open("workers.txt", "a") as file:
                print(json.dumps([worker_id, os.environ["DATABASE_URL"], start]), file=file)
        """,
    )
    run("-n2", "--maxschedchunk=1").assert_outcomes(passed=4)
    url, children = json.loads((connected.path / "controller.json").read_text())
    lines = (connected.path / "workers.txt").read_text().splitlines()
    found = {tuple(json.loads(line)) for line in lines}
    assert {worker for worker, _, _ in found} == {"gw0", "gw1"}
    assert len({url for _, url, _ in found}) == 2
    assert len({start for _, _, start in found}) == 1
    assert "db.example" not in url
    assert url not in {url for _, url, _ in found}
    assert is_refused(url)
    assert not [each for each in children if "gateway" in each]


def test_workers_that_connect_while_the_conftest_is_imported(
    connected: pytest.Pytester, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one server nonetheless, and the databases are called what the variables say."""
    pytest.importorskip("xdist")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the controller is no worker
    ini(connected, "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    connected.makepyfile(
        conftest="""
        import os

        if "PYTEST_XDIST_WORKER" in os.environ:
            import connected
        """,
        test_it="""
        import os
        import pytest
        from connected import add, conn, names

        @pytest.mark.parametrize("n", range(4))
        def test_it(n, worker_id):
            add("x")
            assert names() == ["x"]
            query = "SELECT current_database()::text, pg_postmaster_start_time()::text"
            name, start = conn.execute(query).fetchone()
            with open("workers.txt", "a") as file:
                print(name, os.environ["DB_NAME"], f"tests_{worker_id}", start, sep=";", file=file)
        """,
    )
    run("-n2", "--maxschedchunk=1").assert_outcomes(passed=4)
    lines = (connected.path / "workers.txt").read_text().splitlines()
    found = {tuple(line.split(";")) for line in lines}
    assert {name for name, *_ in found} == {"tests_gw0", "tests_gw1"}
    assert all(name == by_variable == by_worker for name, by_variable, by_worker, _ in found)
    assert len({start for *_, start in found}) == 1


# However a run ends


@NEEDS_PROC
def test_nothing_is_left_of_a_run_that_is_killed_before_any_test(
    connected: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application was connected by then, to a server without any test's database."""
    ini(connected, "pgmonkey_schema = schema.sql", "pgmonkey_env =", LINES)
    connected.makeconftest(
        """
        import json, os, signal
        from connected import conn

        data = conn.execute("SELECT version()").fetchone()
        with open("told.partial", "w") as file:
            json.dump([os.environ["DATABASE_URL"], os.environ["THE_DSN"]], file)
        os.rename("told.partial", "told.json")
        signal.pause()
        """
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *QUICK]
    with subprocess.Popen(command, cwd=connected.path, stdout=subprocess.DEVNULL) as process:
        try:
            told = connected.path / "told.json"
            assert wait_until(lambda: told.exists() or process.poll() is not None)
            url, dsn = json.loads(told.read_text())
            directory = Path(str(conninfo_to_dict(dsn)["host"]))
            assert processes_of(directory)
            assert not is_refused(url)
        finally:
            process.send_signal(signal.SIGKILL)
    assert wait_until(lambda: is_refused(url))
    assert wait_until(lambda: not (directory.exists() or processes_of(directory)))
