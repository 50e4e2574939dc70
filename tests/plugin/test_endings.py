"""However a run ends, pytest's output is readable and nothing of the server is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.pytest_runs import QUICK
from helpers.remains import NEEDS_PROC, is_gone, processes_of, segments_of
from helpers.waiting import PATIENCE, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = NEEDS_PROC

CONFTEST = """
    import os
    import pytest

    @pytest.fixture(scope="session", autouse=True)
    def told(pgmonkey_database, pgmonkey_server):
        home = pgmonkey_server.conninfo("")["host"]
        with open("home.partial", "w") as file:
            file.write(f"{home} {pgmonkey_database.config_path}")
        os.rename("home.partial", "home.txt")

    @pytest.fixture
    def postmaster(pgmonkey_server):
        with open(pgmonkey_server.conninfo("")["host"] + "/data/postmaster.pid") as file:
            return int(file.readline())
"""
WAITING = """
    import signal

    def test_it(pgmonkey):
        pgmonkey.execute("CREATE TABLE item ()")
        open("waiting", "w").close()
        signal.pause()

    def test_next(pgmonkey):
        pass
"""


class Run:
    """A run of pytest whose tests tell where their server lives."""

    def __init__(self, directory: Path, *args: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *QUICK, *args],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # In CI pytest repeats whole messages in its summary.
            env={name: value for name, value in os.environ.items() if name != "CI"},
            # Inherited as ignored where the suite runs under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def wait_for(self, name: str) -> None:
        """Wait for a file that a test makes."""
        file = self.directory / name
        assert wait_until(lambda: file.exists() or self.process.poll() is not None)
        assert file.exists(), self.process.communicate()[0]

    @property
    def files(self) -> list[Path]:
        """The server's home and the configuration file that leads to it."""
        return [Path(name) for name in (self.directory / "home.txt").read_text().split()]

    def end(self) -> str:
        """Wait for the end and give the output."""
        return self.process.communicate(timeout=PATIENCE)[0]


@pytest.fixture
def begin(pytester: pytest.Pytester) -> Iterator[Callable[..., Run]]:
    """Begin a run of pytest on some tests."""
    pytester.makeconftest(CONFTEST)
    runs = []

    def begin(tests: str, *args: str) -> Run:
        pytester.makepyfile(tests)
        runs.append(Run(pytester.path, *args))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.communicate()


@pytest.fixture
def result(begin: Callable[..., Run]) -> Callable[..., str]:
    """Run pytest to its end, check that nothing is left at once, and give its output."""

    def result(tests: str, *args: str) -> str:
        run = begin(tests, *args)
        output = run.end()
        for path in run.files:
            assert not path.exists()
        assert not processes_of(run.files[0])
        assert_readable(output)
        return output

    return result


def assert_readable(output: str) -> None:
    for unwanted in ("INTERNALERROR", "Traceback", "pytest_pgmonkey/testing/", "ResourceWarning"):
        assert unwanted not in output, output


def waiting(run: Run) -> tuple[Path, set[int]]:
    """Wait until a test waits; give its server's home and processes."""
    run.wait_for("waiting")
    home = run.files[0]
    processes = processes_of(home)
    assert segments_of(processes)
    return home, processes


def test_interrupted_once(begin: Callable[..., Run]) -> None:
    """Ctrl-C ends the run with pytest's own words, and the server with it."""
    run = begin(WAITING)
    home, processes = waiting(run)
    run.process.send_signal(signal.SIGINT)
    output = run.end()
    assert is_gone(home, processes)
    assert not any(path.exists() for path in run.files)
    assert "! KeyboardInterrupt !" in output
    assert run.process.returncode == pytest.ExitCode.INTERRUPTED
    assert_readable(output)


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM], [signal.SIGKILL], [signal.SIGHUP]],
    ids=lambda signals: "-".join(number.name for number in signals),
)
def test_ended_by_signals(begin: Callable[..., Run], signals: list[signal.Signals]) -> None:
    """An impatient or violent end leaves nothing either, a moment later."""
    run = begin(WAITING)
    home, processes = waiting(run)
    for number in signals:
        run.process.send_signal(number)
    run.end()
    assert wait_until(lambda: is_gone(home, processes)), processes_of(home)


def test_a_test_that_leaves_at_once(begin: Callable[..., Run]) -> None:
    """os._exit() in a test, which no clean-up sees, leaves nothing."""
    run = begin("import os\ndef test_it(pgmonkey): os._exit(3)")
    run.end()
    assert run.process.returncode == 3
    assert wait_until(lambda: is_gone(run.files[0], set()))


def test_forks(begin: Callable[..., Run]) -> None:
    """A child may run to pytest's end, and another outlive it: neither ends nor keeps the server.

    The child goes through the end of its interpreter, with every finalizer.
    """
    run = begin(
        """
        import os, signal, sys

        def test_child(pgmonkey):
            child = os.fork()
            if not child:
                sys.exit()
            assert os.waitpid(child, 0)[0] == child

        def test_survivor(pgmonkey):
            assert pgmonkey.execute("SELECT 1").fetchone() == (1,)
            child = os.fork()
            if not child:
                signal.pause()
            with open("survivor", "w") as file:
                file.write(str(child))
        """,
        "-s",
    )
    run.process.wait(PATIENCE)
    survivor = int((run.directory / "survivor").read_text())
    try:
        assert is_gone(run.files[0], set())
    finally:
        os.kill(survivor, signal.SIGKILL)
    assert run.process.returncode == 0, run.end()


def test_stopped_at_the_first_failure(result: Callable[..., str]) -> None:
    """-x and --maxfail end the run as always."""
    output = result(
        """
        def test_one(pgmonkey):
            pgmonkey.execute("SELECT wrong")

        def test_two(pgmonkey):
            pass
        """,
        "-x",
        "--tb=short",
        "--show-capture=no",
        "-p",
        "no:asyncio",
    )
    assert "stopping after 1 failures" in output


def test_a_session_fixture_that_fails(result: Callable[..., str]) -> None:
    """A fixture of the user that fails after the server has started is the error shown."""
    output = result(
        """
        import pytest

        @pytest.fixture(scope="session")
        def data(pgmonkey_database):
            with pgmonkey_database.unblock():
                raise ZeroDivisionError("mine")

        def test_one(data, pgmonkey):
            pass

        def test_two(pgmonkey):
            assert pgmonkey.execute("SELECT 1").fetchone() == (1,)
        """
    )
    assert "ZeroDivisionError: mine" in output
    assert "1 passed, 1 error" in output


def test_a_server_that_recovers_from_a_crash(result: Callable[..., str]) -> None:
    """The test whose session was killed fails and says so; the next one has a new session."""
    output = result(
        """
        import os, signal
        import psycopg
        import pytest

        def test_crash(pgmonkey):
            with pytest.raises(psycopg.OperationalError), pgmonkey.normal as conn:
                os.kill(conn.info.backend_pid, signal.SIGKILL)
                conn.execute("SELECT 1")

        def test_next(pgmonkey):
            assert pgmonkey.execute("SELECT 1").fetchone() == (1,)
        """
    )
    assert "pgmonkey: the server closed the test's connection while the test ran" in output
    assert "2 passed, 1 error" in output


def test_a_server_that_is_gone(result: Callable[..., str]) -> None:
    """Each later test says so in a few lines, with the server's last words; others run."""
    output = result(
        """
        import os, signal
        import psycopg
        import pytest

        def test_crash(pgmonkey, postmaster):
            # What the server's processes say of its end may come late or not at all.
            pgmonkey.execute("DO $$ BEGIN RAISE LOG '% %', 'last', 'words'; END $$")
            with pytest.raises(psycopg.OperationalError), pgmonkey.normal as conn:
                os.kill(postmaster, signal.SIGKILL)
                conn.execute("SELECT pg_sleep(600)")

        @pytest.mark.parametrize("number", range(3))
        def test_next(pgmonkey, number):
            pass

        def test_plain():
            pass
        """
    )
    assert output.count("pgmonkey: the server has ended: connection") == 3
    assert output.count("LOG:  last words") == 1
    assert "2 passed, 4 errors" in output


def test_a_schema_interrupted(begin: Callable[..., Run], pytester: pytest.Pytester) -> None:
    """Ctrl-C while the schema is loaded leaves neither server nor a template to be trusted."""
    pytester.makepyfile(
        steps="""
        import os, time

        def load(conn):
            conn.execute("CREATE TABLE item ()")
            with open("home.partial", "w") as file:
                file.write(conn.info.host)
            os.rename("home.partial", "home.txt")
            open("waiting", "w").close()
            conn.execute("SELECT pg_sleep(60)")
        load.pgmonkey_version = 1
        """
    )
    pytester.makeconftest("")
    run = begin("def test_it(pgmonkey): pass", "--pgmonkey-schema=steps:load")
    home, processes = waiting(run)
    run.process.send_signal(signal.SIGINT)
    output = run.end()
    assert is_gone(home, processes)
    assert "INTERNALERROR" not in output
    again = pytester.path / "again"
    (pytester.path / "waiting").rename(again)
    run = begin("def test_it(pgmonkey): pass", "--pgmonkey-schema=steps:load")
    waiting(run)  # it is loaded once more


def test_workers_ended_together(begin: Callable[..., Run]) -> None:
    """Ctrl-C for the whole process group, as a terminal sends it, ends a run with workers."""
    pytest.importorskip("xdist")
    run = begin(WAITING, "-n1")
    home, processes = waiting(run)
    os.killpg(run.process.pid, signal.SIGINT)
    output = run.end()
    assert wait_until(lambda: is_gone(home, processes)), processes_of(home)
    assert "INTERNALERROR" not in output
