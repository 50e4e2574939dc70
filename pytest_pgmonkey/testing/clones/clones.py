"""Clone isolation: a database of the test's own, with production's real connections and commits."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...errors import PGMonkeyError
from ...handles import make_handle

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...config import ConnectionSpec
    from ...handles import AsyncHandle, Handle
    from ..servers.server import Server

__all__ = ["CloneError", "CloneWorld", "Clones"]

# Where a connection leads is the test's business; all else that a file says of it holds.
_WHERE: Final = frozenset(
    [
        "host",
        "hostaddr",
        "port",
        "dbname",
        "user",
        "password",
        "passfile",
        "require_auth",
        "channel_binding",
        "service",
        "servicefile",
        "sslmode",
        "sslnegotiation",
        "sslcompression",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslcertmode",
        "sslrootcert",
        "sslcrl",
        "sslcrldir",
        "sslsni",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "gssencmode",
        "krbsrvname",
        "gsslib",
        "gssdelegation",
        "target_session_attrs",
        "load_balance_hosts",
    ]
)
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


class _Lent:
    """A production handle's connections, lent to the handle that the application holds."""

    def __init__(self, twin: Handle) -> None:
        self._twin = twin
        self._origins: dict[int, Any] = {}

    def getconn(self, timeout: float | None = None) -> Any:
        source, conn = self._twin._borrow(timeout)
        self._origins[id(conn)] = source
        return conn

    def putconn(self, conn: Any) -> None:
        self._origins.pop(id(conn)).putconn(conn)

    def close(self) -> None:
        self._twin.disconnect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin.pool, name)


class _AsyncLent:
    """The same for an async handle."""

    def __init__(self, twin: AsyncHandle) -> None:
        self._twin = twin
        self._origins: dict[int, Any] = {}

    async def getconn(self, timeout: float | None = None) -> Any:
        source, conn = await self._twin._borrow(timeout)
        self._origins[id(conn)] = source
        return conn

    async def putconn(self, conn: Any) -> None:
        await self._origins.pop(id(conn)).putconn(conn)

    async def close(self) -> None:
        await self._twin.disconnect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin.pool, name)


class CloneWorld:
    """What the handles of one test lead to: a clone, by production's own sources."""

    def __init__(self, clones: Clones, server: Server) -> None:
        self._clones = clones
        self.name = clones.take()
        self.conninfo: Final = server.conninfo(self.name)
        self._twins: dict[Any, Any] = {}
        self._lent: dict[Any, Any] = {}
        self._connection: psycopg.Connection[Any] | None = None
        self._before = clones.mark()
        self._clean = False

    def source(self, handle: Handle) -> Any:
        """Give what a sync handle borrows from; `None` to a handle of our own."""
        return self._find(handle, _Lent)

    def async_source(self, handle: AsyncHandle) -> Any:
        """Give what an async handle borrows from; `None` to a handle of our own."""
        return self._find(handle, _AsyncLent)

    def _find(self, handle: Any, kind: Any) -> Any:
        if handle in self._lent:
            return self._lent[handle]
        if handle in self._twins:
            return None
        twin = make_handle(self._spec(handle.spec), handle._connector.hook)
        self._twins[twin] = handle
        self._lent[handle] = kind(twin)
        return self._lent[handle]

    def _spec(self, spec: ConnectionSpec) -> ConnectionSpec:
        rest = {name: value for name, value in spec.conninfo if name not in _WHERE}
        pool = dict(spec.pool)
        if spec.type.is_pool:
            # A connection costs more than a test: none is opened that nobody borrows.
            pool.setdefault("max_size", max(pool.get("min_size", 4), 1))
            pool["min_size"] = min(pool.get("min_size", 4), 1)
        return replace(
            spec,
            conninfo=tuple(sorted({**rest, **self.conninfo}.items())),
            pool=tuple(sorted(pool.items())),
        )

    def _own_connection(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.Connection.connect(
                **self.conninfo,  # type: ignore[arg-type]
                autocommit=True,
            )
        return self._connection

    def execute(self, query: Any, params: Any) -> psycopg.Cursor[Any]:
        """Run one statement in autocommit."""
        __tracebackhide__ = True
        return self._own_connection().execute(query, params)

    def end(self) -> list[str]:
        """Close what the test has opened; the clone is still to be given back."""
        for twin in self._twins:
            twin._end_all()
        try:
            self._clean = self._clones.mark() == self._before
            if self._connection is not None:
                self._connection.close()
        except psycopg.Error:
            # The test has ended the server's side, or the server itself: the clone goes.
            self._clean = False
        return []

    def give_back(self) -> None:
        """Give the clone back, for another test if nothing was written in it."""
        self._clones.give_back(self.name, clean=self._clean)
