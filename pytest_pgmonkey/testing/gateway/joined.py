"""A client's session in the test's rolled-back transaction: the second door to the sandbox's core.

What a statement means is asked of the core. Here its messages are sent on, and what the server
answers is given to the client, but for the transaction's own ends, which are virtual.

Whatever stands between two syncs of a client is one transaction, as on a server. A Sync of our own
is harmless in between: the session is inside of a transaction block all the time.
"""

from __future__ import annotations

import weakref
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ...errors import SandboxError
from .. import passage
from ..lexer import Verb, statements
from ..sandbox.core.handover import read
from ..sandbox.core.member import CLOSED
from ..sandbox.core.refusals import no_two_phase
from ..sandbox.core.script import Script, discard_all
from ..sandbox.core.settings import Session, assignment
from ..sandbox.core.statements import (
    CONTROL,
    discards_all,
    is_script,
    park,
    prepare,
    refuse_outside,
)
from . import wire
from .channel import Channel
from .client_statements import ClientStatement
from .reports import AnsweredError, ClientError, error_report, notice_report
from .wire import Answers, Bind, Message, Parse, ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from psycopg.pq.abc import PGresult

    from ..lexer import Statement
    from ..sandbox.core.outer import OuterTransaction
    from ..sandbox.core.settings import WrongSettingError
    from .client import Client

    Steps = Generator[Any, Any, Any]
    Parts = tuple[Statement, ...]

# What a client sends.
_QUERY, _SYNC, _FLUSH, _TERMINATE = b"QSHX"
_PARSE, _BIND, _DESCRIBE, _EXECUTE, _CLOSE = b"PBDEC"
_CALL = ord("F")
_COPY: Final = frozenset(b"dcf")
_COPY_DATA = ord("d")
# What a server answers, as far as it is not passed on as it is.
_PASSED_ON: Final = b"DTtn2IsHWcdV"
_READY, _PARSED, _COMPLETE, _ERROR, _NOTICE, _STATUS, _COPY_IN, _SUSPENDED = b"Z1CENSGs"
_COPY_FAILS: Final = wire.message(b"f", b"the client has gone\0")
_ODD: Final = "surrogateescape"  # of a text that is not in UTF-8
_STATEMENT: Final = ord("S")
_FULL: Final = 32768  # bytes for a client that are sent on without waiting for more
_MOST_QUEUED: Final = 262144  # bytes of a client that are sent to the server without its Sync
_NAMES_ITSELF: Final = ("application_name", "pg_stat_activity", "pg_settings")
_NOTIFICATION: Final = ord("A")


class JoinedSession:
    """What a client works in as long as one test runs."""

    def __init__(
        self, client: Client, outer: OuterTransaction, still_leads: Callable[[], bool]
    ) -> None:
        self._client: Final = client
        self._still_leads: Final = still_leads
        self.member: Final = outer.join(client.origin, client.settings)
        self.member.serve(weakref.ref(self))
        if client.kept:
            session = Session(client.settings)
            session.touch(client.kept)
            session.values = dict(client.kept)
            self.member.transaction.session = session
        backend = self.member.backend
        self._backend: Final = backend
        self._channel: Final = Channel(backend.pgconn, client, self._abandoned)
        self._batch: list[Message] = []
        self._batch_size = 0
        self._group = _Group()
        self._portals: dict[bytes, ClientStatement] = {}
        self._named_portals: set[bytes] = set()
        self._held = b""  # a CommandComplete that an error may take the place of
        self._settings_changed = False
        self._told: dict[str, str] = {}  # by ParameterStatus, since the transaction began
        self._text, self._at = "", 0  # of a script, and how far it has run
        self._copied = False

    # What its member asks

    @property
    def has_prepared(self) -> bool:
        """Whether its client has prepared statements in the session."""
        return self._client.statements.prepared_in(self)

    def mark_closed(self, *, broken: bool) -> None:
        """Note that the test has ended; the client finds out by its next statement."""

    def blame(self, wrong: WrongSettingError) -> Exception:
        """Give the error of a setting that the client has asked for when it connected."""
        return wrong.error or psycopg.OperationalError("a setting of the connection is overwritten")

    def deliver_notice(self, result: PGresult) -> None:
        """Pass a notice on that a command of the sandbox's has caused."""
        self._client.out += notice_report(result)

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
        self._client.out += wire.notice(sqlstate, message)

    def tag(self, tag: bytes) -> None:
        """Tell of a command that was not sent as it is."""
        self._complete(wire.complete(tag))

    def run(self, text: str) -> Steps:
        """Send one statement of a script."""
        at = self._text.find(text, self._at)
        self._at = at + len(text)
        try:
            yield from self._exchange(wire.query(_encoded(text)))
        except AnsweredError as error:
            error.offset = at
            raise
        yield from self._after_settings(statements(text))

    # The client's messages

    @property
    def is_over(self) -> bool:
        """Whether the client leads elsewhere from now."""
        member = self.member
        if member.ended or member.returned:
            return True
        return not (member.open or member.transaction.unit or self._still_leads())

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
        member = self.member
        if member.busy and member.owns_running_statement:
            self._backend.expects_cancels = True
            self._backend.send_cancel()

    def _abandoned(self) -> None:
        self._client.dead = True
        self.cancel()

    def _take(self, message: Message) -> None:
        kind = message.kind
        if kind == _SYNC:
            self._end_batch()
        elif self._client.skips or kind in _COPY:
            return
        elif kind in (_QUERY, _CALL):
            self._simple(message)
        elif kind == _FLUSH:
            self._run_batch(synced=False)
        else:
            self._batch.append(message)
            self._batch_size += len(message.raw)
            if self._batch_size > _MOST_QUEUED:
                self._run_batch(synced=False)

    def _operate(self, steps: Steps) -> bool:
        """Run an operation with the turn; gives whether it has succeeded."""
        member, wait = self.member, self._backend.root.wait
        try:
            if not member.turn.take(member) or member.turn.displaced is not None:
                member.claim_turn(wait)
            try:
                member.start()
                if member.ended:
                    raise ClientError("57P01", member.ended)
                member.transaction.in_pipeline = False
                wait(steps)
            except AnsweredError as error:
                self._backend.expects_cancels |= error.sqlstate == "57014"
                raise
            except psycopg.Error as error:
                member.explain(error)
                raise
            except (SandboxError, ClientError, ProtocolViolation):
                raise
            except BaseException:
                self._backend.unsettled = True
                raise
            finally:
                member.after()
        except (
            AnsweredError,
            ClientError,
            ProtocolViolation,
            SandboxError,
            psycopg.Error,
        ) as error:
            self._held = b""
            offset = Script.shift(error) if isinstance(error, psycopg.Error) else 0
            self._client.out += error_report(error, offset=offset)
            return False
        return True

    def _tell_ready(self) -> None:
        member = self.member
        status = "E" if member.failed else "T" if member.open else "I"
        self._client.tell_ready(ord(status))

    # Simple queries

    def _simple(self, message: Message) -> None:
        text = "CALL" if message.kind == _CALL else message.raw[5:-1].decode(errors=_ODD)
        parts = statements(text)
        if parts:
            self._operate(self._settled(self._query(message.raw, parts, text)))
        else:
            self._client.out += wire.EMPTY_QUERY
        self._tell_ready()

    def _query(self, raw: bytes, parts: Parts, text: str) -> Steps:
        member = self.member
        yield from self._get_ready(parts)
        if is_script(member, parts, autocommit=True):
            if any(part.verb is Verb.TWO_PHASE for part in parts):
                raise no_two_phase()
            yield from self._close_portals(parts)
            self._text, self._at = text, 0
            yield from Script(member, self).run(parts, text)
        elif discards_all(member, parts, autocommit=True):
            yield from passage.passing(parts[0], self._client, self._discard_all())
        elif (closed := self._deallocated(parts)) is not None:
            yield from self._exchange(wire.about(b"C", b"S", closed) + wire.SYNC)
            self.tag(b"DEALLOCATE")
        else:
            yield from self._whole(raw, parts)

    def _whole(self, raw: bytes, parts: Parts) -> Steps:
        """Run statements that may be sent as they are."""
        refuse_outside(self.member, parts, autocommit=True)
        yield from prepare(self.member, parts, None, self)
        run = self._exchange(raw)
        for part in parts:
            run = passage.passing(part, self._client, run)
        yield from run
        yield from self._after_settings(parts)
        yield from park(self.member, parts)

    def _settled(self, steps: Steps) -> Steps:
        """Run an operation that is a transaction by itself where none is open."""
        yield from steps
        if self.member.transaction.unit:
            yield from self._close_portals(())
            yield from self.member.transaction.end_statement()
        self._release_held()
        yield from self._keep_settings()

    def _get_ready(self, parts: Parts) -> Steps:
        client, transaction = self._client, self.member.transaction
        name = client.parameters.get("application_name")
        if name and not client.names_itself and any(_asks_for_name(part) for part in parts):
            client.names_itself = True
            client.settings = (*client.settings, ("application_name", name))
            before, transaction.session = transaction.session, Session(client.settings)
            if before is not None:
                transaction.session.touch(before.names)
                transaction.session.values = before.values
        yield from self.member.get_ready()

    def _discard_all(self) -> Steps:
        yield from discard_all(self.member)
        self._client.statements.clear()
        self._client.kept.clear()
        self._named_portals.clear()
        yield from self._restore_given(())
        self.tag(b"DISCARD ALL")

    def _deallocated(self, parts: Parts) -> bytes | None:
        """Give our name of the one statement that is deallocated by SQL, if a Parse made it."""
        if len(parts) != 1 or parts[0].verb is not Verb.DEALLOCATE:
            return None
        words = parts[0].text.split()
        statement = self._client.statements.remove(words[-1].strip('"').encode())
        if statement is None:
            if words[-1].upper() == "ALL":
                self._client.statements.clear()
            return None
        return statement.name if statement.home is self else b"_pgmonkey_none"

    # Settings

    def _after_settings(self, parts: Parts) -> Steps:
        """Note what statements have set, and give back what the client has connected with."""
        for part in parts:
            if part.verb is Verb.SET or part.sets_config:
                self._settings_changed = True
            if part.words[0] == "RESET":
                yield from self._restore_given(part.settings)

    def _restore_given(self, names: tuple[str, ...]) -> Steps:
        for name, value in self._client.settings:
            if not names or name.lower() in names:
                yield from self._backend.run(assignment(name, value))

    def _keep_settings(self) -> Steps:
        """Keep what a transaction has left: the client goes on to other tests with it."""
        member = self.member
        session = member.transaction.session
        if not self._settings_changed or member.open or session is None or self._backend.dead:
            return
        if self._backend.behind:
            yield from self._backend.collect()
        self._settings_changed = False
        names = sorted(session.names)
        values = yield from read(self._backend, names)
        self._client.kept = {n: v for n, v in zip(names, values, strict=True) if v is not None}
        yield from self._tell_settings()

    def _tell_settings(self) -> Steps:
        """Tell the client anew of what it was told of, and a rollback has undone."""
        told, self._told = self._told, {}
        values = yield from read(self._backend, list(told)) if told else _nothing()
        for name, value in zip(told, values, strict=True):
            if value is not None and value != told[name]:
                self._client.out += wire.parameter_status(name, value)

    # Extended queries

    def _run_batch(self, *, synced: bool) -> None:
        batch, self._batch, self._batch_size = self._batch, [], 0
        if batch or (synced and self.member.transaction.unit):
            self._copied = False
            steps = self._extended(batch)
            if not self._operate(self._settled(steps) if synced else self._paused(steps)):
                self._client.skips = True
        if not synced:
            self._client.flush()

    def _end_batch(self) -> None:
        client = self._client
        if not client.skips:
            self._run_batch(synced=True)
            if self._copied:
                self._copied = False  # the server has taken this Sync for a part of the COPY
                client.flush()
                return
        client.skips = False
        self._tell_ready()

    def _paused(self, steps: Steps) -> Steps:
        """Keep the turn, and what is not committed, until the client's Sync."""
        yield from steps
        self.member.transaction.in_pipeline = True
        self._release_held()

    def _extended(self, batch: list[Message]) -> Steps:
        self._group = _Group()
        try:
            for message in batch:
                yield from self._queue(message)
            yield from self._send_group()
        except BaseException:
            for statement, told in self._group.parsing:
                statement.home = None
                if told:
                    self._client.statements.remove(statement.parse.name)
            raise

    def _queue(self, message: Message) -> Steps:
        kind, raw, group = message.kind, message.raw, self._group
        if kind == _PARSE:
            yield from self._parse(ClientStatement(Parse.read(raw)))
        elif kind == _BIND:
            yield from self._bind(Bind.read(raw))
        elif kind == _EXECUTE:
            yield from self._execute(raw)
        elif kind == _DESCRIBE:
            yield from self._describe(raw)
        elif kind == _CLOSE:
            yield from self._close(raw)
        else:
            raise ClientError("08P01", f"invalid frontend message type {kind}")
        if group.size > _MOST_QUEUED:
            yield from self._send_group()

    def _parse(self, statement: ClientStatement) -> Steps:
        client, name = self._client, statement.parse.name
        if name and client.statements.get(name) is not None:
            shown = name.decode(errors="replace")
            raise ClientError("42P05", f'prepared statement "{shown}" already exists')
        client.statements.add(statement)
        if _is_control(statement):
            yield from self._send_group()
            client.out += wire.PARSE_COMPLETE
        else:
            self._group.parse(statement, self, told=True)

    def _settle_statement(self, name: bytes) -> ClientStatement:
        """Give a statement that this session knows from now on."""
        statement = self._client.statements.get(name)
        if statement is None:
            shown = f'prepared statement "{name.decode(errors="replace")}"' if name else ""
            shown = shown or "unnamed prepared statement"
            raise ClientError("26000", f"{shown} does not exist")
        fresh = statement.home is self if name else self._group.unnamed is statement
        if not fresh and not _is_control(statement):
            self._group.parse(statement, self, told=False)
        return statement

    def _bind(self, bind: Bind) -> Steps:
        statement = self._settle_statement(bind.statement)
        self._portals[bind.portal] = statement
        if _is_control(statement):
            yield from self._send_group()
            self._client.out += wire.BIND_COMPLETE
            return
        if not all(part.plain for part in statement.parts):
            # A command of our own would end the unnamed portal.
            yield from self._send_group()
            yield from self._get_ready(statement.parts)
            refuse_outside(self.member, statement.parts, autocommit=True)
            yield from prepare(self.member, statement.parts, bind.texts(), self)
            self._settle_statement(bind.statement)
        if bind.portal:
            self._named_portals.add(bind.portal)
            self.member.transaction.pin()
        self._group.add(bind.of(statement.name))

    def _describe(self, raw: bytes) -> Steps:
        kind, name = wire.target(raw)
        if kind == _STATEMENT:
            statement: ClientStatement | None = self._settle_statement(name)
        else:
            statement = self._portals.get(name)
        if statement is not None and _is_control(statement):
            yield from self._send_group()
            if kind == _STATEMENT:
                self._client.out += wire.NO_PARAMETERS
            self._client.out += wire.NO_DATA
        elif statement is not None and kind == _STATEMENT:
            self._group.add(wire.about(b"D", b"S", statement.name))
        else:
            self._group.add(raw)

    def _close(self, raw: bytes) -> Steps:
        kind, name = wire.target(raw)
        if kind == _STATEMENT:
            statement = self._client.statements.remove(name)
            known = statement is not None and statement.home is self and statement.name
            self._group.add(wire.about(b"C", b"S", known or b"_pgmonkey_none"))
        else:
            self._portals.pop(name, None)
            self._named_portals.discard(name)
            self._group.add(raw)
        yield from ()

    def _execute(self, raw: bytes) -> Steps:
        portal = wire.cstring(raw, 5)[0]
        statement = self._portals.get(portal)
        parts = statement.parts if statement is not None else ()
        if statement is not None and _is_control(statement):
            yield from self._send_group()
            yield from self._control(parts[0])
            return
        self._group.execute(raw, parts)
        if not all(part.plain for part in parts):
            yield from self._send_group()
            yield from self._after_settings(parts)
            yield from park(self.member, parts)

    def _control(self, part: Statement) -> Steps:
        """Begin or end a transaction."""
        member, transaction = self.member, self.member.transaction
        if part.verb is Verb.TWO_PHASE:
            raise no_two_phase()
        yield from self._get_ready((part,))
        if transaction.unit and part.verb is Verb.BEGIN:
            transaction.adopt_unit(part.text.encode())
            self.tag(b"START TRANSACTION" if part.words[0] == "START" else b"BEGIN")
        else:
            yield from self._close_portals((part,))
            self._text, self._at = part.text, 0
            yield from Script(member, self).run((part,), part.text)
        self._release_held()

    def _close_portals(self, parts: Parts) -> Steps:
        """Close the portals that a commit ends."""
        ends = not parts or any(part.verb is Verb.COMMIT for part in parts)
        if ends and self._named_portals and self._backend.in_transaction:
            closes = [wire.about(b"C", b"P", name) for name in self._named_portals]
            self._named_portals.clear()
            yield from self._exchange(b"".join(closes) + wire.SYNC, quiet=True)

    def _send_group(self) -> Steps:
        """Send what is queued, with a Sync of our own, and pass the answers on."""
        group, transaction = self._group, self.member.transaction
        if not group.out:
            return
        yield from self._get_ready(tuple(group.parts))
        if not transaction.open and not transaction.unit:
            yield from transaction.begin_unit()
        for part in group.parts:
            transaction.note(part)
        parts, data = group.take()
        run = self._exchange(data + wire.SYNC)
        for part in parts:
            run = passage.passing(part, self._client, run)
        yield from run

    # The server

    def _exchange(self, data: bytes, *, quiet: bool = False) -> Steps:
        """Send messages and pass on what is answered; raises AnsweredError.

        The last CommandComplete is held back: what a commit says may take its place.
        """
        self._channel.begin()
        self._backend.past_libpq = True
        self._channel.send(data)
        failed, status = self._answers(extended=data[0] != _QUERY, quiet=quiet)
        self._backend.past_libpq = False
        if _LIBPQ_STATUS[status] != self._backend.pgconn.transaction_status:
            yield from self._backend.run(b"")
        if failed is not None:
            raise failed

    def _answers(self, *, extended: bool, quiet: bool) -> tuple[AnsweredError | None, int]:
        """Pass answers on up to the server's ReadyForQuery; gives the error and the status."""
        client, channel, group = self._client, self._channel, self._group
        answers, failed = Answers(_PASSED_ON), None
        while True:
            pieces = iter(answers.feed(channel.receive()))
            for piece in pieces:
                kind = piece[0]
                if kind == _READY:
                    return failed, piece[5]
                if kind == _ERROR:
                    failed = AnsweredError(piece)
                elif kind == _COMPLETE:
                    self._complete(piece)
                elif kind == _COPY_IN:
                    self._out(piece)
                    pieces = chain(pieces, self._copy_in(answers, extended=extended))
                elif kind == _PARSED and not group.parsed():
                    continue
                elif not quiet and kind != _NOTIFICATION:
                    self._pass_on(kind, piece)
            if len(client.out) > _FULL:
                client.flush()

    def _pass_on(self, kind: int, piece: bytes) -> None:
        if kind == _STATUS:
            name, value = piece[5:-1].split(b"\0")
            self._told[name.decode()] = value.decode()
        elif kind == _SUSPENDED:
            self.member.transaction.pin()  # others would make a portal of the same name
        self._out(piece)

    def _out(self, piece: bytes) -> None:
        if self._held:
            self._release_held()
        self._client.out += piece

    def _complete(self, piece: bytes) -> None:
        self._release_held()
        self._held = piece

    def _release_held(self) -> None:
        self._client.out += self._held
        self._held = b""

    def _copy_in(self, answers: Answers, *, extended: bool) -> list[bytes]:
        """Pass on what a client copies in, to its end or an early error; gives what it read."""
        client, channel = self._client, self._channel
        self._copied = extended
        client.flush()
        found: list[bytes] = []
        while not found and self._pass_copy_on():
            if channel.wait_with_client():
                for piece in answers.feed(channel.receive()):
                    if piece[0] in (_NOTICE, _STATUS):
                        self._out(piece)
                    else:
                        found.append(piece)
            elif not client.read_waiting():
                client.dead = True
                channel.send(_COPY_FAILS)
                break
        if extended:
            channel.send(wire.SYNC)  # it has read the first one as part of the COPY
        return found

    def _next_of_copy(self) -> Message | None:
        try:
            return self._client.next_message()
        except ProtocolViolation as violation:
            self._client.refuse(violation)
            self._client.dead = True
            return Message(_COPY_FAILS[0], _COPY_FAILS)

    def _pass_copy_on(self) -> bool:
        """Send the server what has come of the client's COPY; gives whether more will."""
        while (message := self._next_of_copy()) is not None:
            if message.kind not in (_SYNC, _FLUSH):
                self._channel.send(message.raw)
                if message.kind != _COPY_DATA:
                    return False
        return True


class _Group:
    """Messages that go to the server together, and what is known of their answers."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.size = 0
        self.parts: list[Statement] = []
        self.parsing: deque[tuple[ClientStatement, bool]] = deque()
        self.unnamed: ClientStatement | None = None

    def add(self, raw: bytes) -> None:
        """Queue a message."""
        self.out.append(raw)
        self.size += len(raw)

    def parse(self, statement: ClientStatement, home: object, *, told: bool) -> None:
        """Queue a Parse, of whose success the client is told or not."""
        self.parsing.append((statement, told))
        if not statement.parse.name:
            self.unnamed = statement
        self.add(statement.settle(home))

    def execute(self, raw: bytes, parts: Parts) -> None:
        """Queue an Execute of these statements."""
        self.parts += parts
        self.add(raw)

    def take(self) -> tuple[list[Statement], bytes]:
        """Give the statements that are executed, and all messages."""
        parts, data = self.parts, b"".join(self.out)
        self.parts, self.out, self.size, self.unnamed = [], [], 0, None
        return parts, data

    def parsed(self) -> bool:
        """Note that a Parse has succeeded; gives whether the client is told."""
        return self.parsing.popleft()[1]


_LIBPQ_STATUS: Final = {
    ord("I"): pq.TransactionStatus.IDLE,
    ord("T"): pq.TransactionStatus.INTRANS,
    ord("E"): pq.TransactionStatus.INERROR,
}


def _encoded(text: str) -> bytes:
    return text.encode(errors=_ODD)


def _is_control(statement: ClientStatement) -> bool:
    parts = statement.parts
    return len(parts) == 1 and parts[0].verb in CONTROL


def _asks_for_name(part: Statement) -> bool:
    text = part.text.lower()
    return any(word in text for word in _NAMES_ITSELF)


def _nothing() -> Steps:
    yield from ()
    return []
