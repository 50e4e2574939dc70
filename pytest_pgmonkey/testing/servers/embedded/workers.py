"""One embedded server for all the workers of a pytest-xdist run.

Its directory has a name that only the run knows, so that making it decides which worker starts
the server; the others wait for the facts that it publishes. The controller ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..server import ServerStartError
from . import guardian
from .directories import homes
from .guarded_process import DirectoryTakenError
from .server import EmbeddedServer

if TYPE_CHECKING:
    from ...databases.recipe import Recipe
    from ..worker import Worker
    from .binaries import Binaries

__all__ = ["end_run", "start_or_join_server"]

_POLL: Final = 0.01
_PATIENCE: Final = 10.0


class RunServer(EmbeddedServer):
    """The server of a run, in the worker that has started it."""

    def __init__(self, binaries: Binaries, worker: Worker) -> None:
        self._worker = worker
        super().__init__(binaries, name=worker.run)

    def scratch_name(self, name: str) -> str:
        return f"{name}_{self._worker.name}"

    def publish(self) -> None:
        if self._alone:
            super().publish()
            facts = {"version": self.version, "socket_directory": str(self.socket_directory)}
            self.guarded.publish(self._worker.controller, facts)

    def stop(self) -> None:
        if self._alone:
            super().stop()
        self.finish_saving()


class JoinedServer(EmbeddedServer):
    """The server of a run, in the other workers."""

    def __init__(
        self, binaries: Binaries, worker: Worker, home: Path, facts: dict[str, str]
    ) -> None:
        self._worker = worker
        self._home = home
        self.binaries = replace(binaries, known_version=facts["version"])
        self.socket_directory = Path(facts["socket_directory"])
        self.port = "5432"
        self._password = None
        self._alone = False

    def scratch_name(self, name: str) -> str:
        return f"{name}_{self._worker.name}"

    @property
    def home(self) -> Path:
        return self._home

    def stop(self) -> None:
        """Leave it to the other workers."""


def start_or_join_server(
    binaries: Binaries, worker: Worker, recipe: Recipe | None
) -> EmbeddedServer:
    """Start the server of this run, or wait for the worker that does; raises ServerStartError."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        home = next(filter(_is_home, homes(worker.run)), None)
        if home is None:
            try:
                server = RunServer(binaries, worker)
            except DirectoryTakenError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)
            else:
                server.bring_up(recipe)
                return server
        elif facts := _await_facts(home):
            return JoinedServer(binaries, worker, home, facts)
        else:
            deadline = time.monotonic() + _PATIENCE


def _is_home(directory: Path) -> bool:
    """Whether it is a guardian's first directory: the second, if there is one, has no files."""
    return (directory / guardian.PID).exists()


def _await_facts(home: Path) -> dict[str, str] | None:
    """Wait for the facts of a server; gives `None` where its directory went instead."""
    while home.is_dir():
        with contextlib.suppress(FileNotFoundError):
            facts: dict[str, str] = json.loads((home / guardian.PUBLISHED).read_text("utf-8"))
            return facts
        if not _guardian_lives(home) and home.is_dir():
            raise ServerStartError(
                "The embedded server of this run cannot be had: the process that guards it was"
                " killed."
            )
        time.sleep(_POLL)
    return None


def _guardian_lives(home: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return guardian.is_alive(int((home / guardian.PID).read_text("ascii")))
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
