"""Each test runs once for every connection type of its kind."""

import asyncio
import threading

import psycopg
import pytest
from tally import AsyncTally, Tally


def test_totals_add_up(pgmonkey_connection):
    tally = Tally(pgmonkey_connection)
    tally.add(apples=2, pears=1)
    assert tally.add(apples=3) == {"apples": 5}
    assert tally.top(1) == [("apples", 5)]


def test_all_or_none(pgmonkey_connection):
    tally = Tally(pgmonkey_connection)
    with pytest.raises(psycopg.errors.CheckViolation):
        tally.add(apples=2, pears=-1)
    assert tally.top(10) == []


def test_inside_a_transaction_of_the_caller(pgmonkey_connection):
    tally = Tally(pgmonkey_connection)
    with pgmonkey_connection.transaction(force_rollback=True):
        tally.add(apples=2)
    assert tally.top(10) == []


def test_many_threads(pgmonkey_connection):
    tally = Tally(pgmonkey_connection)
    threads = [threading.Thread(target=tally.add, kwargs={"apples": 1}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.top(1) == [("apples", 8)]


@pytest.mark.asyncio
async def test_totals_add_up_async(pgmonkey_connection):
    tally = AsyncTally(pgmonkey_connection)
    await tally.add(apples=2, pears=1)
    assert await tally.add(apples=3) == {"apples": 5}
    assert await tally.top(1) == [("apples", 5)]


@pytest.mark.asyncio
async def test_all_or_none_async(pgmonkey_connection):
    tally = AsyncTally(pgmonkey_connection)
    with pytest.raises(psycopg.errors.CheckViolation):
        await tally.add(apples=2, pears=-1)
    assert await tally.top(10) == []


@pytest.mark.asyncio
async def test_many_tasks(pgmonkey_connection):
    tally = AsyncTally(pgmonkey_connection)
    await asyncio.gather(*[tally.add(apples=1) for _ in range(20)])
    assert await tally.top(1) == [("apples", 20)]
