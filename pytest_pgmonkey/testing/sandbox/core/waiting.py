"""A queue in which threads and tasks of any loop wait alike, first come, first served."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class Waiter:
    """One who waits; `wake` is called once, from any thread."""

    __slots__ = ("granted", "token", "wake")

    def __init__(self, token: object, wake: Callable[[], None]) -> None:
        self.token: Final = token
        self.wake: Final = wake
        self.granted = False


class Queue:
    """Grants something in order; a subclass says in `_take` whether it is to be had."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may run a destructor inside any of our own lines.
        self._mutex = threading.RLock()
        self._waiters: deque[Waiter] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiters)

    def _take(self, token: object) -> bool:
        raise NotImplementedError

    def take(self, token: object) -> bool:
        """Take it at once if it is to be had."""
        with self._mutex:
            return self._take(token)

    def cancel_waiting(self) -> list[Any]:
        """Wake all who wait, for nothing, and give their tokens."""
        if not self._waiters:
            return []
        with self._mutex:
            waiters = list(self._waiters)
            self._waiters.clear()
            for waiter in waiters:
                waiter.wake()
        return [waiter.token for waiter in waiters]

    def _grant(self) -> None:
        """Serve the longest waiter, if it can be served; call with the mutex held."""
        while self._waiters and self._take(self._waiters[0].token):
            self._serve(self._waiters.popleft())

    @staticmethod
    def _serve(waiter: Waiter) -> None:
        waiter.granted = True
        waiter.wake()

    def _enqueue(self, waiter: Waiter) -> bool:
        with self._mutex:
            if not self._waiters and self._take(waiter.token):
                waiter.granted = True
            else:
                self._waiters.append(waiter)
            return waiter.granted

    def _withdraw(self, waiter: Waiter) -> bool:
        """Stop waiting; gives whether it had been granted meanwhile."""
        with self._mutex:
            if not waiter.granted and waiter in self._waiters:
                self._waiters.remove(waiter)
            return waiter.granted

    def _abandon(self, waiter: Waiter) -> None:
        """Give up what an interrupted waiter was granted."""
        raise NotImplementedError

    def block(self, token: object, timeout: float) -> bool:
        """Block this thread until it is granted; gives whether it was, within `timeout` seconds."""
        event = threading.Event()
        waiter = Waiter(token, event.set)
        if self._enqueue(waiter):
            return True
        try:
            event.wait(timeout)
        except BaseException:
            if self._withdraw(waiter):
                self._abandon(waiter)
            raise
        return self._withdraw(waiter)

    async def suspend(self, token: object, timeout: float) -> bool:
        """Suspend this task until it is granted; gives whether it was, within `timeout` seconds."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            # The waiter's loop may have ended meanwhile; then nobody waits any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(resolve)

        waiter = Waiter(token, wake)
        if self._enqueue(waiter):
            return True
        try:
            await asyncio.wait([future], timeout=timeout)
        except BaseException:
            if self._withdraw(waiter):
                self._abandon(waiter)
            raise
        finally:
            future.cancel()
        return self._withdraw(waiter)
