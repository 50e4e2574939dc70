"""What holds for every connection type."""

# What raises is often the end of a block, and nothing else runs in these loops.
# ruff: noqa: PT012, ASYNC110, ASYNC240

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import ASYNC, NOWHERE, block, call, execute, pid, value
from helpers.waiting import until
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from pytest_pgmonkey import (
    ConfigError,
    ConnectionType,
    HandleClosedError,
    PGConnectionManager,
    PGMonkeyError,
)
from pytest_pgmonkey.blocks import TransactionAbortedError
from pytest_pgmonkey.config import connection_spec
from pytest_pgmonkey.handles import make_handle
from pytest_pgmonkey.testing.addresses.urls import url_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.four_types import Kind

pytestmark = pytest.mark.asyncio


# --- blocks ---


async def test_block_gives_psycopgs_own_connection(kind: Kind) -> None:
    """A block gives a connection of psycopg's own class."""
    async with block(await kind.get()) as conn:
        expected = psycopg.AsyncConnection if kind.type.is_async else psycopg.Connection
        assert type(conn) is expected


async def test_a_single_connection_is_closed_and_a_pooled_one_kept(kind: Kind) -> None:
    """After the block a connection is closed, or back in the pool."""
    handle = await kind.get(pool={"max_size": 1})
    async with block(handle) as first:
        first_pid = await pid(first)
    async with block(handle) as second:
        second_pid = await pid(second)
    assert kind.type.is_pool == (first_pid == second_pid)
    assert kind.type.is_pool == (not first.closed)


async def test_clean_exit_commits(kind: Kind, rows: Any) -> None:
    """What a block did is there for others once it has ended."""
    async with block(await kind.get()) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
        assert rows() == []
    assert rows() == [1]


async def test_exception_rolls_back_and_propagates(kind: Kind, rows: Any) -> None:
    """An exception ends the block with a rollback and comes out unchanged."""
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:
        async with block(await kind.get()) as conn:
            await execute(conn, "INSERT INTO t VALUES (1)")
            raise error
    assert caught.value is error
    assert rows() == []


async def test_swallowed_error_is_raised_at_the_exit(kind: Kind, rows: Any) -> None:
    """A block whose statement failed in silence cannot commit, and says so."""
    handle = await kind.get(pool={"max_size": 1})
    with pytest.raises(TransactionAbortedError, match="nothing was committed") as caught:
        async with block(handle) as conn:
            await execute(conn, "INSERT INTO t VALUES (1)")
            with pytest.raises(psycopg.errors.UndefinedTable):
                await execute(conn, "SELECT * FROM nowhere")
    assert isinstance(caught.value, PGMonkeyError)
    assert isinstance(caught.value, psycopg.errors.InFailedSqlTransaction)
    assert rows() == []
    async with block(handle) as conn:
        await execute(conn, "INSERT INTO t VALUES (2)")
    assert rows() == [2]


async def test_statement_that_may_fail_in_a_savepoint(kind: Kind, rows: Any) -> None:
    """What the error advises works: the savepoint is lost, the block commits."""
    async with block(await kind.get()) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with block(conn.transaction()):
                await execute(conn, "INSERT INTO t VALUES (1)")
    assert rows() == [1]


async def test_error_at_commit_comes_out(kind: Kind, admin: Any, rows: Any) -> None:
    """A deferred constraint speaks at the end of the block, and the connection is given back."""
    admin.execute("CREATE TABLE d (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    admin.execute("GRANT ALL ON d TO public")
    handle = await kind.get(pool={"max_size": 1, "timeout": 2})
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with block(handle) as conn:
            await execute(conn, "INSERT INTO d VALUES (1), (1)")
    async with block(handle) as conn:
        assert await value(conn, "SELECT count(*) FROM d") == 0


async def test_nested_blocks_are_two_connections(kind: Kind, rows: Any) -> None:
    """Blocks of one handle nest, and neither takes anything from the other."""
    handle = await kind.get()
    async with block(handle) as outer:
        await execute(outer, "INSERT INTO t VALUES (1)")
        async with block(handle) as inner:
            assert await pid(outer) != await pid(inner)
            await execute(inner, "INSERT INTO t VALUES (2)")
        assert rows() == [2]
        await execute(outer, "INSERT INTO t VALUES (3)")
    assert rows() == [1, 2, 3]


async def test_inner_failure_leaves_the_outer_block_alone(kind: Kind, rows: Any) -> None:
    """An inner block that fails takes nothing of the outer one with it."""
    handle = await kind.get()
    async with block(handle) as outer:
        await execute(outer, "INSERT INTO t VALUES (1)")
        with pytest.raises(ZeroDivisionError):
            async with block(handle) as inner:
                await execute(inner, "INSERT INTO t VALUES (2)")
                raise ZeroDivisionError
    assert rows() == [1]


async def test_connection_closed_by_its_user(kind: Kind) -> None:
    """Whoever closes the connection in a block has nothing to hear about it."""
    handle = await kind.get(pool={"max_size": 1})
    async with block(handle) as conn:
        await call(conn.close())
    async with block(handle) as conn:
        assert await value(conn, "SELECT 1") == 1


async def test_connection_of_a_block_with_a_name(kind: Kind, rows: Any) -> None:
    """`handle.connection()` commits, rolls back and gives back as a block of the handle does."""
    handle = await kind.get(pool={"max_size": 1})
    async with block(handle.connection(timeout=5)) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
    with pytest.raises(ZeroDivisionError):
        async with block(handle.connection()) as conn:
            await execute(conn, "INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
    assert rows() == [1]


async def test_connection_is_entered_once_at_a_time(kind: Kind) -> None:
    """One `connection()` is one block: to enter it twice is refused with where it was entered."""
    borrowed = (await kind.get()).connection()
    async with block(borrowed):
        with pytest.raises(PGMonkeyError, match=r"four_types\.py:\d+: call handle\.connection\(\)"):
            async with block(borrowed):
                pass


async def test_autocommit(kind: Kind, rows: Any) -> None:
    """`autocommit` of the file is that of the connection."""
    async with block(await kind.get(autocommit="yes")) as conn:
        assert conn.autocommit is True
        await execute(conn, "INSERT INTO t VALUES (1)")
        assert rows() == [1]


async def test_begin_in_autocommit_is_committed_at_the_exit(kind: Kind, rows: Any) -> None:
    """A transaction that was begun by hand ends with its block."""
    handle = await kind.get(autocommit=True, pool={"max_size": 1})
    async with block(handle) as conn:
        await execute(conn, "BEGIN")
        await execute(conn, "INSERT INTO t VALUES (1)")
    assert rows() == [1]


# --- transactions and cursors ---


async def test_transaction_is_a_real_one(kind: Kind, rows: Any) -> None:
    """A transaction outside of a block commits at its end, or rolls back."""
    handle = await kind.get()
    async with block(handle.transaction()) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
        assert rows() == []
    assert rows() == [1]
    with pytest.raises(ZeroDivisionError):
        async with block(handle.transaction()) as conn:
            await execute(conn, "INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
    assert rows() == [1]


async def test_transaction_in_autocommit(kind: Kind, rows: Any) -> None:
    """A transaction is one in autocommit too."""
    handle = await kind.get(autocommit=True)
    async with block(handle) as conn:
        async with block(handle.transaction()):
            await execute(conn, "INSERT INTO t VALUES (1)")
            assert rows() == []
        assert rows() == [1]


async def test_nested_transactions_are_savepoints(kind: Kind, rows: Any) -> None:
    """An inner transaction is a savepoint on the connection of the outer one."""
    handle = await kind.get()
    async with block(handle.transaction()) as outer:
        await execute(outer, "INSERT INTO t VALUES (1)")
        with pytest.raises(ZeroDivisionError):
            async with block(handle.transaction()) as inner:
                assert inner is outer
                await execute(inner, "INSERT INTO t VALUES (2)")
                raise ZeroDivisionError
        async with block(handle.transaction()):
            await execute(outer, "INSERT INTO t VALUES (3)")
        assert rows() == []
    assert rows() == [1, 3]


async def test_transaction_in_a_block_is_the_blocks(kind: Kind, rows: Any) -> None:
    """Inside of a block a transaction is on the connection of the block."""
    handle = await kind.get()
    async with block(handle) as conn, block(handle.transaction()) as same:
        assert same is conn
    async with block(handle.connection()) as conn, block(handle.transaction()) as same:
        assert same is conn


async def test_forced_and_asked_rollback(kind: Kind, rows: Any) -> None:
    """`force_rollback` and `psycopg.Rollback` end a transaction without an error."""
    handle = await kind.get()
    async with block(handle.transaction(force_rollback=True)) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
    async with block(handle.transaction()) as conn:
        await execute(conn, "INSERT INTO t VALUES (2)")
        raise psycopg.Rollback
    assert rows() == []


async def test_cursor_alone_is_a_block(kind: Kind, rows: Any) -> None:
    """A cursor outside of a block commits at its end."""
    handle = await kind.get()
    async with block(handle.cursor(row_factory=dict_row)) as cursor:
        await call(cursor.execute("INSERT INTO t VALUES (1) RETURNING n"))
        assert await call(cursor.fetchone()) == {"n": 1}
    assert rows() == [1]


async def test_cursor_in_a_block_is_the_blocks(kind: Kind) -> None:
    """A cursor inside of a block is on its connection, also where blocks are nested."""
    handle = await kind.get()
    async with block(handle) as outer:
        async with block(handle) as inner, block(handle.cursor()) as cursor:
            assert cursor.connection is inner
        async with block(handle.cursor("named")) as cursor:
            assert cursor.connection is outer


async def test_cursor_of_another_handle(kind: Kind) -> None:
    """A block of one handle is none of another's business."""
    one, other = await kind.get(), await kind.get(application_name="other")
    async with block(one) as conn, block(other.cursor()) as cursor:
        assert cursor.connection is not conn


# --- settings and hooks ---


async def test_settings_outlive_a_rollback(kind: Kind) -> None:
    """Session settings are applied outside of any transaction."""
    handle = await kind.get(settings={"work_mem": "12MB", "jit": False}, pool={"max_size": 1})
    for _ in range(2):
        async with block(handle) as conn:
            await call(conn.rollback())
            assert await value(conn, "SHOW work_mem") == "12MB"
            await call(conn.rollback())
            assert await value(conn, "SHOW jit") == "off"
            await call(conn.rollback())


async def test_settings_with_a_row_factory_in_the_pools_arguments(kind: Kind) -> None:
    """What a pool is told about its connections does not get in the way of the settings."""
    pool = {"kwargs": {"row_factory": dict_row, "cursor_factory": None}}
    handle = await kind.get(settings={"work_mem": "12MB"}, pool=pool)
    async with block(handle) as conn:
        row = await call((await execute(conn, "SHOW work_mem")).fetchone())
    assert "12MB" in (row.values() if kind.type.is_pool else row)


async def test_search_path_list_stays_a_list(kind: Kind, admin: Any) -> None:
    """A list in the file is a list of schemas, not the name of one."""
    admin.execute('CREATE SCHEMA "a b"')
    admin.execute('GRANT ALL ON SCHEMA "a b" TO public')
    handle = await kind.get(settings={"search_path": ["a b", "public"]})
    async with block(handle) as conn:
        assert await value(conn, "SELECT current_schemas(false)") == ["a b", "public"]


@pytest.mark.parametrize(
    ("name", "setting"), [("no_such_setting", "x"), ("work_mem", "plenty"), ("ssl", "on")]
)
async def test_bad_setting_is_named(kind: Kind, name: str, setting: str) -> None:
    """A setting that the server refuses is an error that names its key, with the reason."""
    with pytest.raises(ConfigError, match=name) as caught:
        await kind.get(settings={"jit": "off", name: setting})
    assert f"{kind.type.settings_section}.{name}" == caught.value.key
    assert kind.manager.cache_info["size"] == 0


async def test_setting_that_another_overwrites(kind: Kind) -> None:
    """A setting that does not stay is an error, not a surprise."""
    with pytest.raises(ConfigError, match="overwrites") as caught:
        await kind.get(settings={"work_mem": "12MB", "WORK_MEM": "13MB"})
    assert f"{kind.type.settings_section}.work_mem" == caught.value.key


async def test_bad_setting_names_the_file(kind: Kind, make_config: Any) -> None:
    """An error in a file's setting names the file."""
    sections = {kind.type.settings_section: {"no_such_setting": 1}}
    path = make_config(kind.type, **sections)
    with pytest.raises(ConfigError, match="unrecognized configuration parameter") as caught:
        await call(kind.manager.get_database_connection(path))
    assert str(path) == caught.value.file


def _hooked(function: Any, kind: Kind) -> PGConnectionManager:
    async def aconfigure(conn: Any) -> None:
        await call(function(conn))

    return PGConnectionManager(configure=function, aconfigure=aconfigure)


async def test_hook_sees_every_new_connection(kind: Kind) -> None:
    """The manager's function is called with each connection, settings and autocommit in place."""
    seen = []

    def hook(conn: Any) -> Any:
        seen.append((conn.autocommit, conn.info.parameter_status("application_name")))
        conn.row_factory = dict_row
        return conn.execute("CREATE TEMPORARY TABLE mine (n int)")

    async with _hooked(hook, kind) as manager:
        handle = await kind.get(manager, settings={"application_name": "hooked"})
        async with block(handle) as one, block(handle) as two:
            for conn in (one, two):
                row = await call((await execute(conn, "SELECT count(*) FROM mine")).fetchone())
                assert row == {"count": 0}
    assert {(False, "hooked")} == set(seen)


async def test_hook_that_fails_in_silence(kind: Kind) -> None:
    """A function that leaves a connection in a failed transaction is an error that names it."""

    def sync_hook(conn: Any) -> None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            conn.execute("SELECT * FROM nowhere")

    async def hook(conn: Any) -> None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            await conn.execute("SELECT * FROM nowhere")

    async with PGConnectionManager(configure=sync_hook, aconfigure=hook) as manager:
        with pytest.raises(psycopg.ProgrammingError, match=r"hook.* left .* INERROR"):
            await kind.get(manager)


# --- facts, names, life ---


async def test_facts(kind: Kind, pg_server: Any, database: str) -> None:
    """`test_connection()` tells what the server says of itself."""
    facts = await call((await kind.get()).test_connection())
    assert pg_server.version == facts.server_version
    assert (database, "pgmonkey", None) == (facts.database, facts.user, facts.tls)
    assert facts.backend_pid > 0
    assert 0 < facts.elapsed < 10


async def test_handle_tells_what_it_is(kind: Kind, database: str) -> None:
    """A handle knows its type, its pool and its configuration."""
    handle = await kind.get(connect_timeout=7)
    assert kind.type is handle.connection_type
    assert kind.type.is_pool == (handle.pool is not None)
    assert handle.config["connection_settings"]["connect_timeout"] == 7
    assert f"dbname={database!r}" in repr(handle)


async def test_no_secret_is_shown(kind: Kind) -> None:
    """Neither handle nor configuration prints a secret, at any depth."""
    handle = await kind.get(password="hunter2")
    shown = [repr(handle), repr(handle.config), repr(handle.config["connection_settings"])]
    assert "hunter2" not in "".join([*shown, str(handle.spec)])
    assert handle.config["connection_settings"]["password"] == "hunter2"


@pytest.mark.parametrize("name", ["dbname", "host", "user"])
@pytest.mark.parametrize(
    "dsn", ["postgresql://me:hunter2@db.example/app", "host=db.example password=hunter2"]
)
async def test_a_connection_string_in_place_of_a_name(kind: Kind, name: str, dsn: str) -> None:
    """Where somebody writes a DSN as a name, no text shows its password, and one tells the key."""
    shown = repr(make_handle(connection_spec(kind.sections(**{name: dsn}), kind.type)))
    assert "hunter2" not in shown
    with pytest.raises(ConfigError, match="holds a whole connection string") as caught:
        await kind.get(**{name: dsn})
    assert caught.value.key == f"connection_settings.{name}"
    assert "as the key dsn" in str(caught.value)
    assert "hunter2" not in f"{caught.value} {caught.value!r}"


async def test_without_a_file(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DSN gives the same handle as its parts do, and a new one on request."""
    parts = kind.config["connection_settings"]
    get = kind.manager.get_database_connection_from_dsn
    handle = await call(get(make_conninfo(**parts), str(kind.type)))
    assert handle is await call(get(url_of({**parts, "port": str(parts["port"])}), kind.type))
    async with block(handle) as conn:
        assert await value(conn, "SELECT current_database()") == parts["dbname"]
    again = await call(get(make_conninfo(**parts), kind.type, force_reload=True))
    assert handle is not again


async def test_a_dsn_shows_no_secret(kind: Kind) -> None:
    """Neither a handle made from a DSN nor an error tells its password."""
    with pytest.raises(psycopg.OperationalError) as caught:
        await call(
            kind.manager.get_database_connection_from_dsn(
                f"host={NOWHERE} password=hunter2", kind.type
            )
        )
    assert "hunter2" not in repr(caught.value)
    sections = {"connection_settings": {"dsn": "postgresql://me:hunter2@h/d"}}
    handle = make_handle(connection_spec(sections, kind.type))
    assert "hunter2" not in f"{handle!r} {handle.config!r} {handle.config['connection_settings']!r}"


@pytest.mark.parametrize("dsn", ["", " ", None])
async def test_no_dsn(manager: PGConnectionManager, dsn: Any) -> None:
    """A variable that is not set does not lead to whatever database there is."""
    with pytest.raises(ConfigError, match="is its variable set"):
        manager.get_database_connection_from_dsn(dsn)


@pytest.mark.parametrize("kind", ASYNC, indirect=True)
@pytest.mark.parametrize("way", ["file", "dictionary", "dsn"])
async def test_entered_without_an_await(
    kind: Kind, way: str, make_config: Any, rows: Any, sessions: Any
) -> None:
    """`async with` takes what the manager gives, which can be awaited as often as one likes."""
    manager, name = kind.manager, str(kind.type)
    parts = kind.config["connection_settings"]
    asked: Any = {
        "file": lambda: manager.get_database_connection(make_config(name)),
        "dictionary": lambda: manager.get_database_connection_from_dict(kind.config, name),
        "dsn": lambda: manager.get_database_connection_from_dsn(make_conninfo(**parts), name),
    }[way]()
    async with asked as conn:
        handle = await asked
        async with asked as other, handle.cursor() as cursor:
            assert other is not conn
            assert cursor.connection is other
            await conn.execute("INSERT INTO t VALUES (1)")
    assert rows() == [1]
    with pytest.raises(ZeroDivisionError):
        async with asked as conn:
            await conn.execute("INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
    assert rows() == [1]
    assert handle is await asked

    async def add(n: int) -> None:
        async with asked as conn, AsyncExitStack() as stack:
            await (await stack.enter_async_context(asked)).execute("SELECT 1")
            await conn.execute("INSERT INTO t VALUES (%s)", [n])

    await asyncio.gather(*map(add, range(10, 12)))
    assert rows() == [1, 10, 11]


@pytest.mark.parametrize("kind", ASYNC, indirect=True)
async def test_reloads_once(kind: Kind) -> None:
    """What is asked for with a reload opens anew once, however often it is awaited."""
    old = await kind.get()
    asked = kind.manager.get_database_connection_from_dict(
        kind.sections(), kind.type, force_reload=True
    )
    async with asked:
        new = await asked
        assert new is not old
        await kind.get(force_reload=True)
        async with asked as conn:  # the second block is another handle's
            assert await value(conn, "SELECT 1") == 1
    assert new is not await asked


async def test_one_handle_for_one_configuration(kind: Kind, make_config: Any) -> None:
    """The same settings give the same handle, others another; sections of other types are equal."""
    one = await kind.get()
    assert one is await kind.get()
    assert one is not await kind.get(application_name="other")
    info = kind.manager.cache_info
    assert info["size"] == 2
    assert list(info["connection_types"].values()) == [str(kind.type)] * 2


async def test_type_of_the_file(kind: Kind, make_config: Any) -> None:
    """Without a type it is the file's."""
    path: Path = make_config(kind.type)
    handle = await call(kind.manager.get_database_connection(str(path)))
    assert kind.type is handle.connection_type
    assert handle is await call(kind.manager.get_database_connection(path, str(kind.type)))


async def test_normal_without_any_type(
    make_config: Callable[..., Path], manager: PGConnectionManager
) -> None:
    """Where nothing names a type it is `normal`."""
    handle = manager.get_database_connection(make_config())
    assert ConnectionType.NORMAL is handle.connection_type  # type: ignore[union-attr]


async def test_disconnect(kind: Kind, sessions: Any) -> None:
    """A disconnected handle is closed for good, and the next one is alive."""
    handle = await kind.get()
    pool = handle.pool
    await call(handle.disconnect())
    await call(handle.disconnect())
    assert pool is None or pool.closed
    until(lambda: sessions() == [])
    assert kind.manager.cache_info["size"] == 0
    with pytest.raises(HandleClosedError, match="disconnected"):
        async with block(handle):
            pass
    another = await kind.get()
    assert another is not handle
    async with block(another) as conn:
        assert await value(conn, "SELECT 1") == 1


async def test_disconnect_lets_a_block_finish(kind: Kind, rows: Any) -> None:
    """A block that is open when its handle is disconnected ends as it would have."""
    handle = await kind.get()
    async with block(handle) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
        await call(handle.disconnect())
        await execute(conn, "INSERT INTO t VALUES (2)")
    assert rows() == [1, 2]
    assert conn.closed


async def test_reload(kind: Kind, rows: Any, sessions: Any) -> None:
    """A reload gives a new handle; the old one's blocks finish and its next ones lead to it."""
    old = await kind.get()
    async with block(old) as conn:
        await execute(conn, "INSERT INTO t VALUES (1)")
        new = await kind.get(force_reload=True)
        await execute(conn, "INSERT INTO t VALUES (2)")
    assert new is not old
    assert rows() == [1, 2]
    assert conn.closed
    async with block(old) as conn:
        await execute(conn, "INSERT INTO t VALUES (3)")
    assert old.pool is new.pool
    assert kind.manager.cache_info["size"] == 1
    await call(new.disconnect())
    until(lambda: sessions() == [])


async def test_reload_follows_its_file(kind: Kind, make_config: Any, sessions: Any) -> None:
    """A reload of a file that has changed takes the place of what it said before."""
    path: Path = make_config(kind.type)
    old = await call(kind.manager.get_database_connection(path))
    text = path.read_text().replace(
        "connection_settings:", "connection_settings:\n  options: -cjit=0"
    )
    path.write_text(text)
    new = await call(kind.manager.get_database_connection(path, force_reload=True))
    assert kind.manager.cache_info["size"] == 1
    async with block(old) as conn:
        assert await value(conn, "SHOW jit") == "off"
    assert new.spec != old.spec


async def test_reload_that_fails_changes_nothing(kind: Kind, make_config: Any) -> None:
    """Where the new one cannot connect, the old one stays in its place."""
    path: Path = make_config(kind.type)
    old = await call(kind.manager.get_database_connection(path))
    good = path.read_text()
    path.write_text(good.replace("dbname: ", "dbname: no_"))
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await call(kind.manager.get_database_connection(path, force_reload=True))
    async with block(old) as conn:
        assert await value(conn, "SELECT 1") == 1
    path.write_text(good)
    assert old is await call(kind.manager.get_database_connection(path))


async def test_dead_server(kind: Kind) -> None:
    """Where no server answers, psycopg's own error is raised at once and nothing is kept."""
    with pytest.raises(psycopg.OperationalError, match="No such file") as caught:
        await kind.get(host=NOWHERE)
    assert type(caught.value) is psycopg.OperationalError
    assert kind.manager.cache_info["size"] == 0


async def test_clear_cache(kind: Kind, sessions: Any) -> None:
    """Clearing the cache ends its handles; the manager goes on."""
    handle = await kind.get()
    async with block(handle):
        pass
    await kind.manager.clear_cache_async()
    until(lambda: sessions() == [])
    assert kind.manager.cache_info == {"size": 0, "connection_types": {}}
    with pytest.raises(HandleClosedError):
        async with block(handle):
            pass
    async with block(await kind.get()) as conn:
        assert await value(conn, "SELECT 1") == 1


async def test_clear_cache_from_sync_code(kind: Kind, sessions: Any) -> None:
    """`clear_cache()` has async handles closed by their loop, as soon as it gets to it."""
    handle = await kind.get()
    async with block(handle):
        pass
    kind.manager.clear_cache()
    with pytest.raises(HandleClosedError):
        async with block(handle):
            pass

    async def wait_for_the_end() -> None:
        while sessions():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait_for_the_end(), 10)


async def test_manager_after_its_end(kind: Kind) -> None:
    """A manager that was closed can be used again."""
    async with kind.manager:
        first = await kind.get()
    second = await kind.get()
    assert first is not second
    async with block(second) as conn:
        assert await value(conn, "SELECT 1") == 1


async def test_reading_code_that_never_awaits(kind: Kind, tmp_path: Path) -> None:
    """A file that is wrong is an error at the call, for every type."""
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        kind.manager.get_database_connection(tmp_path / "missing.yaml", kind.type)
