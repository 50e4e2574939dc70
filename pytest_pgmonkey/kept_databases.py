"""The databases of failed tests that were kept: which there are, and how one is removed.

Each has a file in the user's cache, without a password. A server that the kit has started lives
on as long as the file of one of its databases is there.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

from .caches import private_cache, private_caches
from .errors import PGMonkeyError
from .processes import is_dead

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from psycopg import Connection

LIMIT: Final = 10
_DIRECTORY: Final = "kept"
_PREFIX: Final = "pgmonkey_kept_"
_NAME_LIMIT: Final = 63
_SUPERUSER: Final = "postgres"
_CONNECT_LIMIT: Final = 5


class KeptError(PGMonkeyError):
    """A database cannot be kept or removed; the message says why."""


@dataclass(frozen=True)
class Kept:
    """One database: its test, how people reach it, and `place`, by which it is found again."""

    name: str
    test: str
    made: str
    """UTC, in ISO 8601."""
    source: str
    dsn: str
    psql: str
    place: Mapping[str, Any]
    note: str = ""
    """What else one has to know to get in."""
    machine: str = field(default_factory=socket.gethostname)
    file: Path | None = field(default=None, compare=False)

    def save(self) -> Kept:
        """Write its file, all or nothing, and give it with its file; raises KeptError."""
        file = writable_directory() / f"{self.name}.json"
        partial = file.with_suffix(".partial")
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file"}
        try:
            with partial.open("x", encoding="utf-8") as writing:
                json.dump(facts, writing)
            partial.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise KeptError(f"{file} cannot be written: {error.strerror}") from None
        return replace(self, file=file)

    def forget(self) -> None:
        """Remove its file; a server of the kit's own ends with its last one. Raises KeptError."""
        try:
            if self.file is not None:
                self.file.unlink(missing_ok=True)
        except OSError as error:
            raise KeptError(f"{self.file} cannot be removed: {error.strerror}") from None

    def is_gone(self) -> bool:
        """Whether it is certain that the database is no more."""
        return _SOURCES[self.source].is_gone(self)


def new_name(test: str) -> str:
    """Give a new name for the database of a test, which tells the test."""
    suffix = f"_{secrets.token_hex(4)}"
    # Parameters may hold "::" too.
    path, bracket, parameters = test.partition("[")
    function = path.rpartition("::")[2] + bracket + parameters
    words = re.sub(r"[^a-z0-9]+", "_", function.lower()).strip("_") or "test"
    return _PREFIX + words[: _NAME_LIMIT - len(_PREFIX) - len(suffix)].rstrip("_") + suffix


def entries() -> list[Kept]:
    """Give the databases that this user keeps on this machine, the oldest first."""
    found = [_read(file) for cache in private_caches(_DIRECTORY) for file in cache.glob("*.json")]
    here = socket.gethostname()
    mine = [kept for kept in found if kept is not None and kept.machine == here]
    return sorted(mine, key=lambda kept: (kept.made, kept.name))


def names_in(container: str) -> set[str]:
    """Give the names of the databases that are kept in a container."""
    return {kept.name for kept in entries() if kept.place.get("container") == container}


def remove(kept: Kept) -> None:
    """Drop a database and forget it; raises KeptError."""
    _SOURCES[kept.source].drop(kept)
    kept.forget()


def remove_old() -> None:
    """Remove the oldest as long as there are more than LIMIT; one that cannot be reached stays."""
    for kept in entries()[:-LIMIT]:
        with contextlib.suppress(KeptError):
            remove(kept)


def describe(kept: Kept) -> dict[str, str]:
    """Give what people are told of a database, under the names that they know."""
    told = {
        "test": kept.test,
        "when": f"{kept.made[:19].replace('T', ' ')} UTC",
        "source": kept.source,
        "DSN": kept.dsn,
        "psql": kept.psql,
    }
    return {**told, "note": kept.note} if kept.note else told


def writable_directory() -> Path:
    """Give the directory of the files; raises KeptError where none can be written."""
    directory = private_cache(_DIRECTORY)
    if directory is None:
        raise KeptError(
            "there is no cache directory to write into, and a database that is not written down "
            "there would never be removed: set XDG_CACHE_HOME to a directory of yours"
        )
    return directory


def _read(file: Path) -> Kept | None:
    """Read an entry; `None` where it is just being removed, or is no entry of this version."""
    try:
        kept = Kept(**json.loads(file.read_text("utf-8")), file=file)
        return kept if kept.source in _SOURCES else None
    except (OSError, ValueError, TypeError):
        return None


# --- where a database is kept ---


class _Source:
    """Where databases are kept: a server on which they can be seen and dropped."""

    def connect(self, kept: Kept) -> Connection[Any]:
        """Connect as the role that may drop the database; raises KeptError."""
        raise NotImplementedError

    def is_gone(self, kept: Kept) -> bool:
        """Whether it is certain that the database is no more."""
        try:
            with self.connect(kept) as conn:
                query = "SELECT FROM pg_catalog.pg_database WHERE datname = %s"
                return conn.execute(query, [kept.name]).fetchone() is None
        except KeptError:
            return False

    def drop(self, kept: Kept) -> None:
        """Drop the database; raises KeptError."""
        import psycopg
        from psycopg import sql

        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        with self.connect(kept) as conn:
            try:
                conn.execute(statement.format(sql.Identifier(kept.name)))
            except psycopg.Error as error:
                raise KeptError(f"{kept.name} cannot be dropped: {error}") from None


class _Configured(_Source):
    """A server that somebody else runs: its file is read again, so that no password is kept."""

    def connect(self, kept: Kept) -> Connection[Any]:
        import psycopg

        from .config import read_spec
        from .connecting import Connector, drive
        from .secrets import redact_text

        file = kept.place["file"]
        hidden: tuple[str, ...] = ()
        try:
            spec = read_spec(file, "normal", **kept.place["options"])
            hidden = spec.secrets
            conninfo = {"connect_timeout": str(_CONNECT_LIMIT), **spec.conninfo_dict}
            spec = replace(spec, conninfo=tuple(sorted(conninfo.items())))
            conn: Connection[Any] = drive(Connector(spec).connect())
            conn.autocommit = True
        except (PGMonkeyError, psycopg.Error, OSError) as error:
            text = redact_text(str(error), hidden)
            raise KeptError(text if file in text else f"{file}: {text}") from None
        return conn


class _Embedded(_Source):
    """A server of the kit's own, which lives as long as a database is kept on it."""

    def connect(self, kept: Kept) -> Connection[Any]:
        import psycopg

        try:
            return psycopg.connect(
                host=kept.place["host"],
                port=kept.place["port"],
                user=_SUPERUSER,
                dbname=_SUPERUSER,
                connect_timeout=_CONNECT_LIMIT,
                autocommit=True,
            )
        except psycopg.Error as error:
            raise KeptError(f"the server of {kept.name} does not answer: {error}") from None

    def is_gone(self, kept: Kept) -> bool:
        return not _listens(kept.place) or super().is_gone(kept)

    def drop(self, kept: Kept) -> None:
        if _listens(kept.place):
            super().drop(kept)


class _Contained(_Source):
    """A container, whose passwords nobody knows."""

    def is_gone(self, kept: Kept) -> bool:
        return is_dead(kept.place["guardian"]) or not _listens(kept.place)

    def drop(self, kept: Kept) -> None:
        """Leave it to the process that guards the container."""


_SOURCES: Final[dict[str, _Source]] = {
    "config": _Configured(),
    "embedded": _Embedded(),
    "container": _Contained(),
}


def _listens(place: Mapping[str, Any]) -> bool:
    """Whether a server listens at its socket: one that is too busy to answer does."""
    host, port = str(place["host"]), int(place["port"])
    try:
        if host.startswith("/"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(f"{host}/.s.PGSQL.{port}")
        else:
            socket.create_connection((host, port), _CONNECT_LIMIT).close()
    except OSError:
        return False
    return True
