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

from ..guardian import is_alive
from ..server import OwnServer, ServerStartError
from . import guardian
from .directories import homes
from .guarded_process import DirectoryTakenError
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
        home = next(filter(_is_home, homes(worker.run)), None)
        if home is None:
            try:
                return EmbeddedServer.start(binaries, recipe, worker)
            except DirectoryTakenError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)
        elif published := _await_publication(home):
            return JoinedServer(binaries, worker, home, Path(published))
        else:
            deadline = time.monotonic() + _PATIENCE


def _is_home(directory: Path) -> bool:
    """Whether it is a guardian's first directory: the second, if there is one, has no files."""
    return (directory / guardian.PID).exists()


def _await_publication(home: Path) -> str:
    """Wait until a server is published, and give its socket's directory.

    Gives nothing where the home went instead.
    """
    while home.is_dir():
        with contextlib.suppress(FileNotFoundError):
            return (home / guardian.PUBLISHED).read_text("utf-8")
        if not _guardian_lives(home) and home.is_dir():
            raise ServerStartError(
                "The embedded server of this run cannot be had: the process that guards it was"
                " killed."
            )
        time.sleep(_POLL)
    return ""


def _guardian_lives(home: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return is_alive(int((home / guardian.PID).read_text("ascii")))
    return False


def end_run(run: str) -> None:
    """End the server of a run, if one of its workers has started one; leaves nothing behind."""
    found = homes(run)
    if any(guardian.has_kept(str(home)) for home in found):
        return  # A database is kept there: the guardian ends the server when it is removed.
    for home in filter(_is_home, found):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((home / guardian.PID).read_text("ascii")), signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while home.is_dir() and _guardian_lives(home) and time.monotonic() < deadline:
            time.sleep(_POLL)
        guardian.end_orphan(str(home / guardian.DATA))
    for directory in found:
        guardian.remove_tree(str(directory))
