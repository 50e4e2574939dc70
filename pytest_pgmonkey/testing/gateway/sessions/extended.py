"""A client's extended queries in the test's transaction: statements, portals and batches.

Whatever stands between two syncs of a client is one transaction, as on a server. A Sync of our own
is harmless in between: the session is inside of a transaction block all the time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

import psycopg

from ... import passage
from ...sandbox.core.refusals import no_two_phase
from ...sandbox.core.statements import Door, park, prepare, refuse_outside, warn_outside
from ...sql.lexer import Verb
from ..protocol import wire
from ..protocol.client_statements import ClientStatement
from ..protocol.reports import ClientError
from ..protocol.wire import Bind, Message, Parse
from .exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...sandbox.core.member import Member
    from ...sql.lexer import Statement
    from ..protocol.client import Client

    Steps = Generator[Any, Any, Any]
    Parts = tuple[Statement, ...]

_PARSE, _BIND, _DESCRIBE, _EXECUTE, _CLOSE = b"PBDEC"
_STATEMENT: Final = ord("S")


class Session(Door, Protocol):
    """What a batch asks of the session that it is sent in."""

    def get_ready(self, parts: Parts) -> Steps:
        """Bring the backend to where the client left it."""

    def after(self, parts: Parts) -> Steps:
        """Note what statements have done to the client's session."""

    def script(self, parts: Parts, text: str) -> Steps:
        """Run statements that speak of transactions."""

    def discard_all(self, part: Statement) -> Steps:
        """Run DISCARD ALL."""

    def tag(self, tag: bytes) -> None:
        """Tell of a command that was not sent as it is."""


class Extended:
    """The part of a client's session that speaks the extended protocol."""

    def __init__(self, session: Session, client: Client, member: Member) -> None:
        self._session: Final = session
        self._client: Final = client
        self._member: Final = member
        self._group = _Group()
        self._portals: dict[bytes, ClientStatement] = {}
        self._named_portals: set[bytes] = set()
        self._refused: dict[bytes, psycopg.Error] = {}
        self.exchange: Final = Exchange(client, member, self._parsed)

    def _parsed(self) -> bool:
        return self._group.parsed()

    def run(self, batch: list[Message]) -> Steps:
        """Send a batch of messages on, and answer those that begin or end transactions."""
        self._group = _Group()
        try:
            for message in batch:
                yield from self._take(message)
            yield from self._send_group()
            self.exchange.release()
        except BaseException:
            for statement, told in self._group.parsing:
                statement.home = None
                if told:
                    self._client.statements.remove(statement.parse.name)
            raise

    def executed(self, batch: list[Message]) -> list[Statement]:
        """Give the statements that a batch executes, as far as they are known."""
        statements: dict[bytes, ClientStatement | None] = {}
        portals: dict[bytes, ClientStatement | None] = {}
        parts: list[Statement] = []
        for kind, raw in batch:
            if kind == _PARSE:
                parse = Parse.read(raw)
                statements[parse.name] = ClientStatement(parse)
            elif kind == _BIND:
                bind = Bind.read(raw)
                known = self._client.statements.get(bind.statement)
                portals[bind.portal] = statements.get(bind.statement, known)
            elif kind == _EXECUTE:
                portal = wire.cstring(raw, 5)[0]
                statement = portals.get(portal, self._portals.get(portal))
                parts += statement.parts if statement is not None else ()
        return parts

    def _take(self, message: Message) -> Steps:
        try:
            waits = self._queue(message)
        except (ClientError, wire.ProtocolViolation):
            yield from self._send_group()  # what came before is answered before
            raise
        if waits is not None:
            yield from waits

    def _queue(self, message: Message) -> Steps | None:
        """Queue a message; gives what must be waited for, if anything."""
        kind, raw = message.kind, message.raw
        if kind == _BIND:
            return self._bind(Bind.read(raw))
        if kind == _EXECUTE:
            return self._execute(raw)
        if kind == _DESCRIBE:
            return self._describe(raw)
        if kind == _PARSE:
            return self._parse(ClientStatement(Parse.read(raw)))
        if kind == _CLOSE:
            return self._close(raw)
        raise ClientError("08P01", f"invalid frontend message type {kind}")

    def _parse(self, statement: ClientStatement) -> Steps | None:
        client, name = self._client, statement.parse.name
        if name and client.statements.get(name) is not None:
            shown = name.decode(errors="replace")
            raise ClientError("42P05", f'prepared statement "{shown}" already exists')
        client.statements.add(statement)
        if statement.is_control:
            return self._answer(wire.PARSE_COMPLETE)
        self._group.parse(statement, self, told=True)
        return None

    def _answer(self, data: bytes) -> Steps:
        """Answer a message ourselves, after those that the server is to answer."""
        yield from self._send_group()
        self.exchange.tell(data)

    def _settle_statement(self, name: bytes) -> ClientStatement:
        """Give a statement that this session knows from now on."""
        statement = self._client.statements.get(name)
        if statement is None:
            shown = f'prepared statement "{name.decode(errors="replace")}"' if name else ""
            shown = shown or "unnamed prepared statement"
            raise ClientError("26000", f"{shown} does not exist")
        fresh = statement.home is self if name else self._group.unnamed is statement
        if not fresh and not statement.is_control:
            self._group.parse(statement, self, told=False)
        return statement

    def _bind(self, bind: Bind) -> Steps | None:
        statement = self._settle_statement(bind.statement)
        self._portals[bind.portal] = statement
        self._refused.pop(bind.portal, None)
        if statement.is_control:
            return self._answer(wire.BIND_COMPLETE)
        if bind.portal:
            self._named_portals.add(bind.portal)
            self._member.transaction.pin()
        if not statement.is_plain:
            return self._prepare(bind, statement)
        self._group.add(bind.of(statement.name))
        return None

    def _prepare(self, bind: Bind, statement: ClientStatement) -> Steps:
        """Run what comes before a statement; here, as it would end the unnamed portal."""
        parts = statement.parts
        is_first = not (self._member.transaction.unit or self._group.parts)
        yield from self._send_group()
        yield from self._session.get_ready(parts)
        try:
            refuse_outside(self._member, parts, autocommit=True)
        except psycopg.Error as error:
            self._refused[bind.portal] = error  # which is told when it is executed
        else:
            if is_first and self._member.transaction.unit:  # begun by the Parse alone
                warn_outside(self._member, parts, self._session)
            yield from prepare(self._member, parts, bind.texts(), self._session)
        self._settle_statement(bind.statement)
        self._group.add(bind.of(statement.name))

    def _describe(self, raw: bytes) -> Steps | None:
        kind, name = wire.target(raw)
        of_statement = kind == _STATEMENT
        statement = self._settle_statement(name) if of_statement else self._portals.get(name)
        if statement is not None and statement.is_control:
            return self._answer((wire.NO_PARAMETERS if of_statement else b"") + wire.NO_DATA)
        if statement is not None and of_statement:
            raw = wire.about(b"D", b"S", statement.name)
        self._group.add(raw)
        return None

    def _close(self, raw: bytes) -> Steps | None:
        kind, name = wire.target(raw)
        if kind == _STATEMENT:
            statement = self._client.statements.remove(name)
            known = statement is not None and statement.home is self and statement.name
            raw = wire.about(b"C", b"S", known or b"_pgmonkey_none")
        else:
            self._portals.pop(name, None)
            self._named_portals.discard(name)
        self._group.add(raw)
        return None

    def _execute(self, raw: bytes) -> Steps | None:
        portal = wire.cstring(raw, 5)[0]
        statement = self._portals.get(portal)
        if self._refused and portal in self._refused:
            return self._refuse(self._refused.pop(portal))
        if statement is not None and statement.is_control:
            return self._control(statement.parts[0])
        self._group.execute(raw, statement.parts if statement is not None else ())
        if statement is not None and not statement.is_plain:
            return self._finish(statement.parts)
        return None

    def _refuse(self, error: psycopg.Error) -> Steps:
        yield from self._send_group()
        raise error

    def _finish(self, parts: Parts) -> Steps:
        """Run what comes after a statement."""
        yield from self._send_group()
        yield from self._session.after(parts)
        yield from park(self._member, parts)

    def _control(self, part: Statement) -> Steps:
        """Begin or end a transaction."""
        yield from self._send_group()
        if part.verb is Verb.TWO_PHASE:
            raise no_two_phase()
        yield from self._session.get_ready((part,))
        if part.verb is Verb.DISCARD:
            yield from self._session.discard_all(part)
        else:
            yield from self._session.script((part,), part.text)
        self.exchange.release()

    def close_portals(self, parts: Parts) -> Steps:
        """Close the portals that a commit ends."""
        ends = not parts or any(part.verb is Verb.COMMIT for part in parts)
        if ends and self._named_portals and self._member.backend.in_transaction:
            closes = [wire.about(b"C", b"P", name) for name in self._named_portals]
            self._named_portals.clear()
            yield from self.exchange.send(b"".join(closes) + wire.SYNC, quiet=True)

    def _send_group(self) -> Steps:
        """Send what is queued, with a Sync of our own, and pass the answers on."""
        group, transaction = self._group, self._member.transaction
        if not group.out:
            return
        yield from self._session.get_ready(tuple(group.parts))
        if not transaction.open and not transaction.unit:
            yield from transaction.begin_unit()
        for part in group.parts:
            transaction.note(part)
        parts, data = group.take()
        yield from passage.all_passing(parts, self._client, self.exchange.send(data + wire.SYNC))

    def discard(self) -> None:
        """Forget all statements and portals."""
        self._client.statements.clear()
        self._portals.clear()
        self._named_portals.clear()


class _Group:
    """Messages that go to the server together, and what is known of their answers."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.parts: list[Statement] = []
        self.parsing: deque[tuple[ClientStatement, bool]] = deque()
        self.unnamed: ClientStatement | None = None

    def add(self, raw: bytes) -> None:
        """Queue a message."""
        self.out.append(raw)

    def parse(self, statement: ClientStatement, home: object, *, told: bool) -> None:
        """Queue a Parse, of whose success the client is told or not."""
        self.parsing.append((statement, told))
        if not statement.parse.name:
            self.unnamed = statement
        self.add(statement.settle(home, shared=True))

    def execute(self, raw: bytes, parts: Parts) -> None:
        """Queue an Execute of these statements."""
        self.parts += parts
        self.add(raw)

    def take(self) -> tuple[list[Statement], bytes]:
        """Give the statements that are executed, and all messages."""
        parts, data = self.parts, b"".join(self.out)
        self.parts, self.out, self.unnamed = [], [], None
        return parts, data

    def parsed(self) -> bool:
        """Note that a Parse has succeeded; gives whether the client is told."""
        return self.parsing.popleft()[1]
