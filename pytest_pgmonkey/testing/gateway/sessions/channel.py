"""The socket of a PGconn, for whole messages past libpq, which is idle and notices nothing.

Whoever uses it up to the server's ReadyForQuery leaves libpq as it was, its notion of the
transaction's status excepted.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import psycopg

from ....errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.pq.abc import PGconn

    from ..protocol.client import Client

_CHUNK: Final = 65536
_MOMENT: Final = 100  # ms
_HUNG_UP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_GONE: Final = "server closed the connection unexpectedly"


def plain_socket(pgconn: PGconn) -> int:
    """Give the number of a session's socket; raises SandboxError where it is encrypted."""
    if pgconn.ssl_in_use:
        raise SandboxError(
            "the test's server is reached by TLS, which other clients cannot share: let the "
            "configuration of the tests connect without it (sslmode: disable)"
        )
    return pgconn.socket


class Channel:
    """Sends to a server and receives from it, while a client waits.

    `abandoned` is called where the client has gone meanwhile, once for each exchange.
    """

    def __init__(self, pgconn: PGconn, client: Client, abandoned: Callable[[], None]) -> None:
        self._pgconn: Final = pgconn
        self._fd: Final = pgconn.socket
        self._client: Final = client
        self._abandoned: Final = abandoned
        self._inbox: list[bytes] = []
        self._both = select.poll()
        self._both.register(self._fd, select.POLLIN)
        self._both.register(client, _HUNG_UP)
        self._server = select.poll()
        self._server.register(self._fd, select.POLLIN)
        self._waiting = self._both

    def begin(self) -> None:
        """Begin an exchange."""
        self._waiting = self._both

    def send(self, data: bytes) -> None:
        """Send all of it; a server that sends much itself is read meanwhile."""
        try:
            sent = os.write(self._fd, data)
            if sent < len(data):
                self._send_rest(memoryview(data)[sent:])
        except BlockingIOError:
            self._send_rest(memoryview(data))
        except OSError:
            self._lose()

    def _send_rest(self, view: memoryview) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLOUT)
        while view:
            ((_, event),) = poll.poll()
            if event & select.POLLIN:
                self._inbox.append(self._read())
            if event & select.POLLOUT:
                with suppress(BlockingIOError):
                    view = view[os.write(self._fd, view) :]

    def receive(self) -> bytes:
        """Wait for the server and give what it has sent; raises OperationalError if it has gone."""
        if self._inbox:
            return self._inbox.pop(0)
        while True:
            events = self._waiting.poll()
            if len(events) == 1 and events[0][0] == self._fd:
                with suppress(BlockingIOError):
                    return self._read()
            elif any(fd != self._fd for fd, _ in events):
                self._waiting = self._server
                self._abandoned()

    def _read(self) -> bytes:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            raise
        except OSError:
            data = b""
        return data or self._lose()

    def _lose(self) -> bytes:
        with suppress(psycopg.OperationalError):  # now libpq knows
            self._pgconn.consume_input()
            self._pgconn.consume_input()
        raise psycopg.OperationalError(_GONE)

    @property
    def has_answer(self) -> bool:
        """Whether the server has sent something."""
        return bool(self._inbox or self._server.poll(0))

    def wait_with_client(self) -> tuple[bool, bool]:
        """Wait for either, a moment at most; gives whether server and client have sent any."""
        if self._inbox:
            return True, False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._client, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(_MOMENT)}
        return self._fd in ready, self._client.fileno() in ready
