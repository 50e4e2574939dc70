"""`pgmonkey pgimport`: which rows arrive, and where a file is wrong."""

from __future__ import annotations

import gzip
import io
import os
import re
import subprocess
import sys
from itertools import zip_longest

import psycopg
import pytest
import yaml


def rows(conn, table: str = "t") -> list[tuple[object, ...]]:
    return conn.execute(f"SELECT * FROM {table}").fetchall()


class TestColumns:
    def test_by_name(self, load, conn):
        """The header names the columns: any order, any part of them; others get their default."""
        conn.execute("CREATE TABLE t (a int, b text, c text DEFAULT 'none')")

        result = load("t", "b,a\nx,1\n,2\n")

        assert result.output() == "imported 2 rows into public.t\n"
        assert rows(conn) == [(1, "x", "none"), (2, None, "none")]

    def test_by_similar_name(self, load, conn):
        """A header that differs in case and blanks alone is understood."""
        conn.execute('CREATE TABLE t (customer_id int, "Name" text)')

        load("t", "Customer ID,NAME\n1,x\n")

        assert rows(conn) == [(1, "x")]

    def test_the_exact_name_first(self, load, conn):
        """Names that differ in case alone are told apart."""
        conn.execute('CREATE TABLE t (name text, "Name" text)')

        load("t", "Name,name\nupper,lower\n")

        assert rows(conn) == [("lower", "upper")]

    @pytest.mark.parametrize(
        ("header", "error"),
        [
            ("a,d", "header, value 2: table public.t has no column 'd' (it has a, bb, g)"),
            ("a,b", "header, value 2: table public.t has no column 'b' (did you mean 'bb'?)"),
            ("a,bb,A", "header, value 3: column 'a' is named twice"),
            ("a,,bb", "header, value 2: has no name"),
            ("a,g", "header, value 2: column 'g' is generated; its values cannot be imported"),
            ('a,"b', "line 1: a quoted value never ends"),
        ],
    )
    def test_bad_header(self, load, conn, header, error):
        """A header that does not fit is an error that names the value, and nothing is imported."""
        conn.execute("CREATE TABLE t (a int, bb int, g int GENERATED ALWAYS AS (a) STORED)")

        assert error in load("t", f"{header}\n1,2,3\n").error
        assert rows(conn) == []

    def test_no_header(self, load, conn):
        """Without a header the values are the table's columns, but for those that are generated."""
        conn.execute("CREATE TABLE t (g int GENERATED ALWAYS AS (a) STORED, a int, b text)")

        load("t", "1,x\n", "--no-header")

        assert rows(conn) == [(1, 1, "x")]

    def test_columns(self, load, conn):
        """`--columns` names the values, with a header or without."""
        conn.execute('CREATE TABLE t (a int, "b,c" text)')

        load("t", "x,1\n", "--no-header", "--columns", '"b,c",a')
        load("t", "p,q\ny,2\n", "--columns", '"b,c",a')

        assert rows(conn) == [(1, "x"), (2, "y")]

    def test_columns_must_fit_the_header(self, load, conn):
        """Not one header less or more than `--columns` names."""
        conn.execute("CREATE TABLE t (a int)")

        error = load("t", "p,q\n1,2\n", "--columns", "a").error

        assert error.endswith("line 1 has 2 values, --columns names 1")

    def test_identity(self, load, conn):
        """Values of an identity column are taken; where there are none it counts by itself."""
        conn.execute("CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY, a text)")

        load("t", "a\nx\n")
        load("t", "id,a\n7,y\n")

        assert rows(conn) == [(1, "x"), (7, "y")]


class TestTables:
    @pytest.mark.parametrize("name", ["app.People", "App.PEOPLE", '"App"."PEOPLE"', "APP.people"])
    def test_names(self, load, conn, name):
        """A name is taken as it stands, then in lower case; quotes leave no choice."""
        conn.execute('CREATE SCHEMA app; CREATE SCHEMA "App"')
        for table in ('app."People"', '"App"."PEOPLE"', "app.people"):
            conn.execute(f"CREATE TABLE {table} (a text)")
        expected = {"app.People": 'app."People"', "APP.people": "app.people"}

        load(name, "a\nx\n")

        assert rows(conn, expected.get(name, '"App"."PEOPLE"')) == [("x",)]

    def test_search_path(self, load, conn, make_config, pgmonkey, tmp_path):
        """A name without schema is looked for in the search path of the configuration."""
        conn.execute("CREATE SCHEMA app; CREATE TABLE app.t (a text); CREATE TABLE t (a text)")
        config = make_config(sync_settings={"search_path": ["app"]})
        path = tmp_path / "x.csv"
        path.write_text("a\nx\n")

        arguments = ["--table", "t", "--connconfig", config, "--import_file", path]

        assert pgmonkey("pgimport", *arguments).output() == "imported 1 row into app.t\n"

    @pytest.mark.parametrize("name", ["a.b.c", ".t", '"t', '"t"x', ""])
    def test_bad_name(self, load, name):
        """What cannot be a table's name is one line."""
        assert repr(name) in load(name, "a\n1\n").error

    def test_no_such_table(self, load):
        """A table that is missing is one line that says how to have it."""
        assert "--create-table creates it" in load("nope", "a\n1\n").error

    def test_create(self, load, conn, dump):
        """A new table has the header's names in lower case, and text."""
        result = load("New", "Full Name,Größe\nx,007\n", "--create-table")

        assert result.output() == "imported 1 row into public.New\n"
        assert dump('"New"') == "full_name,größe\nx,007\n"

    def test_create_as_written(self, load, dump):
        """`--no-lowercase` keeps the header's names."""
        load("t", "Full Name\nx\n", "--create-table", "--no-lowercase")

        assert dump("t") == "Full Name\nx\n"

    def test_create_without_header(self, load, dump):
        """Without names the columns are numbered."""
        load("t", "x,y\n", "--create-table", "--no-header")

        assert dump("t") == "column_1,column_2\nx,y\n"

    def test_create_where_it_exists(self, load, conn):
        """`--create-table` takes the table that is there."""
        conn.execute("CREATE TABLE t (a int)")

        load("t", "a\n1\n", "--create-table", "--infer-types")

        assert rows(conn) == [(1,)]

    @pytest.mark.parametrize(
        ("header", "error"),
        [("A,a", "column 'a' is named twice"), ("x" * 64, "is longer than PostgreSQL's 63 bytes")],
    )
    def test_create_with_bad_names(self, load, conn, header, error):
        """Names that would collide or be cut are refused."""
        assert error in load("t", f"{header}\n", "--create-table").error
        assert conn.execute("SELECT to_regclass('t')").fetchone() == (None,)

    def test_truncate(self, load, conn):
        """`--truncate` takes the old rows away, and only if the new ones arrive."""
        conn.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)")

        assert load("t", "a\nx\n", "--truncate").status == 1
        assert rows(conn) == [(1,)]
        load("t", "a\n2\n", "--truncate")
        assert rows(conn) == [(2,)]

    def test_failed_creation_leaves_nothing(self, load, conn):
        """A bad row takes the new table away."""
        load("t", "a,b\n1,2\n3\n", "--create-table")

        assert conn.execute("SELECT to_regclass('t')").fetchone() == (None,)


VALUES_AND_TYPES = [
    (["true", "False"], "boolean"),
    (["0", "-2147483648", "2147483647"], "integer"),
    (["1", "2147483648"], "bigint"),
    (["9223372036854775808"], "numeric"),
    (["1.50", "-0.25"], "numeric"),
    (["1.5e-10", "2"], "double precision"),
    (["1234567890.1234567890e5"], "text"),
    (["007"], "text"),
    (["-0"], "text"),
    (["+1"], "text"),
    (["1", '""'], "text"),
    (["1", ""], "integer"),
    (["", ""], "text"),
    (["2024-02-29"], "date"),
    (["2023-02-29"], "text"),
    (["0000-01-01"], "text"),
    (["2024-02-29", "2024-01-01 10:00"], "timestamp without time zone"),
    (["2024-02-29T23:59:59.123456"], "timestamp without time zone"),
    (["2024-02-29 10:00:00+02", "2024-02-29T10:00:00Z"], "timestamp with time zone"),
    (["2024-02-29 24:00"], "text"),
    (["9b2f3c1e-0d0a-4c7e-8a44-0123456789ab"], "uuid"),
]


class TestTypes:
    def test_infer(self, load, conn):
        """A type is chosen only if all values have it and come back as they were."""
        header = ",".join(f"c{number}" for number in range(len(VALUES_AND_TYPES)))
        columns = (values for values, _ in VALUES_AND_TYPES)
        lines = [header, *map(",".join, zip_longest(*columns, fillvalue=""))]

        load("t", "\n".join(lines), "--create-table", "--infer-types").output()

        found = conn.execute(
            "SELECT format_type(atttypid, NULL) FROM pg_attribute"
            " WHERE attrelid = 't'::regclass AND attnum > 0 ORDER BY attnum"
        )
        assert [type_ for (type_,) in found] == [type_ for _, type_ in VALUES_AND_TYPES]

    def test_text_without_being_asked(self, load, dump):
        """Without `--infer-types` all is text, and nothing is rounded or trimmed."""
        data = "a,b\n007,1.10\n"

        load("t", data, "--create-table")

        assert dump("t") == data

    def test_infer_needs_create(self, load):
        """`--infer-types` alone is wrong usage."""
        result = load("t", "a\n1\n", "--infer-types")

        assert (result.status, result.out) == (2, "")
        assert "--infer-types belongs to --create-table" in result.err


class TestFormats:
    @pytest.mark.parametrize(
        ("data", "options"),
        [
            (b"a;b\n1;'x;y'\n", ["--delimiter", ";", "--quotechar", "'"]),
            (b"a\tb\n1\tx;y\n", ["--delimiter", "tab"]),
            (b"a\tb\n1\tx;y\n", ["--delimiter", "\\t"]),
            (b"a,b\r\n1,x;y\r\n", []),
            (b"a,b\r1,x;y\r", []),
            (b"a,b\n1,x;y", []),
            (b"\n\r\na,b\n1,x;y\n", []),
            (b'"a","b"\n"1","x;y"\n', []),
            (b"\xef\xbb\xbfa,b\n1,x;y\n", []),
            (b"\xef\xbb\xbfa,b\n1,x;y\n", ["--encoding", "utf-8-sig"]),
            ("a,b\n1,x;y\n".encode("utf-16"), []),
            ("a,b\n1,x;y\n".encode("utf-32"), []),
            ("\ufeffa,b\n1,x;y\n".encode("utf-16-le"), ["--encoding", "utf-16-le"]),
        ],
    )
    def test_forms(self, load, conn, data, options):
        """The same rows in many forms."""
        conn.execute("CREATE TABLE t (a int, b text)")

        load("t", data, *options).output()

        assert rows(conn) == [(1, "x;y")]

    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("cp1252", "cp1252"),
            ("WIN1252", "cp1252"),
            ("LATIN9", "iso8859-15"),
            ("latin-1", "latin-1"),
            ("SJIS", "cp932"),
            ("Shift_JIS", "cp932"),
            ("EUC_JP", "euc_jp"),
            ("GB18030", "gb18030"),
            ("utf-16-be", "utf-16-be"),
            ("cp437", "cp437"),
            ("UNICODE", "utf-8"),
        ],
    )
    def test_encodings(self, load, conn, dump, name, codec):
        """Encodings by Python's or PostgreSQL's name, in the header and in values."""
        # In Shift JIS the second byte of this sign is the delimiter.
        word = "ä" if codec in ("cp1252", "iso8859-15", "latin-1", "cp437") else "ポ"
        data = f"{word}|b\n{word}|1\n"

        load("t", data.encode(codec), "--encoding", name, "--create-table", "--delimiter", "|")

        assert dump("t") == f"{word},b\n{word},1\n"

    def test_null(self, load, conn):
        """An unquoted empty field is NULL, a quoted one is not; `--null` takes another word."""
        conn.execute("CREATE TABLE t (a text, b text)")

        load("t", 'a,b\n,""\n')
        load("t", 'a,b\nNULL,"NULL"\n,x\n', "--null", "NULL")

        assert rows(conn) == [(None, ""), (None, "NULL"), ("", "x")]

    def test_one_column(self, load, conn):
        """An empty line of a file with one column is a row with NULL."""
        conn.execute("CREATE TABLE t (a text)")

        load("t", 'a\nx\n\n""\n')

        assert rows(conn) == [("x",), (None,), ("",)]

    def test_end_marker(self, tls_server, pgmonkey, tmp_path):
        r"""A value `\.` is a value on servers before PostgreSQL 18, too, and so are those after."""
        config = tmp_path / "c.yaml"
        config.write_text(yaml.safe_dump({"connection_settings": tls_server.conninfo()}))
        path = tmp_path / "x.csv"
        path.write_bytes(b'a\nx\n\\.\n"\n\\.\n"\ny\n\\.')
        arguments = ["--table", "end_marker", "--connconfig", config, "--import_file", path]
        with psycopg.connect(**tls_server.admin_conninfo(), autocommit=True) as conn:
            conn.execute("CREATE TABLE end_marker (a text); GRANT ALL ON end_marker TO PUBLIC")
            try:
                pgmonkey("pgimport", *arguments).output()
                found = rows(conn, "end_marker")
            finally:
                conn.execute("DROP TABLE end_marker")

        assert found == [("x",), ("\\.",), ("\n\\.\n",), ("y",), ("\\.",)]

    def test_gzip(self, load, conn):
        """A packed file is unpacked, parts behind one another too."""
        conn.execute("CREATE TABLE t (a text)")
        packed = gzip.compress(b"a\nx\n") + gzip.compress(b"y\n")

        load("t", packed, name="in.csv.gz")

        assert rows(conn) == [("x",), ("y",)]

    def test_damaged_gzip(self, load, conn):
        """A packed file that is cut off is one line, and nothing is imported."""
        conn.execute("CREATE TABLE t (a text)")
        packed = gzip.compress(b"a\n" + os.urandom(1 << 19).hex().encode())

        assert "in.csv.gz: is damaged" in load("t", packed[:-9], name="in.csv.gz").error
        assert "in.csv.gz: is damaged" in load("t", b"a\nx\n", name="in.csv.gz").error
        assert rows(conn) == []

    def test_stdin(self, pgmonkey, config_path, conn):
        """`-` is standard input."""
        conn.execute("CREATE TABLE t (a text)")
        arguments = ["--table", "t", "--connconfig", config_path, "--import_file", "-"]

        pgmonkey("pgimport", *arguments, stdin=b"a\nx\n").output()

        assert rows(conn) == [("x",)]

    def test_pipe(self, config_path, conn):
        """A pipe is read as it comes, and no progress is shown in it."""
        conn.execute("CREATE TABLE t (a text)")
        data = b"a\n" + b"x" * 100 + b"\n" + b"y\n" * 200_000

        arguments = ["--table", "t", "--connconfig", str(config_path), "--import_file", "-"]
        result = subprocess.run(
            [sys.executable, "-m", "pytest_pgmonkey", "pgimport", *arguments],
            input=data,
            capture_output=True,
            check=True,
            timeout=60,
        )

        assert result.stdout == b"imported 200001 rows into public.t\n"
        assert result.stderr == b""

    @pytest.mark.parametrize(
        "options",
        [
            ["--delimiter", ",,"],
            ["--delimiter", "ä"],
            ["--delimiter", "\n"],
            ["--quotechar", ""],
            ["--delimiter", '"'],
            ["--null", ","],
            ["--columns", "a,a"],
            ["--columns", "a,,b"],
            ["--columns", '"a'],
        ],
    )
    def test_wrong_usage(self, load, options):
        """Signs and names that cannot be are wrong usage."""
        result = load("t", "a\n1\n", *options)

        assert (result.status, result.out) == (2, "")

    def test_unknown_encoding(self, load):
        """An encoding that nobody knows is one line; one of no text is the same."""
        for name in ("klingon", "base64"):
            assert f"unknown encoding {name!r}" in load("t", "a\n1\n", "--encoding", name).error


class TestBadFiles:
    @pytest.mark.parametrize(
        ("data", "error"),
        [
            ("a,b\n1,x\ny,2\n", "line 3, column a, value 1 (character 1): invalid input syntax"),
            ('a,b\n1,"x\n"\ny,2\n', "line 4, column a, value 1 (character 1): invalid input"),
            ('b,a\n"ä\nöü",x\n', "line 3, column a, value 2 (character 5): invalid input"),
            ('b,a\r\n"p\r\nq",x\r\n', "line 3, column a, value 2 (character 4): invalid input"),
            ('b,a\rp,1\r"p\rq",x\r', "line 4, column a, value 2 (character 4): invalid input"),
            ('\n\n"a",\n"b"\n', "header, value 2: has no name"),
            ("\n\na,b\n1,x\n2\n", "line 5, column a, value 1 (character 1): the row has 1 value"),
            (
                "a,b\n1,x,y\n",
                "line 2, value 3 (character 5): the row has 3 values, the header names",
            ),
            ("a,b\n1,x\n\n2,y\n", "line 3, column a, value 1 (character 1): the row has 1 value"),
            ("a,b\n1,x\n \n", "line 3, column a, value 1 (character 1): invalid input syntax"),
            ('a,b\n1,x\n2,"y\n3,z\n', "line 3, column b, value 2 (character 3): a quoted value"),
            ("a,b\n1,x\n,y\n", "line 3, column a, value 1 (character 1): null value in column"),
            ("a,b\n1,x\n2,y\n1,z\n", "line 4, column a, value 1 (character 1): duplicate key"),
            ("a,b\n1,x\n2,bad\n", "line 3, column b, value 2 (character 3): new row for relation"),
            (b"a,b\n1,x\n2,\xe4\n", "line 3, column b, value 2 (character 3): invalid byte"),
            (b"a,b\n1,x\n2,\0\n", "line 3, column b, value 2 (character 3): invalid byte"),
            (b"a,\xe4\n1,x\n", "header, value 2: is not utf-8; --encoding names another"),
            ("", "is empty"),
            ("\n\n", "is empty"),
        ],
    )
    def test_position(self, load, conn, data, error):
        """Nothing is imported; the error names file, line, column and value."""
        conn.execute(
            "CREATE TABLE t (a int PRIMARY KEY, b text CONSTRAINT good CHECK (b <> 'bad'))"
        )

        found = load("t", data).error

        assert f"in.csv: {error}" in found
        assert rows(conn) == []

    @pytest.mark.parametrize("line", [2, 3, 70_001, 200_001])
    def test_far_into_a_file(self, load, conn, line):
        """The line is right wherever it is, quoted line ends before it or not."""
        conn.execute("CREATE TABLE t (a int, b text)")
        lines = ["a,b", *(f'{number},"x\n{number}"' for number in range(100_000))]
        at = line // 2
        lines[at] = f"x{lines[at]}"

        found = load("t", "\n".join(lines)).error

        assert f"in.csv: line {2 * at}, column a, value 1 (character 1): " in found

    def test_stdin_names_what_it_can(self, pgmonkey, config_path, conn):
        """What cannot be read once more has line, column and value."""
        conn.execute("CREATE TABLE t (a int, b int)")
        arguments = ["--table", "t", "--connconfig", config_path, "--import_file", "-"]

        result = pgmonkey("pgimport", *arguments, stdin=b"b,a\n1,2\n3,x\n")

        assert result.error.startswith("standard input: line 3, column a, value 2: invalid input")

    def test_gzip_and_recoded(self, load, conn):
        """Positions are those of the text, in packed and recoded files too."""
        conn.execute("CREATE TABLE t (a int, b text)")
        data = 'b,a\n"ä\nö",x\n'

        packed = load("t", gzip.compress(data.encode()), name="in.csv.gz").error
        recoded = load("t", data.encode("utf-16")).error

        assert "in.csv.gz: line 3, column a, value 2 (character 4)" in packed
        assert "in.csv: line 3, column a, value 2 (character 4)" in recoded

    def test_not_of_its_encoding(self, load, conn):
        """Bytes that Python cannot decode are named by line."""
        conn.execute("CREATE TABLE t (a text)")

        error = load("t", b"a\nx\n\x81 \n", "--encoding", "cp932").error

        assert "in.csv: line 3: byte 0x81 is not cp932" in error
        assert rows(conn) == []

    def test_foreign_key(self, load, conn):
        """A constraint that is judged at the end, or at the commit, says which value breaks it."""
        conn.execute("CREATE TABLE p (id int PRIMARY KEY); INSERT INTO p VALUES (1)")
        for deferred in ("", "DEFERRABLE INITIALLY DEFERRED"):
            conn.execute("DROP TABLE IF EXISTS t")
            conn.execute(f"CREATE TABLE t (b text, a int REFERENCES p {deferred})")

            error = load("t", 'b,a\n1,1\n"2\n2",1\n3,2\n').error

            assert "in.csv: line 5, column a, value 2 (character 3): insert or update" in error
            assert "Key (a)=(2) is not present" in error

    def test_names_with_signs(self, load, conn):
        """Columns and tables with odd names are told apart in what the server says."""
        conn.execute('CREATE TABLE "t, line 9" ("a: b" int, "a" int)')

        error = load('"t, line 9"', "a,a: b\n1,x\n").error

        assert "in.csv: line 2, column a: b, value 2 (character 3)" in error

    def test_missing_file(self, load, pgmonkey, config_path):
        """A file that is not there is one line."""
        arguments = ["--table", "t", "--connconfig", config_path, "--import_file", "/no/such.csv"]

        error = pgmonkey("pgimport", *arguments).error

        assert error == "/no/such.csv: cannot be read: No such file or directory"

    def test_wrong_quotechar(self, load, conn):
        """A quote that never ends in a large file is found before all of it is in memory."""
        conn.execute("CREATE TABLE t (a text)")

        assert "does not end within" in load("t", '"a\n' + "x\n" * 2_000_000).error

    def test_may_not(self, load, conn, pg_server, database):
        """What the server does not allow is its one line."""
        with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as admin:
            admin.execute("CREATE TABLE mine (a int)")

        assert "permission denied for table mine" in load("mine", "a\n1\n").error


class TestSidecar:
    @pytest.fixture
    def sidecar(self, tmp_path):
        def write(**keys: object) -> None:
            (tmp_path / "in.yaml").write_text(yaml.safe_dump(keys))

        return write

    def test_the_originals(self, load, dump, sidecar):
        """The file that the original made is read: names, signs, encoding, and a new table."""
        sidecar(
            has_headers=False,
            auto_create_table=True,
            enforce_lowercase=True,
            delimiter=";",
            quotechar="'",
            encoding="utf-16-le",
        )

        result = load("t", "'x;y';ä\n".encode("utf-16-le"))

        assert result.err.endswith("in.yaml: settings taken from it\n")
        assert dump("t") == "column_1,column_2\nx;y,ä\n"

    def test_options_take_its_place(self, load, dump, sidecar):
        """What is said on the command line holds."""
        sidecar(has_headers=False, auto_create_table=False, delimiter=";")

        load("t", "a|b\n1|2\n", "--header", "--create-table", "--delimiter", "|")

        assert dump("t") == "a,b\n1,2\n"

    @pytest.mark.parametrize(
        ("keys", "error"),
        [
            ({"delimiter": ",,"}, "in.yaml: delimiter: must be one ASCII character"),
            ({"delimiter": 1}, "in.yaml: delimiter: must be one character, in quotes"),
            ({"has_headers": "perhaps"}, "in.yaml: has_headers: must be true or false"),
            ({"delimiter": ",", "quote": "x"}, "in.yaml: quote: unknown key"),
        ],
    )
    def test_bad(self, load, sidecar, keys, error):
        """A file beside that is wrong is one line that names the key."""
        sidecar(**keys)

        assert error in load("t", "a\n1\n").error

    def test_none_of_ours(self, load, dump, sidecar):
        """A YAML file without any setting of CSV files is an error: they may be misspelt."""
        sidecar(title="x", separator=";")

        error = load("t", "a\n1\n", "--create-table").error

        assert "in.yaml: has none of the settings of" in error
        assert "known are delimiter, quotechar" in error


def test_progress_on_a_terminal(load, conn, monkeypatch):
    """On a terminal a line shows how far it is, and is gone at the end."""
    conn.execute("CREATE TABLE t (a int)")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("pytest_pgmonkey.cli.copying.progress._INTERVAL", 0)
    monkeypatch.setattr("sys.stderr", terminal)

    load("t", "a\n" + "1\n" * 100_000)

    shown = terminal.getvalue().split("\r")
    assert any(re.search(r"\[#+ *\] +\d+%  .* [kM]B/s", line) for line in shown)
    assert shown[-1] == "\x1b[K"
