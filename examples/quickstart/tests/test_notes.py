import asyncio

import psycopg
import pytest
from notes.repository import AsyncNotes, Notes, notes


@pytest.mark.pgmonkey
def test_the_applications_own_pool():
    notes.add("buy milk")
    notes.add("call home")
    assert notes.all() == ["buy milk", "call home"]


@pytest.mark.pgmonkey
def test_nothing_is_left_of_another_test():
    assert notes.all() == []


@pytest.mark.pgmonkey
def test_a_refused_note_leaves_the_others():
    notes.add("buy milk")
    with pytest.raises(psycopg.errors.CheckViolation):
        notes.add("")
    assert notes.all() == ["buy milk"]


@pytest.mark.asyncio
@pytest.mark.pgmonkey
async def test_the_applications_own_async_pool():
    notes = await AsyncNotes.open()
    await asyncio.gather(notes.add("buy milk"), notes.add("call home"))
    assert sorted(await notes.all()) == ["buy milk", "call home"]


def test_every_sync_type(pgmonkey_connection):
    """Runs twice: `normal` and `pool`."""
    notes = Notes(pgmonkey_connection)
    notes.add("buy milk")
    assert notes.all() == ["buy milk"]


@pytest.mark.asyncio
async def test_every_async_type(pgmonkey_connection):
    """Runs twice: `async` and `async_pool`."""
    notes = AsyncNotes(pgmonkey_connection)
    await notes.add("buy milk")
    assert await notes.all() == ["buy milk"]


def test_what_is_in_the_table(pgmonkey):
    notes.add("buy milk")
    body, age = pgmonkey.execute("SELECT body, now() - created_at FROM note").fetchone()
    assert body == "buy milk"
    assert age.total_seconds() == 0, "now() stands still while a test runs"
