"""The directories and programs of one embedded server, in the hands of its guardian."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest_pgmonkey

from ..guard import Guard
from . import guardian

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["GuardedProcess", "read_log"]

LOG_LINES = 15
_ROOT = Path(pytest_pgmonkey.__file__).parents[1]


class GuardedProcess(Guard):
    """The directories and programs of one server; the requests are those of `guardian.Guardian`.

    The first directory is the home: it holds the data directory and the log.
    """

    guarded = "embedded server"

    def __init__(self, directories: Sequence[Path], uid: int | None) -> None:
        self.directories: list[Path] = []
        self.home = directories[0]
        self.data = self.home / guardian.DATA
        facts = (-1 if uid is None else uid, *directories)
        super().__init__(guardian, *facts, path=[str(_ROOT)])
        try:
            self.ask("make")
        except BaseException:
            self.end()  # what was there before the guardian is not ours to remove
            raise
        self.directories += directories

    def log(self) -> str:
        return read_log(self.home)

    def end(self) -> bool:
        """Stop everything and remove the directories, unless a database is kept in them."""
        if guardian.has_kept(str(self.home)):
            self.leave()
        if not super().end():
            return False
        for path in self.directories:
            if path.exists():  # the guardian itself was killed
                guardian.end_orphan(str(self.data))
                guardian.remove_tree(str(path))
        return True

    def at_exit(self) -> None:
        self.end()


def read_log(home: Path) -> str:
    """Give the last lines of the log in a server's home."""
    try:
        text = (home / guardian.LOG).read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_LINES:])
