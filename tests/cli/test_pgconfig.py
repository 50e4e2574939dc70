"""The `pgmonkey` command: what it prints where, and its exit status."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap

import pytest
import yaml

import pytest_pgmonkey
from pytest_pgmonkey import ConnectionType, cli, load_config
from pytest_pgmonkey.config import read_spec
from pytest_pgmonkey.connection_type import CONNECTION_TYPES
from pytest_pgmonkey.testing.addresses.urls import url_of

WRONG = "wr0ng-password"


def pgmonkey(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "pytest_pgmonkey", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=60,
        check=False,
    )


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """Give the one line that a failed command says."""
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pgmonkey: error: ")
    return line


@pytest.fixture
def call(capsys):
    """A function that runs the command in this process and gives status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def write(tmp_path):
    """A function that writes a configuration and gives its path."""

    def write(config: object) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return str(path)

    return write


class TestParser:
    def test_version(self, call):
        """`--version` prints the version on stdout."""
        assert (0, f"pgmonkey {pytest_pgmonkey.__version__}\n", "") == call("--version")

    @pytest.mark.parametrize("arguments", [["--help"], ["pgconfig", "--help"]])
    def test_help(self, call, arguments):
        """Help that was asked for goes to stdout."""
        status, out, err = call(*arguments)

        assert (status, err) == (0, "")
        assert "usage: pgmonkey" in out

    @pytest.mark.parametrize("arguments", [[], ["pgconfig"], ["--debug"]])
    def test_no_command(self, call, arguments):
        """Without a command the help goes to stderr, and that is wrong usage."""
        status, out, err = call(*arguments)

        assert (status, out) == (2, "")
        assert "usage: pgmonkey" in err
        assert "create" in err or "pgconfig" in err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            ["pgconfig", "nonsense"],
            ["pgconfig", "create"],
            ["pgconfig", "test"],
            ["pgconfig", "test", "--connconf", "x"],
            ["pgconfig", "create", "--filepath", "x", "--type", "mysql"],
            ["pgconfig", "test", "--connconfig", "x", "--connection-type", "asink"],
        ],
    )
    def test_wrong_usage(self, call, arguments):
        """Wrong usage is status 2, an unknown connection type included."""
        status, out, err = call(*arguments)

        assert (status, out) == (2, "")
        assert "usage: pgmonkey" in err

    def test_help_imports_nothing_heavy(self):
        """Help and wrong usage answer without psycopg, yaml or asyncio."""
        code = """
            import sys
            from pytest_pgmonkey.cli import main
            assert main(["--help"]) == 0
            assert main(["pgconfig", "test", "--connection-type", "x"]) == 2
            heavy = {"psycopg", "psycopg_pool", "yaml", "asyncio", "pytest"} & set(sys.modules)
            sys.exit(f"imported {heavy}" if heavy else 0)
        """

        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False
        )

        assert result.returncode == 0, result.stderr

    def test_production_is_free_of_pytest(self):
        """Neither the package's names nor a running command import pytest or `testing`."""
        code = """
            import sys
            import pytest_pgmonkey
            for name in pytest_pgmonkey.__all__:
                getattr(pytest_pgmonkey, name)
            from pytest_pgmonkey.cli import main
            main(["pgconfig", "test", "--connconfig", "/nope"])
            wrong = [
                name for name in sys.modules
                if name.startswith(("pytest_pgmonkey.testing", "_pytest", "testcontainers"))
                or name == "pytest"
            ]
            sys.exit(f"imported {wrong}" if wrong else 0)
        """

        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False
        )

        assert result.returncode == 0, result.stderr

    def test_interrupt(self, call, monkeypatch):
        """Ctrl-C ends a command quietly with the shell's status for it."""

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("pytest_pgmonkey.cli.pgconfig._try_connection", interrupted)

        assert call("pgconfig", "test", "--connconfig", "x") == (130, "", "")


class TestCreate:
    @pytest.mark.parametrize("option", ["--filepath", "--connconfig"])
    def test_writes_a_template(self, call, tmp_path, option):
        """The template is written for its owner alone; the message goes to stderr."""
        path = tmp_path / "new.yaml"

        status, out, err = call("pgconfig", "create", option, path)

        assert (status, out) == (0, "")
        assert str(path) in err
        if os.name != "nt":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize("type_", list(ConnectionType))
    def test_template_is_valid(self, call, tmp_path, type_):
        """The template can be used as it stands, by every type."""
        path = tmp_path / "new.yaml"
        call("pgconfig", "create", "--filepath", path, "--type", "pg")

        spec = read_spec(path, type_)

        assert {"min_size": 5, "max_size": 20}.items() <= dict(spec.pool).items() or not spec.pool
        assert set(load_config(path)) == {
            "connection_type",
            "connection_settings",
            "sync_settings",
            "async_settings",
            "pool_settings",
            "async_pool_settings",
        }

    def test_template_is_valid_without_its_comment_signs(self, call, tmp_path):
        """What the template proposes in comments can be taken as it is."""
        path = tmp_path / "new.yaml"
        call("pgconfig", "create", "--filepath", path)
        lines = [
            line.replace("# ", "", 1) if line.startswith("  # ") and ":" in line else line
            for line in path.read_text().splitlines()
            if not line.startswith(("  # password:", "  #   from_", "  # host:"))
        ]
        path.write_text("\n".join(lines))

        spec = read_spec(path, "pool")

        assert ("search_path", "app, public") in spec.settings
        assert dict(spec.pool)["num_workers"] == 3

    def test_never_overwrites(self, call, tmp_path):
        """A file that exists stays as it is."""
        path = tmp_path / "new.yaml"
        path.write_text("mine")

        status, out, err = call("pgconfig", "create", "--filepath", path)

        assert (status, out) == (1, "")
        assert f"pgmonkey: error: {path}: exists already, and is left as it is\n" == err
        assert path.read_text() == "mine"

    def test_never_follows_a_link(self, call, tmp_path):
        """A link that leads nowhere is a file that exists."""
        path = tmp_path / "new.yaml"
        path.symlink_to(tmp_path / "elsewhere")

        assert call("pgconfig", "create", "--filepath", path)[0] == 1
        assert not (tmp_path / "elsewhere").exists()

    def test_missing_directory(self, call, tmp_path):
        """A directory that is not there is one clear line."""
        path = tmp_path / "no" / "new.yaml"

        assert (
            1,
            "",
            f"pgmonkey: error: {path}: cannot be written: No such file or directory\n",
        ) == call("pgconfig", "create", "--filepath", path)


class TestBadConfig:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("", "is empty"),
            ("a: [\n", "malformed YAML at line 2, column 1"),
            ("- a\n", "is a list, not a mapping"),
            ("sync_settings: {}\n", "section connection_settings is missing"),
            ("connection_settings: {hots: x}\n", "did you mean 'host'?"),
            ("connection_settings: {port: x}\n", "connection_settings.port: must be an integer"),
            ("connection_settings: {host: a, host: b}\n", "duplicate key 'host'"),
            ("connection_settings: {sslrootcert: /nope}\n", "cannot read the file /nope"),
            ("connection_type: asink\nconnection_settings: {}\n", "did you mean 'async'?"),
        ],
    )
    def test_is_one_line(self, call, write, config, message):
        """Every bad file is one line on stderr and status 1."""
        path = write(config)

        status, out, err = call("pgconfig", "test", "--connconfig", path)

        assert (status, out) == (1, "")
        assert err.startswith(f"pgmonkey: error: {path}: ")
        assert message in err
        assert err.count("\n") == 1

    def test_sizes(self, call, write):
        """Sizes are judged for the type that is tried."""
        path = write({"connection_settings": {}, "pool_settings": {"min_size": 9, "max_size": 1}})

        err = call("pgconfig", "test", "--connconfig", path, "--connection-type", "pool")[2]

        assert (
            f"pgmonkey: error: {path}: pool_settings: min_size (9) is above max_size (1)\n" == err
        )

    def test_missing_file(self, call):
        """A missing file is one line."""
        status, out, err = call("pgconfig", "test", "--filepath", "/nope.yaml")

        assert (status, out) == (1, "")
        assert err == "pgmonkey: error: /nope.yaml: cannot be read: No such file or directory\n"

    def test_interpolation(self, call, write, monkeypatch):
        """References are resolved on request; sensitive defaults and empty values as allowed."""
        monkeypatch.delenv("NO_SUCH", raising=False)
        monkeypatch.setenv("EMPTY", "")
        path = write({"connection_settings": {"password": "${NO_SUCH:-x}", "port": "${EMPTY}x"}})
        test = ["pgconfig", "test", "--connconfig", path]

        assert "interpolation is off" in call(*test)[2]
        assert "sensitive key takes no default" in call(*test, "--resolve-env")[2]
        allowed = [*test, "--resolve-env", "--allow-sensitive-defaults"]
        assert "port: must be an integer\n" in call(*allowed)[2]
        assert "EMPTY is empty" in call(*allowed, "--strict")[2]

    def test_wrapper(self, call, write):
        """The deprecated wrapper is one line of warning, however often the file is read."""
        path = write({"postgresql": {"connection_settings": {"port": "x"}}})

        status, out, err = call("pgconfig", "test", "--connconfig", path)

        assert (status, out) == (1, "")
        warning, error = err.splitlines()
        assert warning.startswith(f"pgmonkey: warning: {path}: the wrapper 'postgresql:'")
        assert "must be an integer" in error

    def test_debug_shows_the_traceback(self, call, write):
        """`--debug` adds the traceback, before or after the command."""
        path = write("connection_settings: {port: x}")

        for arguments in (["--debug", "pgconfig", "test"], ["pgconfig", "test", "--debug"]):
            status, out, err = call(*arguments, "--connconfig", path)

            assert (status, out) == (1, "")
            assert err.startswith("Traceback (most recent call last):")
            assert err.splitlines()[-1].startswith("pgmonkey: error: ")

    def test_dead_host(self, write):
        """A server that is not there is one line with the cause, as every type."""
        config = {"connection_settings": {"host": "127.0.0.1", "port": 1, "password": WRONG}}
        path = write(config)

        for type_ in ("normal", "async_pool"):
            test = ["pgconfig", "test", "--connconfig", path, "--connection-type", type_]
            line = failure(pgmonkey(*test))

            assert "Connection refused" in line or "refused" in line.lower()
            assert line.startswith(f"pgmonkey: error: {path}: ")
            assert WRONG not in line

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
    @pytest.mark.parametrize("type_", ["normal", "async_pool"])
    def test_interrupt_while_connecting(self, write, type_):
        """Ctrl-C ends the wait for a server that never answers, quietly."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            path = write({"connection_settings": {"host": "127.0.0.1", "port": port}})
            test = ["pgconfig", "test", "--connconfig", path, "--connection-type", type_]
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest_pgmonkey", *test],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            silent.settimeout(30)
            with process, silent.accept()[0] as connection:
                connection.recv(8)
                process.send_signal(signal.SIGINT)
                output = process.communicate(timeout=30)

        assert output == (b"", b"")
        assert process.returncode == 130


class TestServer:
    @pytest.mark.parametrize("type_", CONNECTION_TYPES)
    def test_connects(self, make_config, pg_server, database, type_):
        """The test really connects, as the type that is asked for, and prints what it found."""
        path = make_config(pool_settings={"min_size": 2}, async_pool_settings={"min_size": 2})

        result = pgmonkey("pgconfig", "test", "--connconfig", path, "--connection-type", type_)

        assert (result.returncode, result.stderr) == (0, "")
        facts = dict(line.split(":", 1) for line in result.stdout.splitlines())
        facts = {name: value.strip() for name, value in facts.items()}
        assert facts.pop("time").endswith(" ms")
        assert {
            "connection type": type_,
            "server version": f"PostgreSQL {pg_server.version}",
            "database": database,
            "user": pg_server.conninfo(database)["user"],
            "TLS": "no",
        } == facts

    def test_dsn(self, write, pg_server, database):
        """A file with a DSN is a file like any other."""
        path = write({"connection_settings": {"dsn": url_of(pg_server.conninfo(database))}})

        result = pgmonkey("pgconfig", "test", "--connconfig", path)

        assert (result.returncode, result.stderr) == (0, "")
        assert database in result.stdout

    def test_columns_are_aligned(self, make_config):
        """The values stand below one another."""
        result = pgmonkey("pgconfig", "test", "--filepath", make_config())

        lines = result.stdout.splitlines()
        columns = {len(line) - len(line.split(":", 1)[1].lstrip()) for line in lines}
        assert len(columns) == 1

    def test_type_of_the_file(self, make_config):
        """Without the option it is the file's type."""
        result = pgmonkey("pgconfig", "test", "--connconfig", make_config("async"))

        assert "connection type: async\n" in result.stdout

    def test_bad_session_setting(self, make_config):
        """A setting that the server refuses is named by key."""
        path = make_config(sync_settings={"work_mem": "lots"})

        line = failure(pgmonkey("pgconfig", "test", "--connconfig", path))

        assert f"{path}: sync_settings.work_mem: " in line

    def test_no_such_database(self, make_config):
        """A database that is not there is one line with the server's words."""
        path = make_config(connection_settings={"dbname": "no_such_database"})

        line = failure(
            pgmonkey("pgconfig", "test", "--connconfig", path, "--connection-type", "pool")
        )

        assert 'database "no_such_database" does not exist' in line

    def test_closed_stdout(self, make_config):
        """A reader that goes away early is no reason for a traceback."""
        read, write = os.pipe()
        os.close(read)
        arguments = ["pgconfig", "test", "--connconfig", str(make_config())]

        with os.fdopen(write, "wb") as stdout:
            result = subprocess.run(
                [sys.executable, "-m", "pytest_pgmonkey", *arguments],
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=60,
                check=False,
            )

        assert result.stderr == b""
        assert result.returncode == 1

    def test_tutorial(self, tmp_path, pg_server, database):
        """create, edit, test: the flow of the tutorial works with the template's own pools."""
        path = tmp_path / "pgmonkey_config.yaml"
        assert pgmonkey("pgconfig", "create", "--filepath", path).returncode == 0
        text = path.read_text().replace(
            "port: 5432", f"port: '{pg_server.conninfo('x').get('port', '')}'"
        )
        for name, value in (
            ("host: localhost", pg_server.conninfo("x")["host"]),
            ("dbname: postgres", database),
            ("user: postgres", pg_server.conninfo("x")["user"]),
        ):
            assert f"  {name}\n" in text
            text = text.replace(f"  {name}\n", f"  {name.split(':')[0]}: {value}\n")
        path.write_text(text)

        test = ["pgconfig", "test", "--connconfig", path, "--connection-type", "async_pool"]
        result = pgmonkey(*test)

        assert (result.returncode, result.stderr) == (0, "")
        assert "connection type: async_pool\n" in result.stdout


class TestTLSAndPasswords:
    def test_tls(self, write, tls_server):
        """A connection with TLS says which."""
        path = write({"connection_settings": tls_server.conninfo("postgres")})

        result = pgmonkey("pgconfig", "test", "--connconfig", path)

        assert (result.returncode, result.stderr) == (0, "")
        assert "TLSv1." in result.stdout

    @pytest.mark.parametrize("type_", CONNECTION_TYPES)
    def test_wrong_password(self, write, tls_server, type_):
        """A wrong password is the server's one line at once, and does not show the password."""
        path = write({"connection_settings": tls_server.conninfo("postgres", password=WRONG)})
        test = ["pgconfig", "test", "--connconfig", path, "--connection-type", type_]

        line = failure(pgmonkey(*test))

        assert "password authentication failed" in line
        assert WRONG not in line

    def test_debug_hides_the_password(self, write, tls_server):
        """The traceback does not show the password either."""
        path = write({"connection_settings": tls_server.conninfo("postgres", password=WRONG)})

        result = pgmonkey("--debug", "pgconfig", "test", "--connconfig", path)

        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert WRONG not in result.stderr

    def test_bad_tls_file(self, write, tls_server, tmp_path):
        """A file that is no certificate is one line that names it."""
        bad = tmp_path / "bad.crt"
        bad.write_text("nonsense")
        path = write({"connection_settings": tls_server.conninfo(sslrootcert=str(bad))})

        assert str(bad) in failure(pgmonkey("pgconfig", "test", "--connconfig", path))
