"""What a test runs in: the protocol that rollback and clone isolation follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg import Cursor

    from ..handles import AsyncHandle, Handle
    from ..sources import AsyncSource, Source
    from .sandbox.core.outer import OuterTransaction
    from .sandbox.core.places import Left as Left

__all__ = ["Isolation", "KitError", "Loans", "Sources", "SpoiledError"]


class KitError(PGMonkeyError):
    """The kit cannot give a test what it asks for; the message says what to do."""


class SpoiledError(KitError):
    """A test has committed something that cannot be undone: no other may run on it."""


class Sources(Protocol):
    """What handles borrow their connections from; `None` leaves a handle its own source."""

    def source(self, handle: Handle, /) -> Source | None: ...
    def async_source(self, handle: AsyncHandle, /) -> AsyncSource | None: ...

    @property
    def leads_to(self) -> OuterTransaction | Mapping[str, str]:
        """What clients of the gateway join: a transaction, or a database by libpq's keywords."""


class Loans(Protocol):
    """The connections that a handle has lent."""

    def note(self, source: Any, conn: Any) -> Any:
        """Note that a connection was borrowed, and return it."""

    def end(self, conn: Any) -> Any:
        """Forget a returned connection, and return the source that it came from."""

    @property
    def left(self) -> list[Left]:
        """The connections that were not returned."""


class Isolation(Sources, Protocol):
    """What a test runs in, from its first fixture to its end."""

    @property
    def conninfo(self) -> dict[str, str]:
        """Keywords for libpq that lead to the test's database."""

    def execute(self, query: Any, params: Any) -> Cursor[Any]:
        """Run one statement in autocommit."""

    @property
    def left(self) -> list[Left]:
        """The connections that the last test did not return."""

    def begin(self) -> None:
        """Begin the test."""

    def end(self) -> tuple[list[str], list[str]]:
        """Undo the test; return its failures, and what else its report should tell.

        Raises SpoiledError where it cannot be undone.
        """
