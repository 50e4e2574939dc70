"""The async side: takes waiting mail, one at a time, and sends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from pytest_pgmonkey import AsyncHandle, PGConnectionManager

CONFIG = Path(__file__).with_name("database.yaml")
TAKE = """
    SELECT id, recipient FROM mail WHERE state = 'waiting'
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
"""

Send = Callable[[str], Awaitable[None]]

manager = PGConnectionManager()


async def empty_outbox(send: Send) -> int:
    """Send what is waiting; gives how many were tried."""
    db = await manager.get_database_connection(CONFIG, "async_pool")
    tried = 0
    while await _send_one(db, send):
        tried += 1
    return tried


async def _send_one(db: AsyncHandle, send: Send) -> bool:
    async with db as conn:
        row = await (await conn.execute(TAKE)).fetchone()
        if row is None:
            return False
        key, recipient = row
        problem = await _problem_of(send(recipient))
        await conn.execute(
            "UPDATE mail SET state = %s, problem = %s WHERE id = %s",
            ["failed" if problem else "sent", problem, key],
        )
    return True


async def _problem_of(sending: Awaitable[None]) -> str | None:
    try:
        await sending
    except OSError as error:
        return str(error)
    return None
