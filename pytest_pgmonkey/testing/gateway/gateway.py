"""The gateway: whatever speaks PostgreSQL's protocol joins the running test through one address."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

import psycopg

from ...errors import PGMonkeyError
from ..addresses.purpose import Purpose
from ..sandbox.core.outer import OuterTransaction
from .protocol import wire
from .protocol.client import Client, peer_process
from .protocol.client_statements import ClientStatements
from .protocol.greeting import Greetings, wanted_settings
from .protocol.reports import error_report
from .sessions.doomed import DoomedSession
from .sessions.joined import JoinedSession
from .sessions.peeking import CloneLookSession, PeekSession, why_not
from .sessions.relayed import RelayedSession
from .sessions.wider import WiderSession

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Mapping

    from ..isolation import Sources
    from .entrance.entrance import Entrance
    from .sessions.wider import Scopes

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
    """Serves the clients that come in at an entrance, each in a thread of its own.

    `leading` gives what handles borrow from now, `None` where no test runs; `conninfo` leads to the
    database that can be read meanwhile, `greeter` to one where every client's settings can be tried
    out. Databases by the names in `others` are the test's, too. `scopes` are those of transactions
    that are begun outside of tests.
    """

    def __init__(
        self,
        leading: Callable[[], Sources | None],
        conninfo: Callable[[], Mapping[str, str]],
        greeter: Callable[[], Mapping[str, str]],
        entrance: Entrance,
        others: Collection[str] = (),
        scopes: Scopes | None = None,
    ) -> None:
        self._leading = leading
        self._conninfo: Final = conninfo
        self._others: Final = others
        self._scopes: Final = scopes
        self._greetings = Greetings(greeter)
        self._outer: OuterTransaction | None = None
        self._moving = threading.Lock()
        self._clients: dict[Client, _Session | None] = {}
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.entrance: Final = entrance
        _living.add(self)

    @property
    def _outside(self) -> OuterTransaction:
        """Where no test runs: whatever a client says, nothing is ever written."""
        with self._moving:
            conninfo = self._conninfo()
            if self._outer is None or self._outer.conninfo != conninfo:
                self._outer = OuterTransaction(conninfo, reads_only=True)
            return self._outer

    def obstacle(self) -> str:
        """Tell why nobody can look at the running test just now; empty where one can."""
        lead = self._lead()
        if lead is None:
            return _NO_TEST
        return why_not(lead) if isinstance(lead, OuterTransaction) else ""

    def _lead(self) -> OuterTransaction | Mapping[str, str] | None:
        """Give what clients join now, `None` where no test runs and nothing is being prepared."""
        leading = self._leading()
        return None if leading is None else leading.leads_to

    def _current(self) -> str:
        """Give the name of the running test's own database, if it has one."""
        lead = self._lead()
        return "" if lead is None or isinstance(lead, OuterTransaction) else lead["dbname"]

    def conninfo(self, purpose: Purpose) -> dict[str, str]:
        """Give libpq's keywords that lead here."""
        return self.entrance.conninfo(purpose, self._name_for(purpose))

    def conninfo_by_tcp(self, purpose: Purpose) -> dict[str, str]:
        """Give libpq's keywords that lead here by TCP, with a password."""
        return self.entrance.conninfo_by_tcp(purpose, self._name_for(purpose))

    def _name_for(self, purpose: Purpose) -> str:
        return "" if purpose is Purpose.SESSION else self._current()

    # Tests

    def end_sessions(self) -> None:
        """End the sessions that clients have outside of the sandbox.

        Their databases are copied or dropped next.
        """
        outer = self._outer
        if outer is not None:
            outer.reset()
            outer.close()
        for client, session in list(self._clients.items()):
            if client.sending:
                client.cut_off()  # it takes nothing of what it has asked for
            if isinstance(session, (RelayedSession, CloneLookSession)):
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
        self.entrance.close()
        for client in list(self._clients):
            self._dismiss(client, _RUN_HAS_ENDED)
        for thread in list(self._threads):
            thread.join(_PATIENCE)
        if self._outer is not None:
            self._outer.close()

    def forget_in_fork(self) -> None:
        """Leave the clients to the parent."""
        for client in list(self._clients):
            client.drop()

    # Clients

    def accept(self, sock: socket.socket) -> None:
        """Serve a client in a thread of its own."""
        client = Client(sock, ClientStatements(), self.entrance.purpose_of(sock))
        self._clients[client] = None
        thread = threading.Thread(
            target=self._run, args=(client, peer_process(sock)), name="pgmonkey-client", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def cancel(self, _pid: int, key: bytes) -> None:
        """Cancel what the client with this key runs."""
        for client, session in list(self._clients.items()):
            if client.key == key and session is not None:
                session.cancel()

    def _run(self, client: Client, process: int) -> None:
        try:
            if self._welcome(client, process):
                self._serve(client)
        except wire.ProtocolViolation as violation:
            client.refuse(violation)
        except (PGMonkeyError, psycopg.Error) as error:
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
            is_open = there and client.status != _IDLE
            client.doomed = client.doomed or (is_open and not client.begun)

    def _session(self, client: Client) -> _Session:
        if client.doomed:
            return DoomedSession(client)
        message = client.receive()  # a session is made when it is asked for something
        if message is None:
            raise EOFError
        client.put_back(message)
        widens, client.widens = client.widens, False
        if widens and (wider := self._wider(client)) is not None:
            return wider
        leading = self._leading()

        def still_leads() -> bool:
            return self._leading() is leading

        lead = self._outside if leading is None else leading.leads_to
        if client.only_looks:
            if isinstance(lead, OuterTransaction):
                return PeekSession(client, lead, still_leads)
            return CloneLookSession(client, lead, still_leads)
        if isinstance(lead, OuterTransaction):
            outside = leading is None and not widens
            return JoinedSession(client, lead, still_leads, outside=outside)
        return RelayedSession(client, lead, still_leads)

    def _wider(self, client: Client) -> WiderSession | None:
        scopes = self._scopes
        if scopes is None:
            return None
        return scopes.widen(lambda outer: WiderSession(client, outer, scopes))

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
        client.has_come()
        self._greet(client, startup)
        return True

    def _knows_password(self, client: Client) -> bool:
        client.out += wire.CLEARTEXT_PASSWORD
        client.flush()
        return hmac.compare_digest(client.password(), self.entrance.password.encode())

    def _problem(self, client: Client) -> tuple[str, str] | None:
        """Find why a client cannot be served: SQLSTATE and a sentence."""
        given = client.parameters
        user, dbname = self.entrance.user, self.entrance.dbname
        asked = given.get("user", "")
        if client.has_password and not self._knows_password(client):
            return "28P01", f'password authentication failed for user "{asked}"'
        if asked != user:
            return "28000", f'role "{asked}" cannot join the test: connect as "{user}"'
        asked = given.get("database") or asked
        if asked not in (dbname, *self._others) and asked not in self._names():
            return "3D000", (
                f'there is one test database: connect to "{dbname}", not to "{asked}", or let '
                f"that name lead to it, too: in the ini file, pgmonkey_map = {asked} = primary"
            )
        if given.get("replication", "false") not in ("false", "off", "no", "0"):
            return "0A000", "a rolled-back test has nothing to replicate"
        if client.ends_with_test and self._leading() is None:
            return "57P03", _NO_TEST
        return None

    def _names(self) -> tuple[str, ...]:
        """Give the names that the test's database really has."""
        return self._conninfo()["dbname"], self._current()

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
        lead = self._lead()
        return lead.backend.backend_pid if isinstance(lead, OuterTransaction) else otherwise


_living: weakref.WeakSet[Gateway] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for gateway in list(_living):
        gateway.forget_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
