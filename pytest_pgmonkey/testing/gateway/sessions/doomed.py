"""What a client is in whose transaction has ended with its test, until it ends it itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...sql.lexer import Verb, statements
from ..protocol import wire
from ..protocol.client_statements import ClientStatement
from ..protocol.wire import Bind, Parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...sql.lexer import Statement
    from ..protocol.client import Client
    from ..protocol.wire import Message

_ENDED: Final = wire.failure(
    "25P02",
    "current transaction is aborted: the test in which it began has ended, and with it what the "
    "transaction had done",
)
_SYNC, _TERMINATE, _FLUSH, _STATEMENT = b"SXHS"


class DoomedSession:
    """Refuses everything but the end of the transaction."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._portals: dict[bytes, ClientStatement | None] = {}
        self.is_over = False

    def serve(self) -> bool:
        """Serve until the transaction is ended; gives whether the client is still there."""
        client = self._client
        while not self.is_over:
            message = client.receive()
            if message is None or message.kind == _TERMINATE:
                return False
            self._take(message)
        return True

    def close(self) -> None:
        """There is nothing to close."""

    def cancel(self) -> None:
        """There is nothing to cancel."""

    def _take(self, message: Message) -> None:
        client = self._client
        if message.kind == _SYNC:
            client.skips = False
            self._tell_ready()
        elif message.kind == _FLUSH:
            client.flush()
        elif not client.skips:
            answer = self._answers().get(message.kind)
            if answer is not None:
                answer(message.raw)

    def _answers(self) -> dict[int, Callable[[bytes], None]]:
        return dict(
            zip(
                b"QPBDEC",
                (self._query, self._parse, self._bind, self._describe, self._execute, self._close),
                strict=True,
            )
        )

    def _tell_ready(self) -> None:
        self.is_over = not self._client.doomed
        self._client.tell_ready(ord("E" if self._client.doomed else "I"))

    def _refuse(self) -> None:
        self._client.out += _ENDED
        self._client.skips = True

    def _end(self) -> None:
        self._client.out += wire.complete(b"ROLLBACK")
        self._client.doomed = False
        self._client.status = ord("I")

    def _query(self, raw: bytes) -> None:
        text = raw[5:-1].decode(errors="surrogateescape")
        parts = statements(text)
        if not parts:
            self._client.out += wire.EMPTY_QUERY
        elif not _ends(parts[0]):
            self._client.out += _ENDED
        else:
            self._end()
            if len(parts) > 1:
                self._go_on(parts[0].text, text)
                return
        self._tell_ready()

    def _go_on(self, first: str, text: str) -> None:
        """Leave the rest of a script to another session."""
        done = text.index(";", text.index(first) + len(first)) + 1
        rest = " " * done + text[done:]  # so that positions stay as they are
        raw = wire.query(rest.encode(errors="surrogateescape"))
        self._client.put_back(wire.Message(raw[0], raw))
        self.is_over = True

    def _parse(self, raw: bytes) -> None:
        statement = ClientStatement(Parse.read(raw))
        if not _is_end(statement):
            self._refuse()
            return
        self._client.statements.add(statement)
        self._client.out += wire.PARSE_COMPLETE

    def _bind(self, raw: bytes) -> None:
        bind = Bind.read(raw)
        statement = self._client.statements.get(bind.statement)
        self._portals[bind.portal] = statement
        if _is_end(statement):
            self._client.out += wire.BIND_COMPLETE
        else:
            self._refuse()

    def _describe(self, raw: bytes) -> None:
        kind, name = wire.target(raw)
        of_statement = kind == _STATEMENT
        found = self._client.statements.get(name) if of_statement else self._portals.get(name)
        if _is_end(found):
            self._client.out += (wire.NO_PARAMETERS if of_statement else b"") + wire.NO_DATA
        else:
            self._refuse()

    def _execute(self, raw: bytes) -> None:
        if _is_end(self._portals.get(wire.cstring(raw, 5)[0])) and self._client.doomed:
            self._end()
        else:
            self._refuse()

    def _close(self, raw: bytes) -> None:
        kind, name = wire.target(raw)
        if kind == _STATEMENT:
            self._client.statements.remove(name)
        self._client.out += wire.CLOSE_COMPLETE


def _ends(part: Statement) -> bool:
    return part.verb in (Verb.COMMIT, Verb.ROLLBACK) and not part.chains


def _is_end(statement: ClientStatement | None) -> bool:
    return statement is not None and len(statement.parts) == 1 and _ends(statement.parts[0])
