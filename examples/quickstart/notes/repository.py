"""Where notes are written and read, for sync and for async code."""

from __future__ import annotations

from pathlib import Path

from psycopg.rows import scalar_row

from pytest_pgmonkey import AsyncHandle, Handle, PGConnectionManager

CONFIG = Path(__file__).with_name("database.yaml")
INSERT = "INSERT INTO note (body) VALUES (%s) RETURNING id"
SELECT = "SELECT body FROM note ORDER BY id"

manager = PGConnectionManager()


class Notes:
    def __init__(self, db: Handle | None = None) -> None:
        self._db = db or manager.get_database_connection(CONFIG, "pool")

    def add(self, body: str) -> int:
        with self._db as conn:
            return conn.cursor(row_factory=scalar_row).execute(INSERT, [body]).fetchone()

    def all(self) -> list[str]:
        with self._db as conn:
            return conn.cursor(row_factory=scalar_row).execute(SELECT).fetchall()


class AsyncNotes:
    def __init__(self, db: AsyncHandle) -> None:
        self._db = db

    @classmethod
    async def open(cls) -> AsyncNotes:
        return cls(await manager.get_database_connection(CONFIG, "async_pool"))

    async def add(self, body: str) -> int:
        async with self._db as conn:
            cursor = await conn.cursor(row_factory=scalar_row).execute(INSERT, [body])
            return await cursor.fetchone()

    async def all(self) -> list[str]:
        async with self._db as conn:
            cursor = await conn.cursor(row_factory=scalar_row).execute(SELECT)
            return await cursor.fetchall()


notes = Notes()
