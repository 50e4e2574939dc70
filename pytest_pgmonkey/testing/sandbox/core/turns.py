"""Whose turn it is on the one backend, and which wait for it could never end."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from ....errors import SandboxError
from .refusals import Refusals
from .waiting import Queue

if TYPE_CHECKING:
    from .refusals import WaitRefusedError
    from .waiting import Waiter


class BusyError(SandboxError):
    """Somebody is in the middle of something that comes to an end by itself."""


class Holder(Protocol):
    """What a turn needs to know of a member."""

    thread: int
    task: asyncio.Task[object] | None
    yielding: bool
    """Between two statements of a transaction that has perhaps only read."""
    returned: bool
    """Whether its loan has ended."""
    ended: str
    """Why it can do nothing any more."""

    @property
    def open(self) -> bool:
        """In a virtual transaction."""

    @property
    def name(self) -> str:
        """What it is in messages."""


class _Nobody:
    """Who has a turn that was seized."""

    thread = 0
    task = None
    yielding = returned = False
    ended = ""
    open = True
    name = "a checkpoint"


_NOBODY: Final = _Nobody()


def current_task() -> asyncio.Task[object] | None:
    """Give the running task of this thread, `None` outside an event loop."""
    # Ten times as fast as catching get_running_loop()'s RuntimeError, and paid per statement.
    loop = asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


class Turn(Queue):
    """The right to use the backend.

    A member holds it during an operation and as long as its virtual transaction is open. One
    whose transaction has perhaps only read (`yielding`) can be preempted: the new holder then
    asks the backend, and either goes on or gives the turn back.
    """

    def __init__(self, refusals: Refusals | None = None) -> None:
        super().__init__()
        self.holder: Any = None
        self.preempted: Any = None
        self._refusals: Final = refusals or Refusals()

    def _take(self, token: Any) -> bool:
        holder = self.holder
        if holder is None or holder is token:
            self.holder = token
        elif holder.yielding and self.preempted is None:
            self.preempted, self.holder = holder, token
        else:
            return False
        token.yielding = False
        return True

    def _grant(self) -> None:
        # One at a time: who is granted the turn holds it, or has a preemption to settle first.
        if self._waiters and self._take(self._waiters[0].token):
            self._serve(self._waiters.popleft())

    def _abandon(self, waiter: Waiter) -> None:
        if self.preempted is not None and self.holder is waiter.token:
            self.give_back(waiter.token)
        else:
            self.leave(waiter.token)

    def is_kept_from(self, member: Holder) -> bool:
        """Whether somebody has it who does not give it up just now."""
        holder = self.holder
        return not (holder is None or holder is member or holder.yielding)

    def hold(self, member: Holder) -> bool:
        """Have the turn to the end, where a member has it; gives whether it has.

        Where it is being preempted just now, whoever preempts it ends its transaction.
        """
        with self._mutex:
            if self.preempted is member:
                member.returned = True
            elif self.holder is member:
                member.yielding = False
                return True
            return False

    def give_back(self, member: object) -> bool:
        """Return the turn to the preempted holder: it has written, and keeps it to its end.

        Gives whether it is still there.
        """
        with self._mutex:
            if self.preempted is not None and self.preempted.returned:
                return False
            self._give_back(member)
            return True

    def _give_back(self, member: object) -> None:
        with self._mutex:
            preempted, self.preempted = self.preempted, None
            if self.holder is not member:
                return
            self.holder = preempted
            preempted.yielding = False
            if not preempted.open:
                self._pass_on()
                return
            self._wake(preempted)

    def _wake(self, holder: Holder) -> None:
        """Serve a holder that has queued for its next statement while another was at it."""
        for waiter in self._waiters:
            if waiter.token is holder:
                self._waiters.remove(waiter)
                self._serve(waiter)
                return

    def keep_preempted(self) -> Any:
        """Settle a preemption: the former holder has only read, and is suspended."""
        with self._mutex:
            preempted, self.preempted = self.preempted, None
            return preempted

    def seize(self) -> Any:
        """Take the turn from whoever has it and does nothing just now; gives who that was.

        It is nobody's until `hand_to`. Raises BusyError where somebody is about to use it.
        """
        with self._mutex:
            holder = self.holder
            if self.preempted is not None or not (holder is None or holder.open):
                raise BusyError("a statement is about to run")
            self.holder = _NOBODY
            return holder

    def hand_to(self, member: Holder | None) -> None:
        """Give a seized turn to a member, or to the longest waiter."""
        with self._mutex:
            if member is None:
                self._pass_on()
            else:
                self.holder = member
                self._wake(member)

    def leave(self, member: object) -> None:
        """End an operation or a transaction; the longest waiter gets the turn next."""
        if self.holder is member:
            with self._mutex:
                self._pass_on()

    def offer(self, member: object) -> None:
        """End an operation inside a transaction that may be preempted."""
        if self._waiters:
            with self._mutex:
                if self.holder is member:
                    self._grant()

    def renewed(self) -> Turn:
        """Give a turn with the same holder, which those whose wait was cancelled do not know."""
        turn = Turn(self._refusals)
        turn.holder = self.holder
        if turn.holder is not None:
            turn.holder.turn = turn
        return turn

    def _pass_on(self) -> None:
        self.holder = None
        self._grant()

    def wait(self, member: Holder, timeout: float) -> None:
        """Block this thread until the turn is had; raises WaitRefusedError."""
        self._refuse_deadlock(member, is_async=False)
        timeout = self._refusals.patience(timeout)
        if not self.block(member, timeout):
            raise self._too_long(member, timeout)

    async def wait_async(self, member: Holder, timeout: float) -> None:
        """Suspend this task until the turn is had; raises WaitRefusedError."""
        self._refuse_deadlock(member, is_async=True)
        timeout = self._refusals.patience(timeout)
        if not await self.suspend(member, timeout):
            raise self._too_long(member, timeout)

    def _refuse_deadlock(self, member: Holder, *, is_async: bool) -> None:
        holder: Holder | None = self.holder
        if holder is None or holder is member or holder.yielding:
            return
        if holder.thread != threading.get_ident():
            return
        # A blocked thread cannot run the holder's code; a task cannot run beside itself; and
        # code outside any task, further up on this thread's stack, waits for the loop to end.
        if not is_async or holder.task is None or holder.task is current_task():
            raise self._refusals.wait(
                f"{member.name} needs the test's transaction, which {holder.name} holds with "
                "changes that are not committed; waiting here would never end"
            )

    def _too_long(self, member: Holder, timeout: float) -> WaitRefusedError:
        holder = self.holder
        by = "another"
        if holder is not None:
            by = holder.name.replace("the connection", "the one", 1)
        return self._refusals.wait(
            f"{member.name} waited {timeout:g} s for {by}, whose transaction is open with "
            "changes that are not committed",
            counts=not member.ended,
        )
