"""pytest-xdist: one server for all workers, a database for each, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.pytest_runs import QUICK
from helpers.remains import NEEDS_PROC, is_gone, processes_of
from helpers.waiting import wait_until

from pytest_pgmonkey.testing.servers.server import RUN, new_run, worker_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("xdist")

SHARED = """
    import os

    def tell(dsn):
        facts = dict(part.split("=", 1) for part in dsn.split())
        worker = os.environ["PYTEST_XDIST_WORKER"]
        with open("told.txt", "a") as file:
            print(worker, facts["host"], facts["dbname"], file=file)
"""
STEPS = """
    import os

    def load(conn):
        with open("loaded.txt", "a") as file:
            print("loaded", os.environ["PYTEST_XDIST_WORKER"], file=file)
        conn.execute("CREATE TABLE item (name text)")
"""


@pytest.fixture
def crowd(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose schema is a function that counts its calls."""
    pytester.makepyfile(shared=SHARED, steps=STEPS)
    pytester.makeini("[pytest]\npythonpath = .\npgmonkey_schema = steps:load\n")
    return pytester


def told(pytester: pytest.Pytester) -> list[tuple[str, ...]]:
    """Worker, server directory and database of each test that told them."""
    text = (pytester.path / "told.txt").read_text()
    return [tuple(line.split()) for line in text.splitlines()]


def the_home(pytester: pytest.Pytester) -> Path:
    (home,) = {home for _, home, _ in told(pytester)}
    return Path(home)


def the_loads(pytester: pytest.Pytester) -> list[str]:
    """The worker of each time that the schema was loaded."""
    lines = (pytester.path / "loaded.txt").read_text().splitlines()
    return [line.split()[1] for line in lines]


def test_one_server_one_schema_and_a_database_for_each_worker(
    crowd: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Two workers find the same table in two databases of one server; the header comes once."""
    crowd.makepyfile(
        """
        import pytest
        from shared import tell

        @pytest.mark.parametrize("number", range(8))
        def test_it(pgmonkey, pgmonkey_database, number):
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (0,)
            pgmonkey.execute("INSERT INTO item VALUES ('mine')")
            tell(pgmonkey_database.dsn)
        """
    )
    result = run("-n2")
    result.assert_outcomes(passed=8)
    assert {("gw0", "tests_gw0"), ("gw1", "tests_gw1")} == {(w, db) for w, _, db in told(crowd)}
    assert len(the_loads(crowd)) == 1
    assert sum(line.startswith("pgmonkey:") for line in result.outlines) == 1
    assert not the_home(crowd).exists()


def test_a_worker_that_crashes_takes_no_server_with_it(
    crowd: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The worker that started the server dies: the other one and the next one go on."""
    test = """
        import os, signal
        from pathlib import Path
        from shared import tell

        def test_before(pgmonkey, pgmonkey_database):
            tell(pgmonkey_database.dsn)

        def test_crash(pgmonkey):
            crashed = Path("crashed")
            loader = Path("loaded.txt").read_text().split()[1]
            if loader == os.environ["PYTEST_XDIST_WORKER"] and not crashed.exists():
                crashed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def test_after(pgmonkey, pgmonkey_database):
            pgmonkey.execute("INSERT INTO item VALUES ('mine')")
            tell(pgmonkey_database.dsn)
    """
    crowd.makepyfile(test_one=test, test_two=test)
    result = run("-n2", "--dist=loadfile")
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 1
    assert "errors" not in outcomes
    (crashed,) = the_loads(crowd)
    workers = [worker for worker, _, _ in told(crowd)]
    assert crashed in workers
    assert workers[-1] != crashed
    assert not the_home(crowd).exists()


def test_a_schema_that_fails_fails_in_every_worker(
    crowd: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The other worker does not wait for a server that will never be ready."""
    (crowd.path / "wrong.sql").write_text("CREATE TABLE a ();\nCREATE TABLE a ();\n")
    crowd.makepyfile(test_one="def test_it(pgmonkey): pass", test_two="def test_it(pgmonkey): pass")
    result = run("-n2", "--dist=loadfile", f"--pgmonkey-schema={crowd.path / 'wrong.sql'}")
    result.assert_outcomes(errors=2)
    expected = f'pgmonkey: {crowd.path / "wrong.sql"}, line 2: relation "a" already exists'
    assert sum(expected in line for line in result.outlines if not line.startswith("ERROR")) == 2
    assert "Traceback" not in result.stdout.str()


def test_a_server_asked_for_first_gets_its_template_later(
    crowd: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Where a fixture of the user needs the bare server, the schema is still loaded once."""
    crowd.makeconftest(
        """
        import psycopg, pytest

        @pytest.fixture(scope="session", autouse=True)
        def bare(pgmonkey_server):
            with psycopg.connect(**pgmonkey_server.conninfo("postgres")) as conn:
                yield conn
        """
    )
    test = """
        from shared import tell

        def test_it(pgmonkey, pgmonkey_database):
            pgmonkey.execute("INSERT INTO item VALUES ('mine')")
            tell(pgmonkey_database.dsn)
    """
    crowd.makepyfile(test_one=test, test_two=test)
    run("-n2", "--dist=loadfile").assert_outcomes(passed=2)
    assert len(the_loads(crowd)) == 1
    assert not the_home(crowd).exists()


@NEEDS_PROC
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_controller(crowd: pytest.Pytester, number: int) -> None:
    """A controller that is killed leaves nothing, although workers are in their tests."""
    crowd.makepyfile(
        """
        import os, signal
        from shared import tell

        def test_it(pgmonkey, pgmonkey_database):
            tell(pgmonkey_database.dsn)
            print(os.getpid(), file=open("pid.txt", "w"), flush=True)
            signal.pause()
        """
    )
    command = [sys.executable, "-m", "pytest", "-n1", *QUICK]
    with subprocess.Popen(command, cwd=crowd.path, stdout=subprocess.DEVNULL) as controller:
        pid = crowd.path / "pid.txt"
        assert wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"))
        worker, home = int(pid.read_text()), the_home(crowd)
        processes = processes_of(home)
        controller.send_signal(number)
        try:
            assert wait_until(lambda: is_gone(home, processes)), processes_of(home)
        finally:
            _kill(worker)


def _kill(pid: int) -> None:
    """End a worker that waits for a signal; it may have noticed that it is alone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_worker_elsewhere_has_a_server_of_its_own() -> None:
    """A worker that is no child of the controller cannot share its server's socket."""
    run = new_run()
    workerinput = {"workerid": "gw0", RUN: run}
    assert worker_of(workerinput) is None
    assert worker_of({"workerid": "gw0"}) is None
    assert worker_of(None) is None
    run["controller"] = os.getppid()
    worker = worker_of(workerinput)
    assert worker is not None
    assert ("gw0", run["name"]) == (worker.name, worker.run)
