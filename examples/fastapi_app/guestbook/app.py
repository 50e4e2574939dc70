"""The guestbook's routes. Its pool lives as long as the application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from psycopg.rows import dict_row
from pydantic import BaseModel

from pytest_pgmonkey import AsyncHandle, PGConnectionManager

CONFIG = Path(__file__).with_name("database.yaml")
manager = PGConnectionManager()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.db = await manager.get_database_connection(CONFIG, "async_pool")
    yield
    await manager.aclose()


app = FastAPI(lifespan=lifespan)


def database(request: Request) -> AsyncHandle:
    return request.app.state.db


Database = Annotated[AsyncHandle, Depends(database)]


class Entry(BaseModel):
    author: str
    message: str


@app.get("/entries")
async def entries(db: Database) -> list[Entry]:
    async with db as conn:
        cursor = conn.cursor(row_factory=dict_row)
        await cursor.execute("SELECT author, message FROM entry ORDER BY id")
        return await cursor.fetchall()


@app.post("/entries", status_code=201)
async def sign(entry: Entry, db: Database) -> int:
    async with db as conn:
        return await _insert(conn, entry)


@app.post("/entries/all", status_code=201)
async def sign_all(entries: list[Entry], db: Database) -> int:
    """Take all entries or none."""
    async with db as conn:
        for entry in entries:
            await _insert(conn, entry)
            if not entry.message.strip():
                raise HTTPException(422, f"{entry.author} wrote nothing")
    return len(entries)


@app.get("/figures")
async def figures(db: Database) -> dict[str, int]:
    authors, messages = await asyncio.gather(
        _number(db, "SELECT count(DISTINCT author) FROM entry"),
        _number(db, "SELECT count(*) FROM entry"),
    )
    return {"authors": authors, "messages": messages}


async def _insert(conn, entry: Entry) -> int:
    cursor = await conn.execute(
        "INSERT INTO entry (author, message) VALUES (%s, %s) RETURNING id",
        [entry.author, entry.message],
    )
    return (await cursor.fetchone())[0]


async def _number(db: AsyncHandle, query: str) -> int:
    async with db as conn:
        return (await (await conn.execute(query)).fetchone())[0]
