"""A handle's blocks: which of them an exit belongs to, and how a block ends.

Nothing here talks to a server: the end of a block is a generator of calls.
"""

from __future__ import annotations

import logging
import sys
from asyncio import _get_running_loop, current_task
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.pq import TransactionStatus

from .errors import PGMonkeyError

if TYPE_CHECKING:
    from types import FrameType

    from .connecting import Steps

logger = logging.getLogger("pytest_pgmonkey")


class TransactionAbortedError(PGMonkeyError, psycopg.errors.InFailedSqlTransaction):
    """A block ended normally, although one of its statements had failed."""


# --- blocks ---


class Block:
    """One connection, between a `with` and its end."""

    # Not the frame: a context may remember the block for longer than its variables shall live.
    __slots__ = ("code", "conn", "outer", "position", "source", "task", "thread")

    def __init__(self, source: Any, conn: Any, frame: FrameType) -> None:
        self.source = source
        self.conn = conn
        self.code = frame.f_code
        self.position = frame.f_lasti
        self.thread = get_ident()
        self.task = current_task() if _get_running_loop() is not None else None
        outer = _innermost.get()
        while outer is not None and outer.source is None:
            outer = outer.outer
        self.outer: Block | None = outer

    def end(self) -> tuple[Any, Any]:
        """Give source and connection; a context that remembers the block keeps neither."""
        lent = (self.source, self.conn)
        self.source = self.conn = self.task = None
        return lent

    @property
    def is_inherited(self) -> bool:
        """Whether it is the block of a process of which this one is a forked child."""
        return self.source is INHERITED

    def is_mine(self) -> bool:
        task = current_task() if _get_running_loop() is not None else None
        return self.thread == get_ident() and self.task is task

    @property
    def where(self) -> str:
        lines = (line for first, end, line in self.code.co_lines() if first <= self.position < end)
        return f"{self.code.co_filename}:{next(lines, None) or self.code.co_firstlineno}"


#: The source of the blocks that a forked child finds open.
INHERITED: Final = object()
GENERATOR: Final = CO_GENERATOR | CO_ASYNC_GENERATOR
#: The innermost block of this context; a chain, in which ended blocks are passed over.
_innermost: ContextVar[Block | None] = ContextVar("pytest_pgmonkey_block", default=None)


class Blocks:
    """The open blocks of one handle, and which of them an exit belongs to.

    Without a lock: an entry is added at the end and removed by its identity, both of them single
    operations of a list, and who walks the list backwards in between misses no other entry.
    """

    def __init__(self) -> None:
        # The frame that executes a `with` is one and the same at its start and at its end, also
        # where a generator is resumed by another thread. Held: a dead frame's address is reused.
        self._open: list[tuple[FrameType | None, Block]] = []

    def enter(self, source: Any, conn: Any, frame: FrameType, *, paired: bool) -> Block:
        """Note a block; one that is `paired` is found again by its frame, by `leave`."""
        block = Block(source, conn, frame)
        _innermost.set(block)
        self._open.append((frame if paired else None, block))
        return block

    def leave(self, frame: FrameType) -> Block:
        """Take out the block that ends in this frame."""
        for entry in reversed(self._open):
            if entry[0] is frame:
                return self._take(entry)
        return self._take(self._by_holder())

    def remove(self, block: Block) -> None:
        """Take out a block whose owner knows it."""
        for entry in reversed(self._open):
            if entry[1] is block:
                self._take(entry)
                return

    def _take(self, entry: tuple[FrameType | None, Block]) -> Block:
        self._open.remove(entry)
        block = entry[1]
        if _innermost.get() is block:
            _innermost.set(block.outer)
        return block

    def _by_holder(self) -> tuple[FrameType | None, Block]:
        """Guess, for an exit in another frame: an ExitStack enters and leaves in its own."""
        running = _running_frames()
        # A frame that still runs, or that waits at a `yield`, will end its block by itself.
        ended = [entry for entry in self._open if entry[0] is not None and entry[0] not in running]
        candidates = [entry for entry in ended if not entry[1].code.co_flags & GENERATOR] or ended
        mine = [entry for entry in candidates if entry[1].is_mine()]
        if mine:
            return mine[-1]
        if len(candidates) == 1:
            return candidates[0]
        raise PGMonkeyError(
            f"{len(candidates)} blocks of this handle are open and none of them was entered here, "
            "so it cannot be told which one ends: enter it with `handle.connection()`"
        )

    def visible(self) -> Block | None:
        """Find the innermost block that this very thread and task opened in this context.

        A child task inherits the context, and a thread of an executor serves one request after
        the other: neither may share a connection by accident.
        """
        block = _innermost.get()
        while block is not None:
            is_mine = not block.is_inherited and block.is_mine()
            if is_mine and any(each is block for _, each in self._open):
                return block
            block = block.outer
        return None

    def places(self) -> list[str]:
        return [block.where for _, block in self._open if not block.is_inherited]

    def forget_parent(self) -> None:
        for _, block in self._open:
            block.source = INHERITED


def _running_frames() -> set[FrameType]:
    running = set()
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
    return running


# --- the end of a block ---


def settle(conn: Any, error: BaseException | None) -> Steps[None]:
    """Commit, or roll back, or say why neither is possible."""
    status = conn.info.transaction_status
    if status == TransactionStatus.IDLE:
        return
    if conn.closed:
        if conn.broken and error is None:
            raise psycopg.OperationalError(
                "the connection was lost in this block: nothing that it had not committed is kept"
            )
    elif error is not None:
        yield from undo(conn)
    elif status == TransactionStatus.INERROR:
        yield from undo(conn)
        raise TransactionAbortedError(
            "a statement failed in this block and its error was swallowed, so nothing was "
            "committed: put a statement that may fail in `with conn.transaction():`"
        )
    else:
        try:
            yield conn.commit
        except BaseException:
            yield from undo(conn)
            raise


def undo(conn: Any) -> Steps[None]:
    if conn.closed:
        return
    try:
        yield conn.rollback
    except Exception as error:
        # The error that ends the block must not be hidden by this one.
        logger.warning("rollback failed on %s: %s", conn, error)
