"""A client's session in the test's rolled-back transaction: the second door to the sandbox's core.

What a statement means is asked of the core. Here its messages are sent on, and what the server
answers is given to the client, but for the transaction's own ends, which are virtual.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ....errors import SandboxError
from ... import passage
from ...sandbox.core.handover import read
from ...sandbox.core.member import CLOSED
from ...sandbox.core.refusals import no_two_phase
from ...sandbox.core.script import Script, discard_all
from ...sandbox.core.settings import Session, assignment, untouched
from ...sandbox.core.statements import (
    begins_at_once,
    discards_all,
    is_in_place,
    is_script,
    park,
    prepare,
    refuse_outside,
    writes_in_block,
)
from ...sql.lexer import Verb, statements
from ..protocol import wire
from ..protocol.reports import AnsweredError, ClientError, error_report, notice_report
from ..protocol.wire import Message, ProtocolViolation
from .channel import plain_socket
from .extended import Extended

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from psycopg.pq.abc import PGresult

    from ...sandbox.core.member import Member
    from ...sandbox.core.outer import OuterTransaction
    from ...sandbox.core.settings import WrongSettingError
    from ...sql.lexer import Statement
    from ..protocol.client import Client

    Steps = Generator[Any, Any, Any]
    Parts = tuple[Statement, ...]

# What a client sends.
_QUERY, _SYNC, _FLUSH, _TERMINATE = b"QSHX"
_CALL = ord("F")
_THE_SYNC: Final = Message(_SYNC, wire.SYNC)
_NOTHING: Final = Message(_FLUSH, wire.FLUSH)
_COPY: Final = frozenset(b"dcf")
_TOLD: Final = (AnsweredError, ClientError, ProtocolViolation, SandboxError, psycopg.Error)
_READ_ONLY: Final = "25006"
_OUTSIDE: Final = (
    "the database is used outside of a test that has one, where it can only be read. Let the test "
    "ask for it: with a fixture (pgmonkey, pgmonkey_dsn, …) or with @pytest.mark.pgmonkey; a "
    "session fixture can write to the prepared database inside `with pgmonkey_database.unblock():`"
)
_ODD: Final = "surrogateescape"  # of a text that is not in UTF-8
_MOST_QUEUED: Final = 262144  # bytes of a client that are sent to the server without its Sync
_NAMES_ITSELF: Final = ("application_name", "pg_stat_activity", "pg_settings")


class JoinedSession:
    """What a client works in as long as one test runs, or `outside` of tests.

    A transaction that it has begun before goes on. Raises psycopg.Error or SandboxError where it
    cannot be had.
    """

    def __init__(
        self,
        client: Client,
        outer: OuterTransaction,
        still_leads: Callable[[], bool],
        *,
        outside: bool = False,
    ) -> None:
        self._client: Final = client
        self._outside: Final = outside
        self._begun, client.begun = client.begun, b""
        self._is_carried = bool(self._begun)
        self._watches = outside  # what comes before it is run
        self._still_leads: Final = still_leads
        plain_socket(outer.backend.pgconn)  # or it is refused before it joins
        self.member: Final = self._join(outer)
        self.member.serve(weakref.ref(self))
        if client.kept:
            session = Session(client.settings)
            session.touch(client.kept)
            session.values = dict(client.kept)
            self.member.transaction.session = session
        backend = self.member.backend
        self._backend: Final = backend
        self._batch: list[Message] = []
        self._batch_size = 0
        self._extended: Final = Extended(self, client, self.member)
        self._exchange: Final = self._extended.exchange
        self._settings_changed = False
        self._commits = False  # what may fail yet
        self._text, self._at = "", 0  # of a script, and how far it has run

    def _join(self, outer: OuterTransaction) -> Member:
        return outer.join(self._client.origin, self._client.settings)

    # What its member asks

    @property
    def has_prepared(self) -> bool:
        """Whether its client has prepared statements in the session."""
        return self._client.statements.prepared_in(self._extended)

    def mark_closed(self, *, broken: bool) -> None:
        """Note that the test has ended; the client finds out by its next statement."""

    def blame(self, wrong: WrongSettingError) -> Exception:
        """Give the error of a setting that the client has asked for when it connected."""
        return wrong.error or psycopg.OperationalError("a setting of the connection is overwritten")

    def begin_anew(self, command: bytes) -> None:
        """Note that the client's transaction was undone: its next statement begins it again."""
        self._begun = command

    def deliver_notice(self, result: PGresult) -> None:
        """Pass a notice on that a command of the sandbox's has caused."""
        if self._commits:
            self._client.out += notice_report(result)  # before what is held back
        else:
            self._exchange.tell(notice_report(result))

    def forget_prepared(self) -> None:
        """Prepare its statements again where they are used next."""
        self._client.statements.unsettle()

    # What the core's statements ask

    autocommit: Final = True

    @property
    def operation(self) -> object:
        """What the passage sees."""
        return self._client

    def begin_command(self) -> bytes:
        """Give the BEGIN of no modes."""
        return b"BEGIN"

    def warn(self, sqlstate: str, message: str) -> None:
        """Warn as the server would."""
        self._exchange.tell(wire.notice(sqlstate, message))

    def tag(self, tag: bytes) -> None:
        """Tell of a command that was not sent as it is."""
        self._exchange.complete(wire.complete(tag))

    def run(self, text: str) -> Steps:
        """Send one statement of a script."""
        at = self._text.find(text, self._at)
        self._at = at + len(text)
        try:
            yield from self._exchange.send(wire.query(text.encode(errors=_ODD)))
        except AnsweredError as error:
            error.offset = at
            raise
        yield from self.after(statements(text))

    # The client's messages

    @property
    def is_over(self) -> bool:
        """Whether the client leads elsewhere from now."""
        member = self.member
        if member.ended or member.returned or self._backend.dead:
            return True
        if self._client.widens:
            return True
        is_open = member.open or member.transaction.unit or self._begun
        return not (is_open or self._still_leads())

    def serve(self) -> bool:
        """Do what the client asks until the test ends; gives whether the client is still there."""
        client = self._client
        while not client.dead and (message := client.receive()) is not None:
            if message.kind == _TERMINATE:
                return False
            if self.is_over:
                client.put_back(message)
                return True
            self._take(message)
        return False

    def close(self) -> None:
        """Roll back what is open: the client has gone, or leads elsewhere from now."""
        self.member.leave(CLOSED)

    def cancel(self) -> None:
        """Cancel what the client runs."""
        self._exchange.cancel()

    def _take(self, message: Message) -> None:
        kind = message.kind
        if kind == _SYNC:
            self._end_batch()
        elif self._client.skips or kind in _COPY:
            return
        elif kind in (_QUERY, _CALL):
            self._simple(message)
        elif kind == _FLUSH:
            self._run_batch(message)
        else:
            self._batch.append(message)
            self._batch_size += len(message.raw)
            if self._batch_size > _MOST_QUEUED:
                self._run_batch(_NOTHING)

    def _operate(self, steps: Steps) -> bool:
        """Run an operation with the turn; gives whether it has succeeded."""
        member, wait = self.member, self._backend.root.wait
        try:
            if not member.turn.take(member) or member.turn.preempted is not None:
                member.claim_turn(wait)
            self._run(self._resumed(steps) if self._begun else steps)
        except _TOLD as error:
            self._exchange.release()
            self._client.out += self._report(error)
            return False
        return True

    def _run(self, steps: Steps) -> None:
        member = self.member
        try:
            member.start()
            if member.ended:
                raise ClientError("57P01", member.ended)
            member.transaction.in_pipeline = False
            self._backend.root.wait(steps)
        except _TOLD as error:
            self._explain(error)
            raise
        except BaseException:
            self._backend.unsettled = True
            raise
        finally:
            member.after()

    def _resumed(self, steps: Steps) -> Steps:
        """Begin what the client has begun elsewhere, before its first statement here."""
        yield from self.member.get_ready()
        yield from self.member.transaction.begin(self._begun)
        self._begun = b""
        yield from steps

    def _report(self, error: Exception) -> bytes:
        offset = Script.shift(error) if isinstance(error, psycopg.Error) else 0
        is_outside = self._backend.reads_only and not self._client.only_looks
        if is_outside and getattr(error, "sqlstate", "") == _READ_ONLY:
            return wire.failure("57P03", _OUTSIDE)
        return error_report(error, offset=offset)

    def _explain(self, error: Exception) -> None:
        if isinstance(error, psycopg.Error):
            self.member.explain(error)
        elif isinstance(error, AnsweredError):
            error.hint = self.member.advise(error.sqlstate, error.text)
            self._backend.expects_cancels |= error.sqlstate == "57014"

    def _tell_ready(self) -> None:
        member = self.member
        status = "E" if member.failed else "T" if member.open or self._begun else "I"
        self._client.begun = b""
        if status == "T" and self._goes_on():
            self._client.begun = member.transaction.modes or self._begun
        self._exchange.tell_changed()
        self._client.tell_ready(ord(status))

    def _goes_on(self) -> bool:
        """Whether the open transaction goes on where the client leads next: nothing is lost."""
        left = self.member.transaction.leftovers
        return self._outside or left.can_go_on(is_carried=self._is_carried)

    # Simple queries

    def _simple(self, message: Message) -> None:
        text = "CALL" if message.kind == _CALL else message.raw[5:-1].decode(errors=_ODD)
        parts = statements(text)
        if self._watches and self._is_dealt_with(parts, message):
            self._unless_it_left()
            return
        self._client.statements.remove(b"")  # as a server does
        if not parts:
            self._client.out += wire.EMPTY_QUERY
        elif not (len(parts) == 1 and self._is_quick(message.raw, parts[0])):
            self._operate(self._settled(self._query(message.raw, parts, text)))
        self._tell_ready()

    def _is_quick(self, raw: bytes, part: Statement) -> bool:
        return self._at_once(raw, part) if part.plain else self._puts_off(part)

    def _unless_it_left(self) -> None:
        if not self._client.widens:
            self._tell_ready()

    def _is_dealt_with(self, parts: Parts, *messages: Message) -> bool:
        """Leave, outside of a test, what writes in a transaction block to another session."""
        client = self._client
        is_open = bool(self.member.open or self._begun)
        client.widens = not self.member.failed and writes_in_block(parts, is_open=is_open)
        if client.widens:
            client.begun = self.member.transaction.modes or self._begun
            client.put_back(*messages)
        return client.widens

    def _at_once(self, raw: bytes, part: Statement) -> bool:
        """Run a plain statement that needs nothing before it; gives whether it was one.

        The shortest way, taken by nearly every statement.
        """
        member, transaction = self.member, self.member.transaction
        member.occupy()  # nobody begins to look meanwhile
        if (
            not self._asks_for_name((part,))
            and member.turn.take(member)
            and member.turn.preempted is None
            and not self._backend.behind
            and is_in_place(member)
            and not self._begun
            and (transaction.open or (part.read_only and begins_at_once(member, part)))
        ):
            transaction.unit = not transaction.open
            self._operate(self._passing(raw, part))
            return True
        member.busy = False
        return False

    def _puts_off(self, part: Statement) -> bool:
        """Answer a BEGIN that would have to wait, or the end of what has not begun yet.

        Only the first statement that needs the turn may be refused it: drivers do not expect BEGIN
        to fail (asyncpg takes the transaction for open all the same).
        """
        member = self.member
        waits = member.turn.is_kept_from(member) and not self._outside
        if part.verb is Verb.BEGIN and waits and not (self._begun or member.open):
            self._begun = part.text.encode(errors=_ODD)
            self.tag(b"START TRANSACTION" if part.words[0] == "START" else b"BEGIN")
        elif part.verb in (Verb.COMMIT, Verb.ROLLBACK) and self._begun and not part.chains:
            self._begun = b""
            self.tag(b"COMMIT" if part.verb is Verb.COMMIT else b"ROLLBACK")
        else:
            return False
        self._exchange.release()
        return True

    def _passing(self, raw: bytes, part: Statement) -> Steps:
        transaction = self.member.transaction
        transaction.note(part)
        yield from passage.passing(part, self._client, self._exchange.send(raw))
        if transaction.unit:
            transaction.close()  # it has only read
        self._exchange.release()

    def _query(self, raw: bytes, parts: Parts, text: str) -> Steps:
        member = self.member
        yield from self.get_ready(parts)
        if is_script(member, parts, autocommit=True):
            yield from self.script(parts, text)
        elif discards_all(member, parts, autocommit=True):
            yield from self.discard_all(parts[0])
        elif (closed := self._deallocated(parts)) is not None:
            yield from self._exchange.send(wire.about(b"C", b"S", closed) + wire.SYNC, quiet=True)
            self.tag(b"DEALLOCATE")
        else:
            yield from self._whole(raw, parts)

    def script(self, parts: Parts, text: str) -> Steps:
        """Run statements one by one, with what they do to transactions."""
        if any(part.verb is Verb.TWO_PHASE for part in parts):
            raise no_two_phase()
        yield from self._extended.close_portals(parts)
        self._text, self._at = text, 0
        script = Script(self.member, self)
        try:
            yield from script.run(parts, text)
        except BaseException:
            if script.is_at_end:
                self._exchange.drop()
            raise

    def _unless_it_fails(self, commit: Steps) -> Steps:
        """Commit, or tell nothing of what was done before."""
        self._commits = True
        try:
            yield from commit
        except BaseException:
            self._exchange.drop()
            raise
        finally:
            self._commits = False

    def _whole(self, raw: bytes, parts: Parts) -> Steps:
        """Run statements that may be sent as they are."""
        refuse_outside(self.member, parts, autocommit=True)
        yield from prepare(self.member, parts, None, self)
        yield from passage.all_passing(parts, self._client, self._exchange.send(raw))
        yield from self.after(parts)
        yield from park(self.member, parts)

    def _settled(self, steps: Steps) -> Steps:
        """Run an operation that is a transaction by itself where none is open."""
        yield from steps
        if self.member.transaction.unit:
            yield from self._extended.close_portals(())
            yield from self._unless_it_fails(self.member.transaction.end_statement())
        self._exchange.release()
        yield from self._keep_settings()

    def get_ready(self, parts: Parts) -> Steps:
        """Bring the backend to where the client left it, by its name where it is asked for."""
        client, transaction = self._client, self.member.transaction
        if self._asks_for_name(parts):
            client.names_itself = True
            name = client.parameters["application_name"]
            client.settings = (*client.settings, ("application_name", name))
            before, transaction.session = transaction.session, Session(client.settings)
            if before is not None:
                transaction.session.touch(before.names)
                transaction.session.values = before.values
        yield from self.member.get_ready()

    def _asks_for_name(self, parts: Parts) -> bool:
        """Whether statements ask for the name that the client has, for the first time.

        Nearly every client has one: for that alone no session changes hands.
        """
        client = self._client
        if client.names_itself or not client.parameters.get("application_name"):
            return False
        return any(_names(part.text) for part in parts)

    def discard_all(self, part: Statement) -> Steps:
        """Run DISCARD ALL; in a transaction the server refuses it."""
        if discards_all(self.member, (part,), autocommit=True):
            run = self._discard_all()
        else:
            run = self._exchange.send(wire.query(b"DISCARD ALL"))
        return (yield from passage.passing(part, self._client, run))

    def _discard_all(self) -> Steps:
        yield from discard_all(self.member)
        self._extended.discard()
        self._client.kept.clear()
        yield from self._restore_given(())
        session = untouched(self._client.settings)
        self.member.transaction.session = self._backend.settings_of = session
        self._settings_changed = True
        self.tag(b"DISCARD ALL")

    def _deallocated(self, parts: Parts) -> bytes | None:
        """Give our name of the one statement that is deallocated by SQL, if a Parse made it."""
        if len(parts) != 1 or parts[0].verb is not Verb.DEALLOCATE:
            return None
        name = parts[0].text.split()[-1].strip('"')
        statement = self._client.statements.remove(name.encode())
        if statement is None:
            return None
        return statement.name if statement.home is self._extended else b"_pgmonkey_none"

    # Settings

    def after(self, parts: Parts) -> Steps:
        """Note what statements have done to the client's session, whatever becomes of them."""
        for part in parts:
            if part.verb in (Verb.SET, Verb.SET_LOCAL) or part.sets_config:
                self._settings_changed = True
            if part.words[0] == "RESET" or (part.verb is Verb.SET and part.words[-1] == "DEFAULT"):
                yield from self._restore_given(part.settings)
            if part.words[:2] == ("DEALLOCATE", "ALL"):
                self._client.statements.clear()

    def _restore_given(self, names: tuple[str, ...]) -> Steps:
        for name, value in self._client.settings:
            if not names or name.lower() in names:
                yield from self._exchange.send(wire.query(assignment(name, value)), quiet=True)

    def _keep_settings(self) -> Steps:
        """Keep what a transaction has left: the client goes on to other tests with it."""
        if not self._settings_changed or self._backend.dead:
            return
        if self.member.open and not self._outside:
            return
        if self._backend.behind:
            yield from self._backend.collect()
        self._settings_changed = False
        client, session = self._client, self.member.transaction.session
        names = sorted(session.names) if session is not None else []
        shown = [n for n in client.reported if client.names_itself or n != "application_name"]
        values = yield from read(self._backend, names + shown)
        client.kept = {n: v for n, v in zip(names, values, strict=False) if v is not None}
        for name, value in zip(shown, values[len(names) :], strict=True):
            if value is not None:
                self._exchange.changed[name] = value

    # Extended queries

    def _run_batch(self, end: Message) -> None:
        synced = end.kind == _SYNC
        batch, self._batch, self._batch_size = self._batch, [], 0
        if self._watches:
            executed = tuple(self._extended.executed(batch))
            if self._is_dealt_with(executed, *batch, end):
                client = self._client
                client.skips = not client.widens
                return
        transaction = self.member.transaction
        if batch or (synced and (transaction.unit or transaction.in_pipeline)):
            self._exchange.has_copied = False
            steps = self._extended.run(batch)
            if not self._operate(self._settled(steps) if synced else self._paused(steps)):
                self._client.skips = True
        if not synced:
            self._client.flush()

    def _end_batch(self) -> None:
        client = self._client
        if not client.skips:
            self._run_batch(_THE_SYNC)
            if client.widens:
                return
            if self._exchange.has_copied:
                # The server has taken this Sync for a part of the COPY.
                self._exchange.has_copied = False
                client.flush()
                return
        client.skips = False
        self._tell_ready()

    def _paused(self, steps: Steps) -> Steps:
        """Keep the turn, and what is not committed, until the client's Sync."""
        yield from steps
        self.member.transaction.in_pipeline = True
        self._exchange.release()


@lru_cache(maxsize=1024)
def _names(text: str) -> bool:
    return any(word in text.lower() for word in _NAMES_ITSELF)
