"""One test process: its server, its prepared database, and the tests that run in it one by one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ..config import connection_spec
from ..connecting import AsyncDirectSource, Connector, DirectSource
from ..connection_type import CONNECTION_TYPES
from ..handles import make_handle
from ..manager import PGConnectionManager
from .clones.clones import Clones, CloneWorld
from .databases.recipe import recipe_of
from .databases.schema import load_schema, resolve_steps
from .interception import Phase
from .prepared import Database, KitError, SpoiledError
from .sandbox import Sandbox
from .sandbox.internals import SandboxConnection
from .servers.launch import start_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ..config import ConnectionSpec
    from ..handles import AsyncHandle, Handle
    from .clones.keeping import Keeping
    from .databases.recipe import Recipe
    from .interception import Interception
    from .options import Options
    from .sandbox.sandbox import Scope
    from .servers.launch import Launch
    from .servers.server import Server
    from .servers.worker import Worker

__all__ = ["Kit"]


_PATIENCE: Final = 10.0


class _Preparation:
    """Leads handles to the database being prepared, in real transactions."""

    def __init__(self, kit: Kit, conninfo: dict[str, str]) -> None:
        self._kit = kit
        self._conninfo = conninfo

    def _connector(self, handle: Any) -> Connector:
        spec = self._kit.spec(str(handle.spec.type), self._conninfo)
        return Connector(spec, handle._connector.hook)

    def source(self, handle: Handle) -> DirectSource:
        return DirectSource(self._connector(handle))

    def async_source(self, handle: AsyncHandle) -> AsyncDirectSource:
        return AsyncDirectSource(self._connector(handle))


class Kit:
    """What the fixtures of one process share; made at their first use."""

    def __init__(
        self,
        options: Options,
        interception: Interception,
        stop_run: Callable[[str], None],
        worker: Worker | None = None,
    ) -> None:
        self.options = options
        self.worker = worker
        self.stop_run = stop_run
        self.interception = interception
        self._server: Server | None = None
        self._sandbox: Sandbox | None = None
        self._database: Database | None = None
        self._steps: list[Path | Callable[[Any], Any]] = []
        self._recipe: Recipe | None = None
        self._specs: dict[str, ConnectionSpec] = {}
        self._unblocked = self._pooled = False
        self._lost = ""
        self._clones: Clones | None = None
        self._world: CloneWorld | None = None
        self._keeping: Keeping | None = None
        self._shared: list[Scope] = []
        self._depth = 0
        self._pid = os.getpid()

    # Server and database

    @property
    def server(self) -> Server:
        """The server, started at its first use."""
        if self._server is None:
            self._server = start_server(self.options, self.worker)
            self._server.publish()
        return self._server

    def prepare(self, steps: Iterable[Any], launched: Launch | None = None) -> Database:
        """Make the database of this process, load the schema into it, and connect to it.

        The server may be launched already, with these steps in mind. Once made it serves to the
        end of the run: a test that is run again may have ended the session's fixtures.
        """
        if self._database is not None:
            return self._database
        self._steps = resolve_steps(steps, self.options.rootdir)
        self._prepare_template(launched)
        existing = self._existing()
        name = existing or self.server.scratch_name("tests")
        if existing is None:
            self._create(name)
        self._database = Database(self, name, existing=existing is not None)
        conninfo = self.server.conninfo(name)
        self._sandbox = Sandbox(conninfo, self.options.wait_timeout)
        self._specs = {name: self.spec(name, conninfo) for name in CONNECTION_TYPES}
        self.interception.sandbox = self._sandbox
        self._sandbox.connect()
        self._pooled = self._sandbox.backend.is_pooled
        return self._database

    def _existing(self) -> str | None:
        """Name the database that tests run in as it is, `None` where they get one of their own."""
        wanted = bool(self._steps or self.options.extensions)
        if self.options.database == "existing" and wanted:  # steps that a fixture has given
            raise KitError(
                "--pgmonkey-database is existing: nothing is ever committed in it, so schema and "
                "extensions cannot be loaded; use scratch databases"
            )
        return None if self.options.database == "scratch" or wanted else self.server.existing

    def _prepare_template(self, launched: Launch | None) -> None:
        """Have a server with the template of the schema; one that fails to get it is stopped."""
        self._recipe = recipe_of(self._steps, self.options.extensions, self.options.rootdir)
        if self._server is not None:
            self._find_template()
            return
        if launched is not None:
            self._server = launched.server()
        else:
            self._server = start_server(self.options, self.worker, self._recipe)
        try:
            self._find_template()
            self._server.publish()
        except BaseException:
            self._server.stop()
            self._server = None
            raise

    def _find_template(self) -> str | None:
        return self.server.template(self._recipe, self._load) if self._recipe else None

    def _create(self, name: str) -> None:
        template = self._find_template()
        self.server.create_database(name, template)
        if template is None:
            self._load(name)

    def _load(self, name: str) -> None:
        """Create the extensions in a database and load the schema into it."""
        self._create_extensions(name)
        with self.preparing(name):
            load_schema(self._steps, lambda: _connect(self.server.conninfo(name)))

    def _create_extensions(self, name: str) -> None:
        if self.options.extensions:
            from .databases.extensions import create_extensions

            with _connect(self.server.admin_conninfo(name)) as conn:
                create_extensions(
                    conn,
                    self.options.extensions,
                    self.server.description,
                    self.server.extension_advice,
                )

    def spec(self, connection_type: str, conninfo: dict[str, str]) -> ConnectionSpec:
        """Give the configuration of a type for a database of the server."""
        return connection_spec(self.server.config(conninfo["dbname"]), connection_type)

    @contextmanager
    def preparing(self, name: str) -> Iterator[None]:
        """Lead handles to a database for real, for a block."""
        interception = self.interception
        before = interception.phase, interception.preparing
        interception.preparing = _Preparation(self, self.server.conninfo(name))
        interception.phase = Phase.PREPARING
        try:
            yield
        finally:
            interception.phase, interception.preparing = before

    def note_unblocked(self) -> None:
        """Note that the database holds more than the schema: it cannot be made again."""
        self._unblocked = True
        if self._clones is not None:
            self._clones.forget_template()

    # Data of wider scopes

    @property
    def simple(self) -> bool:
        """Whether a test can begin without anything that may fail."""
        return not (self._shared or self._lost) and self.interception.isolation == "rollback"

    @contextmanager
    def share(self) -> Iterator[SandboxConnection]:
        """Give a connection whose work the tests of a scope see, until the block ends."""
        if self.interception.clones_wanted:
            self.clones.make_template()  # while nobody is connected to the database
        scope = self.sandbox.open_scope()
        self._shared.append(scope)
        try:
            yield scope.connection
        finally:
            self._shared.remove(scope)
            scope.close()

    # Clones

    def _pristine(self) -> str | None:
        """Give the template of which the prepared database is a copy to which nothing came."""
        return None if self._unblocked else self._find_template()

    @property
    def clones(self) -> Clones:
        """The copies of the prepared database."""
        if self._clones is None:
            self._clones = Clones(
                self.server, self.database.name, self.sandbox.close, self._pristine
            )
        return self._clones

    @property
    def conninfo(self) -> dict[str, str]:
        """Keywords for libpq that lead to the database of the running test."""
        if self._world is not None:
            return self._world.conninfo
        return self.outside_conninfo

    @property
    def outside_conninfo(self) -> dict[str, str]:
        """Keywords for libpq that lead to the prepared database, past the test's transaction.

        Such a connection would wait for the test's locks without end, so it waits for as long as
        one of the test's own.
        """
        conninfo = self.server.conninfo(self.database.name)
        options = conninfo.get("options", "")
        # PgBouncer refuses options that it does not know.
        if "lock_timeout" in options or self._pooled:
            return conninfo
        limit = max(1, round(self.options.wait_timeout * 1000))
        return {**conninfo, "options": f"{options} -c lock_timeout={limit}".lstrip()}

    def execute(self, query: Any, params: Any) -> psycopg.Cursor[Any]:
        """Run one statement in autocommit in the running test's database."""
        __tracebackhide__ = True
        if self._world is not None:
            return self._world.execute(query, params)
        conn: Any = self.sandbox.lend(SandboxConnection, autocommit=True)
        try:
            cursor: psycopg.Cursor[Any] = conn.execute(query, params)
            return cursor
        finally:
            conn.close()

    # Tests

    @property
    def database(self) -> Database:
        """The prepared database."""
        assert self._database is not None  # fixtures ask for the database first
        return self._database

    @property
    def sandbox(self) -> Sandbox:
        """The rolled-back transaction of the running test."""
        assert self._sandbox is not None  # fixtures ask for the database first
        return self._sandbox

    def begin(self) -> None:
        """Begin a test; fixtures may do so several times, the first one counts."""
        if not self._depth and not self.simple:
            self._begin_special()
        self._depth += 1
        self.interception.phase = Phase.TEST

    def _begin_special(self) -> None:
        if self._lost:
            told, self._lost = self._lost, self._lost.partition("\n")[0]
            raise KitError(told)
        if self.interception.isolation == "clone":
            self._world = CloneWorld(self.clones, self.server)
            self.interception.sandbox = self._world
        elif any(scope.lost for scope in self._shared):
            raise KitError(
                "the data of pgmonkey_module or pgmonkey_class is gone: an earlier test has lost "
                "the session that it was written in"
            )
        else:
            self.sandbox.begin()

    def end(self) -> tuple[list[str], list[str]]:
        """End a test: undo it, and give its failures and what else its report should tell.

        Raises SpoiledError where that cannot be done.
        """
        self._depth -= 1
        if self._depth:
            return [], []
        self.interception.phase = Phase.OUTSIDE
        if self._world is not None:
            world, self._world = self._world, None
            self.interception.sandbox = self.sandbox
            failures = world.end()
            if self._keeping is not None:
                self._keeping.hold(world)
            else:
                world.give_back()
            return failures, []
        sandbox = self.sandbox
        refusals = sandbox.take_refusals()
        failures = sandbox.reset()
        if sandbox.spoiled:
            self._rebuild(failures)
        elif not sandbox.is_open:
            self._reopen()
        return failures, refusals

    def see(self, test: str, when: str, *, failed: bool) -> str:
        """Follow the phases of a test whose database may be kept; give what its report tells."""
        if self._server is None:
            return ""
        if self._keeping is None:
            from .clones.keeping import Keeping

            self._keeping = Keeping(self._server)
        return self._keeping.see(test, when, failed=failed, cloned=self._world is not None)

    def _reopen(self) -> None:
        """Connect anew, or remember why no further test can: one line for each is enough."""
        try:
            self.sandbox.connect(_PATIENCE)
        except psycopg.OperationalError as error:
            last_words = filter(None, [f"the server has ended: {error}", self.server.log()])
            self._lost = "\n".join(last_words)

    def _rebuild(self, failures: list[str]) -> None:
        """Make the database anew after something was committed in it."""
        name = self.database.name
        self.sandbox.close()
        self.sandbox.spoiled = False
        if self.database.existing or self._unblocked:
            failures = [*failures, f"the database {name!r} is no longer as it was: the run stops"]
            raise SpoiledError("; ".join(failures))
        self.server.drop_database(name)
        self._create(name)

    def handle(self, connection_type: str) -> Any:
        """Give a handle of a type that leads to the test's transaction."""
        return make_handle(self._specs[connection_type], None, self.own_manager)

    @property
    def own_manager(self) -> PGConnectionManager:
        """The manager to which the kit's own handles belong."""
        if not hasattr(self, "_manager"):
            self._manager = self.manager()
        return self._manager

    def manager(self) -> PGConnectionManager:
        """Give a new manager, whose handles all lead to the test's transaction."""
        manager = PGConnectionManager()
        self.interception.own.add(manager)
        return manager

    def close(self) -> None:
        """End everything that the process has started."""
        if os.getpid() != self._pid:
            return
        if self._keeping is not None:
            self._keeping.close()
        if self._clones is not None:
            self._clones.close()
        if self._sandbox is not None:
            self._sandbox.close()
        if self._database is not None:
            self._database.remove_files()
        if self._server is not None:
            self._server.stop()
        self._sandbox = self._database = self._server = None


def _connect(conninfo: dict[str, str]) -> psycopg.Connection[Any]:
    return psycopg.Connection.connect(**conninfo)  # type: ignore[arg-type]
