"""The directories of embedded servers, and the process that guards them."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ....caches import may_enter
from ..guard import Guard
from ..server import ServerStartError
from . import guardian

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ON_WINDOWS", "GuardedProcess", "choose_directories", "homes", "read_log"]

ON_WINDOWS: Final = os.name == "nt"
SOCKET_LIMIT: Final = 103 if sys.platform == "darwin" else 107
ROOM: Final = 512 * 1024 * 1024
LOG_LINES: Final = 15


def choose_directories(uid: int | None, name: str = "", *, data: Path | None = None) -> list[Path]:
    """Choose a home for the data, in RAM where there is room, and a place for the socket.

    They are one directory, unless the home's path is too long for a Unix socket. With `data` the
    home is there.
    """
    name = f"pgmonkey-{name or secrets.token_hex(4)}"
    bases = [
        base
        for base in _bases_with(data)
        if base.is_dir() and os.access(base, os.W_OK | os.X_OK) and may_enter(base, uid)
    ]
    roomy = [base / name for base in bases if shutil.disk_usage(base).free >= ROOM]
    short = [base / name for base in bases if _fits_socket(base / name)]
    if data is not None and data / name not in roomy:
        raise ServerStartError(
            f"The embedded server cannot have its data in {data}: that is not a directory in which"
            f" its user may write, or has less than {ROOM >> 20} MB of room."
        )
    if not roomy or not short:
        lack = f"{ROOM >> 20} MB of room" if not roomy else "a path short enough for a Unix socket"
        raise ServerStartError(
            f"No directory for the embedded server has {lack}: looked at"
            f" {', '.join(map(str, _bases()))}. Set TMPDIR to one that has."
        )
    home = roomy[0]
    return [home] if home in short else [home, short[0]]


def homes(name: str, *, data: Path | None = None) -> list[Path]:
    """Give the directories of that name that are there."""
    return [path for base in _bases_with(data) if (path := base / f"pgmonkey-{name}").is_dir()]


def _bases_with(data: Path | None) -> list[Path]:
    return list(dict.fromkeys([*([data] if data else []), *_bases()]))


def _bases() -> list[Path]:
    names = ["/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp"]
    return [Path(tempfile.gettempdir())] if ON_WINDOWS else list(map(Path, dict.fromkeys(names)))


def _fits_socket(directory: Path) -> bool:
    return ON_WINDOWS or len(os.fsencode(directory / ".s.PGSQL.65535")) <= SOCKET_LIMIT


class GuardedProcess(Guard):
    """The directories and programs of one server; the requests are those of `guardian.Guardian`.

    The first directory is the home: it holds the data directory and the log.
    """

    guarded = "embedded server"

    def __init__(self, directories: Sequence[Path], uid: int | None) -> None:
        self.directories: list[Path] = []
        self.home = directories[0]
        self.data = self.home / guardian.DATA
        super().__init__(guardian, -1 if uid is None else uid, *directories)
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
