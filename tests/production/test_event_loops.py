"""Event loops: each has connections of its own, which end with it."""

# What is waited for is the server's.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from helpers.four_types import ASYNC, Kind, pid, value
from helpers.waiting import until

from pytest_pgmonkey import AsyncHandle, HandleClosedError, PGConnectionManager, PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def loose_manager() -> Iterator[PGConnectionManager]:
    """A manager that belongs to no loop."""
    with PGConnectionManager() as manager:
        yield manager


@pytest.fixture(params=ASYNC)
def kind(request: pytest.FixtureRequest, config: Any, loose_manager: PGConnectionManager) -> Kind:
    return Kind(request.param, config, loose_manager)


async def use(handle: AsyncHandle) -> int:
    async with handle as conn:
        return await pid(conn)


def test_two_loops_one_after_the_other(kind: Kind, sessions: Any) -> None:
    """A second `asyncio.run()` gets a handle and a pool of its own; the first's are closed."""

    async def main() -> tuple[AsyncHandle, Any]:
        handle = await kind.get()
        assert handle is await kind.get()
        await use(handle)
        await use(handle)
        return handle, handle.pool

    first, first_pool = asyncio.run(main())
    until(lambda: sessions() == [])
    second, second_pool = asyncio.run(main())
    assert first is not second
    if kind.type.is_pool:
        assert first_pool is not second_pool
        assert first_pool.closed
        assert second_pool.closed
    until(lambda: sessions() == [])
    assert kind.manager.cache_info["size"] == 0


def test_handle_kept_for_the_next_loop(kind: Kind, sessions: Any) -> None:
    """A handle that outlives its loop works in the next one, and after any number of them."""
    handle = asyncio.run(kind.get())
    for _ in range(3):
        asyncio.run(use(handle))
        until(lambda: sessions() == [])
    assert len(handle._sources) <= 1


def test_two_loops_at_the_same_time(kind: Kind) -> None:
    """Loops of two threads share a handle, and no connection."""
    handle = asyncio.run(kind.get())

    async def main(_: int) -> list[int]:
        return list(await asyncio.gather(*[use(handle) for _ in range(10)]))

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda n: asyncio.run(main(n)), range(2)))
    assert not set(results[0]) & set(results[1])


def test_disconnected_in_another_loop(kind: Kind, sessions: Any) -> None:
    """Disconnecting in one loop has the pools of others closed by these."""

    async def main() -> None:
        handle = await kind.get()
        await use(handle)
        with ThreadPoolExecutor(1) as other:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(other, lambda: asyncio.run(handle.disconnect()))
        with pytest.raises(HandleClosedError):
            await use(handle)
        while handle._sources or sessions():
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_cache_cleared_by_another_thread(kind: Kind, sessions: Any) -> None:
    """`clear_cache()` in a thread closes the pool in the loop that runs in another."""

    async def main() -> None:
        await use(await kind.get())
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, kind.manager.clear_cache)
        while sessions():
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_cache_cleared_after_the_loop(kind: Kind) -> None:
    """`clear_cache()` has nothing to do, and says nothing, where the loop is gone."""
    asyncio.run(kind.get())
    kind.manager.clear_cache()
    assert kind.manager.cache_info["size"] == 0


def test_all_tasks_cancelled(kind: Kind) -> None:
    """A program that cancels every task of its loop can go on with its handles."""

    async def main() -> int:
        handle = await kind.get()
        await use(handle)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)
        async with handle as conn:
            return int(await value(conn, "SELECT 1"))

    assert asyncio.run(main()) == 1


def test_loop_closed_without_ending_its_tasks(
    kind: Kind, capfd: pytest.CaptureFixture[str], sessions: Any
) -> None:
    """A loop that is closed the old way leaves nothing on stderr, and no warning."""
    loop = asyncio.new_event_loop()
    handle = loop.run_until_complete(kind.get())
    loop.run_until_complete(use(handle))
    loop.close()
    kind.manager.clear_cache()
    until(lambda: sessions() == [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del handle, loop
        gc.collect()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("way", ["kept", "asked for again"])
def test_next_loop_ends_what_a_closed_one_left(kind: Kind, way: str, sessions: Any) -> None:
    """Connections of a loop that was closed the old way are closed when the next one comes."""
    loop = asyncio.new_event_loop()
    handle = loop.run_until_complete(kind.get())
    loop.run_until_complete(use(handle))
    before = set(sessions())
    loop.close()

    async def main() -> None:
        await use(handle if way == "kept" else await kind.get())
        while set(sessions()) & before:
            await asyncio.sleep(0.005)

    if way != "kept":
        del handle
    asyncio.run(asyncio.wait_for(main(), 10))


def test_loops_are_not_kept_alive(kind: Kind) -> None:
    """What a loop leaves behind does not keep it."""
    import weakref

    handle = asyncio.run(kind.get())
    seen: list[Any] = []

    async def main() -> None:
        await use(handle)
        seen.append(weakref.ref(asyncio.get_running_loop()))

    for _ in range(3):
        asyncio.run(main())
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


def test_pool_outside_of_a_loop(kind: Kind) -> None:
    """Outside of a loop the pool is that of the only loop; several are not told apart."""

    async def pool_in_loop(handle: Any) -> Any:
        async with handle:
            return handle.pool

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    handle = first.run_until_complete(kind.get())
    pool = first.run_until_complete(pool_in_loop(handle))
    assert handle.pool is pool
    assert (pool is not None) == kind.type.is_pool
    if kind.type.is_pool:
        assert second.run_until_complete(pool_in_loop(handle)) is not pool
        with pytest.raises(PGMonkeyError, match="has 2 pools, one for each event loop"):
            _ = handle.pool
    for loop in (first, second):
        loop.run_until_complete(kind.manager.clear_cache_async())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_a_coroutine_to_asyncio(kind: Kind) -> None:
    """What is to be awaited can be run, and made a task, as a coroutine can."""

    def ask(force_reload: bool = False) -> Any:
        return kind.manager.get_database_connection_from_dict(
            kind.sections(), kind.type, force_reload=force_reload
        )

    async def main() -> None:
        one, other = await asyncio.gather(asyncio.create_task(ask()), ask())
        assert one is other
        cancelled = asyncio.create_task(ask())
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        closed = ask(force_reload=True)
        closed.send(None)
        closed.close()
        closed.close()
        assert one is await ask()

    asyncio.run(main())
    assert asyncio.run(ask()).connection_type is kind.type


def test_never_awaited(kind: Kind, sessions: Any) -> None:
    """A handle that is asked for and never awaited connects nowhere and is not cached."""
    asked = kind.manager.get_database_connection_from_dict(kind.sections(), kind.type)
    del asked
    gc.collect()
    assert sessions() == []
    assert kind.manager.cache_info["size"] == 0
