"""The clones of the prepared database: made ahead of the tests that take them, dropped behind."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..servers.server import Server

__all__ = ["CloneError", "Clones"]

_AHEAD: Final = 2
# What has written has taken a transaction id: the next one to be given tells.
_NEXT_XID: Final = "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text"


class CloneError(PGMonkeyError):
    """A clone of the test database cannot be made; the message says why."""


class Clones:
    """Copies of the prepared database: made ahead and dropped behind, by one thread.

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
        self._ready: queue.Queue[str | BaseException] = queue.Queue()
        self._ordered = 0
        self._work: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._clean: list[str] = []
        self._watch: psycopg.Connection[Any] | None = None
        self._jobs_ordered = self._jobs_done = 0
        self._lock = threading.Lock()

    def take(self) -> str:
        """Give the name of a fresh clone."""
        if self._clean:
            return self._clean.pop()
        self.make_template()
        self._order(1)
        made = self._ready.get()
        with self._lock:
            self._ordered -= 1
        if isinstance(made, BaseException):
            raise made
        return made

    def mark(self) -> object:
        """Give what is equal to a later one only if nothing on the server was written between."""
        ordered, done = self._jobs_ordered, self._jobs_done
        if ordered != done:
            return object()  # our own jobs write, too
        if self._watch is None or self._watch.closed:
            self._watch = psycopg.Connection.connect(
                **self._server.admin_conninfo(),  # type: ignore[arg-type]
                autocommit=True,
            )
        row = self._watch.execute(_NEXT_XID).fetchone()
        return row, ordered

    def _order(self, ready: int) -> None:
        """See to it that so many clones are made, or being made."""
        with self._lock:
            wanted = ready - self._ordered
            self._ordered += max(wanted, 0)
        for _ in range(wanted):
            self._count += 1
            self._enqueue("make", self._name("clone"))

    def _name(self, kind: str) -> str:
        return self._server.scratch_name(f"{kind}{self._count}")

    def give_back(self, name: str, *, clean: bool) -> None:
        """Keep a clone in which nothing was written for the next test; drop any other."""
        if clean:
            self._clean.append(name)
        else:
            self._enqueue("drop", name)
            self._order(_AHEAD)

    def forget_template(self) -> None:
        """Copy the prepared database anew before the next clone: it has changed."""
        for name in self._clean:
            self._enqueue("drop", name)
        self._clean.clear()
        while self._ordered:
            made = self._ready.get()
            self._ordered -= 1
            if isinstance(made, str):
                self._enqueue("drop", made)
        if self._original is not None:
            self._enqueue("drop", self._original)
        self._template = self._original = None

    def make_template(self) -> None:
        """Copy the prepared database to one that nobody connects to, if not done yet."""
        if self._template is None:
            self._template = self._pristine()
        if self._template is None:
            self._before_copy()
            self._count += 1
            name = self._name("original")
            self._create(name, self._source)
            self._template = self._original = name

    def _create(self, name: str, template: str) -> None:
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

    def _enqueue(self, what: str, name: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pgmonkey-clones", daemon=True)
            self._thread.start()
        self._jobs_ordered += 1
        self._work.put((what, name))

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            made = self._do(*job)
            self._jobs_done += 1
            if made is not None:
                self._ready.put(made)

    def _do(self, what: str, name: str) -> str | BaseException | None:
        try:
            if what == "make":
                self._create(name, str(self._template))
                return name
            self._server.drop_database(name)
        except BaseException as error:  # it is raised where the clone is taken
            # A clone that is not dropped goes with the server, or with the next run's sweep.
            return error if what == "make" else None
        return None

    def close(self) -> None:
        """End the thread after what it has to do; databases go with the server or the run."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
