"""The gateway: whatever speaks PostgreSQL's protocol joins the running test through one address."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

import psycopg

from ...errors import SandboxError
from ..sandbox.core.outer import OuterTransaction
from .entrance.listener import Listener
from .protocol import wire
from .protocol.client import Client, peer_process
from .protocol.client_statements import ClientStatements
from .protocol.greeting import Greetings, wanted_settings
from .protocol.reports import error_report
from .sessions.doomed import DoomedSession
from .sessions.joined import JoinedSession
from .sessions.relayed import RelayedSession

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from ..isolation import Sources

logger = logging.getLogger("pytest_pgmonkey")

_TEST_HAS_ENDED: Final = "terminating connection: the test has ended"
_RUN_HAS_ENDED: Final = "terminating connection: the test run has ended"
_NO_TEST: Final = "pgmonkey.dsn leads to a running test, and none runs"
_PATIENCE: Final = 2.0  # seconds for the threads of clients that were told to go
_IDLE: Final = ord("I")


class _Session(Protocol):
    def serve(self) -> bool: ...
    def close(self) -> None: ...
    def cancel(self) -> None: ...


class Gateway:
    """Serves clients, each in a thread of its own.

    `leading` gives what handles borrow from now, `None` where no test runs; `conninfo` leads to the
    prepared database, `greeter` to one where every client's settings can be tried out.
    """

    def __init__(
        self,
        leading: Callable[[], Sources | None],
        conninfo: Mapping[str, str],
        greeter: Mapping[str, str],
    ) -> None:
        self._leading = leading
        self._conninfo: Final = conninfo
        self._greetings = Greetings(greeter)
        # Where no test runs: whatever a client says, nothing is ever written.
        self._outside: Final = OuterTransaction(conninfo, reads_only=True)
        self._clients: dict[Client, _Session | None] = {}
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._listener: Final = Listener(self._accept, self._cancel)
        _living.add(self)

    def _lead(self, leading: Sources | None) -> OuterTransaction | Mapping[str, str]:
        """Give what clients join now."""
        return self._outside if leading is None else leading.leads_to

    def _current(self) -> str:
        """Give the name of the running test's own database, if it has one."""
        lead = self._lead(self._leading())
        return "" if isinstance(lead, OuterTransaction) else lead["dbname"]

    def conninfo(self, *, ends_with_test: bool) -> dict[str, str]:
        """Give libpq's keywords that lead here, by connections that end with their test or not."""
        return {
            "host": str(self._listener.directory),
            "port": str(self._listener.ports[ends_with_test]),
            "user": self._conninfo["user"],
            "dbname": (ends_with_test and self._current()) or self._conninfo["dbname"],
        }

    # Tests

    def end_sessions(self) -> None:
        """End the sessions that clients have outside of the sandbox.

        Their databases are copied or dropped next.
        """
        self._outside.reset()
        self._outside.close()
        for client, session in list(self._clients.items()):
            if client.sending:
                client.cut_off()  # it takes nothing of what it has asked for
            if isinstance(session, RelayedSession):
                session.end()

    def end_clients(self) -> None:
        """Send the clients away that end with their test."""
        for client in list(self._clients):
            if client.ends_with_test:
                self._dismiss(client, _TEST_HAS_ENDED)

    @staticmethod
    def _dismiss(client: Client, why: str) -> None:
        client.dismissed = why
        client.hang_up()

    def close(self) -> None:
        """End all of it."""
        self._listener.close()
        for client in list(self._clients):
            self._dismiss(client, _RUN_HAS_ENDED)
        for thread in list(self._threads):
            thread.join(_PATIENCE)
        self._outside.close()

    def forget_in_fork(self) -> None:
        """Leave the clients to the parent."""
        for client in list(self._clients):
            client.drop()

    # Clients

    def _accept(self, sock: socket.socket) -> None:
        client = Client(sock, ClientStatements())
        client.ends_with_test = sock.getsockname().endswith(str(self._listener.ports[True]))
        self._clients[client] = None
        thread = threading.Thread(
            target=self._run, args=(client, peer_process(sock)), name="pgmonkey-client", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def _cancel(self, _pid: int, key: bytes) -> None:
        for client, session in list(self._clients.items()):
            if client.key == key and session is not None:
                session.cancel()

    def _run(self, client: Client, process: int) -> None:
        try:
            if self._welcome(client, process):
                self._serve(client)
        except wire.ProtocolViolation as violation:
            client.refuse(violation)
        except (SandboxError, psycopg.Error) as error:
            client.out += error_report(error, severity="FATAL")
        except (EOFError, TimeoutError, OSError):
            pass  # it has gone, or never came
        except Exception:  # nobody sees the end of a thread, and the others go on
            logger.exception("a client of the gateway was lost")
        finally:
            client.close()
            self._clients.pop(client, None)

    def _serve(self, client: Client) -> None:
        there = True
        while there and not client.dismissed:
            session = self._clients[client] = self._session(client)
            try:
                # Its test may have ended while it joined: nothing of it shall reach the next one.
                there = not client.dismissed and session.serve()
            finally:
                self._clients[client] = None
                session.close()
            client.doomed = client.doomed or (there and client.status != _IDLE)

    def _session(self, client: Client) -> _Session:
        if client.doomed:
            return DoomedSession(client)
        message = client.receive()  # a session is made when it is asked for something
        if message is None:
            raise EOFError
        client.put_back(message)
        leading = self._leading()

        def still_leads() -> bool:
            return self._leading() is leading

        lead = self._lead(leading)
        if isinstance(lead, OuterTransaction):
            return JoinedSession(client, lead, still_leads)
        return RelayedSession(client, lead, still_leads)

    # The handshake

    def _welcome(self, client: Client, process: int) -> bool:
        startup = wire.read_startup(client.startup())
        while startup.code in (wire.SSL, wire.GSSENC):
            client.out += b"N"
            client.flush()
            startup = wire.read_startup(client.startup())
        if startup.code == wire.CANCEL:
            return False
        client.parameters = startup.parameters
        client.identify(process)
        problem = self._problem(client)
        if problem:
            client.out += wire.failure(*problem, severity="FATAL")
            return False
        self._greet(client, startup)
        return True

    def _problem(self, client: Client) -> tuple[str, str] | None:
        """Find why a client cannot be served: SQLSTATE and a sentence."""
        given = client.parameters
        user, dbname = self._conninfo["user"], self._conninfo["dbname"]
        asked = given.get("user", "")
        if asked != user:
            return "28000", f'role "{asked}" cannot join the test: connect as "{user}"'
        asked = given.get("database") or asked
        if asked not in (dbname, self._current()):
            return "3D000", f'there is one test database: connect to "{dbname}", not to "{asked}"'
        if given.get("replication", "false") not in ("false", "off", "no", "0"):
            return "0A000", "a rolled-back test has nothing to replicate"
        if client.ends_with_test and self._leading() is None:
            return "57P03", _NO_TEST
        return None

    def _greet(self, client: Client, startup: wire.Startup) -> None:
        wanted = wanted_settings(client.parameters)
        usual, greeting = self._greetings.of(()), self._greetings.of(wanted)
        usual_by_name = {name.lower(): value for name, value in usual.reported.items()}
        reported_by_name = {name.lower(): value for name, value in greeting.reported.items()}
        client.settings = tuple(
            (name, value)
            for name, value in wanted
            if name.lower() not in usual_by_name
            or usual_by_name[name.lower()] != reported_by_name[name.lower()]
        )
        minor = startup.code & 0xFFFF
        if minor > wire.NEWEST_MINOR or startup.unknown_options:
            minor = min(minor, wire.NEWEST_MINOR)
            client.out += wire.negotiated(minor, startup.unknown_options)
        client.key = secrets.token_bytes(32 if minor >= wire.NEWEST_MINOR else 4)
        client.out += wire.AUTHENTICATION_OK
        name = client.parameters.get("application_name", "")
        for parameter, value in {**greeting.reported, "application_name": name}.items():
            client.out += client.report(parameter, value)
        client.out += wire.key_data(self._pid(usual.pid), client.key)
        client.tell_ready(_IDLE)

    def _pid(self, otherwise: int) -> int:
        """Give the process that the server's own views know a client of now by."""
        leading = self._leading()
        lead = self._lead(leading)
        if leading is None or not isinstance(lead, OuterTransaction):
            return otherwise
        return lead.backend.backend_pid


_living: weakref.WeakSet[Gateway] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for gateway in list(_living):
        gateway.forget_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
