import asyncio

from bookings.database import engine
from bookings.models import metadata


def create_tables(conn):
    """Have the application's own engine create the tables, once, before the first test."""
    asyncio.run(_create_tables())


# The tables are made again when this file has changed; else they are kept from run to run.
create_tables.pgmonkey_inputs = ["bookings/models.py"]


async def _create_tables():
    async with engine.begin() as conn:
        await conn.run_sync(metadata.create_all)
    await engine.dispose()  # asyncpg's connections cannot leave the event loop that ends here
