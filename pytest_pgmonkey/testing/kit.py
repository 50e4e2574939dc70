"""One test process: its server, its prepared database, and the tests that run in it one by one."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, contextmanager
from functools import cached_property
from shlex import quote
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.conninfo import make_conninfo

from ..config import connection_spec
from ..connection_type import CONNECTION_TYPES
from ..errors import PGMonkeyError
from ..handles import make_handle
from ..manager import PGConnectionManager
from ..secrets import redact_text
from . import passage
from .addresses.config_files import ConfigFiles
from .addresses.purpose import Purpose
from .clone_connections import CloneConnector, Loans
from .clones.clones import Clones
from .clones.isolation import CloneIsolation
from .databases.recipe import recipe_of
from .databases.schema import resolve_steps
from .isolation import KitError, SpoiledError
from .options import is_function, refuse_existing
from .prepared import Database, Preparation
from .record.record import Record
from .rollback import RollbackIsolation
from .sandbox.psycopg_door.internals import arguments
from .servers.launch import start_server

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from concurrent.futures import Future

    from psycopg import Connection

    from .clones.keeping import Keeping
    from .gateway.entrance.entrance import Entrance
    from .gateway.gateway import Gateway
    from .gateway.sessions.wider import WiderSession
    from .interception import Interception
    from .isolation import Isolation
    from .options import Options
    from .record.lines import Line
    from .sandbox.checkpoints import Checkpoint
    from .sandbox.core.outer import OuterTransaction, Scope
    from .servers.server import Server, Worker

__all__ = ["Kit"]

_NOT_IN_A_CLONE: Final = (
    "a client has written in a transaction that it began outside of the test and that is still "
    "open; a clone does not have that data. Use isolation='rollback', or end the transaction"
)

_RESTARTS_FOR_ITSELF: Final = (
    "sequences='restart' cannot be had in an existing database under pytest-xdist: each test "
    "would wait for another worker's. Use scratch databases (--pgmonkey-database=scratch), or run "
    "without workers"
)
_NO_CHECKPOINT: Final = (
    "pgmonkey.checkpoint() undoes nothing in clone isolation, where every commit is real. Mark the "
    "test with @pytest.mark.pgmonkey(isolation='rollback'), or let each case be a test of its own"
)


class Kit:
    """What the fixtures of one process share; made at their first use.

    Before `prepare()` it has only a server. `isolations_wanted` gives the isolations that the run's
    tests ask for. `restart_wanted` tells whether a test asks for sequences as the template has
    them. Clients may connect to `entrance` before any test.
    """

    # These exist once the database is prepared, which every fixture asks for first.
    handles: OwnHandles
    isolation: Isolation
    _rollback: RollbackIsolation
    _clones: Clones

    def __init__(
        self,
        options: Options,
        interception: Interception,
        stop_run: Callable[[str], None],
        worker: Worker | None = None,
        *,
        isolations_wanted: Callable[[], Collection[str]] = tuple,
        restart_wanted: Callable[[], bool] = bool,
        entrance: Entrance | None = None,
    ) -> None:
        self._options = options
        self._interception = interception
        self._stop_run = stop_run
        self._worker = worker
        self._isolations_wanted = isolations_wanted
        self._restart_wanted = restart_wanted
        self._entrance = entrance
        # A client may start the server from a thread of its own.
        self._starting = threading.Lock()
        self._opening = threading.Lock()
        self._between = threading.RLock()  # a client may open a scope while a test begins
        self._server: Server | None = None
        self._database: Database | None = None
        self._keeping: Keeping | None = None
        self._gateway: Gateway | None = None
        self._depth = 0
        self.record = Record(arguments)
        self.may_clone = False
        """Whether the test that began last is in rollback isolation and could be in a clone."""
        self.may_move = False
        """Whether a refusal moves it into a clone."""
        self.has_moved = False
        """Whether the test that began last is in a clone although it did not ask for one."""
        self.leaks: list[str] = []
        """What the test that ended last has left open, for its report."""
        self.files = ConfigFiles()
        self._ends = ExitStack()
        self._ends.callback(self.files.remove)
        self._pid = os.getpid()

    @property
    def server(self) -> Server:
        """The server, started at its first use."""
        server, _ = self._start(lambda: start_server(self._options, self._worker))
        server.publish()
        return server

    def _start(self, start: Callable[[], Server]) -> tuple[Server, bool]:
        """Give the server, and whether this call started it."""
        with self._starting:
            if self._server is not None:
                return self._server, False
            server = self._server = start()
            self._ends.callback(server.stop)
            return server, True

    def _for_clients(self) -> Server:
        """Give the server to a client, which may come before the schema's steps are known."""
        if self._server is not None:
            return self._server
        options, recipe = self._options, None
        # The application may be in the middle of being imported, and wait for its connection.
        if not any(is_function(step) for step in options.schema):
            steps = resolve_steps(options.schema, options.rootdir)
            recipe = recipe_of(steps, options.extensions, options.rootdir)
        server, _ = self._start(lambda: start_server(options, self._worker, recipe))
        if self._worker is not None:
            server.publish()  # the others may wait for it before any test runs
        return server

    def prepare(self, steps: Iterable[Any], launched: Future[Server] | None = None) -> Database:
        """Make the database of this process, load the schema into it, and connect to it.

        The server may already be launched for these steps. The database is made only once in a
        run, because a test that is run again may have ended the session's fixtures.
        """
        if self._database is None:
            self._end_sessions()
            preparation = self._preparation(steps, launched)
            preparation.make(scratch=self._options.database == "scratch")
            database = self._compose(preparation)
            self._rollback.connect()
            self._database = database
            self._end_sessions()  # from now on clients read the prepared database
        return self._database

    def _preparation(self, steps: Iterable[Any], launched: Future[Server] | None) -> Preparation:
        """Start a server with the template of the schema, and stop it if that fails."""
        options = self._options
        resolved = resolve_steps(steps, options.rootdir)
        if resolved or options.extensions:
            refuse_existing(options)  # the steps came from a fixture, not from an option
        recipe = recipe_of(resolved, options.extensions, options.rootdir)

        def start() -> Server:
            if launched is not None:
                return launched.result()
            return start_server(options, self._worker, recipe)

        server, is_new = self._start(start)
        if launched is not None and launched.result() is not server:
            launched.result().stop()  # a client was faster
        preparation = Preparation(
            server, resolved, recipe, options.extensions, self._interception, self._end_sessions
        )
        try:
            preparation.template()
            server.publish()
        except BaseException:
            if is_new:
                self._server = None
                server.stop()
            raise
        return preparation

    def _compose(self, preparation: Preparation) -> Database:
        server, name, options = preparation.server, preparation.name, self._options
        self._rollback = self.isolation = RollbackIsolation(
            server.conninfo(name),
            options.wait_timeout,
            preparation.remake,
            server.log,
            is_existing=preparation.is_existing,
        )
        self._clones = Clones(server, name, self._before_copy, preparation.pristine)
        passage.recorder = self.record
        self._ends.callback(self._record_no_more)
        self.handles = OwnHandles(server.config(name), self._interception)
        database = Database(preparation, self._rollback, self._changing, self.files)
        for end in (self._rollback.close, self._clones.close):
            self._ends.callback(end)
        if options.keep != "never":
            from .clones.keeping import Keeping

            self._keeping = Keeping(server)
            self._ends.callback(self._keeping.close)
        return database

    @property
    def gateway(self) -> Gateway:
        """The gateway, by which any client joins the tests; it listens from its first use on."""
        with self._opening:
            if self._gateway is None:
                from .gateway.entrance.entrance import Entrance
                from .gateway.gateway import Gateway

                entrance = self._entrance or Entrance(
                    self.server.user, self._outside()["dbname"], lambda: self.gateway
                )
                self._gateway = Gateway(
                    lambda: self._interception.leading,
                    self._outside,
                    self._greeter,
                    entrance,
                    self._options.map,
                    self,
                )
            return self._gateway

    def accept(self, dbname: str) -> None:
        """Let handles in this process use this name for the test's database."""
        self._interception.accept(dbname)

    def _outside(self) -> dict[str, str]:
        """Give libpq's keywords of the database that clients read while no test runs."""
        return self._greeter() if self._database is None else self._rollback.conninfo

    def _greeter(self) -> dict[str, str]:
        """Give libpq's keywords of a database that exists as long as the server."""
        server = self._for_clients()
        return server.conninfo(server.admin_conninfo()["dbname"])

    # Tests

    @contextmanager
    def share(self, *, restarts: bool = False) -> Iterator[Connection[Any]]:
        """Give a connection whose work the tests of a scope see, until the block ends.

        With `restarts`, the connection finds sequences as the template has them.
        """
        with self._between:
            self._end_sessions()
            self._note_sequences()
            self._prepare_for_clones()
            self._check_restart(restarts=restarts)
            scope = self._rollback.open_scope(restarts=restarts)
        try:
            yield scope.connection
        finally:
            with self._between:
                self._rollback.close_scope(scope)

    def widen(self, make: Callable[[OuterTransaction], WiderSession]) -> WiderSession | None:
        """Open a scope for a transaction that a client has begun outside of a test.

        Returns `None` if a test has begun meanwhile, or the database is not prepared.
        """
        with self._between:
            if self._depth or self._database is None or self._interception.leading is not None:
                return None
            self._end_sessions()
            self._note_sequences()
            self._prepare_for_clones()
            restarts = self._options.sequences == "restart"
            self._check_restart(restarts=restarts)
            return self._rollback.widen(make, restarts=restarts)

    def _prepare_for_clones(self) -> None:
        """Make the clones' template, if tests may want one, before the database is written to."""
        wanted = self._isolations_wanted()
        if "clone" in wanted or ("auto" in wanted and self._makes_clones):
            self._clones.make_template()

    @property
    def _makes_clones(self) -> bool:
        """Whether it makes clones unasked: it never copies a database that is not its own."""
        return self._database is not None and not self._database.is_existing

    def leave(self, scope: Scope[Any]) -> None:
        """Close a client's scope: now, or at the end of the running test."""
        with self._between:
            self._rollback.leave(scope, in_test=bool(self._depth))

    def begin(self, isolation: str, needs_clone: bool = False, restarts: bool = False) -> None:
        """Begin a test. Several fixtures may call this; only the first call counts.

        With isolation auto, the test runs in a clone if it `needs_clone` and can have one. With
        `restarts`, it finds sequences as the template has them; in a clone it does anyway.
        """
        with self._between:
            if not self._depth:
                self._begin(isolation, needs_clone=needs_clone, restarts=restarts)
            self._depth += 1

    def _begin(self, isolation: str, *, needs_clone: bool, restarts: bool) -> None:
        self._end_sessions()
        self._note_sequences()
        could = self._makes_clones and not self._rollback.has_wider
        self.has_moved = could and isolation == "auto" and needs_clone
        is_cloned = isolation == "clone" or self.has_moved
        self.may_clone = could and not is_cloned
        self.may_move = self.may_clone and isolation == "auto"
        test: Isolation = self._clone() if is_cloned else self._rollback
        if self._keeping is not None and not (is_cloned or self._obstacle_to_keeping()):
            self._clones.make_template()  # for the next test, in case this one's database is kept
        restarts = restarts and not is_cloned
        self._check_restart(restarts=restarts)
        if restarts:
            self._rollback.begin(restarts=True)
        else:
            test.begin()
        self.record.begin()
        self._rollback.refusals.begin(moves=self.may_move)
        self.isolation = test
        self._interception.begin_test(test)

    def _clone(self) -> CloneIsolation:
        self._rollback.check_server()
        if self._rollback.has_wider:
            raise KitError(_NOT_IN_A_CLONE)
        retire = self._keeping.hold if self._keeping else CloneIsolation.give_back
        return CloneIsolation(self._clones, self.server, CloneConnector, Loans, retire)

    def _note_sequences(self) -> None:
        """Note where sequences stand before any test moves them, if a test will ask for that."""
        if self._restart_wanted() or self._options.sequences == "restart":
            self._rollback.note_sequences()

    def _check_restart(self, *, restarts: bool) -> None:
        if restarts and self._worker is not None and not self._makes_clones:
            raise KitError(_RESTARTS_FOR_ITSELF)

    def _before_copy(self) -> None:
        """Disconnect from the prepared database, with sequences as tests should find them."""
        if self._makes_clones:
            self._rollback.put_sequences_back()
        self._rollback.close()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let somebody write data that every test should see."""
        self._clones.forget_template()
        if not self._depth:  # a running test has used what follows
            self._rollback.put_sequences_back()
        try:
            yield
        finally:
            self._rollback.forget_sequences()

    @property
    def refusal(self) -> str:
        """Why the test that began last must run in a clone; empty if it need not."""
        return self._rollback.refusals.first if self.may_move else ""

    def checkpoint(self) -> Checkpoint:
        """Give a block that is undone at its end; its test is never run again in a clone.

        Raises KitError in clone isolation.
        """
        from .sandbox.checkpoints import Checkpoint
        from .sandbox.core.outer import OuterTransaction

        lead = self.isolation.leads_to
        if not isinstance(lead, OuterTransaction):
            raise KitError(_NO_CHECKPOINT)
        self.may_clone = self.may_move = self._rollback.refusals.moves = False
        return Checkpoint(lead)

    def expect_test(self) -> None:
        """Forget the last test."""
        self.may_clone = self.may_move = self.has_moved = False
        self.leaks = []

    def end(self) -> tuple[list[str], list[str]]:
        """End a test and undo it; return its failures, and what else its report should tell.

        If it cannot be undone, the run stops. Then this raises SpoiledError.
        """
        with self._between:
            return self._end()

    def _end(self) -> tuple[list[str], list[str]]:
        self._depth -= 1
        if self._depth:
            return [], []
        self._interception.end_test()
        self.record.end()
        self._rollback.refusals.moves = False  # a refusal between tests moves no test
        self._end_sessions()
        test, self.isolation = self.isolation, self._rollback
        try:
            if test is self._rollback and self._keeping is not None and self._keeping.is_promised:
                failures, refusals = self._end_and_keep(self._keeping)
            else:
                failures, refusals = test.end()
            return failures + self._see_leaks(test), refusals
        except SpoiledError as error:
            self._stop_run(f"pgmonkey: {error}")
            raise
        finally:
            if self._gateway is not None:
                self._gateway.end_clients()

    def _see_leaks(self, test: Isolation) -> list[str]:
        """Note what a test has left open; return the failures that this means."""
        self.leaks = []
        if not test.left or self._options.leaks == "off":
            return []
        from .record.leaks import leaks

        found = leaks(test.left)
        if self._options.leaks == "error":
            return found
        self.leaks = found
        return []

    def _end_and_keep(self, keeping: Keeping) -> tuple[list[str], list[str]]:
        """End a test in rollback isolation, keep its database, and make another one."""
        assert self._database is not None
        if not self._clones.has_template:
            keeping.fail("what every test finds has changed while it ran")
            return self._rollback.end()
        try:
            told = self._rollback.make_real()
        except (PGMonkeyError, psycopg.Error, TimeoutError) as error:
            keeping.fail(redact_text(str(error)))
            return self._rollback.end()
        name = self._database.name
        if not keeping.keep(name):
            self.server.drop_database(name)
        self.server.create_database(name, self._clones.make_template())
        self._rollback.forget_sequences()
        return told

    def _obstacle_to_keeping(self) -> str:
        """Tell why the database of a test in rollback isolation cannot be kept; empty if it can."""
        if self._database is None or self._database.is_existing:
            return "nothing is ever committed in a database that is not the kit's own"
        if self._rollback.is_shared:
            return (
                "other tests work in it, too: pgmonkey_module, pgmonkey_class or a client is open"
            )
        return ""

    def _end_sessions(self) -> None:
        """Disconnect the gateway's clients from a database that is copied or dropped next."""
        if self._gateway is not None:
            self._gateway.end_sessions()

    def pointer(self) -> str:
        """Tell how to look at the running test, or why that is impossible; empty if none runs."""
        if not self._depth:
            return ""
        try:
            dsn = make_conninfo(**self.gateway.conninfo(Purpose.PEEK))
            return self.gateway.obstacle() or f"the test's data: psql {quote(dsn)}"
        except PGMonkeyError as error:
            return str(error)

    def timeline(self, width: int) -> list[Line]:
        """Give the statements of the test that began last, for a report of this width."""
        from .record.timeline import timeline

        record, options = self.record, self._options
        entries = list(record.since(0))
        missing = record.number - len(entries)
        return timeline(entries, record.began, missing, width, params=options.timeline_params)

    def _record_no_more(self) -> None:
        if passage.recorder is self.record:
            passage.recorder = None

    def see(self, test: str, when: str, *, failed: bool) -> str:
        """Note a phase of a test whose database may be kept; return a text for its report."""
        if self._keeping is None:
            return ""
        running = self.isolation if self._depth else None
        obstacle = self._obstacle_to_keeping() if running is self._rollback else ""
        return self._keeping.see(test, when, failed=failed, running=running, obstacle=obstacle)

    def close(self) -> None:
        """End everything that the process has started."""
        if os.getpid() != self._pid:
            return  # a forked child has started none of it
        if self._gateway is not None:
            self._gateway.close()  # it may be older than what its clients are connected to
        self._ends.close()


class OwnHandles:
    """Makes handles and managers that lead to the running test, even without interception.

    `config` is the configuration of the prepared database.
    """

    def __init__(self, config: Mapping[str, Any], interception: Interception) -> None:
        self._interception = interception
        self._specs = {name: connection_spec(config, name) for name in CONNECTION_TYPES}

    def make(self, connection_type: str) -> Any:
        """Give a new handle of a type."""
        return make_handle(self._specs[connection_type], None, self._owner)

    @cached_property
    def _owner(self) -> PGConnectionManager:
        return self.manager()

    def manager(self) -> PGConnectionManager:
        """Give a new manager; any path or dictionary you give it leads to the test's database."""
        manager = PGConnectionManager()
        self._interception.adopt(manager)
        return manager
