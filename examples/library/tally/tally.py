"""What is asked of the server stands once; the two classes only ask."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_pgmonkey import AsyncHandle, Handle

ADD = """
    INSERT INTO tally AS old (name, total) VALUES (%s, %s)
    ON CONFLICT (name) DO UPDATE SET total = old.total + excluded.total
    RETURNING total
"""
TOP = "SELECT name, total FROM tally ORDER BY total DESC, name LIMIT %s"


def _in_order(amounts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Sort the counters, so that two callers never lock each other's rows crosswise."""
    return sorted(amounts.items())


class Tally:
    def __init__(self, db: Handle) -> None:
        self._db = db

    def add(self, **amounts: int) -> dict[str, int]:
        """Count all of these or none, and give the new totals."""
        totals = {}
        with self._db.transaction() as conn:
            for name, amount in _in_order(amounts):
                (totals[name],) = conn.execute(ADD, [name, amount]).fetchone()
        return totals

    def top(self, limit: int) -> list[tuple[str, int]]:
        with self._db as conn:
            return conn.execute(TOP, [limit]).fetchall()


class AsyncTally:
    def __init__(self, db: AsyncHandle) -> None:
        self._db = db

    async def add(self, **amounts: int) -> dict[str, int]:
        """Count all of these or none, and give the new totals."""
        totals = {}
        async with self._db.transaction() as conn:
            for name, amount in _in_order(amounts):
                cursor = await conn.execute(ADD, [name, amount])
                (totals[name],) = await cursor.fetchone()
        return totals

    async def top(self, limit: int) -> list[tuple[str, int]]:
        async with self._db as conn:
            return await (await conn.execute(TOP, [limit])).fetchall()
