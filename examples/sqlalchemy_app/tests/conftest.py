import httpx
import pytest_asyncio
from bookings.app import app


@pytest_asyncio.fixture(scope="session")
async def client():
    """An HTTP client of the application, which starts once and serves all tests."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://bookings.example"
        ) as client,
    ):
        yield client
