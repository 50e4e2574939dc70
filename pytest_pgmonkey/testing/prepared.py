"""The prepared database of a test process, as fixtures show it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import yaml
from psycopg.conninfo import make_conninfo

from ..errors import PGMonkeyError
from .servers.embedded.directories import choose_directories
from .servers.embedded.guarded_process import GuardedProcess
from .servers.server import url_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .kit import Kit

__all__ = ["Database", "KitError", "SpoiledError"]


class KitError(PGMonkeyError):
    """The kit cannot give a test what it asks for; the message says what to do."""


class SpoiledError(KitError):
    """A test has committed something that cannot be undone: no other may run on it."""


class Database:
    """The prepared database of this process; the value of the fixture `pgmonkey_database`."""

    def __init__(self, kit: Kit, name: str, *, existing: bool) -> None:
        self.kit: Final = kit
        self.name: Final = name
        self.existing: Final = existing
        self._guarded: GuardedProcess | None = None

    def __repr__(self) -> str:
        return f"<Database {self.name!r} on {self.kit.server.description}>"

    @property
    def dsn(self) -> str:
        """What libpq connects with: `host=… dbname=…`.

        Such a connection is outside of every test's transaction: **it commits for good**. It waits
        for a lock no longer than `wait-timeout` (its `lock_timeout`).
        """
        return make_conninfo(**self.kit.outside_conninfo)

    @property
    def url(self) -> str:
        """The same as a URL, for tools that want one: `postgresql://user@host/name`."""
        return url_of(self.kit.server.conninfo(self.name))

    @property
    def config_path(self) -> Path:
        """A YAML file that leads a subprocess to this database; it is removed with the run."""
        if self._guarded is None:
            # It may hold a password: a guardian removes it even after a SIGKILL.
            self._guarded = GuardedProcess(choose_directories(None)[:1], None)
            with self._config_file.open("x", encoding="utf-8") as file:
                self._config_file.chmod(0o600)
                yaml.safe_dump(self.kit.server.config(self.name), file)
        return self._config_file

    @property
    def _config_file(self) -> Path:
        assert self._guarded is not None
        return self._guarded.home / "pgmonkey_config.yaml"

    @contextmanager
    def unblock(self) -> Iterator[None]:
        """Let handles write to this database for a block, for data that every test shall see.

        Raises KitError in an existing database, in which nothing is ever committed.
        """
        if self.existing:
            raise KitError(
                f"the database {self.name!r} is not the kit's own: nothing is ever committed in "
                "it. Use scratch databases (--pgmonkey-database=scratch)"
            )
        self.kit.note_unblocked()
        with self.kit.preparing(self.name):
            yield

    def remove_files(self) -> None:
        """Remove the file of `config_path`."""
        if self._guarded is not None:
            self._guarded.end()
            self._guarded = None
