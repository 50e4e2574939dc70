"""The server in a container: what it is, how it fails, how it ends, and when it is chosen.

These tests need an engine and an image: `tests/container_image/build` makes one without any
registry, and PGMONKEY_TEST_IMAGE names another.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import refused
from helpers.pytest_runs import QUICK
from helpers.servers import options

from pytest_pgmonkey import PGConnectionManager, kept_databases
from pytest_pgmonkey.errors import PGMonkeyError
from pytest_pgmonkey.processes import is_dead, process_name
from pytest_pgmonkey.testing.databases.recipe import Recipe
from pytest_pgmonkey.testing.servers.container import guardian
from pytest_pgmonkey.testing.servers.container import server as container
from pytest_pgmonkey.testing.servers.container.engine import EngineError, engine_problem
from pytest_pgmonkey.testing.servers.container.server import (
    OWNER,
    ContainerServer,
    says_ready,
)
from pytest_pgmonkey.testing.servers.embedded import binaries
from pytest_pgmonkey.testing.servers.guard import Guard
from pytest_pgmonkey.testing.servers.launch import choose
from pytest_pgmonkey.testing.servers.server import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

docker = pytest.importorskip("docker", reason="needs testcontainers: pip install '.[container]'")

IMAGE = os.environ.get("PGMONKEY_TEST_IMAGE", "pgmonkey-test-postgres")
ADVICE = "start Docker and run tests/container_image/build pgmonkey-test-postgres"
NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="names processes by /proc, which Linux has"
)
TESTS = """
    import os
    import pytest

    def test_sync(pgmonkey_connection):
        with pgmonkey_connection as conn:
            conn.execute("INSERT INTO item VALUES (1)")
            assert conn.execute("SELECT current_user").fetchone() == ("pgmonkey",)

    @pytest.mark.asyncio
    async def test_async(pgmonkey_connection):
        async with pgmonkey_connection as conn:
            await conn.execute("INSERT INTO item VALUES (1)")

    @pytest.mark.parametrize("n", range(4))
    def test_server(pgmonkey, n):
        row = pgmonkey.execute("SELECT pg_postmaster_start_time(), current_database()").fetchone()
        with open(f"server-{os.environ.get('PYTEST_XDIST_WORKER')}-{n}", "w") as file:
            print(*row, sep="\\n", file=file)
"""


class Engine:
    """The engine, as somebody sees it who looks whether anything is left behind."""

    def __init__(self) -> None:
        self.client = docker.from_env()

    def attempts(self) -> set[str]:
        """The containers of all servers of the kit, by what their label says."""
        found = self.client.api.containers(all=True, filters={"label": guardian.ATTEMPT})
        return {item["Labels"][guardian.ATTEMPT] for item in found}

    def of(self, server: ContainerServer) -> Any:
        return self.client.containers.get(server.name)

    def volumes(self) -> set[str]:
        return {volume.name for volume in self.client.volumes.list()}

    def build(self, tag: str, files: dict[str, bytes]) -> None:
        """Make an image of a few files that has no entry point."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o755
                tar.addfile(info, io.BytesIO(content))
        self.client.api.import_image_from_data(archive.getvalue(), repository=tag)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The machine's engine, which has the image."""
    problem = engine_problem()
    if problem is None:
        engine = Engine()
        try:
            engine.client.images.get(IMAGE)
        except docker.errors.ImageNotFound:
            problem = f"the image {IMAGE} is not there"
    if problem is not None:
        # Where somebody says which image there is, there has to be one.
        (pytest.fail if "PGMONKEY_TEST_IMAGE" in os.environ else pytest.skip)(
            f"{problem}; {ADVICE}"
        )
    yield engine
    engine.client.close()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[ContainerServer]:
    """A server that tests share."""
    server = ContainerServer.start(IMAGE)
    yield server
    server.stop()


@pytest.fixture
def nothing_left(engine: Engine) -> Iterator[None]:
    """Check that a test leaves no container and no volume that was not there before."""
    containers, volumes = engine.attempts(), engine.volumes()
    yield
    assert wait_until(lambda: engine.attempts() <= containers)
    assert engine.volumes() <= volumes


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where no engine is."""
    address = "unix:///nonexistent/none.sock"
    monkeypatch.setenv("DOCKER_HOST", address)
    return address


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run the tests above in a process of their own on a container; warnings are errors."""
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    (pytester.path / "schema.sql").write_text("CREATE TABLE item (id int)", "utf-8")
    options = ("--pgmonkey-schema=schema.sql", f"--pgmonkey-image={IMAGE}")

    def run(*args: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*QUICK, "-W", "error", *options, *args)

    return run


@pytest.fixture
def kept_until_the_end() -> Iterator[None]:
    """Forget what a test has kept, however it ends."""
    assert kept_databases.entries() == []
    yield
    for one in kept_databases.entries():
        one.forget()


def items(engine: Engine, one: kept_databases.Kept) -> list[Any]:
    """What is in a table of a kept database, read with the password that the note leads to."""
    container = engine.client.containers.get(one.place["container"])
    command = shlex.split(one.note.partition(f" {container.name} ")[2])
    password = container.exec_run(command).output.decode().strip()
    with psycopg.connect(one.dsn, password=password) as conn:
        return conn.execute("SELECT id FROM item").fetchall()


def databases(engine: Engine, one: kept_databases.Kept) -> str:
    """The databases in a container, by the command that people are told."""
    container = engine.client.containers.get(one.place["container"])
    command = shlex.split(one.psql.partition(f" {container.name} ")[2])
    command[command.index("-d") + 1] = "postgres"
    command += ["-c", "SELECT datname FROM pg_database"]
    return str(container.exec_run(command).output.decode())


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> bool:
    """Wait for something that no event announces; tell whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def start_in_subprocess(then: str = "sys.stdin.read()") -> tuple[subprocess.Popen[str], str]:
    """Start a server in another process, which then does something; give what is its label."""
    script = f"""\
        import os, signal, sys
        from pytest_pgmonkey.testing.servers.container.server import ContainerServer
        server = ContainerServer.start({IMAGE!r})
        print(server._attempt, server._guard.pid, flush=True)
        {then}
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()
    return process, line.strip()


class TestServer:
    def test_the_tests_role_owns_its_database_and_is_no_superuser(
        self, server: ContainerServer
    ) -> None:
        """The role of the tests may create tables in its database, and is nothing more."""
        server.create_database("owned")
        with psycopg.connect(**server.conninfo("owned")) as conn:
            conn.execute("CREATE TABLE a ()")
            row = conn.execute(
                "SELECT rolname, rolsuper FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
        server.drop_database("owned")
        assert row == ("pgmonkey", False)

    def test_its_data_is_in_memory_and_not_cared_for(
        self, server: ContainerServer, engine: Engine
    ) -> None:
        """The data directory is in a tmpfs, there is no volume, and nothing is flushed."""
        with psycopg.connect(**server.admin_conninfo()) as conn:
            row = conn.execute(
                "SELECT current_setting('data_directory'), current_setting('fsync')"
            ).fetchone()
        assert row == ("/pgmonkey/data", "off")
        mounts = engine.of(server).attrs["Mounts"]
        assert {mount["Type"] for mount in mounts} <= {"tmpfs"}
        assert "/pgmonkey" in engine.of(server).attrs["HostConfig"]["Tmpfs"]

    def test_its_passwords_are_random_and_hidden(self, server: ContainerServer) -> None:
        """No two roles and no two servers have one password, and no text shows it."""
        passwords = {
            server.conninfo("x")["password"],
            server.admin_conninfo()["password"],
            ContainerServer(IMAGE).conninfo("x")["password"],
        }
        assert len(passwords) == 3
        text = f"{server!r} {server.description} {server.name}"
        assert not any(password in text for password in passwords)

    def test_it_says_what_it_is(self, server: ContainerServer) -> None:
        """Source, description and version agree with the server."""
        with psycopg.connect(**server.admin_conninfo()) as conn:
            assert conn.info.parameter_status("server_version").split()[0] == server.version
        assert ("container", f"container {IMAGE}") == (server.source, server.description)

    def test_production_code_connects_with_its_configuration(self, server: ContainerServer) -> None:
        """The configuration is one that a YAML file could hold."""
        with PGConnectionManager() as manager:
            pool = manager.get_database_connection_from_dict(server.config("postgres"), "pool")
            with pool as conn:
                assert conn.execute("SELECT 1").fetchone() == (1,)

    def test_a_template_is_loaded_once(self, server: ContainerServer) -> None:
        """The second who asks for a recipe's database gets the one that the first has loaded."""
        loaded: list[str] = []
        recipe = Recipe(secrets.token_hex(32), lasting=True)
        names = [server.template(recipe, loaded.append) for _ in range(2)]
        assert [recipe.name, recipe.name] == names
        assert len(loaded) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_fork_cannot_remove_it(self, server: ContainerServer, engine: Engine) -> None:
        """A forked process that stops its copy of the server leaves the container alone."""
        process, label = start_in_subprocess(
            "pid = os.fork()\n"
            "        if pid == 0:\n"
            "            server.stop()\n"
            "            os._exit(0)\n"
            "        print(os.waitpid(pid, 0)[1], flush=True)\n"
            "        sys.stdin.read()\n"
            "        server.stop()"
        )
        attempt = label.split()[0]
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "0"
        assert attempt in engine.attempts()
        _, errors = process.communicate()
        assert errors == ""
        assert attempt not in engine.attempts()


class TestErrors:
    def test_an_absent_engine_is_named(self, no_engine: str) -> None:
        """Without an engine the error says where none answers and why."""
        with pytest.raises(EngineError) as caught:
            ContainerServer.start(IMAGE)
        text = (
            f"No container engine answers at {no_engine}: No such file or directory. Start Docker"
        )
        assert str(caught.value).startswith(text)

    def test_an_engine_that_refuses_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An engine on the network that does not answer is an error as well."""
        monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
        with pytest.raises(EngineError, match=r"127\.0\.0\.1:1: Connection refused"):
            ContainerServer.start(IMAGE)

    def test_testcontainers_may_not_be_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the error says how to get it."""
        monkeypatch.setitem(sys.modules, "testcontainers.core.docker_client", None)
        with pytest.raises(EngineError, match=r"pip install \"pytest-pgmonkey\[container\]\""):
            ContainerServer.start(IMAGE)

    @pytest.mark.parametrize("image", ["pgmonkey.invalid/none:1", "Not An Image"])
    def test_an_image_that_cannot_be_had(
        self, engine: Engine, image: str, nothing_left: None
    ) -> None:
        """The error names the image, the reason and the option."""
        with pytest.raises(ServerStartError) as caught:
            ContainerServer.start(image)
        text = str(caught.value)
        assert f"image {image} is not on this machine and cannot be pulled: " in text
        assert "--pgmonkey-image" in text
        assert "\n" not in text

    def test_a_container_that_dies_shows_its_last_words(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        """Its end is noticed at once, and the error has exit code and log."""
        monkeypatch.setitem(container.SETTINGS, "work_mem", "much")
        begin = time.monotonic()
        with pytest.raises(ServerStartError, match=r"ended with exit code 1 instead of") as caught:
            ContainerServer.start(IMAGE)
        assert 'invalid value for parameter "work_mem": "much"' in caught.value.log
        assert time.monotonic() - begin < container.START_LIMIT / 2

    def test_an_image_without_a_server(self, engine: Engine, nothing_left: None) -> None:
        """An image in which there is nothing to run says so."""
        tag = f"pgmonkey-test-empty-{secrets.token_hex(4)}"
        engine.build(tag, {"nothing": b""})
        try:
            with pytest.raises(ServerStartError, match=r"does not start: .*postgres.*not found"):
                ContainerServer.start(tag)
        finally:
            engine.client.images.remove(tag)

    def test_a_port_that_cannot_be_reached(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        """A server that is ready and does not answer is given up long before the time limit."""
        monkeypatch.setitem(container.SETTINGS, "listen_addresses", "localhost")
        monkeypatch.setattr(container, "REACH_LIMIT", 0.5)
        monkeypatch.setattr(container, "LOG_POLL", 0.2)
        with pytest.raises(ServerStartError, match=r"cannot be reached at .* it says") as caught:
            ContainerServer.start(IMAGE)
        assert "ready to accept connections" in caught.value.log

    def test_a_server_that_never_answers(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        """The wait has an end where nothing is ready and nothing dies."""
        monkeypatch.setitem(container.SETTINGS, "listen_addresses", "")
        monkeypatch.setattr(container, "START_LIMIT", 0.5)
        with pytest.raises(ServerStartError, match=r"cannot be reached at .* have passed"):
            ContainerServer.start(IMAGE)

    def test_no_error_shows_a_password(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        """What the container wrote is shown without the password that it was given."""
        monkeypatch.setattr(ContainerServer, "_derive", lambda _, what: f"secret-{what}")
        monkeypatch.setitem(container.SETTINGS, "work_mem", "secret-postgres")
        with pytest.raises(ServerStartError) as caught:
            ContainerServer.start(IMAGE)
        assert "secret-postgres" not in str(caught.value)
        assert "work_mem" in str(caught.value)


class TestEnds:
    def test_stop_removes_container_and_guardian(self, engine: Engine, nothing_left: None) -> None:
        """After `stop` there is neither, and a second one does nothing."""
        process, label = start_in_subprocess("sys.stdin.read(); server.stop(); server.stop()")
        attempt, guardian = label.split()
        assert attempt in engine.attempts()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert attempt not in engine.attempts()
        assert not Path(f"/proc/{guardian}").exists()

    def test_a_process_that_just_ends(self, engine: Engine, nothing_left: None) -> None:
        """A server that nobody stops ends with its process, which warns of nothing."""
        process, label = start_in_subprocess()
        assert label.split()[0] in engine.attempts()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
    def test_sigkill(self, engine: Engine, nothing_left: None) -> None:
        """The container goes when the process is killed."""
        process, label = start_in_subprocess()
        assert label.split()[0] in engine.attempts()
        process.kill()
        process.communicate()

    @NEEDS_PROC
    def test_sigkill_of_guardian_and_process(
        self, engine: Engine, server: ContainerServer, nothing_left: None
    ) -> None:
        """What is left when both are killed is swept by the next run, and only that."""
        process, label = start_in_subprocess()
        attempt, guardian = label.split()
        os.kill(int(guardian), signal.SIGKILL)
        process.kill()
        process.communicate()
        assert attempt in engine.attempts()
        ContainerServer.start(IMAGE).stop()
        assert attempt not in engine.attempts()
        assert server._attempt in engine.attempts()

    def test_a_container_that_comes_late_is_removed(
        self, engine: Engine, nothing_left: None
    ) -> None:
        """A process may be killed while the engine makes its container: the guardian waits."""
        process = Guard(guardian, attempt := secrets.token_hex(16), path=sys.path)._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        engine.client.containers.create(IMAGE, ["postgres"], labels={guardian.ATTEMPT: attempt})
        assert process.wait(timeout=guardian.REMOVE_LIMIT) == 0
        process.stdout.close()

    @NEEDS_PROC
    def test_only_the_dead_are_swept(self) -> None:
        """A process is dead when it was here, on this boot, and is no more."""
        here = process_name(os.getpid())
        machine, pid, start = here.rsplit(" ", 2)
        assert not is_dead(here)
        assert is_dead(f"{machine} {pid} {int(start) + 1}")
        assert is_dead(f"{machine} {2**22 + 1} {start}")
        assert not is_dead(f"another {pid} {start}")
        assert not is_dead("")
        assert not is_dead("nonsense")


class TestRuns:
    def test_tests_run_on_it(self, run: Callable[..., Any], nothing_left: None) -> None:
        """Sync and async tests pass on a container, the header names it, warnings are none."""
        result = run("--pgmonkey-source=container")
        result.assert_outcomes(passed=8)
        result.stdout.fnmatch_lines(
            [f"pgmonkey: container {IMAGE}, isolation=auto (--pgmonkey-source)"]
        )

    def test_what_rollback_cannot_serve(
        self, run: Callable[..., Any], pytester: pytest.Pytester, nothing_left: None
    ) -> None:
        """It runs in clones of a container's database, two-phase commits too."""
        pytester.makepyfile(refused.MIXED)
        result = run("-k", "test_what")
        result.assert_outcomes(passed=refused.ALL)
        assert f"pgmonkey: {refused.MOVED} tests ran in clones" in result.stdout.str()

    def test_workers_share_one(
        self, run: Callable[..., Any], pytester: pytest.Pytester, nothing_left: None
    ) -> None:
        """Two workers have one server, and a database each."""
        pytest.importorskip("xdist")
        result = run("-n2", "--dist=each")
        result.assert_outcomes(passed=16)
        notes = [path.read_text("utf-8").splitlines() for path in pytester.path.glob("server-*")]
        assert len(notes) == 8
        assert len({start for start, _ in notes}) == 1
        assert {name for _, name in notes} == {"tests_gw0", "tests_gw1"}

    def test_a_worker_that_is_killed_leaves_it_to_the_others(
        self, run: Callable[..., Any], pytester: pytest.Pytester, nothing_left: None
    ) -> None:
        """The container lives as long as the run, whichever worker has made it."""
        pytest.importorskip("xdist")
        pytester.makepyfile(
            """
            import os, signal
            import pytest

            @pytest.mark.parametrize("n", range(8))
            def test_it(pgmonkey, n):
                start = pgmonkey.execute("SELECT pg_postmaster_start_time()").fetchone()
                with open("starts", "a") as file:
                    print(*start, file=file)
                if os.environ["PYTEST_XDIST_WORKER"] == "gw0":
                    os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        run("-n2", "--max-worker-restart=1").assert_outcomes(passed=7, failed=1)
        starts = (pytester.path / "starts").read_text("utf-8").splitlines()
        assert (len(starts), len(set(starts))) == (8, 1)

    def test_databases_of_failed_tests_stay(
        self,
        run: Callable[..., Any],
        pytester: pytest.Pytester,
        engine: Engine,
        nothing_left: None,
        kept_until_the_end: None,
    ) -> None:
        """The container of all workers lives on, unswept, until its last database is removed."""
        failing = """
            import pytest

            @pytest.mark.pgmonkey(isolation="clone")
            def test_it(pgmonkey):
                pgmonkey.execute("INSERT INTO item VALUES (7)")
                assert False
        """
        pytester.makepyfile(test_one=failing, test_two=failing)
        options = ("-n2", "--dist=loadfile", "--pgmonkey-keep=failed", "test_one.py", "test_two.py")
        result = run(*options)
        result.assert_outcomes(failed=2)
        ContainerServer.start(IMAGE).stop()  # sweeps
        first, second = kept_databases.entries()
        assert f"\n{first.psql}\n" in result.stdout.str()
        assert "password=***REDACTED***" in result.stdout.str()  # in the repr of a fixture
        assert not re.search(r"password=\w", result.stdout.str())
        assert [items(engine, one) for one in (first, second)] == [[(7,)], [(7,)]]
        kept_databases.remove(first)
        assert wait_until(lambda: first.name not in databases(engine, first))
        assert not second.is_gone()
        kept_databases.remove(second)
        assert wait_until(second.is_gone)

    def test_an_absent_engine_is_one_clear_error(
        self, run: Callable[..., Any], no_engine: str
    ) -> None:
        """The report has one line for it, no stack of ours, and no warning turned into a crash."""
        result = run("--pgmonkey-source=container", "-k", "sync")
        result.assert_outcomes(errors=4)
        assert "Traceback" not in result.stdout.str() + result.stderr.str()
        result.stdout.fnmatch_lines([f"pgmonkey: No container engine answers at {no_engine}: *"])


class TestChoice:
    def test_binaries_come_before_a_container(self) -> None:
        """Where there are server binaries, auto needs no engine."""
        assert choose(options()).source == "embedded"

    def test_an_image_means_a_container(self) -> None:
        """Somebody who names an image wants it used."""
        choice = choose(options(image="postgis/postgis:17-3.5"))
        assert choice.description == "container postgis/postgis:17-3.5"

    def test_the_default_image(self) -> None:
        """A container is the official image of the newest version where none is named."""
        assert choose(options(source="container")).description == "container postgres:18"

    def test_an_engine_is_the_last_resort(
        self, monkeypatch: pytest.MonkeyPatch, engine: Engine
    ) -> None:
        """Without config and binaries auto takes a container, and says why."""
        monkeypatch.setattr(binaries, "PLACES", ())
        choice = choose(options())
        assert (
            choice.source,
            choice.why,
        ) == ("container", "no config given, no server binaries found")

    def test_nothing_at_all_lists_every_way(
        self, monkeypatch: pytest.MonkeyPatch, no_engine: str
    ) -> None:
        """The one error says of each source what was missing and how to get it."""
        monkeypatch.setattr(binaries, "PLACES", ())
        with pytest.raises(PGMonkeyError) as caught:
            choose(options())
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines[1:]] == ["config", "embedded", "container"]
        for advice in ("--pgmonkey-config", "pytest-pgmonkey[embedded]", no_engine):
            assert advice in str(caught.value)

    def test_embedded_asked_for_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With source=embedded no container takes the place of missing binaries."""
        monkeypatch.setattr(binaries, "PLACES", ())
        with pytest.raises(binaries.BinariesNotFoundError):
            choose(options(source="embedded"))


class TestLog:
    FIRST = """\
LOG:  listening on Unix socket "/var/run/postgresql/.s.PGSQL.5432"
LOG:  database system is ready to accept connections
LOG:  database system is shut down
"""
    SECOND = """\
LOG:  listening on IPv4 address "0.0.0.0", port 5432
LOG:  listening on Unix socket "/var/run/postgresql/.s.PGSQL.5432"
"""
    READY = "LOG:  database system is ready to accept connections\n"

    @pytest.mark.parametrize(
        ("log", "ready"),
        [
            ("", False),
            (FIRST, False),
            (FIRST + SECOND, False),
            (FIRST + SECOND + READY, True),
        ],
    )
    def test_a_server_is_ready_when_it_is_so_on_the_network(self, log: str, ready: bool) -> None:
        """The official image first runs a server that only it can reach."""
        assert ready == says_ready(log)


def test_the_owner_is_named_on_the_container(server: ContainerServer, engine: Engine) -> None:
    """The container tells whose it is."""
    assert process_name(os.getpid()) == engine.of(server).labels[OWNER]
