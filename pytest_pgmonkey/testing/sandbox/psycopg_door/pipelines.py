"""psycopg's pipelines on a member's connection.

The backend is in pipeline mode only from a statement to the next sync. Between a sync and the next
statement it is as free as after any other statement: the unit that the sync ends is committed or
undone, and another member can have the turn. psycopg's pipeline object notices nothing of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from .internals import BasePipeline, answer_queue, fail_queue, register_control

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..core.member import Member

    Steps = Generator[Any, Any, Any]

__all__ = ["AsyncSandboxPipeline", "SandboxPipeline", "fail", "resume", "step_out"]


def resume(member: Member) -> Steps:
    """Go into pipeline mode: what follows is queued until the next sync."""
    backend, transaction = member.backend, member.transaction
    if backend.streamed and backend.streamed_in is not transaction:
        # libpq leaves single-row mode with the next query that is sent outside of a pipeline. Where
        # psycopg sends none, right after its own stream(), it fails on a real connection as well.
        yield from backend.attempt(b"")
    backend.streamed = False
    backend.pgconn.enter_pipeline_mode()
    transaction.in_pipeline = True
    transaction.pin()


def pause(member: Member, pipeline: Any) -> Steps:
    """Have what is queued answered and leave pipeline mode; raises the first error among it."""
    if not member.transaction.in_pipeline:
        return
    error = yield from answer_queue(pipeline)
    member.leave_pipeline()
    if error is not None:
        raise error


def step_out(member: Member, pipeline: Any) -> Steps:
    """Pause for commands of our own; gives `False` where the server skips all until the sync."""
    if pipeline.status == pq.PipelineStatus.ABORTED:
        return False
    try:
        yield from pause(member, pipeline)
    except psycopg.Error:
        yield from fail(member, pipeline)
        raise
    return True


def fail(member: Member, pipeline: Any) -> Steps:
    """Go into pipeline mode as after an error, which stays until the sync."""
    yield from resume(member)
    yield from fail_queue(pipeline)


class _Pipelined(BasePipeline):  # type: ignore[misc]
    """What both pipelines share."""

    _conn: Any

    @property
    def status(self) -> pq.PipelineStatus:
        if self._conn._member.transaction.in_pipeline:
            return super().status  # type: ignore[no-any-return]
        return pq.PipelineStatus.ON if self.level else pq.PipelineStatus.OFF

    def _enter_gen(self) -> Steps:
        psycopg.capabilities.has_pipeline(check=True)
        if self.command_queue or self.result_queue:
            yield from self._sync_gen()
        self._conn._member.pipelined = True
        self.level += 1

    def _sync_gen(self) -> Steps:
        member: Member = self._conn._member
        if member.transaction.in_pipeline:
            yield from pause(member, self)
            yield from member.transaction.end_statement()

    def _exit_gen(self) -> Steps:
        return self._sync_gen()

    def _exit(self, exc: BaseException | None) -> None:
        self.level -= 1
        if self.level:
            return
        member: Member = self._conn._member
        member.pipelined = False
        if member.transaction.in_pipeline and not member.returned:
            # Its end was interrupted, or libpq is lost in the middle of something.
            member.interrupt()
            member.after()
            # A signal can have interrupted the end itself.
            if exc is None and sys.exc_info()[1] is None:
                raise psycopg.OperationalError("the pipeline has ended with results uncollected")


class SandboxPipeline(_Pipelined, psycopg.Pipeline):
    """A psycopg `Pipeline` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"


class AsyncSandboxPipeline(_Pipelined, psycopg.AsyncPipeline):
    """A psycopg `AsyncPipeline` that works inside the test's transaction."""

    __module__ = "pytest_pgmonkey"


for _operation in (_Pipelined._enter_gen, _Pipelined._sync_gen):
    register_control(_operation)
