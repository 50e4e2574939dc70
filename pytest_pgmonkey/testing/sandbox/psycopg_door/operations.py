"""psycopg's operations on a member's connection: what runs as it is, and what runs in its place.

Each operation of psycopg is a generator that passes `wait()`. `plan` judges it before it has the
turn, `steps` gives the generator to run: psycopg's own, or the same with our commands around it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ....errors import SandboxError
from ... import passage
from ...sql.lexer import Statement, Verb, declaration, plain_statement, statements
from ..core.backend import Level
from ..core.refusals import RefusedError, no_two_phase
from ..core.script import Script, discard_all
from ..core.statements import (
    begins_at_once,
    discards_all,
    is_in_place,
    is_script,
    park,
    prepare,
    refuse_outside,
    speak_of_transactions,
)
from .internals import (
    CLOSE,
    CONTROL,
    DECLARE,
    LOCAL,
    STATEMENT,
    arguments,
    check_parameters,
    holds,
    is_execute,
    is_extended,
    is_queued,
    is_stream,
    note_results,
    parameters,
    query_text,
    read_operation,
    set_results,
    tagged_result,
)
from .pipelines import fail, resume

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..core.member import Member

    Steps = Generator[Any, Any, Any]
    Planned = tuple[str, Any, Any, Any]


def as_it_is(member: Member, gen: Any) -> Steps | None:
    """Give what runs a plain statement, in a transaction that keeps the turn anyway."""
    names = arguments(gen)
    query = names["query"]
    if type(query) is not str or (part := plain_statement(query)) is None:
        return None
    _start(member)
    if not member.steady:  # any more
        member.busy = False
        return None
    member.transaction.current = part.text
    return passage.passing(part, names, gen)


def _start(member: Member) -> None:
    member.start()
    # The end of a test refuses all operations, and then waits for those that have started.
    if member.ended:
        raise psycopg.OperationalError(member.ended)


def plan(member: Member, gen: Any) -> Planned | None:
    """Judge an operation before it runs; `None` if it does not touch the backend."""
    if member.backend.forked:
        gen.close()
        raise SandboxError(
            "a forked process cannot use the test's connection; let it open its own, "
            'in a test with @pytest.mark.pgmonkey(isolation="clone")'
        )
    if member.ended:
        gen.close()
        raise psycopg.OperationalError(member.ended)
    kind, sql, obj = read_operation(gen)
    if kind is LOCAL:
        if not member.transaction.in_pipeline:
            return None
        kind = CONTROL  # it syncs first
    return kind, sql, obj, gen


def steps(member: Member, conn: Any, planned: Planned) -> Steps:
    """Give the generator to run for an operation that has the turn."""
    gen: Steps
    kind, sql, obj, gen = planned
    _start(member)
    transaction = member.transaction
    if member.streaming:
        return _stream_on(member, gen) if transaction.unit else gen
    parts = statements(query_text(sql, conn)) if kind is STATEMENT else ()
    if member.pipelined and kind is not CONTROL:
        return _pipelined(member, conn, kind, parts, obj, gen)
    if transaction.in_pipeline:
        return gen
    if len(parts) == 1 and parts[0].plain and not obj.closed:
        shortcut = _shortcut(member, conn, parts[0], gen)
        if shortcut is not None:
            transaction.note(parts[0])
            return passage.passing(parts[0], gen, shortcut)
    if kind is DECLARE:
        declared = declaration(obj.name, query_text(sql, conn), holds=holds(obj))
        kind, parts = STATEMENT, (declared,)
    return _with_ours(member, conn, kind, parts, obj, gen)


def abandon(run: Steps | None) -> None:
    """Close an interrupted operation while the interruption is being handled.

    The garbage collector must not do it later, when nobody else holds the exception. psycopg's
    compiled generators keep an earlier one until they are closed; it dies in the middle of that,
    and Python 3.11 and 3.12 crash if code that runs then catches an exception (Cython 3.3.1).
    """
    if run is not None:
        with suppress(Exception):  # A pipeline's end waits for its results even now.
            run.close()


def _shortcut(member: Member, conn: Any, part: Statement, gen: Steps) -> Steps | None:
    """Give what runs a plain statement where there is little or nothing to do before it."""
    backend, transaction = member.backend, member.transaction
    session = transaction.session
    if not is_in_place(member):
        return None
    if not transaction.open:
        if conn.autocommit:
            if not begins_at_once(member, part):
                return None
            transaction.unit = True
            if not part.read_only:
                gen = _stream_on(member, gen)
        elif (session is not None and session.sets_modes) or conn.begin_command() != b"BEGIN":
            return None
        elif backend.is_direct:
            return _begin_outer(member, gen)
        elif backend.level is Level.STANDING:
            transaction.modes, transaction.open = b"BEGIN", True
        else:
            return None
    return _after_collecting(member, gen) if backend.behind else gen


def _begin_outer(member: Member, gen: Steps) -> Steps:
    backend, transaction = member.backend, member.transaction
    if backend.behind:
        yield from backend.collect()
    yield from backend.begin(b"BEGIN", b"")
    transaction.modes, transaction.open = b"BEGIN", True
    return (yield from gen)


def _after_collecting(member: Member, gen: Steps) -> Steps:
    yield from member.backend.collect()
    return (yield from gen)


def _with_ours(
    member: Member, conn: Any, kind: str, parts: tuple[Statement, ...], obj: Any, gen: Any
) -> Steps:
    """Run an operation with our commands before and after it, or something in its place."""
    yield from member.get_ready()
    transaction = member.transaction
    if kind is CONTROL:
        return (yield from gen)
    if kind is CLOSE and not transaction.open and not holds(obj):
        gen.close()
        return None
    if len(parts) == 1 and parts[0].plain:
        if not transaction.open and conn.autocommit:
            yield from transaction.begin_unit()
        transaction.note(parts[0])
    elif (instead := _replacement(member, conn, parts, obj, gen)) is not None:
        return (yield from instead)
    else:
        yield from _prepare(member, conn, kind, parts, gen)
    after = _parking(member, parts, gen) if any(p.looks_at_timeouts for p in parts) else gen
    return (yield from passage.all_passing(parts, gen, _stream_on(member, after)))


def _replacement(
    member: Member, conn: Any, parts: tuple[Statement, ...], obj: Any, gen: Any
) -> Steps | None:
    """Give what is to run in place of an operation, if anything."""
    if _is_script(member, conn, parts, gen):
        return _run_script(member, conn, obj, parts, gen)
    if discards_all(member, parts, autocommit=conn.autocommit):
        return passage.passing(parts[0], gen, _discard_all(member, conn, obj))
    if parts and obj.closed:
        return gen  # type: ignore[no-any-return] # which raises, in front of any BEGIN
    refuse_outside(member, parts, autocommit=conn.autocommit)
    return None


def _is_script(member: Member, conn: Any, parts: tuple[Statement, ...], gen: Any) -> bool:
    if len(parts) > 1 and member.failed and not is_execute(gen):
        return speak_of_transactions(parts)
    return is_script(member, parts, autocommit=conn.autocommit)


def _prepare(member: Member, conn: Any, kind: str, parts: tuple[Statement, ...], gen: Any) -> Steps:
    params = parameters(gen) if parts else None
    return prepare(member, parts, params, conn, by_user=kind is STATEMENT)


def _parking(member: Member, parts: tuple[Statement, ...], gen: Steps) -> Steps:
    """Run an operation, and let no time-out that it looked at end the session afterwards."""
    result = yield from gen
    yield from park(member, parts)
    return result


def _stream_on(member: Member, gen: Any) -> Steps:
    """Run an operation, and the commit where it ends an autocommit statement."""
    result = yield from gen
    if member.transaction.unit:
        yield from member.transaction.end_statement()
    return result


# Pipelines


def _pipelined(
    member: Member, conn: Any, kind: str, parts: tuple[Statement, ...], obj: Any, gen: Any
) -> Steps:
    """Queue an operation; what must be answered before it is done outside of pipeline mode."""
    transaction = member.transaction
    if kind is DECLARE:
        raise psycopg.NotSupportedError("server-side cursors not supported in pipeline mode")
    if kind is STATEMENT and is_stream(gen):
        raise psycopg.ProgrammingError("stream() cannot be used in pipeline mode")
    if kind is STATEMENT and is_queued(gen) and not obj.closed:
        if speak_of_transactions(parts):
            raise _no_control_in_pipelines()
        if discards_all(member, parts, autocommit=conn.autocommit):
            raise RefusedError(_NO_DISCARD, "; leave the pipeline before it")
        if any(part.words[0] == "COPY" for part in parts):
            # psycopg sends it, and the session is lost.
            raise psycopg.NotSupportedError("COPY cannot be used in pipeline mode")
        if transaction.in_pipeline and all(part.plain for part in parts):
            for part in parts:
                transaction.note(part)
        elif (yield from conn.pause_pipeline()):
            yield from member.get_ready()
            # Where the transaction has failed, the statement will say so.
            if member.backend.in_transaction or not (transaction.open or transaction.unit):
                yield from _prepare(member, conn, kind, parts, gen)
                yield from _fail_outside(member, conn, parts)
            yield from resume(member)
    elif member.backend.behind:
        # What psycopg would fetch now are answers to our own commands.
        yield from member.backend.collect()
    result = yield from passage.all_passing(parts, gen, gen)
    if any(part.looks_at_timeouts for part in parts) and (yield from conn.pause_pipeline()):
        yield from transaction.park_timeouts(parts[0])
    return result


def _fail_outside(member: Member, conn: Any, parts: tuple[Statement, ...]) -> Steps:
    """Let what needs a transaction block fail where there is none, and the pipeline with it."""
    try:
        refuse_outside(member, parts, autocommit=conn.autocommit)
    except psycopg.Error:
        yield from fail(member, conn._pipeline)
        raise


_NO_DISCARD: Final = "DISCARD ALL cannot be run in pipeline mode in a rolled-back test"


def _no_control_in_pipelines() -> RefusedError:
    return RefusedError(
        "a transaction command in SQL cannot be run in pipeline mode in a rolled-back test",
        "; use commit(), rollback() or transaction()",
    )


# Scripts


class _CursorScript:
    """Runs a script's statements over libpq, for a cursor that gets their results."""

    def __init__(self, member: Member, conn: Any, operation: Any) -> None:
        self._backend = member.backend
        self._conn = conn
        self.operation = operation
        self.results: list[Any] = []

    @property
    def autocommit(self) -> bool:
        return bool(self._conn.autocommit)

    def begin_command(self) -> bytes:
        return self._conn.begin_command()  # type: ignore[no-any-return]

    def run(self, text: str) -> Steps:
        results = yield from self._backend.run(text.encode())
        self.results += results
        return results

    def tag(self, tag: bytes) -> None:
        self.results.append(tagged_result(tag))

    def warn(self, sqlstate: str, message: str) -> None:
        self._conn.warn(sqlstate, message)


def _run_script(
    member: Member, conn: Any, cursor: Any, parts: tuple[Statement, ...], gen: Any
) -> Steps:
    """Run the statements one by one and leave their results in the cursor, as psycopg would."""
    if any(part.verb is Verb.TWO_PHASE for part in parts):
        raise no_two_phase()
    if not is_execute(gen):
        raise RefusedError("a transaction command can only be run by execute()", " here")
    params = parameters(gen)
    if cursor.closed or (len(parts) > 1 and is_extended(cursor, gen)):
        # Either raises, the second after a question to the server.
        if not member.transaction.open and conn.autocommit:
            yield from member.transaction.begin_unit()
        return (yield from gen)
    check_parameters(cursor, parts[0].text, params)
    door = _CursorScript(member, conn, gen)
    try:
        yield from Script(member, door).run(parts)
    finally:
        # However it ended, psycopg must find out what the statements have done.
        note_results(conn, door.results)
    set_results(cursor, door.results)
    return None


def _discard_all(member: Member, conn: Any, cursor: Any) -> Steps:
    yield from discard_all(member)
    results = [tagged_result(b"DISCARD ALL")]
    note_results(conn, results)
    set_results(cursor, results)
