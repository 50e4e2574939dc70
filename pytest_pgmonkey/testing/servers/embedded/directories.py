"""Where the directories of embedded servers are; imported by runs that may have none."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from ....caches import may_enter
from ..server import ServerStartError

__all__ = ["ON_WINDOWS", "choose_directories", "homes"]

ON_WINDOWS: Final = os.name == "nt"
SOCKET_LIMIT: Final = 103 if sys.platform == "darwin" else 107
ROOM: Final = 512 * 1024 * 1024


def choose_directories(uid: int | None, name: str = "") -> list[Path]:
    """Choose a home for the data, in RAM where there is room, and a place for the socket.

    They are one directory, unless the home's path is too long for a Unix socket.
    """
    name = f"pgmonkey-{name or secrets.token_hex(4)}"
    bases = [base for base in _bases() if _is_usable(base, uid)]
    roomy = [base / name for base in bases if shutil.disk_usage(base).free >= ROOM]
    short = [base / name for base in bases if _fits_socket(base / name)]
    if not roomy or not short:
        lack = f"{ROOM >> 20} MB of room" if not roomy else "a path short enough for a Unix socket"
        raise ServerStartError(
            f"No directory for the embedded server has {lack}: looked at"
            f" {', '.join(map(str, _bases()))}. Set TMPDIR to one that has."
        )
    home = roomy[0]
    return [home] if home in short else [home, short[0]]


def homes(name: str) -> list[Path]:
    """Give the directories of that name that are there."""
    return [path for base in _bases() if (path := base / f"pgmonkey-{name}").is_dir()]


def _bases() -> list[Path]:
    names = ["/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp"]
    return [Path(tempfile.gettempdir())] if ON_WINDOWS else list(map(Path, dict.fromkeys(names)))


def _is_usable(base: Path, uid: int | None) -> bool:
    return base.is_dir() and os.access(base, os.W_OK | os.X_OK) and may_enter(base, uid)


def _fits_socket(directory: Path) -> bool:
    return ON_WINDOWS or len(os.fsencode(directory / ".s.PGSQL.65535")) <= SOCKET_LIMIT
