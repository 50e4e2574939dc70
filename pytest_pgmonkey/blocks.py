"""A handle's blocks: which of them an exit belongs to, and how a block ends.

Nothing here talks to a server: the end of a block is a generator of calls.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from asyncio import events
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import TransactionStatus

from .errors import PGMonkeyError

if TYPE_CHECKING:
    from types import FrameType

    from .connecting import Steps

__all__ = ["Block", "Blocks", "TransactionAbortedError", "settle"]

logger = logging.getLogger("pytest_pgmonkey")


class TransactionAbortedError(PGMonkeyError, psycopg.errors.InFailedSqlTransaction):
    """A block ended as if all were well, though a statement in it had failed."""


# --- blocks ---


class Block:
    """One connection, between a `with` and its end."""

    __slots__ = ("conn", "inherited", "open", "outer", "place", "source", "task", "thread")

    def __init__(self, source: Any, conn: Any, frame: FrameType, outer: Block | None) -> None:
        self.source = source
        self.conn = conn
        self.place = (frame.f_code, frame.f_lasti)
        self.thread = threading.get_ident()
        self.task = _current_task()
        self.outer = outer
        self.open = True
        self.inherited = False

    def end(self) -> tuple[Any, Any]:
        """Give source and connection back; a context that remembers the block keeps neither."""
        lent = (self.source, self.conn)
        self.open = False
        self.source = self.conn = self.task = None
        return lent

    def is_mine(self) -> bool:
        return self.thread == threading.get_ident() and self.task is _current_task()

    @property
    def where(self) -> str:
        code, position = self.place
        lines = (line for start, end, line in code.co_lines() if start <= position < end)
        return f"{code.co_filename}:{next(lines, None) or code.co_firstlineno}"


#: The innermost block of this context; a chain, in which ended blocks are passed over.
_innermost: ContextVar[Block | None] = ContextVar("pytest_pgmonkey_block", default=None)


def _current_task() -> asyncio.Task[Any] | None:
    if events._get_running_loop() is None:
        return None
    return asyncio.current_task()


class Blocks:
    """The open blocks of one handle, and which of them an exit belongs to."""

    def __init__(self) -> None:
        # Reentrant: a finalizer may remove a lost block while its thread holds the lock.
        self._lock = threading.RLock()
        # The frame that executes a `with` is one and the same at its start and at its end, also
        # where a generator is resumed by another thread. Held: a dead frame's address is reused.
        self._open: list[tuple[FrameType | None, Block]] = []

    def enter(self, source: Any, conn: Any, frame: FrameType, *, paired: bool) -> None:
        """Note a block of a `with` statement; `paired` blocks are found again by its frame."""
        self._note(Block(source, conn, frame, _outer_block()), frame if paired else None)

    def lease(self, source: Any, conn: Any, frame: FrameType) -> Block:
        """Note a block whose owner knows it, and names it at the end."""
        block = Block(source, conn, frame, _outer_block())
        self._note(block, None)
        return block

    def _note(self, block: Block, frame: FrameType | None) -> None:
        _innermost.set(block)
        with self._lock:
            self._open.append((frame, block))

    def leave(self, frame: FrameType) -> Block:
        """Take out the block that ends in this frame."""
        with self._lock:
            block = self._by_frame(frame) or self._by_holder()
            self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        with self._lock:
            for index, (_, each) in enumerate(self._open):
                if each is block:
                    del self._open[index]
                    break
        if _innermost.get() is block:
            _innermost.set(block.outer)

    def _by_frame(self, frame: FrameType) -> Block | None:
        for mine, block in reversed(self._open):
            if mine is frame:
                return block
        return None

    def _by_holder(self) -> Block:
        # An ExitStack enters and leaves in frames of its own.
        candidates = [block for frame, block in self._open if frame is not None]
        mine = [block for block in candidates if block.is_mine()]
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
            if block.open and not block.inherited and block.is_mine() and self._holds(block):
                return block
            block = block.outer
        return None

    def _holds(self, block: Block) -> bool:
        return any(mine is block for _, mine in self._open)

    def places(self) -> list[str]:
        return [block.where for _, block in self._open if not block.inherited]

    def forget_parent(self) -> None:
        self._lock = threading.RLock()
        for _, block in self._open:
            block.inherited = True


def _outer_block() -> Block | None:
    outer = _innermost.get()
    while outer is not None and not outer.open:
        outer = outer.outer
    return outer


# --- the end of a block ---


def settle(conn: Any, error: BaseException | None) -> Steps[None]:
    """Commit, or roll back, or say why neither is possible."""
    if conn.closed:
        if conn.broken and error is None:
            raise psycopg.OperationalError(
                "the connection was lost in this block: nothing that it had not committed is kept"
            )
        return
    status = conn.info.transaction_status
    if status == TransactionStatus.IDLE:
        return
    if error is not None:
        yield from _undo(conn)
    elif status == TransactionStatus.INERROR:
        yield from _undo(conn)
        raise TransactionAbortedError(
            "a statement failed in this block and its error was swallowed, so nothing was "
            "committed: put a statement that may fail in `with conn.transaction():`"
        )
    else:
        try:
            yield conn.commit
        except BaseException:
            yield from _undo(conn)
            raise


def _undo(conn: Any) -> Steps[None]:
    if conn.closed:
        return
    try:
        yield conn.rollback
    except Exception as error:
        # The error that ends the block must not be hidden by this one.
        logger.warning("rollback failed on %s: %s", conn, error)
