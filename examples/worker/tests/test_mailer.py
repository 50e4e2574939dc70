import asyncio

import pytest
from mailer import outbox
from mailer.worker import empty_outbox

pytestmark = pytest.mark.pgmonkey


class Post:
    """Stands in for a mail server."""

    def __init__(self, *unknown):
        self.delivered = []
        self.unknown = unknown

    async def __call__(self, recipient):
        if recipient in self.unknown:
            raise OSError(f"nobody is called {recipient}")
        self.delivered.append(recipient)


@pytest.mark.asyncio
async def test_the_worker_sees_what_sync_code_wrote():
    outbox.post("ann", "ben")
    post = Post()
    assert await empty_outbox(post) == 2
    assert post.delivered == ["ann", "ben"]


def test_sync_code_sees_what_the_worker_wrote():
    outbox.post("ann", "ben", "nobody")
    asyncio.run(empty_outbox(Post("nobody")))
    assert outbox.report() == {"sent": 2, "failed": 1}


def test_a_second_run_in_a_loop_of_its_own():
    outbox.post("ann")
    assert asyncio.run(empty_outbox(Post())) == 1
    assert asyncio.run(empty_outbox(Post())) == 0


@pytest.mark.asyncio
async def test_the_worker_dies_and_the_mail_waits():
    outbox.post("ann")

    async def crash(recipient):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        await empty_outbox(crash)
    assert outbox.report() == {"waiting": 1}


@pytest.mark.asyncio
async def test_the_problem_is_noted(pgmonkey):
    outbox.post("nobody")
    await empty_outbox(Post("nobody"))
    assert pgmonkey.execute("SELECT problem FROM mail").fetchone() == ("nobody is called nobody",)


@pytest.mark.asyncio
async def test_the_outbox_is_used_from_another_thread():
    await asyncio.to_thread(outbox.post, "ann")
    assert await empty_outbox(Post()) == 1
