"""Directories of the user's own, for what is to outlive a process."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NAME", "is_ours", "own_cache_bases", "private_cache", "private_caches"]

NAME: Final = "pytest-pgmonkey"


def private_cache(name: str) -> Path | None:
    """Give a directory of the user's own cache that no other user reads, `None` without one."""
    for base in own_cache_bases():
        directory = base / NAME / name
        with contextlib.suppress(OSError):
            directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            if is_ours(directory.parent) and is_ours(directory) and _is_writable(directory):
                return directory
    return None


def private_caches(name: str) -> Iterator[Path]:
    """Give those of the directories that are there, and make none."""
    for base in own_cache_bases():
        directory = base / NAME / name
        with contextlib.suppress(OSError):
            if is_ours(directory.parent) and is_ours(directory):
                yield directory


def own_cache_bases() -> Iterator[Path]:
    """Give the user's own cache directories; a user without a name may have no home either."""
    # The specification of that variable says that a relative path is to be passed over.
    if (named := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        yield named
    with contextlib.suppress(RuntimeError):
        if os.name == "nt":
            yield Path(os.environ.get("LOCALAPPDATA") or Path.home())
        elif sys.platform == "darwin":
            yield Path.home() / "Library" / "Caches"
        else:
            yield Path.home() / ".cache"


def is_ours(directory: Path) -> bool:
    """Refuse a directory that another user has made or may write: programs are run from it."""
    if os.name == "nt":
        return True
    found = directory.lstat()
    foreign = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not (found.st_mode & foreign)
    )


def _is_writable(directory: Path) -> bool:
    return os.access(directory, os.W_OK | os.X_OK)
