"""The engine, made once when this module is imported, and its sessions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(os.environ["DATABASE_URL"])
new_session = async_sessionmaker(engine)


async def session() -> AsyncIterator[AsyncSession]:
    """A request's own session; what the request does not commit is rolled back."""
    async with new_session() as session:
        yield session
