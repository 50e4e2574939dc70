"""Directories for what is to outlive a process, and the lock of those who write into one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

NAME: Final = "pytest-pgmonkey"
LOCK_LIMIT: Final = 60.0
LOCK_POLL: Final = 0.01

# --- directories ---


def private_cache(name: str) -> Path | None:
    """Give a directory of the user's own cache that no other user reads, `None` without one."""
    caches = private_caches(name, make=True)
    return next((cache for cache in caches if os.access(cache, os.W_OK | os.X_OK)), None)


def private_caches(name: str, *, make: bool = False) -> Iterator[Path]:
    """Give those of the directories that are there; with `make` they are made where need be."""
    for base in _own_bases():
        directory = base / NAME / name
        with contextlib.suppress(OSError):
            if make:
                directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                directory.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(directory.parent) and _is_ours(directory):
                yield directory


def readable_cache(uid: int | None) -> Path:
    """Give a directory that only this user writes and `uid` can read, made where need be."""
    bases = [*_own_bases(), Path("/var/cache"), Path("/var/tmp")]
    for base in bases:
        directory = base / NAME
        with contextlib.suppress(OSError):
            nearest = next(parent for parent in (base, *base.parents) if parent.exists())
            if may_enter(nearest, uid):
                # The mode is named, as the umask may let a group write.
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
                if _is_ours(directory):
                    directory.chmod(0o755)  # the umask may have closed it
                    return directory
    raise PGMonkeyError(
        f"No directory for a cache that user {uid} can read: looked at"
        f" {', '.join(map(str, bases))}. Set XDG_CACHE_HOME to one."
    )


def may_enter(directory: Path, uid: int | None) -> bool:
    """Tell whether `uid` gets into what is made in a directory; by its mode, as root may anyway."""
    resolved = directory.resolve()
    return uid is None or all(
        path.stat().st_mode & stat.S_IXOTH for path in (resolved, *resolved.parents)
    )


def _own_bases() -> Iterator[Path]:
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


def _is_ours(directory: Path) -> bool:
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


# --- writing ---


@contextlib.contextmanager
def locked(cache: Path, limit: float = LOCK_LIMIT) -> Iterator[bool]:
    """Hold the lock of a cache directory; gives `False` where it cannot be had in time.

    A run that is stopped with the lock in its hands must not stop all others, hence the limit.
    Without the lock a rename still gives something whole.
    """
    with (cache / "lock").open("w") as file:
        held = _lock(file, limit)
        if held:
            for left_by_a_killed_run in cache.glob("partial-*"):
                shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
        yield held


@contextlib.contextmanager
def partial_directory(cache: Path) -> Iterator[Path]:
    """Give a directory to make something in that is renamed when it is complete."""
    partial = cache / f"partial-{secrets.token_hex(8)}"
    try:
        partial.mkdir(mode=0o700)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lock(file: TextIO, limit: float) -> bool:
    deadline = time.monotonic() + limit
    while True:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_POLL)
        except (ImportError, OSError):  # not every file system has them
            return False
        else:
            return True
