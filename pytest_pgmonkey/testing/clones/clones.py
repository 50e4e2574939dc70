"""The clones of the prepared database: made ahead of the tests that take them, dropped behind."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...errors import PGMonkeyError
from ..databases.commands import connect, roll_back_prepared

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ..servers.server import Server

__all__ = ["CloneError", "Clones"]

_AHEAD: Final = 2
# What has written has taken a transaction id: the one after the last that has ended tells.
_NEXT_XID: Final = "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text"
# Whether transactions are open in a database, which the first does not show, or two-phase commits.
# The functions behind pg_stat_activity and pg_prepared_xacts: to plan those views takes longer.
_STATE: Final = f"""{_NEXT_XID},
EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(NULL) AS session
        WHERE session.datid = db.oid AND session.xact_start IS NOT NULL),
EXISTS (SELECT FROM pg_catalog.pg_prepared_xact() AS prepared WHERE prepared.dbid = db.oid)
FROM pg_catalog.pg_database AS db WHERE db.datname = %s
"""


class CloneError(PGMonkeyError):
    """A clone of the test database cannot be made; the message says why."""


class Clones:
    """Copies of the prepared database: made ahead by one thread, dropped behind by another.

    `source` is the database to copy; nobody may be connected to it meanwhile, so that the kit
    copies it once to a template that nobody connects to. `pristine` gives the template that it was
    copied from itself, `None` where there is none or other data has come since.
    """

    def __init__(
        self,
        server: Server,
        source: str,
        before_copy: Callable[[], None],
        pristine: Callable[[], str | None],
    ) -> None:
        self._server = server
        self._source = source
        self._pristine = pristine
        self._before_copy = before_copy
        self._template: str | None = None
        self._original: str | None = None
        self._count = 0
        self._ready: deque[Future[str]] = deque()
        self._clean: list[str] = []
        self._watch: psycopg.Connection[Any] | None = None
        self._threads = ThreadPoolExecutor(2, "pgmonkey-clones")
        self._jobs = 0
        self._running: list[Future[Any]] = []

    def take(self) -> str:
        """Give the name of a fresh clone."""
        if self._clean:
            return self._clean.pop()
        self.make_template()
        self._order(1)
        return self._ready.popleft().result()

    def mark(self) -> object:
        """Give a mark; two are equal only if nothing was written on the server between them."""
        if not self._is_at_rest:
            return object()  # our own jobs write, too
        return self._watching().execute(_NEXT_XID).fetchone(), self._jobs

    def settle(self, name: str, mark: object) -> bool:
        """Return whether nothing was written in a clone since a mark, and nobody works in it.

        Two-phase commits that are open are rolled back: their names are the server's.
        """
        rested = self._is_at_rest
        row = self._watching().execute(_STATE, [name]).fetchone()
        if row is None:
            return False
        next_xid, in_use, has_prepared = row
        if has_prepared:
            with connect(self._server.admin_conninfo(name)) as conn:
                roll_back_prepared(conn)
        return rested and not (in_use or has_prepared) and mark == ((next_xid,), self._jobs)

    @property
    def _is_at_rest(self) -> bool:
        self._running = [job for job in self._running if not job.done()]
        return not self._running

    def _watching(self) -> psycopg.Connection[Any]:
        if self._watch is None or self._watch.closed:
            self._watch = connect(self._server.admin_conninfo())
        return self._watch

    def give_back(self, name: str, *, clean: bool) -> None:
        """Keep a clone in which nothing was written for the next test; drop any other."""
        if clean:
            self._clean.append(name)
        else:
            self._drop(name)
            if self._template is not None:  # the test may have changed the prepared database
                self._order(_AHEAD)

    def forget_template(self) -> None:
        """Copy the prepared database anew before the next clone: it has changed."""
        unused, self._clean = self._clean, []
        while self._ready:
            made = self._ready.popleft()
            if made.exception() is None:
                unused.append(made.result())
        for name in unused:
            self._drop(name)
        if self._original is not None:
            self._drop(self._original)
        self._template = self._original = None

    @property
    def has_template(self) -> bool:
        """Whether there is a template with the prepared database's present content."""
        return self._template is not None

    def make_template(self) -> str:
        """Copy the prepared database to one that nobody connects to, if not done yet; name it."""
        if self._template is None:
            self._template = self._pristine() or self._copy_source()
            self._server.expect_copies(self._template)
        return self._template

    def _copy_source(self) -> str:
        self._before_copy()
        self._original = self._create(self._name("original"), self._source)
        return self._original

    def close(self) -> None:
        """End the threads after their pending work; the server or the run removes the databases."""
        self._threads.shutdown()
        self._server.disconnect()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _order(self, ready: int) -> None:
        """Make sure that so many clones exist or are being made."""
        while len(self._ready) < ready:
            made = self._submit(self._create, self._name("clone"), str(self._template))
            self._ready.append(made)

    def _drop(self, name: str) -> None:
        # One that cannot be dropped goes with the server, or with the next run's sweep.
        self._submit(self._server.drop_database, name)

    def _submit(self, job: Callable[..., Any], *arguments: str) -> Future[Any]:
        self._jobs += 1
        future = self._threads.submit(job, *arguments)
        self._running.append(future)
        return future

    def _name(self, kind: str) -> str:
        self._count += 1
        return self._server.scratch_name(f"{kind}{self._count}")

    def _create(self, name: str, template: str) -> str:
        try:
            self._server.create_database(name, template)
        except psycopg.errors.ObjectInUse as error:
            detail = error.diag.message_detail or ""
            raise CloneError(
                f"the database {template!r} cannot be copied while others are connected to it "
                f"({detail.rstrip('.')}); close those connections, in session fixtures too"
            ) from None
        except psycopg.errors.InsufficientPrivilege as error:
            raise CloneError(
                f"the database {template!r} cannot be copied: {error.diag.message_primary}; "
                "clone isolation needs a role with CREATEDB that owns the database"
            ) from None
        return name
