"""One embedded server for all the workers of a pytest-xdist run.

Its directory has a name that only the run knows, so that making it decides which worker starts
the server; the others wait until it is published. The controller ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..guard import GuardError
from ..guardian import is_alive
from ..server import OwnServer, ServerStartError
from . import guardian
from .directories import homes
from .server import EmbeddedServer

if TYPE_CHECKING:
    from ...databases.recipe import Recipe
    from ..worker import Worker
    from .binaries import Binaries

__all__ = ["end_run", "start_embedded"]

_POLL: Final = 0.01
_PATIENCE: Final = 10.0


class JoinedServer(EmbeddedServer):
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
    binaries: Binaries, recipe: Recipe | None, worker: Worker | None
) -> EmbeddedServer:
    """Start a server; that of a worker's run, or wait for another worker that does.

    Raises ServerStartError.
    """
    if worker is None:
        return EmbeddedServer.start(binaries, recipe)
    deadline = time.monotonic() + _PATIENCE
    while True:
        home = next(filter(_guardian_of, homes(worker.run)), None)
        if home is None:
            try:
                return EmbeddedServer.start(binaries, recipe, worker)
            except GuardError as error:
                if error.kind != "FileExistsError" or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)
        elif published := _await_publication(home):
            return JoinedServer(binaries, worker, home, Path(published))
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


def end_run(run: str) -> None:
    """End the server of a run, if one of its workers has started one; leaves nothing behind."""
    found = homes(run)
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
