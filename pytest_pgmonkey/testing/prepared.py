"""The prepared database of a test process, and the value of `pgmonkey_database`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from psycopg.conninfo import make_conninfo

from ..connecting import AsyncDirectSource, Connector, DirectSource
from .addresses.urls import url_of
from .databases.commands import connect, create_extensions
from .databases.schema import load_schema
from .file_settings import in_preparation
from .isolation import Isolation, KitError, SpoiledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ..handles import AsyncHandle, Handle
    from .addresses.config_files import ConfigFiles
    from .databases.recipe import Recipe
    from .interception import Interception
    from .servers.server import Server

__all__ = ["Database", "Preparation"]


class _RealSources:
    """Lead handles to a database of the test server, in real transactions."""

    def __init__(self, server: Server, name: str) -> None:
        self._config = server.config(name)
        self.leads_to: Final = server.conninfo(name)

    def _connector(self, handle: Any) -> Connector:
        return Connector(in_preparation(handle.spec, self._config), handle._connector.hook)

    def source(self, handle: Handle) -> DirectSource:
        return DirectSource(self._connector(handle))

    def async_source(self, handle: AsyncHandle) -> AsyncDirectSource:
        return AsyncDirectSource(self._connector(handle))


class Preparation:
    """Makes the database of a process with schema and extensions, from a template if there is one.

    If there is nothing to load, tests may run in the server's own database as it is. `led` is
    called before handles and clients lead elsewhere.
    """

    def __init__(
        self,
        server: Server,
        steps: list[Path | Callable[[Any], Any]],
        recipe: Recipe | None,
        extensions: tuple[str, ...],
        interception: Interception,
        led: Callable[[], None],
    ) -> None:
        self.server: Final = server
        self._steps = steps
        self._recipe = recipe
        self._extensions = extensions
        self._interception = interception
        self._led = led
        self._unblocked = False
        self.name = ""
        self.is_existing = False

    def template(self) -> str | None:
        """Give the database that holds the schema and nothing else, if the server has one."""
        return self.server.template(self._recipe, self._load) if self._recipe else None

    def make(self, *, scratch: bool) -> None:
        """Make the database, unless the tests may run in the server's own."""
        existing = None if scratch or self._steps or self._extensions else self.server.existing
        self.is_existing = existing is not None
        self.name = existing or self.server.scratch_name("tests")
        if not self.is_existing:
            self._create()

    def remake(self, failures: list[str]) -> None:
        """Make the database again after a test has committed something in it.

        Raises SpoiledError, which also names `failures`, if that would lose other data.
        """
        if self.is_existing or self._unblocked:
            told = f"the database {self.name!r} is no longer as it was: the run stops"
            raise SpoiledError("; ".join([*failures, told]))
        self.server.drop_database(self.name)
        self._create()

    def pristine(self) -> str | None:
        """Give the template that the database is still an unchanged copy of."""
        return None if self._unblocked else self.template()

    @contextmanager
    def unblock(self) -> Iterator[None]:
        """Lead handles to the database for a block. After that it cannot be made again."""
        self._unblocked = True
        with self._leading_to(self.name):
            yield

    @contextmanager
    def _leading_to(self, name: str) -> Iterator[None]:
        self._led()  # what they have read before would be in the way
        try:
            with self._interception.preparing(_RealSources(self.server, name)):
                yield
        finally:
            self._led()

    def _create(self) -> None:
        template = self.template()
        self.server.create_database(self.name, template)
        if template is None:
            self._load(self.name)

    def _load(self, name: str) -> None:
        """Create the extensions in a database and load the schema into it."""
        if self._extensions:
            with connect(self.server.admin_conninfo(name), autocommit=False) as conn:
                create_extensions(
                    conn,
                    self._extensions,
                    self.server.description,
                    self.server.extension_advice,
                )
        with self._leading_to(name):
            load_schema(
                self._steps,
                lambda: connect(self.server.conninfo(name), autocommit=False),
                self.server.extension_advice,
            )


class Database:
    """The prepared database of this process; the value of the fixture `pgmonkey_database`.

    `outside` leads past every test's transaction. `changing` is entered while data is written
    that every test should see.
    """

    def __init__(
        self,
        preparation: Preparation,
        outside: Isolation,
        changing: Callable[[], AbstractContextManager[None]],
        files: ConfigFiles,
    ) -> None:
        self._preparation = preparation
        self._outside = outside
        self._changing = changing
        self._files = files
        self._server = preparation.server
        self.name: Final = preparation.name

    @property
    def is_existing(self) -> bool:
        """Whether it is the server's own database, in which the kit never commits anything."""
        return self._preparation.is_existing

    def __repr__(self) -> str:
        return f"<Database {self.name!r} on {self._server.description}>"

    @property
    def dsn(self) -> str:
        """The DSN of the database: `host=… dbname=…`.

        Such a connection is outside of every test's transaction: **it commits for good**. Its
        `lock_timeout` is `wait-timeout`, except behind a connection pooler.
        """
        return make_conninfo(**self._outside.conninfo)

    @property
    def url(self) -> str:
        """The database as a URL: `postgresql://user@host/name`. It has no `lock_timeout`."""
        return url_of(self._server.conninfo(self.name))

    @property
    def config_path(self) -> Path:
        """A YAML file that leads a subprocess to this database; it is removed at the run's end."""
        return self._files.write(self._server.config(self.name))

    @contextmanager
    def unblock(self) -> Iterator[None]:
        """Let handles write to this database for a block, for data that every test should see.

        Raises KitError in an existing database, where the kit never commits anything.
        """
        if self._preparation.is_existing:
            raise KitError(
                f"the database {self.name!r} is not the kit's own: nothing is ever committed in "
                "it. Use scratch databases (--pgmonkey-database=scratch)"
            )
        with self._changing(), self._preparation.unblock():
            yield
