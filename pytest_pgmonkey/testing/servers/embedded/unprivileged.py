"""Makes server binaries usable by the user that the server runs as: unpacked, copied if need be."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING

from ....caches import locked, may_enter, partial_directory, readable_cache
from ....errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .binaries import Binaries

__all__ = ["make_reachable", "unprivileged_uid"]

UNPRIVILEGED = 65534
COPY_LIMIT = 500 * 1024 * 1024


def unprivileged_uid() -> int | None:
    """Give the user that the server has to run as, `None` for the one that runs the tests."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import pwd

    for name in ("nobody", "postgres", "daemon"):
        with contextlib.suppress(KeyError):  # initdb refuses to run as a user without a name
            return pwd.getpwnam(name).pw_uid
    return UNPRIVILEGED


def make_reachable(binaries: Binaries, uid: int | None) -> Binaries:
    """Give binaries that `uid` can run: these, or a copy of them made once."""
    if binaries.archive is not None:
        return _unpacked(binaries, binaries.archive, uid)
    if uid is None:
        return binaries
    found = _tried(binaries, uid) or _tried(_copied(binaries, uid), uid)
    if found is None:
        raise PGMonkeyError(
            f"The server must not run as root, and user {uid} can run neither {binaries.bindir}"
            " nor a copy of it. Run the tests as another user, or install a PostgreSQL server"
            " that every user can read."
        )
    return found


def _tried(binaries: Binaries, uid: int) -> Binaries | None:
    """Give the binaries as those that `uid` runs, if it can run and read them."""
    found = replace(binaries, uid=uid)
    # A library and the first file that initdb reads, where they lie beside the programs
    patterns = ("share/postgres.bki", "share/postgresql/postgres.bki", "lib/plpgsql.*")
    data = [file for pattern in patterns for file in binaries.bindir.parent.glob(pattern)]
    readable = all(
        path.stat().st_mode & stat.S_IROTH and may_enter(path.parent, uid)
        for path in [*data, binaries.program("initdb")]
    )
    with contextlib.suppress(PGMonkeyError):
        return found if found.version and readable else None
    return None


def _unpacked(binaries: Binaries, archive: Path, uid: int | None) -> Binaries:
    def unpack(target: Path) -> None:
        with tarfile.open(archive) as tar:
            # Python 3.10 and 3.11 before their security releases have no filters.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(target)
        top = next(target.iterdir())
        for path in top.iterdir():
            path.rename(target / path.name)
        top.rmdir()

    home = _once(archive, uid, unpack)
    return replace(binaries, bindir=home / "bin", root=home, archive=None)


def _copied(binaries: Binaries, uid: int) -> Binaries:
    sources = [binaries.root / part for part in binaries.parts if (binaries.root / part).exists()]
    files = (path for source in sources for path in source.rglob("*"))
    if sum(path.lstat().st_size for path in files) > COPY_LIMIT:
        raise PGMonkeyError(
            f"The server must not run as root, user {uid} cannot reach {binaries.bindir}, and"
            f" {binaries.root} is too large to copy. Run the tests as another user."
        )

    def copy(target: Path) -> None:
        ignored = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
        for source in sources:
            shutil.copytree(source, target / source.relative_to(binaries.root), ignore=ignored)

    home = _once(binaries.program("postgres"), uid, copy)
    return replace(binaries, bindir=home / binaries.bindir.relative_to(binaries.root), root=home)


def _open_to_all(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if executable else 0o644)


def _once(source: Path, uid: int | None, fill: Callable[[Path], None]) -> Path:
    """Give the cached directory made from a file, filled once, whoever asks at the same time."""
    cache = readable_cache(uid)
    found = source.stat()
    facts = f"{source.resolve()} {found.st_size} {found.st_mtime_ns}"
    target = cache / f"binaries-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    with locked(cache):
        if not target.exists():
            with partial_directory(cache) as partial:
                fill(partial)
                _open_to_all(partial)
                try:
                    partial.rename(target)
                except OSError:
                    if not target.exists():  # else another process without our lock was quicker
                        raise
    return target
