"""Where clients come in, and what they connect with to get there."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, Protocol

from . import porter
from .listener import Listener

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ...addresses.purpose import Purpose

__all__ = ["Doorkeeper", "Entrance"]


class Doorkeeper(Protocol):
    """Who sees to the clients."""

    def accept(self, sock: socket.socket) -> None: ...
    def cancel(self, pid: int, key: bytes) -> None: ...


class Entrance:
    """A Unix socket, and loopback from the moment that somebody asks for an address there.

    Clients connect as `user` to `dbname`. `doorkeeper` gives who sees to them: it is called for
    each, as there need be none before the first.
    """

    def __init__(self, user: str, dbname: str, doorkeeper: Callable[[], Doorkeeper]) -> None:
        self.user: Final = user
        self.dbname: Final = dbname
        self.password: Final = secrets.token_urlsafe(18)
        """What clients by TCP must know: anybody on the machine can connect."""
        self._listener: Final = Listener(
            lambda sock: doorkeeper().accept(sock),
            lambda pid, key: doorkeeper().cancel(pid, key),
        )

    def conninfo(self, purpose: Purpose, dbname: str = "") -> dict[str, str]:
        """Give libpq's keywords that lead here by the Unix socket, which is this user's alone."""
        return {
            "host": str(self._listener.directory),
            "port": str(self._listener.port(purpose)),
            "user": self.user,
            "dbname": dbname or self.dbname,
        }

    def conninfo_by_tcp(self, purpose: Purpose, dbname: str = "") -> dict[str, str]:
        """Give libpq's keywords that lead here by loopback."""
        return {
            "host": porter.LOOPBACK,
            "port": str(self._listener.port_by_tcp(purpose)),
            "user": self.user,
            "password": self.password,
            "dbname": dbname or self.dbname,
        }

    def purpose_of(self, sock: socket.socket) -> Purpose:
        """Tell what a client has come for."""
        return self._listener.purpose_of(sock)

    def close(self) -> None:
        """Accept nobody any more; a second call does nothing."""
        self._listener.close()
