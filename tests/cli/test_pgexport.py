"""`pgmonkey pgexport`: what stands in the file, and when there is one at all."""

from __future__ import annotations

import gzip
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def export(pgmonkey, config_path, tmp_path):
    """A function that exports a table to a file and gives its bytes."""

    def export(table: str, *options: object, name: str = "out.csv") -> bytes:
        path = tmp_path / name
        arguments = ["--table", table, "--connconfig", config_path, "--export_file", path]
        pgmonkey("pgexport", *arguments, *options).output()
        return path.read_bytes()

    return export


class TestContents:
    def test_signs(self, export, conn):
        """NULL and the empty string differ; quotes and line ends are kept."""
        conn.execute("CREATE TABLE t (a text, b text)")
        conn.execute("INSERT INTO t VALUES (NULL, ''), ('a\"b', E'x\\ny'), ('ä', ',')")

        assert export("t").decode() == 'a,b\n,""\n"a""b","x\ny"\nä,","\n'

    def test_options(self, export, conn):
        """Signs, header and the word for NULL are as asked."""
        conn.execute("CREATE TABLE t (a text, b text); INSERT INTO t VALUES (NULL, 'x|y')")
        options = ["--delimiter", "|", "--quotechar", "'", "--null", "NULL", "--no-header"]

        assert export("t", *options) == b"NULL|'x|y'\n"

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("LATIN1", "a\nä\n".encode("latin-1")),
            ("cp1252", "a\nä\n".encode("cp1252")),
            ("utf-8-sig", "a\nä\n".encode("utf-8-sig")),
            ("utf-16", "a\nä\n".encode("utf-16")),
            ("utf-16-le", "a\nä\n".encode("utf-16-le")),
            ("cp437", "a\nä\n".encode("cp437")),
        ],
    )
    def test_encodings(self, export, conn, name, expected):
        """Encodings by Python's or PostgreSQL's name, those too that the server lacks."""
        conn.execute("CREATE TABLE t (a text); INSERT INTO t VALUES ('ä')")

        assert export("t", "--encoding", name) == expected

    @pytest.mark.parametrize("name", ["LATIN1", "cp437"])
    def test_signs_that_an_encoding_lacks(self, pgmonkey, config_path, conn, tmp_path, name):
        """A sign that cannot be written is an error, and there is no file."""
        conn.execute("CREATE TABLE t (a text); INSERT INTO t VALUES ('ポ')")
        arguments = ["--table", "t", "--connconfig", config_path, "--encoding", name]

        error = pgmonkey("pgexport", *arguments, "--export_file", tmp_path / "o.csv").error

        assert "has no equivalent" in error or "'ポ' cannot be written in cp437" in error
        assert not list(tmp_path.glob("*o.csv*"))

    @pytest.mark.parametrize(
        "create",
        [
            "CREATE VIEW t AS SELECT 1 AS a",
            "CREATE MATERIALIZED VIEW t AS SELECT 1 AS a",
            "CREATE TABLE p (a int); CREATE TABLE c () INHERITS (p); INSERT INTO c VALUES (1);"
            "ALTER TABLE p RENAME TO t",
            "CREATE TABLE t (a int) PARTITION BY LIST (a);"
            "CREATE TABLE c PARTITION OF t FOR VALUES IN (1); INSERT INTO t VALUES (1)",
        ],
    )
    def test_kinds(self, export, conn, create):
        """Views, parents and partitioned tables give all of their rows."""
        conn.execute(create)

        assert export("t") == b"a\n1\n"

    def test_generated_columns(self, export, conn, pgmonkey, config_path):
        """Columns that cannot be imported again are left out, and it is said; or asked for."""
        conn.execute("CREATE TABLE t (a int, g int GENERATED ALWAYS AS (a + 1) STORED)")
        conn.execute("INSERT INTO t VALUES (1)")
        arguments = ["--table", "t", "--connconfig", config_path, "--export_file", "-"]

        result = pgmonkey("pgexport", *arguments)

        assert result.output() == "a\n1\n"
        assert "generated columns are left out: g" in result.err
        assert export("t", "--columns", "g,a") == b"g,a\n2,1\n"

    def test_columns(self, export, conn, pgmonkey, config_path):
        """`--columns` chooses and orders; an unknown one is an error."""
        conn.execute("CREATE TABLE t (a int, b int, c int); INSERT INTO t VALUES (1, 2, 3)")

        assert export("t", "--columns", "c,a") == b"c,a\n3,1\n"
        arguments = ["--table", "t", "--connconfig", config_path, "--columns", "d"]
        assert "has no column 'd' (it has a, b, c)" in pgmonkey("pgexport", *arguments).error

    def test_query(self, pgmonkey, config_path):
        """A query goes to standard output, whatever signs it holds; the message to stderr."""
        query = "SELECT '%s{}' AS a -- all of it;"

        result = pgmonkey("pgexport", "--query", query, "--connconfig", config_path)

        assert result.output() == "a\n%s{}\n"
        assert result.err == "pgmonkey: exported 1 row to standard output\n"

    def test_query_only_reads(self, pgmonkey, config_path, conn):
        """A query that writes is refused."""
        conn.execute("CREATE TABLE t (a int)")
        query = "INSERT INTO t VALUES (1) RETURNING a"

        error = pgmonkey("pgexport", "--query", query, "--connconfig", config_path).error

        assert error == "--query: cannot execute INSERT in a read-only transaction"

    def test_dates_can_be_read_again(self, make_config, conn, pgmonkey, pg_server, database):
        """Dates are ISO whatever the server's style, unless the configuration says otherwise."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PGDATESTYLE", "German")
            query = ["--query", "SELECT date '2024-01-31' AS d", "--connconfig"]

            assert pgmonkey("pgexport", *query, make_config()).out == "d\n2024-01-31\n"

        chosen = make_config(sync_settings={"DateStyle": "German"})
        assert pgmonkey("pgexport", *query, chosen).out == "d\n31.01.2024\n"

    def test_sidecar(self, export, conn, tmp_path):
        """The file that the original made beside the CSV file is read."""
        conn.execute("CREATE TABLE t (a int, b int); INSERT INTO t VALUES (1, 2)")
        (tmp_path / "out.yaml").write_text(
            yaml.safe_dump({"delimiter": "\\t", "encoding": "utf-16-le"})
        )

        assert export("t") == "a\tb\n1\t2\n".encode("utf-16-le")


class TestFiles:
    def test_default_name(self, pgmonkey, config_path, conn, tmp_path, monkeypatch):
        """Without a file it is the table's name, in the working directory."""
        conn.execute("CREATE SCHEMA app; CREATE TABLE app.t (a int)")
        monkeypatch.chdir(tmp_path)

        result = pgmonkey("pgexport", "--table", "app.t", "--connconfig", config_path)

        assert result.output() == "exported 0 rows to t.csv\n"
        assert (tmp_path / "t.csv").read_bytes() == b"a\n"

    def test_gzip(self, export, conn):
        """A name that ends in .gz is packed, the same rows to the same bytes."""
        conn.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)")

        packed = export("t", name="out.csv.gz")

        assert gzip.decompress(packed) == b"a\n1\n"
        assert packed == export("t", name="other.csv.gz")

    def test_failure_leaves_the_old_file(self, pgmonkey, config_path, conn, tmp_path):
        """An export that fails after a million rows leaves the old file, and nothing beside it."""
        path = tmp_path / "o.csv"
        path.write_text("old")
        query = "SELECT 1 / (100000 - i) AS a FROM generate_series(1, 100001) AS i"
        arguments = ["--query", query, "--connconfig", config_path, "--export_file", path]

        assert pgmonkey("pgexport", *arguments).error == "--query: division by zero"
        assert path.read_text() == "old"
        assert [each.name for each in tmp_path.iterdir() if "o.csv" in each.name] == ["o.csv"]

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
    def test_permissions(self, export, conn, tmp_path):
        """A new file has the permissions of any new file, an old one keeps its own."""
        conn.execute("CREATE TABLE t (a int)")
        umask = os.umask(0o027)
        try:
            export("t")
        finally:
            os.umask(umask)
        path = tmp_path / "out.csv"

        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        export("t")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604

    @pytest.mark.skipif(os.name == "nt", reason="Windows needs rights for links")
    def test_link(self, export, conn, tmp_path):
        """A link is followed, and stays one."""
        conn.execute("CREATE TABLE t (a int)")
        (tmp_path / "out.csv").symlink_to(tmp_path / "real.csv")

        export("t")

        assert (tmp_path / "out.csv").is_symlink()
        assert (tmp_path / "real.csv").read_bytes() == b"a\n"

    @pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device")
    def test_device(self, pgmonkey, config_path, conn):
        """A device is written to, not replaced."""
        arguments = ["--query", "SELECT 1", "--connconfig", config_path]

        pgmonkey("pgexport", *arguments, "--export_file", "/dev/null").output()

        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    @pytest.mark.parametrize(
        ("path", "reason"),
        [("/no/such/o.csv", "No such file or directory"), ("/tmp", "is a directory")],
    )
    def test_unwritable(self, pgmonkey, config_path, path, reason):
        """A place where no file can be is one line."""
        arguments = ["--query", "SELECT 1", "--connconfig", config_path, "--export_file", path]

        assert pgmonkey("pgexport", *arguments).error == f"{path}: cannot be written: {reason}"

    @pytest.mark.parametrize(
        ("table", "name"),
        [("../evil", ".._evil.csv"), ("/etc/evil", "_etc_evil.csv"), ("a\\b:c", "a_b_c.csv")],
    )
    def test_the_default_name_stays_here(
        self, pgmonkey, conn, config_path, tmp_path, monkeypatch, table, name
    ):
        """A table's name leads to no other directory."""
        directory = tmp_path / "here"
        directory.mkdir()
        monkeypatch.chdir(directory)
        conn.execute(f'CREATE TABLE "{table}" (a int)')

        result = pgmonkey("pgexport", "--table", f'"{table}"', "--connconfig", config_path)

        assert result.output() == f"exported 0 rows to {name}\n"
        assert [path.name for path in directory.iterdir()] == [name]
        assert not list(tmp_path.glob("*.csv"))

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_interrupt(self, config_path, tmp_path, name):
        """Ctrl-C, `kill` and a closed terminal end an export quietly, with no part of a file."""
        directory = tmp_path / "out"
        directory.mkdir()
        query = "SELECT repeat('x', 9000), pg_sleep(0.01) FROM generate_series(1, 100000)"
        command = ["pgexport", "--query", query, "--connconfig", str(config_path)]
        command += ["--export_file", str(directory / "o.csv")]
        with subprocess.Popen(
            [sys.executable, "-m", "pytest_pgmonkey", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            while not any(part.stat().st_size for part in directory.iterdir()):
                assert process.poll() is None
            number = getattr(signal, name)
            process.send_signal(number)
            output = process.communicate(timeout=30)

        assert (process.returncode, output) == (128 + number, (b"", b""))
        assert list(directory.iterdir()) == []

    def test_closed_stdout(self, config_path):
        """A reader that has enough ends the command quietly."""
        query = "SELECT * FROM generate_series(1, 1000000)"
        command = ["pgexport", "--query", query, "--connconfig", str(config_path)]
        with subprocess.Popen(
            [sys.executable, "-m", "pytest_pgmonkey", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b"generate_series\n"
            process.stdout.close()
            errors = process.stderr.read()

        assert (process.returncode, errors) == (1, b"")


class TestWrongUsage:
    @pytest.mark.parametrize(
        "options",
        [
            [],
            ["--table", "t", "--query", "SELECT 1"],
            ["--query", "SELECT 1", "--columns", "a"],
        ],
    )
    def test_is_said(self, pgmonkey, config_path, options):
        """Neither, both, and what does not belong together: status 2."""
        result = pgmonkey("pgexport", "--connconfig", config_path, *options)

        assert (result.status, result.out) == (2, "")

    def test_no_such_table(self, pgmonkey, config_path):
        """A table that is missing is one line."""
        error = pgmonkey("pgexport", "--table", "nope", "--connconfig", config_path).error

        assert error.startswith("table nope does not exist")

    def test_bad_query(self, pgmonkey, config_path):
        """A query that is wrong is the server's line."""
        error = pgmonkey("pgexport", "--query", "SELEKT", "--connconfig", config_path).error

        assert error == '--query: syntax error at or near "SELEKT"'
