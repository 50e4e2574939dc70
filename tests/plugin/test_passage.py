"""Every statement of a test passes one place, in either isolation and by all four types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import pytest_asyncio
from helpers.four_types import ALL, block, call, execute
from psycopg import sql
from psycopg.rows import dict_row

from pytest_pgmonkey import PGConnectionManager, sources
from pytest_pgmonkey.connection_type import ConnectionType
from pytest_pgmonkey.testing import passage
from pytest_pgmonkey.testing.interception import Interception
from pytest_pgmonkey.testing.kit import Kit
from pytest_pgmonkey.testing.options import resolve
from pytest_pgmonkey.testing.sandbox.psycopg_door.internals import parameters, read_operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_pgmonkey.testing.sql.lexer import Statement

CONFIG = {"connection_settings": {"host": "database.invalid", "dbname": "app", "user": "app"}}
INSERT = "INSERT INTO item VALUES (%s)"
SELECT = "SELECT n FROM item ORDER BY n"


@dataclass
class Entry:
    """What a record of one statement could be made of."""

    text: str
    params: Any
    cursor: Any
    outcome: Any = None
    """Its rows, or the class of its error; `None` while it runs."""


class Record:
    """Stands in the passage and notes what passes, and how it ends."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def passing(self, statement: Statement, operation: Any, run: Any) -> Any:
        cursor = read_operation(operation)[2]
        entry = Entry(statement.text, parameters(operation), cursor)
        self.entries.append(entry)
        return self._watch(entry, run)

    def _watch(self, entry: Entry, run: Any) -> Any:
        try:
            results = yield from run
        except BaseException as error:
            entry.outcome = type(error)
            raise
        entry.outcome = results[-1].ntuples if results else entry.cursor.rowcount
        return results

    @property
    def texts(self) -> list[str]:
        return [entry.text for entry in self.entries]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """A test process inside this one."""
    path = tmp_path_factory.mktemp("kit")
    schema = path / "schema.sql"
    schema.write_text("CREATE TABLE item (n int)", "utf-8")
    given = {"source": "embedded"}
    options = resolve(
        lambda option: given.get(option.name), lambda _: None, {}, rootdir=path, called_from=path
    )
    interception = Interception({}, lambda: True, everything=True)
    before, sources.interceptor = sources.interceptor, interception
    kit = Kit(options, interception, pytest.fail)
    try:
        kit.prepare([schema])
        yield kit
    finally:
        kit.close()
        sources.interceptor = before


@pytest.fixture(params=["rollback", "clone"])
def record(
    request: pytest.FixtureRequest, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Record]:
    """What passes in a test of each isolation."""
    record = Record()
    kit.begin(request.param)
    monkeypatch.setattr(passage, "passing", record.passing)
    yield record
    assert kit.end() == ([], [])


@pytest.fixture(params=ALL)
def type_(request: pytest.FixtureRequest) -> ConnectionType:
    return ConnectionType(request.param)


async def application_handle(type_: ConnectionType, manager: Any = None, **sections: Any) -> Any:
    """Give the handle that an application would have, of a server that does not exist."""
    manager = manager or PGConnectionManager()
    return await call(manager.get_database_connection_from_dict({**CONFIG, **sections}, type_))


@pytest_asyncio.fixture(params=["own", "application"])
async def handle(
    request: pytest.FixtureRequest, kit: Kit, record: Record, type_: ConnectionType
) -> Any:
    """A handle of the kit's fixtures, or one that application code gets from its manager."""
    if request.param == "own":
        return kit.handles.make(type_)
    return await application_handle(type_)


async def fails(conn: Any, query: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await execute(conn, query)


# --- what passes ---


@pytest.mark.asyncio
async def test_what_is_executed_passes(record: Record, handle: Any) -> None:
    """Each statement with its SQL, parameters and cursor, and with its rows or its error."""
    async with block(handle) as conn:
        await execute(conn, SELECT)
        first = await execute(conn, INSERT, [1])
        await execute(conn, INSERT, [2])
        await execute(conn, SELECT)
        await fails(conn, "SELECT 1 / 0", psycopg.errors.DivisionByZero)
        await call(conn.rollback())
        await call(conn.set_autocommit(True))
        await execute(conn, "DELETE FROM item")
        assert [(entry.text, entry.params, entry.outcome) for entry in record.entries] == [
            (SELECT, None, 0),
            (INSERT, [1], 1),
            (INSERT, [2], 1),
            (SELECT, None, 2),
            ("SELECT 1 / 0", None, psycopg.errors.DivisionByZero),
            ("DELETE FROM item", None, 0),
        ]
        assert record.entries[1].cursor is first
        assert {entry.cursor.connection for entry in record.entries} == {conn}


@pytest.mark.asyncio
async def test_every_form_of_a_query_passes(record: Record, handle: Any) -> None:
    """Text, bytes and psycopg's composed SQL, and each statement of a string."""
    async with block(handle) as conn:
        await execute(conn, b"SELECT 1")
        await execute(conn, sql.SQL("SELECT {}").format(sql.Literal("a")))
        await execute(conn, "SELECT 2; SELECT ';' -- the end")
        await execute(conn, "")
    assert record.texts == ["SELECT 1", "SELECT 'a'", "SELECT 2", "SELECT ';'"]


@pytest.mark.asyncio
async def test_a_query_that_cannot_be_composed_is_psycopgs_to_refuse(
    record: Record, handle: Any
) -> None:
    """It raises what it raises elsewhere, in a transaction that has begun."""
    async with block(handle) as conn:
        wrong = sql.SQL("SELECT {}").format(sql.Literal(object()))
        await fails(conn, wrong, psycopg.ProgrammingError)
        assert conn.info.transaction_status.name == "INTRANS"
        await fails(conn, None, TypeError)
        await execute(conn, SELECT)
    assert record.texts[-1] == SELECT


@pytest.mark.asyncio
async def test_executemany_passes_once(record: Record, handle: Any) -> None:
    """As the one statement that the application wrote, in a pipeline or not."""
    async with block(handle) as conn, block(conn.cursor()) as cursor:
        await call(cursor.executemany(INSERT, [[1], [2]]))
        async with block(conn.pipeline()):
            await call(cursor.executemany(INSERT, [[3], [4]]))
        assert cursor.rowcount == 2
    assert record.texts == [INSERT, INSERT]


@pytest.mark.asyncio
async def test_a_stream_passes(record: Record, handle: Any) -> None:
    """Once, however many rows are fetched; an error of its sending is seen."""
    query = "SELECT generate_series(1, %s)"
    async with block(handle) as conn:
        cursor = conn.cursor()
        rows = cursor.stream(query, [3])
        if hasattr(rows, "__aiter__"):
            assert [row async for row in rows] == [(1,), (2,), (3,)]
        else:
            assert list(rows) == [(1,), (2,), (3,)]
    assert [(entry.text, entry.params) for entry in record.entries] == [(query, [3])]


@pytest.mark.asyncio
async def test_a_server_side_cursor_passes_with_its_query(record: Record, handle: Any) -> None:
    """What the application wrote, and neither DECLARE nor FETCH nor CLOSE around it."""
    query = "SELECT generate_series(1, %s)"
    async with block(handle) as conn:
        for kind in ({"scrollable": True}, {"withhold": True}):
            async with block(conn.cursor("named", **kind)) as cursor:
                await call(cursor.execute(sql.SQL(query), [5]))
                assert await call(cursor.fetchmany(2)) == [(1,), (2,)]
                assert len(await call(cursor.fetchall())) == 3
        await execute(conn, "DECLARE c CURSOR FOR SELECT 1")
        await execute(conn, "FETCH 1 FROM c")
    assert [(entry.text, entry.params) for entry in record.entries] == [
        (query, [5]),
        (query, [5]),
        ("DECLARE c CURSOR FOR SELECT 1", None),
        ("FETCH 1 FROM c", None),
    ]


@pytest.mark.asyncio
async def test_copy_passes(record: Record, handle: Any) -> None:
    """The statement, not the data; one that the server refuses has its error."""
    async with block(handle) as conn, block(conn.cursor()) as cursor:
        async with block(cursor.copy("COPY item FROM STDIN")) as copy:
            for n in range(3):
                await call(copy.write_row([n]))
        async with block(cursor.copy("COPY item TO STDOUT")) as copy:
            while await call(copy.read()):
                pass
        with pytest.raises(psycopg.errors.UndefinedTable):
            async with block(cursor.copy("COPY nothing TO STDOUT")):
                pass
        await call(conn.rollback())
    assert record.texts == ["COPY item FROM STDIN", "COPY item TO STDOUT", "COPY nothing TO STDOUT"]
    assert record.entries[-1].outcome is psycopg.errors.UndefinedTable


@pytest.mark.asyncio
async def test_a_pipeline_passes(record: Record, handle: Any) -> None:
    """Each statement when it is queued, in order."""
    async with block(handle) as conn, block(conn.pipeline()):
        await execute(conn, INSERT, [1])
        cursor = await execute(conn, SELECT)
        assert await call(cursor.fetchall()) == [(1,)]
    assert [(entry.text, entry.params) for entry in record.entries] == [
        (INSERT, [1]),
        (SELECT, None),
    ]
    assert all(entry.outcome is not None for entry in record.entries)


@pytest.mark.asyncio
async def test_a_script_passes_statement_by_statement(record: Record, handle: Any) -> None:
    """Transaction commands that the application wrote pass as everything that it wrote."""
    async with block(handle) as conn:
        await call(conn.set_autocommit(True))
        await execute(conn, "BEGIN; INSERT INTO item VALUES (1), (2); COMMIT")
        await execute(conn, "BEGIN")
        await execute(conn, "ROLLBACK")
        assert record.texts == [
            "BEGIN",
            "INSERT INTO item VALUES (1), (2)",
            "COMMIT",
            "BEGIN",
            "ROLLBACK",
        ]
        assert all(entry.outcome is not None for entry in record.entries)
        assert {entry.cursor.connection for entry in record.entries} == {conn}
        script = "BEGIN; SELECT 1 / 0; COMMIT"
        await fails(conn, script, psycopg.errors.DivisionByZero)
        await call(conn.rollback())
        assert record.entries[6].outcome is psycopg.errors.DivisionByZero


@pytest.mark.asyncio
async def test_discard_all_passes(record: Record, handle: Any) -> None:
    """Though rollback isolation sends something else in its place."""
    async with block(handle) as conn:
        await call(conn.set_autocommit(True))
        await execute(conn, "DISCARD ALL")
    assert [(entry.text, entry.outcome) for entry in record.entries] == [("DISCARD ALL", -1)]


@pytest.mark.parametrize("record", ["rollback"], indirect=True)
@pytest.mark.asyncio
async def test_a_script_has_the_rows_of_each_statement(record: Record, handle: Any) -> None:
    """Where its statements are sent one by one."""
    async with block(handle) as conn:
        await execute(conn, "BEGIN; SELECT generate_series(1, 3); SELECT 1; COMMIT")
    assert [entry.outcome for entry in record.entries] == [-1, 3, 1, -1]


# --- what does not ---


@pytest.mark.asyncio
async def test_what_psycopgs_methods_send_does_not_pass(record: Record, handle: Any) -> None:
    """Nobody wrote their BEGIN, COMMIT, ROLLBACK and savepoints as SQL."""
    async with block(handle) as conn:
        await execute(conn, INSERT, [1])
        await call(conn.commit())
        await execute(conn, INSERT, [2])
        await call(conn.rollback())
        async with block(conn.transaction()):
            with pytest.raises(psycopg.errors.DivisionByZero):
                async with block(conn.transaction("inner")):
                    await execute(conn, "SELECT 1 / 0")
        await execute(conn, "SAVEPOINT s")
        await call(conn.commit())
    assert record.texts == [INSERT, INSERT, "SELECT 1 / 0", "SAVEPOINT s"]


@pytest.mark.asyncio
async def test_settings_of_the_file_do_not_pass(record: Record, type_: ConnectionType) -> None:
    """The application's own function for new connections does."""
    query = "SELECT current_setting('statement_timeout')"
    seen = []

    def configure(conn: Any) -> None:
        seen.append(conn.execute(query).fetchone())

    async def aconfigure(conn: Any) -> None:
        seen.append(await (await conn.execute(query)).fetchone())

    manager = PGConnectionManager(configure, aconfigure)
    settings = {type_.settings_section: {"statement_timeout": "7000"}}
    async with block(await application_handle(type_, manager, **settings)) as conn:
        await execute(conn, SELECT)
    assert set(seen) == {("7s",)}
    # A pool may be opening another connection at this moment.
    assert set(record.texts) == {query, SELECT}


def test_the_fixtures_own_execute_passes(record: Record, kit: Kit) -> None:
    """`pgmonkey.execute` is part of the test."""
    kit.isolation.execute(INSERT, [1])
    assert [(entry.text, entry.params) for entry in record.entries] == [(INSERT, [1])]


# --- the connections of clones ---


@pytest.mark.parametrize("record", ["clone"], indirect=True)
@pytest.mark.asyncio
async def test_connections_to_clones_are_psycopgs(record: Record, type_: ConnectionType) -> None:
    """With their factories, and in pools with their options."""

    def configure(conn: Any) -> Any:
        conn.row_factory = dict_row

    handle = await application_handle(
        type_,
        PGConnectionManager(configure, configure),
        **({type_.pool_section: {"close_returns": True}} if type_.pool_section else {}),
    )
    async with block(handle) as conn:
        expected = psycopg.AsyncConnection if type_.is_async else psycopg.Connection
        assert isinstance(conn, expected)
        cursor = await execute(conn, "SELECT 1 AS n")
        assert type(cursor) is (psycopg.AsyncCursor if type_.is_async else psycopg.Cursor)
        assert await call(cursor.fetchone()) == {"n": 1}
        assert repr(conn).startswith("<pytest_pgmonkey.")
