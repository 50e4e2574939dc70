"""A client's session in a database of its own: its bytes go to a real session and back.

Only what of a client outlives the session is looked after: statements that it has prepared in an
earlier one are prepared again where it uses them, and settings that it has left are set.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ... import passage
from ...sandbox.core.settings import config_calls
from ...sandbox.core.statements import CONTROL
from ...sql.leftovers import Leftovers
from ...sql.lexer import Verb, statements
from ..protocol import wire
from ..protocol.client_statements import ClientStatement
from ..protocol.greeting import with_settings
from ..protocol.wire import Answers, Bind, Parse
from .channel import plain_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from ...sql.lexer import Statement
    from ..protocol.client import Client
    from ..protocol.wire import Message

_QUERY, _SYNC, _CALL, _TERMINATE = b"QSFX"
_PARSE, _BIND, _DESCRIBE, _EXECUTE, _CLOSE, _STATEMENT = b"PBDECS"
_PASSED_ON: Final = b"DTtn2IsHWcdVCN3G"
_READY, _PARSED, _ERROR, _STATUS = b"Z1ES"
_CHUNK: Final = 65536
_IDLE: Final = ord("I")
_OPEN: Final = ord("T")
_PATIENCE: Final = 2.0  # seconds for its thread to close a session
_FULL: Final = 1 << 20  # bytes that one side may be behind the other


class RelayedSession:
    """A client's session of its own with a server.

    Raises psycopg.Error or SandboxError where it cannot be had.
    """

    def __init__(
        self, client: Client, conninfo: Mapping[str, str], still_leads: Callable[[], bool]
    ) -> None:
        self._client: Final = client
        self._still_leads: Final = still_leads
        self._begun, client.begun = client.begun, b""
        self._is_carried = bool(self._begun)
        self._left = Leftovers()
        # As the client's own: RESET goes back to them.
        keywords: Any = {
            **conninfo,
            "application_name": client.parameters.get("application_name", ""),
            "options": with_settings(conninfo.get("options", ""), client.settings),
        }
        self._conn: Final = psycopg.connect(**keywords, autocommit=True, prepare_threshold=None)
        try:
            self._fd: Final = plain_socket(self._conn.pgconn)
            self._set_up()
        except BaseException:
            self._conn.close()
            raise
        self._answers = Answers(_PASSED_ON)
        self._unsent = b""
        # Parse messages that are not answered, and whether the client is; `None` for each Sync.
        self._parsing: deque[tuple[ClientStatement, bool] | None] = deque()
        self._unanswered = 0  # messages after which the server tells that it is ready
        self._portals: dict[bytes, ClientStatement | None] = {}
        self._unnamed: ClientStatement | None = None
        self._closed = threading.Event()
        self._changed: set[str] = set()  # settings that a statement has perhaps set
        self._params: dict[bytes, list[str | None]] = {}

    def _set_up(self) -> None:
        kept = self._client.kept
        with self._conn.cursor() as cursor:
            for name, value in sorted(kept.items(), key=lambda item: item[0] == "role"):
                cursor.execute("SELECT pg_catalog.set_config(%s, %s, false)", [name, value])
            if self._begun:
                cursor.execute(self._begun)

    def serve(self) -> bool:
        """Pass messages on both ways until the session ends; gives whether the client is there."""
        client = self._client
        if not self._take_messages():
            return False
        while not self._is_over:
            poll = select.poll()
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            poll.register(self._fd, wanted)
            if len(self._unsent) < _FULL:
                poll.register(client, select.POLLIN)
            for fd, event in poll.poll():
                if fd != self._fd:
                    if not client.read_waiting() or not self._take_messages():
                        return False
                    continue
                if event & select.POLLOUT:
                    self._send(b"")
                if event & ~select.POLLOUT and not self._read():
                    return self._end_early()
            if client.dead:
                return False
        return True

    @property
    def _is_over(self) -> bool:
        """Whether the client leads elsewhere from now, and has nothing open here."""
        idle = not self._unanswered and self._client.status == _IDLE
        return idle and not self._still_leads()

    def _end_early(self) -> bool:
        """Let the client go on elsewhere; what it waits for has ended with the session."""
        client = self._client
        client.statements.unsettle()
        if self._unanswered:
            client.begun = b""
            client.out += wire.failure("57P01", "the session has ended with its test")
            for _ in range(self._unanswered):
                client.tell_ready(ord("I"))
        return True

    def end(self) -> None:
        """End the session from another thread, whatever it is at."""
        with contextlib.suppress(OSError, psycopg.Error):
            sock = socket.socket(fileno=os.dup(self._fd))
            try:
                sock.shutdown(socket.SHUT_RDWR)
            finally:
                sock.close()
        self._closed.wait(_PATIENCE)

    def close(self) -> None:
        """Close the session; nothing that the client has asked for goes on."""
        self.cancel()
        self._conn.close()
        self._closed.set()

    def cancel(self) -> None:
        """Cancel what the client runs."""
        if not self._unanswered:
            return
        with contextlib.suppress(psycopg.Error):
            self._conn.cancel_safe(timeout=5)

    # From the client

    def _take_messages(self) -> bool:
        """Send on what has come; gives whether more will."""
        client = self._client
        while (message := client.taken()) is not None:
            if message.kind == _TERMINATE:
                return False
            if self._is_over:
                client.put_back(message)
                return True
            for statement in self._statements(message):
                self._pass(statement)
                self._note_transaction(statement)
                self._note_settings(statement, message)
            self._send(self._translated(message))
        return True

    def _statements(self, message: Message) -> tuple[Statement, ...]:
        if message.kind == _QUERY:
            return statements(message.raw[5:-1].decode(errors="surrogateescape"))
        if message.kind == _EXECUTE:
            executed = self._portals.get(wire.cstring(message.raw, 5)[0])
            return executed.parts if executed is not None else ()
        return ()

    def _pass(self, statement: Statement) -> None:
        def sent() -> Generator[Any, Any, None]:
            yield from ()

        for _ in passage.passing(statement, self._client, sent()):
            pass

    def _note_transaction(self, statement: Statement) -> None:
        if statement.verb in CONTROL:
            self._left.clear()
            self._is_carried = False
            self._begun = statement.text.encode() if statement.verb is Verb.BEGIN else b""
        elif not statement.read_only:
            self._left.note(statement)

    def _note_settings(self, statement: Statement, message: Message) -> None:
        if statement.verb is Verb.SET:
            self._changed.update(statement.settings or self._client.kept)
        elif statement.sets_config:
            portal = wire.cstring(message.raw, 5)[0] if message.kind == _EXECUTE else b""
            calls = config_calls(statement.text, self._params.get(portal))
            self._changed.update(name for name, is_local in calls if not is_local)

    def _keep_settings(self) -> None:
        """Keep what is set after a transaction: the client goes on to other sessions with it."""
        names, self._changed = sorted(self._changed), set()
        columns = ["pg_catalog.current_setting(%s, true)"] * len(names)
        query: Any = f"SELECT {', '.join(columns)}"
        for name, value in zip(
            names, self._conn.execute(query, names).fetchone() or (), strict=True
        ):
            if value is not None:
                self._client.kept[name] = value

    def _translated(self, message: Message) -> bytes:
        kind, raw = message.kind, message.raw
        if kind in (_QUERY, _SYNC, _CALL):
            self._unanswered += 1
            self._parsing.append(None)
        elif kind == _PARSE:
            return self._parse(ClientStatement(Parse.read(raw)), told=True)
        elif kind == _BIND:
            bind = Bind.read(raw)
            first, statement = self._known(bind.statement)
            self._portals[bind.portal] = statement
            if statement is not None and any(part.sets_config for part in statement.parts):
                self._params[bind.portal] = bind.texts()
            return first + bind.of(statement.name if statement else bind.statement)
        elif kind in (_DESCRIBE, _CLOSE) and raw[5] == _STATEMENT:
            return self._about(kind, wire.target(raw)[1])
        return raw

    def _about(self, kind: int, name: bytes) -> bytes:
        first, statement = self._known(name)
        if kind == _CLOSE:
            self._client.statements.remove(name)
        shown = statement.name if statement is not None else name
        return first + wire.about(bytes([kind]), b"S", shown)

    def _parse(self, statement: ClientStatement, *, told: bool) -> bytes:
        found, name = self._client.statements, statement.parse.name
        old = found.get(name)
        self._parsing.append((statement, told))
        if told and name and old is not None and old.home is self:
            return statement.parse.renamed(old.name)  # the server says that there is one
        found.add(statement)
        if not name:
            self._unnamed = statement
        return statement.settle(self, shared=False)

    def _known(self, name: bytes) -> tuple[bytes, ClientStatement | None]:
        """Give what must come first so that a statement is prepared here, and the statement."""
        statement = self._client.statements.get(name)
        if statement is None:
            return b"", None
        fresh = statement.home is self if name else self._unnamed is statement
        return b"" if fresh else self._parse(statement, told=False), statement

    def _send(self, data: bytes) -> None:
        data = self._unsent + data
        try:
            sent = os.write(self._fd, data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(data)  # its end is read next
        self._unsent = data[sent:]

    # From the server

    def _read(self) -> bool:
        """Pass on what the server has sent; gives whether it is still there."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        client = self._client
        for piece in self._answers.feed(data):
            kind = piece[0]
            if kind == _PARSED and (parsed := self._parsing.popleft()) and not parsed[1]:
                continue
            if kind == _READY:
                self._unanswered -= 1
                client.status = piece[5]
                goes_on = self._left.can_go_on(is_carried=self._is_carried)
                client.begun = self._begun if goes_on and piece[5] == _OPEN else b""
                self._drop_unparsed()
                self._parsing.popleft()
                if self._changed and client.status == _IDLE and not self._unanswered:
                    self._keep_settings()
            elif kind == _STATUS:
                client.note_report(piece)
            elif kind == _ERROR:
                self._drop_unparsed()
            client.out += piece
        client.flush()
        return bool(data)

    def _drop_unparsed(self) -> None:
        """Forget statements that the server skips up to the next Sync."""
        while self._parsing and (parsing := self._parsing[0]) is not None:
            self._parsing.popleft()
            parsing[0].home = None
            if parsing[1]:
                self._client.statements.remove(parsing[0].parse.name)
