import httpx
import pytest_asyncio
from guestbook.app import app


@pytest_asyncio.fixture
async def client(pgmonkey):
    """An HTTP client of the running application, in the test's transaction."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://guestbook.example"
        ) as client,
    ):
        yield client
