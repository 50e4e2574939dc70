"""--pgmonkey-keep: the databases of failed tests stay, and nothing else of their runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from helpers.pytest_runs import QUICK
from helpers.remains import NEEDS_PROC, is_gone, processes_of
from helpers.waiting import PATIENCE, wait_until

from pytest_pgmonkey import kept_databases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_pgmonkey.kept_databases import Kept
    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

pytestmark = NEEDS_PROC

TESTS = """
    import psycopg
    import pytest

    pytestmark = pytest.mark.pgmonkey(isolation="clone")
    open_connections = []

    def test_of_the_call(pgmonkey):
        pgmonkey.execute("CREATE TABLE item AS SELECT 7 AS id")
        open_connections.append(psycopg.connect(pgmonkey.dsn))
        assert False

    @pytest.fixture
    def no_setup(pgmonkey):
        pgmonkey.execute("CREATE TABLE item AS SELECT 8 AS id")
        assert False

    def test_of_the_setup(no_setup):
        pass

    @pytest.fixture
    def no_teardown(pgmonkey):
        yield
        assert False

    def test_of_the_teardown(no_teardown, pgmonkey):
        pgmonkey.execute("CREATE TABLE item AS SELECT 9 AS id")

    def test_that_passes(pgmonkey):
        pgmonkey.execute("CREATE TABLE item ()")

    @pytest.mark.xfail
    def test_expected_to_fail(pgmonkey):
        pgmonkey.execute("CREATE TABLE item ()")
        assert False

    @pytest.mark.pgmonkey(isolation="rollback")
    def test_rolled_back(pgmonkey):
        pgmonkey.execute("CREATE TABLE item AS SELECT 10 AS id")
        assert False
"""
ROLLED_BACK = """
    import psycopg
    import pytest

    pytestmark = pytest.mark.pgmonkey(isolation="rollback")
    open_connections = []

    @pytest.fixture
    def item(pgmonkey):
        assert pgmonkey.execute("SELECT to_regclass('item')").fetchone() == (None,)
        pgmonkey.execute("CREATE TABLE item AS SELECT 7 AS id")

    @pytest.fixture
    def no_setup(item):
        assert False

    def test_by_every_door(item, pgmonkey):
        with pgmonkey.pool as conn:
            conn.execute("INSERT INTO item VALUES (8)")
        client = psycopg.connect(pgmonkey.dsn)
        open_connections.append(client)
        client.execute("INSERT INTO item VALUES (9)")
        client.commit()
        client.execute("INSERT INTO item VALUES (10)")
        with pgmonkey.checkpoint():
            client.execute("INSERT INTO item VALUES (11)")
        assert False

    def test_of_the_setup(no_setup):
        pass

    def test_that_passes(item):
        pass

    @pytest.fixture(scope="module")
    def changed(pgmonkey_database):
        with pgmonkey_database.unblock(), psycopg.connect(pgmonkey_database.dsn) as conn:
            conn.execute("CREATE TABLE more AS SELECT 1 AS n")

    def test_after_unblock(changed, item):
        assert False

    def test_that_finds_more(item, pgmonkey):
        assert pgmonkey.execute("SELECT n FROM more").fetchone() == (1,)

    def test_with_unblock(item, pgmonkey_database):
        with pgmonkey_database.unblock():
            pass
        assert False

    class TestShared:
        def test_it(self, pgmonkey_class, item):
            assert False

    @pytest.mark.xfail
    def test_expected_to_fail(item):
        assert False

    def test_that_is_last(item):
        pass
"""
FAILING = """
    import pytest

    @pytest.mark.pgmonkey(isolation="clone")
    def test_it(pgmonkey):
        pgmonkey.execute("CREATE TABLE item AS SELECT 7 AS id")
        assert False
"""


@pytest.fixture(autouse=True)
def nothing_stays(cache: Path) -> Iterator[None]:
    """Whatever becomes of a test here, its databases and servers go with it."""
    assert kept_databases.entries() == []
    yield
    found = kept_databases.entries()
    for one in found:
        with contextlib.suppress(kept_databases.KeptError):
            kept_databases.remove(one)
        one.forget()
    for home in {home_of(one) for one in found if one.source == "embedded"}:
        assert wait_until(lambda home=home: is_gone(home, set()))


def home_of(one: Kept) -> Path:
    return Path(one.place["host"])


def items(one: Kept) -> list[tuple[int]]:
    with psycopg.connect(one.dsn) as conn:
        return conn.execute("SELECT id FROM item").fetchall()


def names() -> list[str]:
    """The functions of the tests whose databases are kept."""
    return [one.test.rpartition("::")[2] for one in kept_databases.entries()]


def test_failures_of_every_phase(pytester: pytest.Pytester) -> None:
    """Each report tells how to get in and how to remove it; what passed leaves nothing."""
    pytester.makepyfile(TESTS)
    command = [sys.executable, "-m", "pytest", *QUICK, "--pgmonkey-keep=failed"]
    # Somebody who waits for the end of the output does not wait for the server's.
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    output = result.stdout
    assert "2 failed, 2 passed, 1 xfailed, 2 errors" in output
    assert names() == [
        "test_of_the_call",
        "test_of_the_setup",
        "test_of_the_teardown",
        "test_rolled_back",
    ]
    found = kept_databases.entries()
    assert [items(one) for one in found] == [[(7,)], [(8,)], [(9,)], [(10,)]]
    for one in found:
        told = f"\nDSN: {one.dsn}\n{one.psql}\npgmonkey kept --remove {one.name}\n"
        assert f"The database of this test is kept: {one.name}{told}" in output
        assert one.name.startswith(f"pgmonkey_kept_{one.test.rpartition('::')[2]}_")
    home = home_of(found[0])
    kept_databases.remove(found[0])
    kept_databases.remove(found[1])
    kept_databases.remove(found[3])
    assert items(found[2]) == [(9,)]
    kept_databases.remove(found[2])
    assert wait_until(lambda: is_gone(home, set()))


def test_in_rollback_isolation(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """What was committed is there, and the next test finds nothing of it."""
    pytester.makepyfile(ROLLED_BACK)
    result = run("--pgmonkey-keep=failed", "--tb=short", "-p", "no:randomly")
    result.assert_outcomes(failed=4, passed=3, errors=1, xfailed=1)
    assert names() == ["test_by_every_door", "test_of_the_setup", "test_after_unblock"]
    found = kept_databases.entries()
    assert [items(one) for one in found] == [[(7,), (8,), (9,)], [(7,)], [(7,)]]
    with psycopg.connect(found[2].dsn) as conn:
        assert conn.execute("SELECT n FROM more").fetchall() == [(1,)]
    result.stdout.fnmatch_lines(
        [
            found[0].psql,
            "The database of this test is not kept after all: what every test finds has changed *",
            "The database of this test is not kept: other tests work in it, too: *",
        ]
    )


def test_in_an_existing_database(
    pytester: pytest.Pytester, run: Callable[..., Any], config_file: Path
) -> None:
    pytester.makepyfile("def test_it(pgmonkey): assert False")
    result = run(f"--pgmonkey-config={config_file}", "--pgmonkey-keep=failed")
    result.stdout.fnmatch_lines(
        [
            "The database of this test is not kept: nothing is ever committed in a database that "
            "is not the kit's own"
        ]
    )


def test_a_run_without_failures(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """It keeps nothing, and its server ends with it."""
    pytester.makepyfile(TESTS)
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def told(pgmonkey_server):
            with open("home.txt", "w") as file:
                file.write(pgmonkey_server.conninfo("")["host"])
        """
    )
    run("--pgmonkey-keep=failed", "-k", "passes or expected").assert_outcomes(passed=1, xfailed=1)
    assert kept_databases.entries() == []
    assert not Path((pytester.path / "home.txt").read_text()).exists()


def test_workers(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """Databases of all workers stay on the one server of the run."""
    pytester.makepyfile(test_one=FAILING, test_two=FAILING)
    run("-n2", "--dist=loadfile", "--pgmonkey-keep=failed").assert_outcomes(failed=2)
    found = kept_databases.entries()
    assert [items(one) for one in found] == [[(7,)], [(7,)]]
    (home,) = {home_of(one) for one in found}
    for one in found:
        kept_databases.remove(one)
    assert wait_until(lambda: is_gone(home, set()))


def test_a_run_that_is_killed(pytester: pytest.Pytester) -> None:
    """What was kept before stays usable; an end of its guardian ends it for good."""
    waiting = """
    def test_waits(pgmonkey_database):
        import signal
        with open("config.partial", "w") as file:
            file.write(str(pgmonkey_database.config_path))
        import os
        os.rename("config.partial", "config.txt")
        signal.pause()
    """
    pytester.makepyfile(FAILING + waiting)
    command = [sys.executable, "-m", "pytest", *QUICK, "--pgmonkey-keep=failed"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        told = pytester.path / "config.txt"
        assert wait_until(lambda: told.exists() or process.poll() is not None)
        process.kill()
    assert wait_until(lambda: not Path(told.read_text()).exists())
    (one,) = kept_databases.entries()
    home = home_of(one)
    assert items(one) == [(7,)]
    assert not one.is_gone()
    processes = processes_of(home)
    os.kill(int((home / "guardian.pid").read_text()), signal.SIGTERM)
    assert wait_until(lambda: is_gone(home, processes))
    assert one.is_gone()


def test_an_interrupted_teardown(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """What the report has told is kept, although the test's teardown is never reported."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def interrupted(pgmonkey):
            yield
            raise KeyboardInterrupt

        @pytest.mark.pgmonkey(isolation="clone")
        def test_it(pgmonkey, interrupted):
            pgmonkey.execute("CREATE TABLE item AS SELECT 7 AS id")
            assert False
        """
    )
    result = run("--pgmonkey-keep=failed")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    (one,) = kept_databases.entries()
    assert f"The database of this test is kept: {one.name}" in result.stdout.str()
    assert items(one) == [(7,)]


def test_the_last_attempt_counts(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """Of a test that is run again after a failure, earlier attempts leave nothing."""
    pytester.makeconftest(
        """
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            if nextitem is None:
                return None
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            runtestprotocol(item, nextitem=nextitem, log=False)
            item._initrequest()
            runtestprotocol(item, nextitem=nextitem)
            return True
        """
    )
    pytester.makepyfile(
        FAILING
        + """
    @pytest.mark.pgmonkey(isolation="clone")
    def test_better_then(pgmonkey, attempts=[]):
        attempts.append(1)
        assert len(attempts) == 2

    def test_last(pgmonkey):
        pass
    """
    )
    run("--pgmonkey-keep=failed").assert_outcomes(failed=1, passed=2)
    assert names() == ["test_it"]


def test_ten_at_most(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The oldest goes."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("n", range(12))
        def test_it(pgmonkey, n):
            pgmonkey.execute("CREATE TABLE item AS SELECT %s AS id", [n])
            assert False
        """
    )
    run("--pgmonkey-keep=failed").assert_outcomes(failed=12)
    found = kept_databases.entries()
    assert [f"test_it[{n}]" for n in range(2, 12)] == names()
    assert [[(n,)] for n in range(2, 12)] == [items(one) for one in found]
    with psycopg.connect(found[0].dsn) as conn:
        query = "SELECT count(*) FROM pg_database WHERE datname LIKE 'pgmonkey_kept_%'"
        assert conn.execute(query).fetchone() == (10,)


def test_no_place_to_write_it_down(
    pytester: pytest.Pytester, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept that nobody could remove, and the report says why."""
    (pytester.path / "file").touch()
    with monkeypatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "HOME"):
            patch.setenv(name, str(pytester.path / "file"))
        pytester.makepyfile(FAILING)
        result = run("--pgmonkey-keep=failed", "--tb=short")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["The database of this test is not kept: *set XDG_CACHE_HOME to a directory of yours"]
    )
    assert "pgmonkey kept --remove" not in result.stdout.str()


def test_a_database_that_is_no_more(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The report takes back what it has said with the failure."""
    pytester.makepyfile(
        """
        import psycopg
        import pytest

        @pytest.mark.pgmonkey(isolation="clone")
        def test_it(pgmonkey, pgmonkey_server):
            (name,) = pgmonkey.execute("SELECT current_database()").fetchone()
            with psycopg.connect(**pgmonkey_server.admin_conninfo(), autocommit=True) as conn:
                conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
            assert False
        """
    )
    result = run("--pgmonkey-keep=failed")
    result.stdout.fnmatch_lines(["The database of this test is not kept after all: *"])
    assert kept_databases.entries() == []


@pytest.fixture
def with_password(
    pg_server: EmbeddedServer, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A file that names a role which may create databases, and the variable of its password."""
    with psycopg.connect(**pg_server.admin_conninfo(), autocommit=True) as conn:
        conn.execute("CREATE ROLE keeper LOGIN CREATEDB")
        config = yaml.safe_load(config_file.read_text("utf-8"))
        config["connection_settings"].update(
            user="keeper", dbname="postgres", password={"from_env": "KEEPER_PASSWORD"}
        )
        config_file.write_text(yaml.safe_dump(config), "utf-8")
        monkeypatch.setenv("KEEPER_PASSWORD", "hunter2hunter2")
        yield config_file
        for (name,) in conn.execute(
            "SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = 'keeper'"
        ).fetchall():
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
        conn.execute("DROP ROLE keeper")


def test_on_a_configured_server(
    pytester: pytest.Pytester, run: Callable[..., Any], with_password: Path, cache: Path
) -> None:
    """It outlives the sweep of later runs, and no password stands anywhere."""
    pytester.makepyfile(FAILING)
    options = (f"--pgmonkey-config={with_password}", "--pgmonkey-resolve-env")
    options += ("--pgmonkey-database=scratch",)
    output = run(*options, "--pgmonkey-keep=failed", "--tb=short").stdout.str()
    run(*options).assert_outcomes(failed=1)
    (one,) = kept_databases.entries()
    assert one.psql in output
    assert f"(psql asks for what {with_password} holds)" in output
    assert one.file is not None
    assert "hunter2" not in output + one.file.read_text("utf-8")
    assert items(one) == [(7,)]
    assert not one.is_gone()
    kept_databases.remove(one)
    assert one.is_gone()
    assert kept_databases.entries() == []
