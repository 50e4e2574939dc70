"""Data of wider scopes: tests see it, and cannot change it for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from .twins import Boom, World, rows, sync_handle

if TYPE_CHECKING:
    from .twins import Twins


def seen(conn: Any) -> list[int]:
    return [n for (n,) in conn.execute("SELECT n FROM t ORDER BY n")]


def put(conn: Any, *numbers: int) -> None:
    for number in numbers:
        conn.execute("INSERT INTO t VALUES (%s, 'x')", [number])


@pytest.mark.parametrize("committed", [True, False])
def test_tests_under_a_scope(own: Twins, committed: bool) -> None:
    """Tests that write, fail, commit and roll back find the scope's data each time."""
    handle = sync_handle(World(own, "normal", real=False))
    scope = own.sandbox.open_scope()
    put(scope.connection, 1, 2)
    if committed:
        scope.connection.commit()
    for _ in range(2):
        own.sandbox.begin()
        with handle.connection() as conn:
            assert seen(conn) == [1, 2]
            put(conn, 3)
            conn.commit()
            conn.execute("DELETE FROM t WHERE n = 1")
        with pytest.raises(Boom), handle.connection() as conn:  # noqa: PT012 - the whole block is meant
            put(conn, 4)
            raise Boom
        with pytest.raises(psycopg.Error), handle.connection() as conn:
            put(conn, 2)
        with handle.connection() as conn:
            assert seen(conn) == [2, 3]
            conn.execute("DELETE FROM t")
            conn.rollback()
            conn.execute("DELETE FROM t")
        assert own.sandbox.reset() == []
    scope.close()
    with handle.connection() as conn:
        assert seen(conn) == []
    assert own.sandbox.reset() == []
    assert rows(own) == []


def test_nested_scopes(own: Twins) -> None:
    """A class in a module: each scope's data ends with it, and with nothing else."""
    handle = sync_handle(World(own, "normal", real=False))
    sandbox = own.sandbox
    module = sandbox.open_scope()
    put(module.connection, 1)
    for number in (10, 20):
        class_ = sandbox.open_scope()
        assert seen(class_.connection) == [1]
        put(class_.connection, number)
        for _ in range(2):
            with handle.connection() as conn:
                assert seen(conn) == [1, number]
                put(conn, 99)
            assert sandbox.reset() == []
        class_.close()
    with handle.connection() as conn:
        assert seen(conn) == [1]
    assert sandbox.reset() == []
    put(module.connection, 2)
    with handle.connection() as conn:
        assert seen(conn) == [1, 2]
    assert sandbox.reset() == []
    module.close()
    with handle.connection() as conn:
        assert seen(conn) == []


def test_scope_without_data(own: Twins) -> None:
    """Scopes in which nothing was done cost nothing and change nothing."""
    handle = sync_handle(World(own, "normal", real=False))
    module, class_ = own.sandbox.open_scope(), own.sandbox.open_scope()
    for _ in range(2):
        with handle.connection() as conn:
            put(conn, 1)
        assert own.sandbox.reset() == []
        own.sandbox.begin()
        assert own.sandbox.reset() == []
    class_.close()
    put(module.connection, 5)
    with handle.connection() as conn:
        assert seen(conn) == [5]
    assert own.sandbox.reset() == []
    module.close()
    assert rows(own) == []


def test_scope_connection_in_a_test(own: Twins) -> None:
    """What a test does on the scope's own connection ends with the test."""
    handle = sync_handle(World(own, "normal", real=False))
    scope = own.sandbox.open_scope()
    put(scope.connection, 1)
    for end in ("commit", "rollback", "nothing"):
        own.sandbox.begin()
        with handle.connection() as conn:
            assert seen(conn) == [1]
        put(scope.connection, 2)
        if end != "nothing":
            getattr(scope.connection, end)()
        assert own.sandbox.reset() == []
    own.sandbox.begin()
    assert seen(scope.connection) == [1]
    assert own.sandbox.reset() == []
    scope.close()


def test_scope_settings(own: Twins) -> None:
    """Settings of the scope's connection stay its own, and outlast its tests."""
    handle = sync_handle(World(own, "normal", real=False))
    scope = own.sandbox.open_scope()
    scope.connection.execute("SET work_mem = '1MB'")
    for _ in range(2):
        with handle.connection() as conn:
            assert conn.execute("SHOW work_mem").fetchone() == ("4MB",)
            conn.execute("SET work_mem = '2MB'")
        assert own.sandbox.reset() == []
        assert scope.connection.execute("SHOW work_mem").fetchone() == ("1MB",)
    scope.close()
    with handle.connection() as conn:
        assert conn.execute("SHOW work_mem").fetchone() == ("4MB",)


def test_constraints_of_a_scope(own: Twins) -> None:
    """A deferred constraint that the scope violates shows when the next test begins."""
    scope = own.sandbox.open_scope()
    scope.connection.execute("INSERT INTO late VALUES (1, 1)")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        own.sandbox.begin()
    own.sandbox.begin()
    assert own.sandbox.reset() == []
    scope.close()
    assert rows(own) == []


def test_tables_of_a_scope(own: Twins) -> None:
    """DDL in scopes and tests, with deferrable constraints, is undone with them."""
    handle = sync_handle(World(own, "normal", real=False))
    scope = own.sandbox.open_scope()
    scope.connection.execute("CREATE TABLE u (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    for _ in range(2):
        with pytest.raises(psycopg.errors.UniqueViolation), handle.connection() as conn:
            conn.execute("INSERT INTO u VALUES (1), (1)")
        with handle.connection() as conn:
            conn.execute("DROP TABLE u")
        assert own.sandbox.reset() == []
    scope.close()
    with pytest.raises(psycopg.errors.UndefinedTable), handle.connection() as conn:
        conn.execute("TABLE u")


def test_scope_when_the_server_dies(own: Twins) -> None:
    """A scope whose session has died is lost, and closing it raises nothing."""
    handle = sync_handle(World(own, "normal", real=False))
    scope = own.sandbox.open_scope()
    put(scope.connection, 1)
    with pytest.raises(psycopg.OperationalError), handle.connection() as conn:  # noqa: PT012 - the whole block is meant
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]
        own.admins[False].execute("SELECT pg_terminate_backend(%s, 1000)", [pid])
        conn.execute("SELECT 1")
    assert "the server closed" in own.sandbox.reset()[0]
    assert scope.lost
    with handle.connection() as conn:
        assert seen(conn) == []
    assert own.sandbox.reset() == []
    scope.close()
