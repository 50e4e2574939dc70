"""Templates on a config's server: kept between runs, shared by workers, never half made."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from helpers.pytest_runs import QUICK
from helpers.waiting import PATIENCE, wait_until

from pytest_pgmonkey.config import connection_spec, load_config
from pytest_pgmonkey.testing.databases.advisory_locks import lock_shared
from pytest_pgmonkey.testing.databases.recipe import Recipe
from pytest_pgmonkey.testing.databases.shared_templates import LIMIT
from pytest_pgmonkey.testing.servers.configured import ConfiguredServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

STEPS = """
    import pathlib

    def load(conn):
        with open("loaded.txt", "a") as file:
            print("loaded", file=file)
        conn.execute("CREATE TABLE item (name text)")
        conn.execute("INSERT INTO item VALUES ('of the schema')")

    def lasting(conn):
        load(conn)

    lasting.pgmonkey_version = 1
"""
TESTS = """
    import pathlib, time
    import pytest

    @pytest.fixture(scope="session", autouse=True)
    def all_workers_are_there(pytestconfig, pgmonkey_database):
        # What they share goes with the last of them.
        worker = getattr(pytestconfig, "workerinput", None)
        if worker is not None:
            pathlib.Path(f"{worker['workerid']}.there").touch()
            deadline = time.monotonic() + 60
            while len(list(pathlib.Path().glob("*.there"))) < worker["workercount"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    @pytest.mark.parametrize("number", range(4))
    def test_it(pgmonkey, number):
        assert pgmonkey.execute("SELECT name FROM item").fetchall() == [("of the schema",)]
        pgmonkey.execute("INSERT INTO item VALUES ('of a test')")
"""
LASTING = "--pgmonkey-schema=steps:lasting"
EACH_RUN = "--pgmonkey-schema=steps:load"


@pytest.fixture
def admin(pg_server: EmbeddedServer) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection."""
    with psycopg.connect(**pg_server.admin_conninfo(), autocommit=True) as conn:
        yield conn


@pytest.fixture
def owner(admin: psycopg.Connection[Any], config_file: Path) -> Iterator[str]:
    """A role with nothing but CREATEDB; the YAML file logs in as it."""
    name = "ordinary"
    admin.execute(f"CREATE ROLE {name} LOGIN CREATEDB")
    config = yaml.safe_load(config_file.read_text("utf-8"))
    config["connection_settings"]["user"] = name
    config_file.write_text(yaml.safe_dump(config), "utf-8")
    yield name
    for database in databases(admin):
        admin.execute(f"DROP DATABASE {database} WITH (FORCE)")
    admin.execute(f"DROP ROLE {name}")


@pytest.fixture
def shop(
    pytester: pytest.Pytester, run: Callable[..., Any], owner: str, config_file: Path
) -> Callable[..., pytest.RunResult]:
    """Run the tests of a project whose schema counts how often it is loaded."""
    pytester.makepyfile(steps=STEPS, test_shop=TESTS)
    pytester.makeini("[pytest]\npythonpath = .\n")
    return lambda *args: run(f"--pgmonkey-config={config_file}", *args)


def databases(admin: psycopg.Connection[Any], owner: str = "ordinary") -> list[str]:
    """The databases of a role."""
    query = "SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = %s ORDER BY 1"
    return [name for (name,) in admin.execute(query, [owner])]


def loads(pytester: pytest.Pytester) -> int:
    path = pytester.path / "loaded.txt"
    return len(path.read_text("utf-8").splitlines()) if path.exists() else 0


def test_a_lasting_schema_is_loaded_once_for_all_runs(
    pytester: pytest.Pytester, shop: Callable[..., Any], admin: psycopg.Connection[Any]
) -> None:
    """The next run runs no step, another version does; nobody can connect to what is kept."""
    for _ in range(2):
        shop(LASTING).assert_outcomes(passed=4)
    assert loads(pytester) == 1
    (kept,) = databases(admin)
    assert kept.startswith("pgmonkey_template_")
    query = "SELECT datallowconn FROM pg_database WHERE datname = %s"
    assert admin.execute(query, [kept]).fetchone() == (False,)
    steps = pytester.path / "steps.py"
    steps.write_text(steps.read_text("utf-8").replace("version = 1", "version = 2"), "utf-8")
    shop(LASTING).assert_outcomes(passed=4)
    assert loads(pytester) == 2
    assert len(databases(admin)) == 2


@pytest.mark.parametrize(("schema", "kept"), [(LASTING, 1), (EACH_RUN, 0)])
def test_workers_share_one_load(
    pytester: pytest.Pytester,
    shop: Callable[..., Any],
    admin: psycopg.Connection[Any],
    schema: str,
    kept: int,
) -> None:
    """The schema is loaded once a run, and what is not kept goes with the last worker."""
    pytest.importorskip("xdist")
    shop(schema, "-n2").assert_outcomes(passed=4)
    assert loads(pytester) == 1
    assert len(databases(admin)) == kept


def test_what_a_killed_worker_shared_is_swept(
    pytester: pytest.Pytester, shop: Callable[..., Any], admin: psycopg.Connection[Any]
) -> None:
    """After a SIGKILL of all workers the template of that run goes with the next one."""
    pytest.importorskip("xdist")
    pytester.makepyfile(
        test_shop="import os, signal\ndef test_it(pgmonkey): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    shop(EACH_RUN, "-n1", "--max-worker-restart=0")
    assert [name for name in databases(admin) if "_schema_" in name]
    pytester.makepyfile(test_shop=TESTS)
    shop(EACH_RUN).assert_outcomes(passed=4)
    assert databases(admin) == []


def test_a_failed_load_leaves_no_template(
    pytester: pytest.Pytester, shop: Callable[..., Any], admin: psycopg.Connection[Any]
) -> None:
    """A step that fails leaves nothing; one that is killed leaves what the next run sweeps."""
    steps = pytester.path / "steps.py"
    good = steps.read_text("utf-8")
    steps.write_text(good + "    raise ValueError\n", "utf-8")
    source = good.replace("    load(conn)\n", "    load(conn)\n    raise ValueError\n")
    steps.write_text(source, "utf-8")
    shop(LASTING).assert_outcomes(errors=4)
    assert databases(admin) == []
    die = "    conn.commit()\n    import os\n    os.kill(os.getpid(), 9)\n"
    steps.write_text(source.replace("    raise ValueError\n", die), "utf-8")
    shop(LASTING)
    assert len(databases(admin)) == 1
    steps.write_text(good, "utf-8")
    shop(LASTING).assert_outcomes(passed=4)
    assert loads(pytester) == 3
    (kept,) = databases(admin)
    assert kept.startswith("pgmonkey_template_")


def test_the_least_recently_used_goes(
    admin: psycopg.Connection[Any], owner: str, config_file: Path
) -> None:
    """At most six stay; one that a living run uses and what only looks like ours always do."""
    config = load_config(config_file)
    spec = connection_spec(config, "normal")
    alike = "pgmonkey_template_0123456789abcdef0123456701234567"
    admin.execute(f"CREATE DATABASE {alike} OWNER {owner}")

    def use(number: int) -> str:
        server = ConfiguredServer(spec, config)
        try:
            return str(server.template(Recipe(str(number), lasting=True), lambda name: None))
        finally:
            server.stop()

    names = [use(number) for number in range(LIMIT)]
    assert use(0) == names[0]  # from here on the second is the oldest
    # Another run names another database, in which advisory locks are not the same.
    elsewhere = pg_conninfo(admin, owner)
    with psycopg.connect(**elsewhere, autocommit=True) as living:
        lock_shared(living, names[1])
        names.append(use(LIMIT))
        assert {alike, *names} == set(databases(admin))
        names.append(use(LIMIT + 1))
        assert {alike, *names} - {names[2]} == set(databases(admin))
    names.append(use(LIMIT + 2))
    assert {alike, *names} - set(names[1:4]) == set(databases(admin))


def pg_conninfo(admin: psycopg.Connection[Any], user: str) -> dict[str, Any]:
    return {"host": admin.info.host, "port": admin.info.port, "user": user, "dbname": "postgres"}


def test_settings_of_the_database_hold_in_its_copies(
    pytester: pytest.Pytester, shop: Callable[..., Any]
) -> None:
    """What ALTER DATABASE and ALTER ROLE … SET have set is there, without a superuser."""
    (pytester.path / "s.sql").write_text(
        """
        CREATE SCHEMA "Odd, \"\"name\"\"";
        DO $$ BEGIN
            EXECUTE format($a$ ALTER DATABASE %I SET search_path TO "Odd, \"\"name\"\"", public $a$,
                current_database());
            EXECUTE format($a$ ALTER DATABASE %I SET DateStyle TO 'SQL, DMY' $a$,
                current_database());
            EXECUTE format($a$ ALTER ROLE ordinary IN DATABASE %I SET work_mem TO '1234kB' $a$,
                current_database());
            EXECUTE format($a$ ALTER ROLE ordinary IN DATABASE %I SET temp_tablespaces TO '' $a$,
                current_database());
        END $$;
        """,
        "utf-8",
    )
    pytester.makepyfile(
        test_shop="""
        import pytest

        @pytest.mark.parametrize("isolation", [
            pytest.param(name, marks=pytest.mark.pgmonkey(isolation=name))
            for name in ("rollback", "clone")
        ])
        def test_it(pgmonkey, isolation):
            def show(name):
                return pgmonkey.execute(f"SHOW {name}").fetchone()[0]

            assert show("search_path") == '"Odd, \"\"name\"\"", public'
            assert show("DateStyle") == "SQL, DMY"
            assert show("work_mem") == "1234kB"
            assert show("temp_tablespaces") == '""'
        """
    )
    shop("--pgmonkey-schema=s.sql").assert_outcomes(passed=2)


def test_a_setting_that_cannot_be_copied_is_named(
    pytester: pytest.Pytester,
    shop: Callable[..., Any],
    admin: psycopg.Connection[Any],
    pg_server: EmbeddedServer,
) -> None:
    """What a superuser has set in the template an ordinary role cannot set in its copy."""
    host = pg_server.admin_conninfo()["host"]
    pytester.makepyfile(
        steps=f"""
        import psycopg

        def lasting(conn):
            name = conn.info.dbname
            with psycopg.connect(host={host!r}, user="postgres", dbname="postgres") as admin:
                admin.execute(f"ALTER DATABASE {{name}} SET log_min_messages TO 'debug1'")

        lasting.pgmonkey_version = 1
        """
    )
    result = shop(LASTING)
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines(["*cannot give a copy*log_min_messages*permission denied*"])
    assert [name for name in databases(admin) if "template" not in name] == []


def test_a_connection_that_a_step_leaves_open(
    pytester: pytest.Pytester, shop: Callable[..., Any]
) -> None:
    """It does not keep the database from becoming a template."""
    pytester.makepyfile(
        steps="""
        import psycopg

        left = []

        def lasting(conn):
            left.append(psycopg.connect(conn.info.dsn))
            left[0].execute("CREATE TABLE item AS SELECT 'of the schema' AS name")
            left[0].commit()

        lasting.pgmonkey_version = 1
        """,
        test_shop=TESTS
        + """
    def test_close():
        import steps
        for conn in steps.left:
            conn.close()
    """,
    )
    shop(LASTING).assert_outcomes(passed=5)


def test_clones_come_from_the_template(pytester: pytest.Pytester, shop: Callable[..., Any]) -> None:
    """No copy of the copy is made for clones, unless a session fixture has added data."""
    pytester.makepyfile(
        test_shop="""
        import pytest

        @pytest.fixture(scope="session")
        def data(pgmonkey_database):
            import psycopg
            with pgmonkey_database.unblock():
                with psycopg.connect(pgmonkey_database.dsn) as conn:
                    conn.execute("INSERT INTO item VALUES ('of the session')")

        @pytest.mark.parametrize("number", range(3))
        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(pgmonkey, number):
            query = "SELECT datname FROM pg_database WHERE datname LIKE '%original%'"
            assert pgmonkey.execute(query).fetchall() == []
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (1,)
            pgmonkey.execute("INSERT INTO item VALUES ('of a test')")

        @pytest.mark.pgmonkey(isolation="clone")
        def test_data(data, pgmonkey):
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)

        @pytest.mark.pgmonkey(isolation="clone")
        def test_data_stays(pgmonkey):
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)
        """
    )
    shop(LASTING).assert_outcomes(passed=5)


@pytest.mark.parametrize("same", [True, False])
def test_two_runs_at_once(
    pytester: pytest.Pytester,
    shop: Callable[..., Any],
    admin: psycopg.Connection[Any],
    config_file: Path,
    pg_server: EmbeddedServer,
    same: bool,
) -> None:
    """Two runs that overlap share a template or have one each, and drop nothing of the other's.

    They name different databases of the server, in which advisory locks are not the same.
    """
    other = pytester.path / "other.yaml"
    config = yaml.safe_load(config_file.read_text("utf-8"))
    config["connection_settings"]["dbname"] = "postgres"
    other.write_text(yaml.safe_dump(config), "utf-8")
    schema = "CREATE TABLE item AS SELECT 'of the schema' AS name;"
    for name in "ab":
        text = schema if same else f"{schema} -- {name}"
        (pytester.path / name).mkdir()
        (pytester.path / name / "s.sql").write_text(text, "utf-8")
    pytester.makepyfile(
        test_shop=TESTS
        + """
    def test_meet(pgmonkey):
        import os
        pgmonkey.execute("INSERT INTO item VALUES ('of a test')")
        for mode, pipe in map(str.split, os.environ["MEET"].split(",")):
            with open(pipe, mode) as file:  # waits for the other side to open it
                file.write("here") if mode == "w" else file.read()
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)

    @pytest.mark.pgmonkey(isolation="clone")
    def test_after(pgmonkey):
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (1,)
    """
    )
    for pipe in ("first", "second"):
        os.mkfifo(pytester.path / pipe)
    is_up = os.open(pytester.path / "first", os.O_RDONLY | os.O_NONBLOCK)
    with start(pytester, "w first,r second", config_file, "a/s.sql") as first:
        try:
            assert select.select([is_up], [], [], PATIENCE)[0]
            with start(pytester, "w second", other, "b/s.sql") as second:
                outputs = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
        finally:
            first.kill()
            os.close(is_up)
    assert first.returncode == second.returncode == 0, "\n".join(outputs)
    assert len(databases(admin)) == (1 if same else 2)
    assert wait_until(lambda: not [n for n in databases(admin) if "template" not in n])


def start(pytester: pytest.Pytester, meet: str, config: Path, schema: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", *QUICK]
    return subprocess.Popen(
        [*command, f"--pgmonkey-config={config}", f"--pgmonkey-schema={schema}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=pytester.path,
        env={**os.environ, "MEET": meet},
    )
