"""The routes."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from .database import engine, session
from .models import Night, Room


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
Session = Annotated[AsyncSession, Depends(session)]


class NewRoom(BaseModel):
    name: str


class Booking(BaseModel):
    guest: str
    days: list[datetime.date]


@app.get("/rooms")
async def rooms(db: Session) -> list[str]:
    return list(await db.scalars(select(Room.name).order_by(Room.name)))


@app.post("/rooms", status_code=201)
async def add_room(room: NewRoom, db: Session) -> None:
    db.add(Room(name=room.name))
    await _commit(db, f"there is a room {room.name} already")


@app.get("/rooms/{name}/nights")
async def nights(name: str, db: Session) -> dict[datetime.date, str]:
    room = await _room(name, db)
    return {night.day: night.guest for night in room.nights}


@app.post("/rooms/{name}/nights", status_code=201)
async def book(name: str, booking: Booking, db: Session) -> None:
    """Book all nights or none."""
    room = await _room(name, db)
    room.nights += [Night(day=day, guest=booking.guest) for day in booking.days]
    await _commit(db, f"{name} is taken")


async def _room(name: str, db: AsyncSession) -> Room:
    query = select(Room).where(Room.name == name).options(selectinload(Room.nights))
    room = await db.scalar(query)
    if room is None:
        raise HTTPException(404, f"there is no room {name}")
    return room


async def _commit(db: AsyncSession, problem: str) -> None:
    try:
        await db.commit()
    except IntegrityError:
        raise HTTPException(409, problem) from None
