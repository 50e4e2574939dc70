"""Messages to the server past libpq, whose answers go to the client as they come."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from psycopg import pq

from ..protocol import wire
from ..protocol.reports import AnsweredError
from ..protocol.wire import Answers, Message, ProtocolViolation
from .channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ...sandbox.core.member import Member
    from ..protocol.client import Client

    Steps = Generator[Any, Any, Any]

_QUERY, _SYNC, _FLUSH, _COPY_DATA = b"QSHd"
# What a server answers, as far as it is not passed on as it is.
_PASSED_ON: Final = b"DTtn2IHWcdV"
_READY, _PARSED, _COMPLETE, _ERROR, _NOTICE, _STATUS, _COPY_IN, _SUSPENDED = b"Z1CENSGs"
_NOTIFICATION: Final = ord("A")
_OF_COPY: Final = frozenset(b"dcfHS")
_COPY_FAILS: Final = wire.message(b"f", b"the client has gone\0")
_COPY_ENDS: Final = wire.message(b"f", b"the test has ended\0")
_FULL: Final = 32768  # bytes for a client that are sent on without waiting for more
_LIBPQ_STATUS: Final = {
    ord("I"): pq.TransactionStatus.IDLE,
    ord("T"): pq.TransactionStatus.INTRANS,
    ord("E"): pq.TransactionStatus.INERROR,
}


class Exchange:
    """What one client's session sends to the server, and what it is answered.

    `parsed` is called for each Parse that has succeeded, and gives whether the client is told.
    """

    def __init__(self, client: Client, member: Member, parsed: Callable[[], bool]) -> None:
        self._client: Final = client
        self._member: Final = member
        self._backend: Final = member.backend
        self._parsed: Final = parsed
        self._channel: Final = Channel(member.backend.pgconn, client, self._abandoned)
        self._held = b""
        self.changed: dict[str, str] = {}
        """Settings of which the client is yet to be told, as a server does before it is ready."""
        self.has_copied = False
        """Whether a COPY has taken the client's Sync for a part of it."""

    def cancel(self) -> None:
        """Cancel what the client runs."""
        member = self._member
        if member.busy and member.owns_running_statement:
            self._backend.expects_cancels = True
            self._backend.send_cancel()

    def _abandoned(self) -> None:
        self._client.dead = True
        self.cancel()

    def send(self, data: bytes, *, quiet: bool = False) -> Steps:
        """Send messages and pass on what is answered; raises AnsweredError.

        The last CommandComplete is held back: what a commit says may take its place. Of `quiet`
        messages, which are ours, the client is told nothing but of the settings they change.
        """
        self._channel.begin()
        self._backend.past_libpq = True
        self._channel.send(data)
        failed, status = self._answers(extended=data[0] != _QUERY, quiet=quiet)
        self._backend.past_libpq = False
        if _LIBPQ_STATUS[status] != self._backend.pgconn.transaction_status:
            yield from self._backend.run(b"")  # libpq sees it now
        if failed is not None:
            raise failed

    def _answers(self, *, extended: bool, quiet: bool) -> tuple[AnsweredError | None, int]:
        """Pass answers on up to the server's ReadyForQuery; gives the error and the status."""
        answers, pieces = Answers(_PASSED_ON), deque[bytes]()
        failed = None
        while True:
            while not pieces:
                if len(self._client.out) > _FULL:
                    self._client.flush()
                pieces.extend(answers.feed(self._channel.receive()))
            piece = pieces.popleft()
            kind = piece[0]
            if kind == _READY:
                return failed, piece[5]
            if kind == _ERROR:
                self.release()
                failed = AnsweredError(self._client.statements.as_named(piece))
            elif quiet and kind != _STATUS:
                continue
            elif kind == _COMPLETE:
                self.complete(piece)
            elif kind == _COPY_IN:
                self._pass_on(kind, piece)
                pieces.extend(self._copy_in(answers, extended=extended))
            elif kind != _NOTIFICATION and (kind != _PARSED or self._parsed()):
                self._pass_on(kind, piece)

    def _pass_on(self, kind: int, piece: bytes) -> None:
        if kind == _STATUS:
            self.changed.update([wire.read_parameter_status(piece)])
            return
        if kind == _SUSPENDED:
            self._member.transaction.portal_is_open = True
            self._member.transaction.pin()  # others would make a portal of the same name
        self.tell(piece)

    def tell(self, data: bytes) -> None:
        """Tell the client something, after what was held back."""
        self.release()
        self._client.out += data

    def tell_changed(self) -> None:
        """Tell the client of settings that have changed."""
        for name, value in self.changed.items():
            if self._client.reported.get(name) != value:
                self._client.out += self._client.report(name, value)
        self.changed.clear()

    # CommandComplete

    def complete(self, piece: bytes) -> None:
        """Hold a CommandComplete back."""
        self.release()
        self._held = self._client.tag = piece

    def release(self) -> None:
        """Tell what was held back."""
        if self._held:
            self._client.out += self._held
            self._held = b""

    def drop(self) -> None:
        """Forget what was held back: an error is told in its place."""
        self._held = b""

    # COPY

    def _copy_in(self, answers: Answers, *, extended: bool) -> list[bytes]:
        """Pass on what a client copies in, to its end or an early error; gives what it read."""
        client, channel = self._client, self._channel
        self.has_copied = extended
        client.flush()
        found: list[bytes] = []
        while not found and self._pass_copy_on():
            from_server, from_client = channel.wait_with_client()
            if from_server:
                for piece in answers.feed(channel.receive()):
                    if piece[0] in (_NOTICE, _STATUS):
                        self._pass_on(piece[0], piece)
                    else:
                        found.append(piece)
            elif from_client and not client.read_waiting():
                client.dead = True
                channel.send(_COPY_FAILS)
                break
            elif self._member.ended or self._member.must_stop:
                # A cancel does not reach a server that waits for data.
                channel.send(_COPY_ENDS)
                break
        if extended:
            channel.send(wire.SYNC)  # it has read the first one as part of the COPY
        return found

    def _pass_copy_on(self) -> bool:
        """Send the server what has come of the client's COPY; gives whether more will."""
        while (message := self._next_of_copy()) is not None:
            if message.kind not in _OF_COPY:
                # A server would end the session, which is the test's.
                self._client.dead = True
                message = Message(_COPY_FAILS[0], _COPY_FAILS)
            if message.kind not in (_SYNC, _FLUSH):
                self._channel.send(message.raw)
                if message.kind != _COPY_DATA:
                    return False
        return True

    def _next_of_copy(self) -> Message | None:
        try:
            return self._client.next_message()
        except ProtocolViolation as violation:
            self._client.refuse(violation)
            self._client.dead = True
            return Message(_COPY_FAILS[0], _COPY_FAILS)
