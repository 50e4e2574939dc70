"""`import_csv` and `export_csv`: the commands' work, for programs."""

from __future__ import annotations

import gzip
import io
import pickle
from itertools import product

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from pytest_pgmonkey import (
    CSVError,
    CSVResult,
    PGConnectionManager,
    PGMonkeyError,
    export_csv,
    import_csv,
)
from pytest_pgmonkey.config import connection_spec
from pytest_pgmonkey.copying.inference import infer_types
from pytest_pgmonkey.copying.settings import Dialect
from pytest_pgmonkey.handles import make_handle


@pytest.fixture(params=["normal", "pool"])
def handle(config, request):
    manager = PGConnectionManager()
    handle = manager.get_database_connection_from_dict(config, request.param)
    with handle as conn:
        conn.execute(
            "CREATE TABLE people (id int, name text, twice int GENERATED ALWAYS AS (id * 2) STORED)"
        )
    yield handle
    handle.disconnect()


@pytest.fixture
def people(handle):
    """A function that gives the table's rows."""

    def people():
        with handle.cursor() as cursor:
            return cursor.execute("SELECT id, name FROM people ORDER BY id").fetchall()

    return people


class TestFiles:
    def test_path(self, handle, people, tmp_path):
        """A path goes in and out, packed by its name."""
        path = tmp_path / "people.csv.gz"
        path.write_bytes(gzip.compress(b"name,id\nAnn,1\n,2\n"))

        assert import_csv(handle, path, table="People") == CSVResult(
            2, "public.people", ("name", "id")
        )
        assert people() == [(1, "Ann"), (2, None)]
        out = str(tmp_path / "out.csv")
        assert export_csv(handle, out, table="people") == CSVResult(
            2, "public.people", ("id", "name"), ("twice",)
        )
        assert (tmp_path / "out.csv").read_bytes() == b"id,name\n1,Ann\n2,\n"

    def test_open_binary_file(self, handle, people):
        """An open file is used from where it stands, and stays open."""
        file = io.BytesIO(b"skipped\nid,name\n1,x\n")
        file.readline()

        import_csv(handle, file, table="people")
        out = io.BytesIO()
        out.write(b"# people\n")
        export_csv(handle, out, query="SELECT id FROM people;")

        assert people() == [(1, "x")]
        assert out.getvalue() == b"# people\nid\n1\n"
        assert not file.closed

    def test_open_text_file(self, handle, people, tmp_path):
        """A text file has its own encoding; line ends within values are kept."""
        path = tmp_path / "people.csv"
        path.write_bytes('skipped\r\nid,name\r\n1,"ä\r\nb"\r\n'.encode("latin-1"))

        with path.open(encoding="latin-1") as file:
            assert file.readline() == "skipped\n"
            import_csv(handle, file, table="people")
        with path.open("w", encoding="latin-1") as file:
            file.write("# é\n")
            export_csv(handle, file, table="people", columns=["name"])

        assert people() == [(1, "ä\r\nb")]
        assert path.read_bytes() == '# é\nname\n"ä\r\nb"\n'.encode("latin-1")

    def test_text_in_memory(self, handle, people):
        """So has none that is in memory."""
        import_csv(handle, io.StringIO("id,name\n1,ä€\n"), table="people")
        out = io.StringIO()
        export_csv(handle, out, table="people", header=False)

        assert out.getvalue() == "1,ä€\n"

    def test_a_refused_value_is_found_in_an_open_file(self, handle):
        """It is read once more from where it stood; the error knows the place."""
        file = io.BytesIO(b"skipped\nname,id\nx,1\ny,z\n")
        file.readline()

        with pytest.raises(
            CSVError, match=r"the file: line 3, column id, value 2 \(char"
        ) as caught:
            import_csv(handle, file, table="people")

        error = caught.value
        assert (error.file, error.line, error.column) == ("the file", 3, "id")
        assert isinstance(error.__cause__, psycopg.errors.InvalidTextRepresentation)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


class TestTransactions:
    def test_it_is_committed(self, handle, admin):
        """Outside of a block."""
        import_csv(handle, io.BytesIO(b"id\n1\n"), table="people")

        assert admin.execute("SELECT count(*) FROM people").fetchone() == (1,)

    def test_inside_a_block(self, handle, people):
        """On the block's connection; what fails leaves the block as it was."""
        with handle as conn:
            conn.row_factory = dict_row
            conn.execute("INSERT INTO people VALUES (1, 'block')")
            import_csv(handle, io.BytesIO(b"id\n2\n"), table="people")
            with pytest.raises(CSVError):
                import_csv(handle, io.BytesIO(b"id\nx\n"), table="people")
            out = io.BytesIO()
            assert export_csv(handle, out, table="people").rows == 2
            conn.execute("INSERT INTO people VALUES (3)")
            conn.rollback()

        assert people() == []

    def test_at_the_start_of_a_block(self, handle, people):
        """It is a part of the block's transaction there, too."""
        with handle as conn:
            import_csv(handle, io.BytesIO(b"id\n1\n"), table="people")
            conn.rollback()

        assert people() == []

    def test_in_autocommit(self, handle, people):
        """There it is committed by itself, and all or nothing as ever."""
        with handle as conn:
            conn.autocommit = True
            import_csv(handle, io.BytesIO(b"id\n1\n"), table="people")
            with pytest.raises(CSVError):
                import_csv(handle, io.BytesIO(b"id\n2\nx\n"), table="people")
            conn.rollback()

        assert people() == [(1, None)]

    def test_settings_are_put_back(self, handle):
        """The block goes on in its own encoding and date style, and may write."""
        with handle as conn:
            conn.execute("SET client_encoding TO 'LATIN1'; SET datestyle TO 'German'")
            import_csv(handle, io.BytesIO("id,name\n1,ä\n".encode()), table="people")
            out = io.BytesIO()
            export_csv(handle, out, query="SELECT name, date '2024-01-31' AS d FROM people")
            conn.execute("INSERT INTO people VALUES (2)")

            assert out.getvalue() == "name,d\nä,2024-01-31\n".encode()
            assert conn.info.encoding == "iso8859-1"
            assert conn.execute("SELECT (date '2024-01-31')::text").fetchone() == ("31.01.2024",)

    def test_nothing_imported(self, handle, people):
        """`truncate` is undone, too; a table that is refused is the package's error."""
        import_csv(handle, io.BytesIO(b"id\n1\n"), table="people")

        with pytest.raises(CSVError, match="invalid input"):
            import_csv(handle, io.BytesIO(b"id\nx\n"), table="people", truncate=True)
        with pytest.raises(CSVError, match=r"no\.such: schema"):
            import_csv(handle, io.BytesIO(b"id\nx\n"), table="no.such", create_table=True)
        assert people() == [(1, None)]


class TestArguments:
    @pytest.mark.parametrize(
        ("function", "arguments", "error"),
        [
            (import_csv, {"delimiter": ",,"}, "`delimiter` must be one ASCII character"),
            (import_csv, {"delimiter": '"'}, "`delimiter` and `quotechar` must differ"),
            (import_csv, {"null": ","}, "`null` must hold neither"),
            (import_csv, {"infer_types": True}, "`infer_types` belongs to `create_table`"),
            (import_csv, {"columns": "ab"}, "`columns` must be a list of names"),
            (import_csv, {"columns": ["a", "a"]}, "`columns`: 'a' is named twice"),
            (export_csv, {"query": "SELECT 1"}, "either `table` or `query`"),
            (export_csv, {"table": None}, "either `table` or `query`"),
            (
                export_csv,
                {"table": None, "query": "SELECT 1", "columns": ["a"]},
                "`columns` belongs",
            ),
        ],
    )
    def test_wrong(self, handle, function, arguments, error):
        """Arguments that cannot be are errors of the package, and ValueErrors."""
        with pytest.raises(ValueError, match=error) as caught:
            function(handle, io.BytesIO(b"id\n1\n"), **{"table": "people", **arguments})
        assert isinstance(caught.value, CSVError)

    def test_an_async_handle(self, config):
        """It is refused; the error says what a coroutine does."""
        spec = connection_spec(config, "async")
        handle = make_handle(spec)

        with pytest.raises(PGMonkeyError, match=r"asyncio\.to_thread\(import_csv, handle"):
            import_csv(handle, "x.csv", table="t")

    def test_composed_query(self, handle):
        """A query may be made of psycopg's parts."""
        out = io.BytesIO()

        result = export_csv(handle, out, query=sql.SQL("SELECT {} AS a").format("it's"))

        assert (result, out.getvalue()) == (CSVResult(1, None, ()), b"a\nit's\n")

    def test_progress(self, handle, tmp_path):
        """It is told how far the work is."""
        path = tmp_path / "x.csv"
        path.write_bytes(b"id\n" + b"1\n" * 200_000)
        seen = []

        import_csv(handle, path, table="people", progress=lambda *args: seen.append(args))

        assert seen[-1] == (400_003, 400_003)
        assert len(seen) > 1


VALUES = [
    "0", "-0", "007", "999999999", "1000000000", "2147483647", "2147483648", "-2147483648",
    "-2147483649", "999999999999999", "1000000000000000", "9223372036854775807",
    "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "3147483647", "1.0",
    "-1.50", "-0.0", "-0.01", "0.123456789012345", "12345678901234.5", "1234567890123456.5", "1e5",
    "-0e5", "1E-10", "1e100", "1.2345678901234567e5", "9" * 999, "9" * 1000, "true", "FALSE", "t",
    "2024-02-29", "2023-02-29", "1900-02-29", "2000-02-29", "2024-04-31", "0000-01-01",
    "2024-01-31 10:00", "2024-01-31T23:59:59.123456", "2024-01-31 24:00", "2024-13-01",
    "2024-01-31 10:00+02", "2024-01-31T10:00:00Z", "2024-01-31 10:00:00-14:59",
    "9b2f3c1e-0d0a-4c7e-8a44-0123456789ab", "x", "1 ", " 1", "1,5", "", '"1"', '1"2"', '""',
]  # fmt: skip


class TestInference:
    def test_any_two_values(self):
        """What is inferred of two values does not depend on their order, nor on blocks."""
        dialect = Dialect(";", '"', "")
        for one, other in product(VALUES, repeat=2):
            lines = [f"{value};1\n".encode() for value in (one, other)]
            here = infer_types(lines, 2, dialect)
            there = infer_types([b"".join(lines[::-1])], 2, dialect)
            again = infer_types([b"".join(lines * 40)], 2, dialect)
            assert here == there == again, (one, other)

    def test_the_server_agrees(self, handle):
        """A value that has a type is the same text when it comes back, but for equal spellings."""
        spellings = {"double precision", "boolean", "timestamp", "timestamp with time zone"}
        for value in VALUES:
            (type_,) = infer_types([f"{value}\n".encode()], 1, Dialect(";", '"', ""))
            bare = value.replace('"', "")
            with handle.cursor() as cursor:
                query = sql.SQL("SELECT {}::{}::text").format(bare, sql.SQL(type_))
                found = cursor.execute(query).fetchone()
            assert type_ in spellings or found == (bare,), (value, type_)

    @pytest.mark.parametrize("last", ["x", "1.5", "3000000000", '"a\nb"', "", "1;2"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_the_last_row_counts(self, last, end):
        """However many rows have been alike before it."""
        types = {"": "integer", "1.5": "numeric", "3000000000": "bigint"}
        data = f"1;x{end}".encode() * 100_000 + f"{last};y".encode()
        blocks = (data[start : start + 65_537] for start in range(0, len(data), 65_537))

        found = infer_types(blocks, 2, Dialect(";", '"', ""))

        assert found == [types.get(last, "text"), "text"]

    @pytest.mark.parametrize("last", ["2;3", '"2\n', "\r2;3\r\n"])
    def test_quoted_line_ends(self, last):
        """They end no record, wherever a block ends; what never ends is text."""
        data = b'1;2\r\n3;"4"\r\n5;\r\n"\n6\r\n";"7"\r\n' * 2 + last.encode()
        types = ["text", "integer"] if last == "2;3" else ["text", "text"]
        for size in range(1, len(data) + 1):
            blocks = (data[start : start + size] for start in range(0, len(data), size))
            assert infer_types(blocks, 2, Dialect(";", '"', "")) == types

    def test_records_that_do_not_fit(self):
        """Where a record has too few values all is text: nothing after it was looked at."""
        assert infer_types([b"1;2\n3\n007;4\n"], 2, Dialect(";", '"', "")) == ["text", "text"]
        assert infer_types([b'1;2\n3;"4\n007;4\n'], 2, Dialect(";", '"', "")) == ["text", "text"]

    def test_a_pipe(self, handle):
        """What can be read only once is kept until its types are known."""

        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

        pipe = Pipe(b"n,t\n" + b"12,x\n" * 100_000 + b"13,y\n\n")
        result = import_csv(handle, pipe, table="new", create_table=True, infer_types=True)

        assert result.rows == 100_001
        with handle.cursor() as cursor:
            query = "SELECT sum(n), pg_typeof(min(n))::text FROM new"
            assert cursor.execute(query).fetchone() == (1_200_013, "integer")


class TestDelimiters:
    @pytest.mark.parametrize("sign", [";", "\t", "|"])
    @pytest.mark.parametrize("create", [True, False])
    def test_another_in_the_header(self, handle, sign, create):
        """A header of one name that seems to be several is an error that says how to go on."""
        data = f'id{sign}"a,b"{sign}name\n1{sign}x{sign}y\n'.encode()

        with pytest.raises(CSVError) as caught:
            import_csv(
                handle,
                io.BytesIO(data),
                table="new" if create else "people",
                create_table=create,
                delimiter="?",
            )

        assert f"it seems to have {sign!r} between its values: delimiter={sign!r} says so" in str(
            caught.value
        )

    def test_a_name_that_has_it(self, handle):
        """A column that exists is found, and `columns` names one that does not."""
        with handle as conn:
            conn.execute('CREATE TABLE odd ("a;b" text)')

        assert import_csv(handle, io.BytesIO(b"a;b\n1\n"), table="odd").rows == 1
        new = import_csv(
            handle, io.BytesIO(b"a;b\n1\n"), table="new", columns=["a"], create_table=True
        )
        assert new.columns == ("a",)

    def test_another_in_a_row(self, handle):
        """Without a header the first row that is one value says it."""
        with pytest.raises(CSVError, match=r"line 1, .*; it seems to have ';' between"):
            import_csv(handle, io.BytesIO(b"1;x\n"), table="people", header=False)


class TestShapes:
    @pytest.mark.parametrize("blank", ["\n", "\n\n\n", "\r\n\r\n"])
    def test_blank_lines_at_the_end(self, handle, people, blank):
        """They are no rows."""
        import_csv(handle, io.BytesIO(b"id,name\n1,x" + blank.encode()), table="people")

        assert people() == [(1, "x")]

    def test_blank_lines_of_one_column(self, handle, people):
        """There they are rows, wherever they stand."""
        import_csv(handle, io.BytesIO(b"id\n1\n\n"), table="people")

        assert people() == [(1, None), (None, None)]

    def test_too_many_columns(self, handle):
        """More columns than a table can have are the file's error."""
        data = ",".join(f"c{number}" for number in range(1601)).encode() + b"\n"

        with pytest.raises(
            CSVError, match=r"the file: has 1601 columns, and a table .* at most 1600"
        ):
            import_csv(handle, io.BytesIO(data), table="new", create_table=True)
