"""Transactions by psycopg's interface: the same outcome as on a database of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from helpers.four_types import block, call

from .twins import Boom, twin

if TYPE_CHECKING:
    from .twins import World


@twin
async def test_block_commits(w: World) -> None:
    """The clean end of a block commits."""
    async with w.borrow() as conn:
        w.status(conn)
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
    async with w.borrow() as conn:
        await w.rows(conn)


@twin
async def test_block_rolls_back(w: World) -> None:
    """An exception that leaves the block rolls back, and propagates."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        raise Boom
    async with w.borrow() as conn:
        await w.rows(conn)


@twin
async def test_swallowed_error(w: World) -> None:
    """A failed statement poisons the transaction, and the block's clean end raises."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "SELECT 1/0")
        await w.run(conn, "SELECT 1")
    async with w.borrow() as conn:
        await w.rows(conn)


@twin
async def test_commit_and_rollback(w: World) -> None:
    """Commits keep, rollbacks undo, in any order on one connection."""
    async with w.borrow() as conn:
        await w.do(conn.rollback)
        await w.do(conn.commit)
        for n in range(6):
            await w.run(conn, "INSERT INTO t VALUES (%s, 'a')", [n])
            await w.do(conn.commit if n % 2 else conn.rollback)
            w.status(conn)
        await w.run(conn, "INSERT INTO t VALUES (1, 'again')")
        await w.do(conn.commit)
        w.status(conn)
        await w.rows(conn)
        await w.run(conn, "SELECT 1/0")
        await w.do(conn.rollback)
        await w.run(conn, "INSERT INTO t VALUES (9, 'last')")


@twin
async def test_commit_after_error(w: World) -> None:
    """`commit()` after an error silently rolls back."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.do(conn.commit)
        w.status(conn)
        await w.rows(conn)


@twin
async def test_first_statement_fails(w: World) -> None:
    """A failing statement that is the first of the test changes nothing."""
    async with w.borrow() as conn:
        await w.run(conn, "SELECT 1/0")
        await w.do(conn.rollback)
        await w.run(conn, "SELECT 2")


@twin
async def test_transaction_blocks(w: World) -> None:
    """`transaction()` commits or rolls back as in production, outermost and nested."""
    async with w.borrow() as conn:
        async with block(conn.transaction()):
            await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        w.status(conn)
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
            async with w.noting(), block(conn.transaction()):
                await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
                raise Boom
            w.status(conn)
            await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "INSERT INTO t VALUES (5, 'a')")
            raise Boom
        w.status(conn)
        await w.rows(conn)


@twin
async def test_transaction_inside_open_one(w: World) -> None:
    """`transaction()` in an open transaction is a savepoint; the rest is decided later."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        async with block(conn.transaction()) as tx:
            w.note(tx.savepoint_name)
            await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        w.status(conn)
        await w.do(conn.rollback)
        await w.rows(conn)


@twin
async def test_transaction_heals_an_error(w: World) -> None:
    """A failing statement in a nested `transaction()` leaves the outer one usable."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        async with w.noting(), block(conn.transaction()):
            await call(conn.execute("INSERT INTO t VALUES (1, 'a')"))
        w.status(conn)
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")


@twin
async def test_transaction_options(w: World) -> None:
    """Names, `force_rollback` and `Rollback` of `transaction()` do what they say."""
    async with w.borrow() as conn:
        async with block(conn.transaction(force_rollback=True)) as tx:
            await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        w.note(tx.status.value)
        async with block(conn.transaction("named")) as tx:
            w.note(tx.savepoint_name)
            await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
            await w.run(conn, "ROLLBACK TO named")
            await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        async with block(conn.transaction()) as outer:
            await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
            async with block(
                conn.transaction("in"),
            ):
                await w.run(conn, "INSERT INTO t VALUES (5, 'a')")
                raise psycopg.Rollback
            async with block(conn.transaction()):
                await w.run(conn, "INSERT INTO t VALUES (6, 'a')")
                raise psycopg.Rollback(outer)
        w.note(outer.status.value)
        await w.rows(conn)
        async with block(conn.transaction()):
            await w.do(conn.commit)
            await w.do(conn.rollback)
            await w.do(conn.set_autocommit, True)
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "COMMIT")
            await w.do(conn.set_autocommit, True)  # nothing is open any more
        w.status(conn)


@twin
async def test_handle_transaction(w: World) -> None:
    """`handle.transaction()` and `handle.cursor()` are what they are in production."""
    handle = await w.handle()
    async with block(handle.transaction()) as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        async with w.noting(), block(handle.transaction()) as inner:
            w.note(inner is conn)
            await w.run(inner, "INSERT INTO t VALUES (2, 'a')")
            raise Boom
    async with block(handle.cursor()) as cursor:
        await call(cursor.execute("SELECT n FROM t"))
        await w.do(cursor.fetchall)


@twin
async def test_autocommit(w: World) -> None:
    """In autocommit each statement is its own transaction."""
    async with w.borrow() as conn:
        await w.do(conn.set_autocommit, True)
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.do(conn.rollback)
        await w.rows(conn)
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
            await w.run(conn, "SELECT 1/0")
        w.status(conn)
        await w.do(conn.set_autocommit, False)
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")
        await w.do(conn.set_autocommit, True)
        await w.do(conn.rollback)
        await w.rows(conn)


@twin
async def test_autocommit_first(w: World) -> None:
    """A failing autocommit statement at the very start leaves nothing behind."""
    async with w.borrow(connection={"autocommit": True}) as conn:
        await w.run(conn, "INSERT INTO late VALUES (1, 1)")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (1, 'a')")
        await w.rows(conn)
        await w.run(conn, "INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (2, 'a')")
        await w.run(conn, "INSERT INTO late VALUES (1, 1)")


@twin
async def test_isolation_levels(w: World) -> None:
    """A level that is set before the test's first transaction holds in it."""
    async with w.borrow() as conn:
        await w.do(conn.set_isolation_level, psycopg.IsolationLevel.SERIALIZABLE)
        await w.run(conn, "SHOW transaction_isolation")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.do(conn.set_isolation_level, psycopg.IsolationLevel.READ_COMMITTED)
        await w.do(conn.rollback)
        await w.run(conn, "SHOW transaction_isolation")
        await w.do(conn.rollback)
        await w.do(conn.set_isolation_level, None)
        await w.run(conn, "SHOW transaction_isolation")


@twin
async def test_read_only(w: World) -> None:
    """A read-only transaction refuses writes, and only it."""
    async with w.borrow() as conn:
        await w.do(conn.set_read_only, True)
        await w.run(conn, "SHOW transaction_read_only")
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        await w.do(conn.rollback)
        await w.do(conn.set_read_only, False)
        await w.run(conn, "INSERT INTO t VALUES (2, 'a')")
        await w.do(conn.commit)
        await w.do(conn.set_read_only, True)
        await w.rows(conn)
        await w.run(conn, "INSERT INTO t VALUES (3, 'a')")
        await w.do(conn.rollback)
        await w.rows(conn)
        await w.do(conn.commit)
        await w.do(conn.set_read_only, None)
        await w.do(conn.set_deferrable, True)
        await w.run(conn, "INSERT INTO t VALUES (4, 'a')")


@twin
async def test_read_only_autocommit_transaction(w: World) -> None:
    """`read_only` counts for `transaction()` in autocommit, not for lone statements."""
    async with w.borrow(connection={"autocommit": True}) as conn:
        await w.do(conn.set_read_only, True)
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")
        async with w.noting(), block(conn.transaction()):
            await call(conn.execute("INSERT INTO t VALUES (2, 'a')"))
        await w.rows(conn)


@twin
async def test_deferred_constraints(w: World) -> None:
    """A deferred constraint is checked at the commit, and its failure rolls back."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO late VALUES (1, 1)")
        await w.do(conn.commit)
        w.status(conn)
        await w.run(conn, "INSERT INTO late VALUES (2, 2)")
        await w.run(conn, "INSERT INTO t VALUES (2, 'in time')")
        await w.do(conn.commit)
        await w.run(conn, "INSERT INTO soon VALUES (3, 3)")
        await w.do(conn.rollback)
        await w.run(conn, "SET CONSTRAINTS ALL DEFERRED")
        await w.run(conn, "INSERT INTO soon VALUES (3, 3)")
        await w.do(conn.commit)
        w.status(conn)
        await w.run(conn, "INSERT INTO soon VALUES (4, 4)")
        await w.do(conn.rollback)
        await w.run(conn, "SET CONSTRAINTS late_n_fkey IMMEDIATE")
        await w.run(conn, "INSERT INTO late VALUES (5, 5)")
        await w.do(conn.rollback)
        await w.run(conn, "INSERT INTO late VALUES (6, 6)")
    async with w.borrow() as conn:
        await w.rows(conn, "late")


@twin
async def test_deferred_constraint_by_transaction(w: World) -> None:
    """`transaction()` and autocommit check deferred constraints at their own ends."""
    async with w.borrow(connection={"autocommit": True}) as conn:
        async with w.noting(), block(conn.transaction()):
            await w.run(conn, "INSERT INTO late VALUES (1, 1)")
        w.status(conn)
        await w.run(conn, "INSERT INTO late VALUES (2, 2)")
        async with w.noting(), block(conn.transaction()):
            async with block(conn.transaction()):
                await w.run(conn, "INSERT INTO late VALUES (3, 3)")
            await w.run(conn, "INSERT INTO t VALUES (3, 'x')")
        await w.run(conn, "SET CONSTRAINTS ALL DEFERRED")
        await w.run(conn, "INSERT INTO soon VALUES (7, 7)")


@twin
async def test_new_deferred_constraint(w: World) -> None:
    """A constraint made in the test is checked too."""
    async with w.borrow() as conn:
        await w.run(conn, "CREATE TABLE u (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        await w.do(conn.commit)
        await w.run(conn, "INSERT INTO u VALUES (1), (1)")
        await w.do(conn.commit)
        await w.rows(conn, "u")


@twin
async def test_several_borrowers_in_turn(w: World) -> None:
    """Data travels between connections and types with the commit, and not before."""
    async with w.borrow() as one:
        await w.run(one, "INSERT INTO t VALUES (1, 'a')")
    async with w.borrow() as one, w.borrow() as two:
        await w.rows(two)
        await w.run(one, "SELECT 1")
        await w.do(one.commit)
        await w.do(two.commit)
        await w.run(two, "INSERT INTO t VALUES (2, 'b')")
        await w.do(two.commit)
        await w.rows(one)
        await w.do(one.commit)
        await w.run(one, "DELETE FROM t WHERE n = 1")
        await w.do(one.rollback)
        await w.rows(two)


@twin
async def test_nested_block_after_select(w: World) -> None:
    """A borrower that has only read does not keep another from writing."""
    async with w.borrow() as outer:
        await w.rows(outer)
        async with w.borrow() as inner:
            await w.run(inner, "INSERT INTO t VALUES (1, 'inner')")
        await w.rows(outer)
        await w.run(outer, "INSERT INTO t VALUES (2, 'outer')")


@twin
async def test_reader_then_rollback(w: World) -> None:
    """A suspended reader that rolls back takes nothing of the other's with it."""
    async with w.borrow() as outer:
        await w.rows(outer)
        async with w.borrow() as inner:
            await w.run(inner, "INSERT INTO t VALUES (1, 'inner')")
        w.status(outer)
        await w.do(outer.rollback)
        await w.rows(outer)
        async with w.borrow() as inner:
            await w.run(inner, "INSERT INTO t VALUES (2, 'inner')")
            await w.do(inner.commit)
            await w.do(outer.commit)
            await w.run(inner, "INSERT INTO t VALUES (3, 'inner')")
        await w.rows(outer)


@twin
async def test_a_block_whose_transaction_sql_has_ended(w: World) -> None:
    """The end of a `transaction()` that was ended in SQL reaches nothing of what came before."""
    async with w.borrow() as conn:
        await w.run(conn, "INSERT INTO t VALUES (1, 'committed')")
    for end in ("ABORT", "COMMIT"):
        for force in (True, False):
            async with w.borrow() as conn:
                await w.run(conn, "SELECT 1")
                async with w.noting(), block(conn.transaction(force_rollback=force)):
                    await w.run(conn, end)
                w.status(conn)
            async with w.borrow() as conn:
                await w.rows(conn)
