"""What is exported and imported again is the same."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from pytest_pgmonkey import cli
from pytest_pgmonkey.copying.records import find_record, guard_end_marker, split_record
from pytest_pgmonkey.copying.settings import Dialect

TEXT = st.text(
    st.one_of(
        st.sampled_from("\"',;\n\r\\. \t|"),
        st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"),
    ),
    max_size=12,
)
INTEGERS = st.integers(-(2**31), 2**31 - 1)
UTC = st.just(datetime.timezone.utc)
COLUMNS = {
    "text": TEXT,
    "varchar(20)": TEXT,
    "integer": INTEGERS,
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "numeric": st.decimals(allow_infinity=False, places=5, min_value=-(10**12), max_value=10**12),
    "real": st.floats(width=32),
    "double precision": st.floats(),
    "boolean": st.booleans(),
    "date": st.dates(),
    "time": st.times(),
    "timestamp": st.datetimes(),
    # psycopg reads no times that are before year 1 where the session is.
    "timestamptz": st.datetimes(datetime.datetime(2, 1, 1), timezones=UTC),
    "interval": st.timedeltas(datetime.timedelta(-9999), datetime.timedelta(9999)),
    "uuid": st.uuids(),
    "bytea": st.binary(max_size=8),
    "jsonb": st.recursive(
        TEXT | INTEGERS, lambda inner: st.lists(inner, max_size=3), max_leaves=4
    ).map(Jsonb),
    "text[]": st.lists(st.none() | TEXT, max_size=3),
    "int4range": INTEGERS.map(lambda low: psycopg.types.range.Range(low, None)),
}
ROWS = st.lists(st.tuples(*(st.none() | values for values in COLUMNS.values())), max_size=4)
RELAXED = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def tables(conn):
    columns = ", ".join(f'"{name.title()}" {name}' for name in COLUMNS)
    conn.execute(f"CREATE TABLE one ({columns}); CREATE TABLE two (LIKE one)")
    return conn


@pytest.mark.parametrize("options", [[], ["--delimiter", "|", "--quotechar", "'", "--null", "-"]])
@RELAXED
@given(rows=ROWS)
def test_every_type(tables, config_path, tmp_path, options, rows):
    """Every common type, NULL and the empty string, quotes, line ends, Unicode."""
    tables.execute("TRUNCATE one, two")
    placeholders = ", ".join(f"%s::{name}" for name in COLUMNS)
    with tables.cursor() as cursor:
        cursor.executemany(f"INSERT INTO one VALUES ({placeholders})", rows)
    path = str(tmp_path / "x.csv")
    common = ["--connconfig", str(config_path), *options]

    assert cli.main(["pgexport", "--table", "one", "--export_file", path, *common]) == 0
    assert cli.main(["pgimport", "--table", "two", "--import_file", path, *common]) == 0

    query = "SELECT t::text FROM {} AS t ORDER BY 1"
    first, second = (tables.execute(query.format(name)).fetchall() for name in ("one", "two"))
    assert first == second
    assert len(first) == len(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "GB18030"])
@RELAXED
@given(values=st.lists(st.none() | TEXT, max_size=5))
def test_one_column(conn, config_path, tmp_path, encoding, values):
    """One column, where an empty line is a row."""
    conn.execute("DROP TABLE IF EXISTS one, two; CREATE TABLE one (a text)")
    conn.execute("CREATE TABLE two (a text)")
    with conn.cursor() as cursor:
        cursor.executemany("INSERT INTO one VALUES (%s)", [(value,) for value in values])
    path = str(tmp_path / "x.csv")
    common = ["--connconfig", str(config_path), "--encoding", encoding]

    assert cli.main(["pgexport", "--table", "one", "--export_file", path, *common]) == 0
    assert cli.main(["pgimport", "--table", "two", "--import_file", path, *common]) == 0

    found = [value for (value,) in conn.execute("SELECT a FROM two")]
    assert found == values


# --- the reader of positions against the server's ---

SIGNS = st.text("ab,\"'\\. ", max_size=12)


@RELAXED
@given(record=SIGNS.filter(bool), quotechar=st.sampled_from("\"'"))
def test_values_are_the_servers(conn, record, quotechar):
    """A record is taken apart as PostgreSQL takes it apart."""
    if record.count(quotechar) % 2 or record == "\\.":
        return
    fields = split_record(record.encode(), Dialect(",", quotechar, "NULL"))
    columns = ", ".join(f"c{number} text" for number in range(len(fields)))
    conn.execute(f"DROP TABLE IF EXISTS t; CREATE TABLE t ({columns})")
    options = f"(FORMAT csv, QUOTE '{quotechar * (2 if quotechar == chr(39) else 1)}', NULL 'NULL')"

    with conn.cursor() as cursor, cursor.copy(f"COPY t FROM STDIN WITH {options}") as copy:
        copy.write(record)

    assert conn.execute("SELECT * FROM t").fetchone() == tuple(
        field.value.decode() for field in fields
    )


@RELAXED
@given(
    records=st.lists(st.text('ab"\n\r', max_size=6), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    size=st.integers(1, 9),
    data=st.data(),
)
def test_the_record_is_the_servers(conn, records, end, size, data):
    """The record that is found is the one of which the server speaks, however blocks are cut."""
    conn.execute("CREATE TABLE IF NOT EXISTS numbers (a int)")
    bad = data.draw(st.integers(0, len(records) - 1))
    quoted = ['"' + record.replace('"', '""') + '"' for record in records]
    # What is no number: the first of them is the one that the server names.
    lines = ["1"] * bad + [f"{line}x" for line in quoted[bad:]]
    text = end.join(lines).encode()

    statement = "COPY numbers FROM STDIN WITH (FORMAT csv)"
    with pytest.raises(psycopg.Error) as caught, conn.cursor().copy(statement) as copy:
        copy.write(text)
    number = int(caught.value.diag.context.split("line ")[1].split(",")[0].split(":")[0])
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    record = find_record(blocks, b'"', number)

    assert record is not None
    assert record.data == lines[bad].encode()
    assert record.line == bad + 1


@RELAXED
@given(
    lines=st.lists(st.sampled_from(["\\.", "a", '"', '""', "\\.x", '"\\."', ""])),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    size=st.integers(1, 9),
)
def test_the_guard_sees_every_marker(lines, end, size):
    r"""Bare `\.` outside of quotes, and nothing else, is quoted, however blocks are cut."""
    text = end.join(lines).encode()
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    expected, quoted = [], False
    for line in lines:
        expected.append('"\\."' if line == "\\." and not quoted else line)
        quoted ^= line.count('"') % 2 == 1

    assert b"".join(guard_end_marker(blocks, b'"')) == end.join(expected).encode()


def test_uuid_and_decimal_are_kept(load, dump):
    """What types are inferred, the text stays the same."""
    data = f"a,b\n{uuid.UUID(int=7)},{Decimal('1.10')}\n"

    load("t", data, "--create-table", "--infer-types")

    assert dump("t") == data
