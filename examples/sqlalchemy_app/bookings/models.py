"""The tables: a room is booked by the night."""

from __future__ import annotations

import datetime

from sqlalchemy import ForeignKey, Identity, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


metadata = Base.metadata


class Room(Base):
    __tablename__ = "room"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    nights: Mapped[list[Night]] = relationship(back_populates="room", order_by="Night.day")


class Night(Base):
    __tablename__ = "night"
    __table_args__ = (UniqueConstraint("room_id", "day"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    room_id: Mapped[int] = mapped_column(ForeignKey("room.id"))
    day: Mapped[datetime.date]
    guest: Mapped[str]
    room: Mapped[Room] = relationship(back_populates="nights")
